"""Checkpoints on their way: each is where it lasts before anybody is told of it.

A report that was heard before its checkpoint lasts could be journaled, and be the best, without a model behind it. On
a disk a checkpoint lasts once it is committed. To a store it is sent while the training goes on, one at a time: the
next one waits for it, and so does the end of the trial.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raytune_lora.training.checkpoint import forget_others
from raytune_lora.training.place import Place, send_files


class Delivery:
    """Sends the first worker's checkpoints, then their reports, and deletes those that are kept no longer."""

    def __init__(self, place: Place, keep: int) -> None:
        """
        Args:
            place: of the worker.
            keep: how many of the newest checkpoints, beside the best.
        """
        self._place = place
        self._keep = keep
        self._thread = ThreadPoolExecutor(1) if place.uri is not None and place.rank == 0 else None
        self._under_way: Future[None] | None = None

    def send(self, checkpoint: Path, report: dict[str, Any] | None) -> None:
        """Have a checkpoint last, and report it.

        Args:
            checkpoint: committed here.
            report: that goes with it; None where nothing was measured.

        Raises:
            StorageError: this one, or one before, could not be sent.
        """
        if self._thread is None:
            self._deliver(checkpoint, report)
            return
        self.settle()
        self._under_way = self._thread.submit(self._deliver, checkpoint, report)

    def look(self) -> None:
        """See whether what is under way has failed.

        Raises:
            StorageError: it has.
        """
        if self._under_way is not None and self._under_way.done():
            self.settle()

    def settle(self) -> None:
        """Wait for what is under way.

        Raises:
            StorageError: it could not be sent.
        """
        if self._under_way is not None:
            sent, self._under_way = self._under_way, None
            sent.result()

    def close(self) -> None:
        """Let nothing run on, however the training ended."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _deliver(self, checkpoint: Path, report: dict[str, Any] | None) -> None:
        copy = self._place.copy
        copy.send_whole(checkpoint.name)
        send_files(copy)
        heard = report is None or self._place.report(report | {"checkpoint": copy.name(checkpoint)})
        if heard:  # else whoever was told of the best one before looks for it where it is
            forget_others(copy, self._keep)
