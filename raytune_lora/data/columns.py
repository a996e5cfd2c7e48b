"""Overrides that map columns of other names to the fields of a form, for messages that propose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytune_lora.config.typed import typed
from raytune_lora.data.faults import filled

# Names of columns, in small letters, that questions and answers have elsewhere; what is likeliest first.
_ASKING = ("question", "prompt", "instruction", "query", "problem", "user", "input", "source", "질문", "지시문")
_ANSWERING = ("answer", "reply", "response", "completion", "output", "solution", "assistant", "target", "답변", "응답")


def proposed(fields: dict[str, Any], forms: Sequence[tuple[str, ...]], columns: Mapping[str, str]) -> str:
    """How to map columns of other names to a form's fields, after what is missing; empty where that is not known.

    Args:
        fields: of the record, by the form's names where they are mapped.
        forms: fields that make a record one of a form, those of the likeliest first.
        columns: what is mapped already.
    """
    free = [str(name) for name, content in fields.items() if filled(content) and name not in columns]
    by_name = {name.strip().lower(): name for name in free}
    for names in forms:  # the same names, written otherwise
        found = {name: by_name[name] for name in names if fields.get(name) is None and name in by_name}
        if found and all(name in found or fields.get(name) is not None for name in names):
            return f": {mapping({**columns, **found})} maps them"
    asking, answering = (next((n for w in side for n in [by_name.get(w)] if n), None) for side in (_ASKING, _ANSWERING))
    for names in (forms[0], ("instruction", "output")):
        if len(names) == 2:
            sides = zip(names, (asking, answering), strict=True)
            found = {name: side for name, side in sides if fields.get(name) is None and side}
            if found and all(name in found or fields.get(name) is not None for name in names):
                return f": {mapping({**columns, **found})} maps them"
    if columns or not free:
        return ""
    return ": name the columns, data.columns.instruction=… data.columns.output=…" if len(free) > 1 else ""


def mapping(columns: Mapping[str, str]) -> str:
    """Overrides that can be pasted."""
    return " ".join(
        f"data.columns.{field}=…" if column == "…" else typed(f"data.columns.{field}", column)
        for field, column in columns.items()
    )
