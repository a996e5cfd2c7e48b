"""What ends a job in order: Ctrl-C, SIGTERM, or a reason found by one of its threads; Ctrl-C again ends it at once."""

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
        self.why: BaseException | None = None  # the job is to end in order; the first reason counts
        self.awaited = False  # someone looks at ``why``, so that nothing need be raised
        self.over = False  # the job ends already: no thread need ask
        self._ending = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, why: BaseException) -> None:
        """Have the job end in order, from any thread: ``why`` is raised in the main one, or found by who awaits it."""
        if self.why is None and not self.over:
            self.why = why
            if self._before and (main := threading.main_thread().ident) is not None:
                signal.pthread_kill(main, signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ending:
            if number == signal.SIGINT:  # a supervisor may send SIGTERM again, and has SIGKILL for what takes too long
                _end_at_once()
            return
        self._ending = True
        if self.why is None:
            self.why = KeyboardInterrupt()
        saved = "what runs is saved; " if isinstance(self.why, KeyboardInterrupt) else ""
        self._tell(f"ending in order: {saved}Ctrl-C {'again ' if number == signal.SIGINT else ''}ends at once")
        if not self.awaited:
            raise self.why


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
