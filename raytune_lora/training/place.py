"""Where a worker stands in its group, and its only ways to the outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what a worker can be asked to do at its next step, the more urgent the higher
GO_ON, STOP, SAVE_AND_STOP = 0, 1, 2


@dataclass(frozen=True)
class Place:
    """Handed to every function that runs on a worker group."""

    rank: int
    workers: int
    folder: Path  # of the task: checkpoints and logs
    report: Callable[[dict[str, Any]], bool]  # whether it was heard: from the first worker, while the task is wanted
    stopped: Callable[[], int]  # whether the task's end was asked for, and how
    slot: int = 0  # number of the group among those of its pool
