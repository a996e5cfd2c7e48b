"""What a worker group does, and how whoever asked for it hears of it.

A trial's process needs nothing more of training than this, and starts sooner without Ray Train's controller.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.board import Report
from raytune_lora.training.failures import Ended


@dataclass(frozen=True)
class Task:
    """Something for a worker group to do."""

    name: str  # what it is stopped by
    function: Callable[..., None]  # called in each worker with cfg, store, its place, and extra
    cfg: RunConfig
    store: TokenStore
    folder: Path  # logs and checkpoints; on storage that all nodes share, or in a working copy of this one
    cpus: int = 0  # a worker's threads; 0: as many as the config gives it
    extra: dict[str, Any] = field(default_factory=dict)
    attempt: int = 0  # at the same thing; no other task of the pool has the same name and attempt
    steps: bool = False  # it asks at each step whether to stop, so that silence means something

    @property
    def key(self) -> tuple[str, int]:
        """Its stream of reports."""
        return self.name, self.attempt


class TaskFailed(Exception):
    """A task ended in another way than by being done."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended
        super().__init__(ended.error or ended.status)


def stream(board: Any, task: Task, again: bool = False) -> Iterator[Report]:
    """Put a task on the board and yield its reports.

    Args:
        board: of the pool whose groups are to do it.
        task: to do.
        again: a reader that was lost may have put it there before: all its reports come once more.

    Raises:
        TaskFailed: it did not end well.
    """
    ray.get(board.submit.remote(task, again))
    for number in itertools.count():
        item = ray.get(board.next.remote(task.key, number))
        if isinstance(item, Ended):
            if item.status:
                raise TaskFailed(item)
            return
        yield item
