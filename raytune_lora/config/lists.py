"""Lists and patterns as one types them: ``method.target_modules=q_proj,v_proj``, ``method.rank_pattern={q_proj: 8}``.

Hydra takes a comma for a sweep of its own, a bare word for a string, and a bracket of a regular expression for a
mistake. The search space holds such a list as one text, as samplers know texts and no lists.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

_OPEN, _CLOSE = "([{", ")]}"


def keys_of(cls: Any, prefix: str, kinds: tuple[str, ...]) -> set[str]:
    """Dotted paths of a config class's fields whose types begin so, nested sections' included."""
    found = {f"{prefix}.{f.name}" for f in fields(cls) if str(f.type).startswith(kinds)}
    for f in fields(cls):
        nested: Any = f.default_factory
        if is_dataclass(nested):
            found |= keys_of(nested, f"{prefix}.{f.name}", kinds)
    return found


def as_list(override: str, keys: set[str]) -> str:
    """An override of a list as Hydra's grammar has one; any other override as it is.

    Args:
        override: such as ``method.target_modules=q_proj,v_proj``.
        keys: of lists.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = re.fullmatch(r"(\+{0,2}([\w.]+))=(.*)", override, re.DOTALL)
    if not found or found[2] not in keys or re.match(r"null$|\$\{|\{", found[3]):
        return override
    value = found[3]
    if value.startswith("["):
        try:
            OverridesParser.create().parse_override(override)
        except HydraException:
            value = value.removeprefix("[").removesuffix("]")
        else:
            return override
    items = [word if re.fullmatch(r"\w+", word) else "'" + word.replace("'", r"\'") + "'" for word in split(value)]
    return f"{found[1]}=[{', '.join(items)}]"


def as_pattern(override: str, keys: set[str]) -> tuple[str, dict[str, Any]] | None:
    """The key and the numbers by name of an override of a pattern; None of any other.

    Hydra's grammar has no key in quotes, and adds no key to a dictionary that is not typed with a plus.

    Args:
        override: such as ``method.rank_pattern={q_proj: 8, layers.(0|1)..*v_proj: 4}``.
        keys: of patterns.
    """
    found = re.fullmatch(r"\+{0,2}([\w.]+)=\{(.*)\}", override, re.DOTALL)
    if not found or found[1] not in keys:
        return None
    pairs = [item.rpartition(":") for item in split(found[2])]
    return found[1], {name.strip().strip("'\""): yaml.safe_load(value) for name, _, value in pairs}


def split(text: str) -> list[str]:
    """The items of a text: parted by commas outside of brackets, without quotes around them or the whole."""
    if re.fullmatch(r"'[^']*'|\"[^\"]*\"", text):
        text = text[1:-1]
    items, depth = [""], 0
    for sign in text:
        depth += (sign in _OPEN) - (sign in _CLOSE)
        if sign == "," and depth <= 0:
            items.append("")
        else:
            items[-1] += sign
    return [re.sub(r"^(['\"])(.*)\1$", r"\2", item.strip()) for item in items if item.strip()]


def text_of(items: list[Any]) -> str:
    """The text that ``split`` parts into these items."""
    return ",".join(map(str, items))


def from_text(current: Any, value: Any) -> Any:
    """The items of a text that is for a key that holds a list, numbers as numbers; any other value as it is.

    Args:
        current: what the key holds.
        value: what it is set to.
    """
    if not isinstance(current, list) or not isinstance(value, str):
        return value
    return [int(item) if item.isdigit() else item for item in split(value)]
