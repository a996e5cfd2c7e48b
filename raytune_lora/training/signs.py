"""Signs of life: what shows that a task goes on while none of its steps ends."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

_EVERY = 5.0  # seconds between two signs
_BUSY, _READS = 0.05, 2**20  # of a core, and bytes between two signs: more than an idle worker uses


class Signs:
    """Shows now and then that a worker computes, or reads."""

    def __init__(self, show: Callable[[], None]) -> None:
        """
        Args:
            show: called with each sign; it must not block.
        """
        self._show = show
        self._next = 0.0

    def forward(self, *_: Any) -> None:
        """A hook of a model's forward pass."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY
            self._show()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Where no model computes yet: it is loaded, an op is compiled. A process that waits shows nothing."""
        ended = threading.Event()
        thread = threading.Thread(target=self._look, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()

    def _look(self, ended: threading.Event) -> None:
        seconds, read = _used()
        while not ended.wait(_EVERY):
            before, (seconds, read) = (seconds, read), _used()
            if abs(seconds - before[0]) > _BUSY * _EVERY or abs(read - before[1]) > _READS:
                self._show()


def _used() -> tuple[float, int]:
    """Seconds of processor time and bytes read by this process and those that it started."""
    seconds, read = 0.0, 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error, OSError, AttributeError):
            times = process.cpu_times()
            seconds += times.user + times.system
            read += process.io_counters().read_bytes
    return seconds, read
