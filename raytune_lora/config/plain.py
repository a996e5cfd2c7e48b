"""What the schema and those who only read a config need: without OmegaConf, which a training process does without."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

MISSING: Any = "???"  # a field without a default, as OmegaConf marks it


def to_plain(value: Any) -> Any:
    """Dataclasses and enums as dicts and strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
