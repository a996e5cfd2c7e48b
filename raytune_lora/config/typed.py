"""Overrides as a user types them in a shell: for messages that propose one."""

from __future__ import annotations

import re
import shlex

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+*-]*[A-Za-z/][A-Za-z0-9_./:@%+*-]*")  # by Hydra's grammar a value as it stands
_WORDS = {"null", "true", "false", "nan", "inf"}  # that mean something else
_NUMBER = re.compile(r"[+-]?[\d_.]*(?:e[+-]?\d+)?", re.IGNORECASE)


def typed(key: str, value: str) -> str:
    """``key=value`` that can be pasted: quoted for Hydra, and then for the shell, where a value needs it.

    Args:
        key: dotted.
        value: as it is meant, such as the name of a file with a comma in it.
    """
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not _NUMBER.fullmatch(value)
    return shlex.quote(f"{key}={value if plain else _quoted(value)}")


def _quoted(value: str) -> str:
    """In quotes of Hydra's grammar: backslashes count before a quotation mark only, and ``${`` would be looked up."""
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    mark = "'" if '"' in value and "'" not in value else '"'
    value = re.sub(rf"(\\*){mark}", lambda found: found[1] * 2 + "\\" + mark, value)
    value = re.sub(r"(\\+)\Z", r"\1\1", value)
    return f"{mark}{value}{mark}"
