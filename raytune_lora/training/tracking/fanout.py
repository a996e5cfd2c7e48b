"""One stream of numbers to many trackers, none of which can stop the training or slow it."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterable

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values

_BACKLOG = 10_000  # steps that wait for a tracker, before it is taken for dead
_PATIENCE = 30.0  # seconds at the end of a trial for what still waits

_log = logging.getLogger(__name__)
_Item = tuple[int, Values]


class Trackers:
    """Hands each step's numbers to every tracker.

    Each tracker runs in a thread of its own, so that the training waits for none. One that raises, or that cannot keep
    up, is reported once in the worker's log and switched off.
    """

    def __init__(self, trackers: Iterable[Tracker], trial: TrackedTrial, patience: float = _PATIENCE) -> None:
        """
        Args:
            trackers: not yet started.
            trial: what they are told.
            patience: seconds that ``close`` waits for all of them together.
        """
        self._patience = patience
        self._lanes = [_Lane(tracker, trial) for tracker in trackers]

    def log(self, step: int, values: Values) -> None:
        """Hand over one step's numbers; never raises, never waits."""
        for lane in self._lanes:
            lane.put((step, values))

    def close(self) -> None:
        """Let the trackers finish; never raises, and waits for ``patience`` at most."""
        for lane in self._lanes:
            lane.end()
        deadline = time.monotonic() + self._patience
        for lane in self._lanes:
            lane.join(deadline - time.monotonic())


class _Lane:
    """One tracker in its thread, and what waits for it."""

    def __init__(self, tracker: Tracker, trial: TrackedTrial) -> None:
        self._tracker = tracker
        self._waiting: queue.Queue[_Item | None] = queue.Queue(_BACKLOG)
        self._off = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(trial,), daemon=True, name=f"tracker-{tracker.kind}")
        self._thread.start()

    def put(self, item: _Item | None) -> None:
        if self._off:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._switch_off(f"has not taken {_BACKLOG} steps")

    def end(self) -> None:
        self.put(None)

    def join(self, seconds: float) -> None:
        if self._off:  # what hangs is not waited for
            return
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._switch_off("did not finish in time; what it had not sent is lost")

    def _run(self, trial: TrackedTrial) -> None:
        try:
            self._tracker.start(trial)
            while (item := self._waiting.get()) is not None:
                self._tracker.log(*item)
        except (Exception, SystemExit):  # libraries raise what they like; an exit would end the thread without a word
            self._switch_off("failed", traceback=True)
            with contextlib.suppress(Exception, SystemExit):
                self._tracker.close()
            return
        try:
            self._tracker.close()
        except (Exception, SystemExit):
            self._switch_off("failed", traceback=True)

    def _switch_off(self, why: str, *, traceback: bool = False) -> None:
        with self._lock:
            if self._off:
                return
            _log.warning(
                "tracker %s %s: it is switched off, the training goes on", self._tracker.kind, why, exc_info=traceback
            )
            self._off = True  # last: nothing waits for a lane that is off, and the trial would end before its warning
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        with contextlib.suppress(queue.Full):  # wakes a thread that is slow and not dead, so that it ends
            self._waiting.put_nowait(None)
