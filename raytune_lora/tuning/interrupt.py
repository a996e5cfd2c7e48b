"""Ctrl-C: once, and a job ends in order; twice, and it ends at once. SIGTERM counts as one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil

INTERRUPTED = 130  # exit status


class Interrupts:
    """Use it as a context manager; outside the main thread, where no signal arrives, it does nothing."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """
        Args:
            tell: called with what happens now.
        """
        self._tell = tell
        self._before: dict[int, Any] = {}
        self.asked = False  # to end in order
        self.awaited = False  # someone looks at ``asked``, so that nothing need be raised

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            _end_at_once()
        self.asked = True
        self._tell("ending in order: what runs is saved; Ctrl-C again ends at once")
        if not self.awaited:
            raise KeyboardInterrupt


def _end_at_once() -> None:
    """End this process and all that it started, among them a local Ray cluster."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor that the live table hides
        sys.stderr.flush()
    os._exit(INTERRUPTED)
