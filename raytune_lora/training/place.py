"""Where a worker stands in its group, and its only ways to the outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from raytune_lora.working_copy import WorkingCopy

LOGS = "logs"  # in a task's folder
CHECKPOINTS = "checkpoint-????????"  # the same, of a trial: by the steps done
SAVING = "saving"  # beside the whole checkpoints: where one is written

# what a worker can be asked to do at its next step, the more urgent the higher
GO_ON, STOP, SAVE_AND_STOP = 0, 1, 2


@dataclass(frozen=True)
class Place:
    """Handed to every function that runs on a worker group."""

    rank: int
    workers: int
    folder: Path  # of the task: checkpoints and logs
    report: Callable[[dict[str, Any]], bool]  # whether it was heard: from the first worker, while the task is wanted
    stopped: Callable[[], int]  # whether the task's end was asked for, and how; each question waits for a process
    lives: Callable[[], None] = lambda: None  # shows that it goes on; it returns at once
    slot: int = 0  # number of the group among those of its pool
    uri: str | None = None  # of the folder in an object store that ``folder`` is this node's copy of
    ask_every: float = 0.25  # seconds between two questions whether to stop, at steps that are not validated

    @property
    def copy(self) -> WorkingCopy:
        """The folder here and in the store."""
        return WorkingCopy(self.folder, self.uri)


def send_files(copy: WorkingCopy) -> None:
    """Have what lies in a task's folder beside its checkpoints in the store, where there is one.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    if copy.uri is not None:
        there = (path for path in copy.path.iterdir() if path.name != SAVING)
        copy.send(*(path for path in there if not fnmatch(path.name, f"{CHECKPOINTS}*")))  # nor their locks
