"""Where a worker stands in its group, and its only ways to the outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """Handed to every function that runs on a worker group."""

    rank: int
    workers: int
    folder: Path  # of the task: checkpoints and logs
    report: Callable[[dict[str, Any]], None]  # heard from the first worker only
    stopped: Callable[[], bool]  # whether the task's end was asked for
    slot: int = 0  # number of the group among those of its pool
