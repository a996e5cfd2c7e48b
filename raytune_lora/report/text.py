"""Values as a person reads them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from raytune_lora.report.charts import number

STATUS = {  # status: how it reads, the class of its colour
    "completed": ("completed", "good"),
    "stopped": ("stopped early", "quiet"),
    "paused": ("paused", "quiet"),
    "failed": ("failed", "bad"),
    "diverged": ("diverged", "warn"),
    "oom": ("out of memory", "bad"),
    "lost": ("its machines were lost", "bad"),
    "quota": ("over its disk quota", "bad"),
}


def literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def shown(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return value if isinstance(value, str) else literal(value)


def loss_text(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if 0.001 <= abs(value) < 1000 or value == 0 else number(value)


def amount(value: float) -> str:
    """A large number as a person says it: ``12,000``, ``1.24 million``."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def date(created: str) -> str:
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()
