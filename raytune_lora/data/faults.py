"""Why a record is no row, in words that say what to write instead."""

from __future__ import annotations

from typing import Any

from raytune_lora.data.rows import Fault

_SHOWN_KEYS = 6  # of an object that is none of what it must be
_NAMES = {
    "dict": "an object",
    "list": "a list",
    "str": "text",
    "bytes": "bytes",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
}


class FaultError(Exception):
    """A record is no row."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(kind, reason)


def wrong(name: str, wanted: str, content: Any) -> FaultError:
    """A field that holds something else than it must: what it must be, what it is, and what to do."""
    value = ""
    if isinstance(content, (bool, int, float)):
        value = f": {content!r}"
    elif isinstance(content, dict) and content:
        value = f" with {listed([*content][:_SHOWN_KEYS])}"
    remedy = _remedy(wanted, content)
    if remedy and wanted == "text" and name.isidentifier():
        remedy += f", or name another column (data.columns.{name}=…)"
    return FaultError("wrong_types", f"{name} must be {wanted} (found {kind_of(content)}{value}){remedy}")


def _remedy(wanted: str, content: Any) -> str:
    """How to write a field of another kind as what it must be."""
    if wanted == "text":
        by_kind: dict[type, str] = {
            dict: "write it as JSON text (json.dumps)",
            list: "join its items into one text, or give each a row of its own",
        }
        return f": {by_kind.get(type(content), 'write it as text, in quotation marks')}"
    if isinstance(content, dict) and content and all(isinstance(each, list) for each in content.values()):
        return ": these are lists in an object, as datasets keeps a Sequence of objects; write a list of objects"
    if isinstance(content, list) and content and all(isinstance(each, (list, tuple)) for each in content):
        return ": these are pairs, as a map of Arrow or Spark is read; write an object (in Parquet, a struct)"
    return ""


def kind_of(content: Any) -> str:
    """What a value is, in words."""
    return _NAMES.get(type(content).__name__, type(content).__name__)


def listed(names: Any) -> str:
    """Names in one line."""
    return ", ".join(map(str, names)) or "none"


def filled(content: Any) -> bool:
    """Whether a field holds anything; NaN is what a column of numbers has for nothing."""
    return content is not None and content != "" and content != [] and content != {} and content == content
