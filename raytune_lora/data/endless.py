"""A limit on what a template's own code may compute: Jinja has loops, and a model's template comes from its author."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from raytune_lora.errors import UserError

SECONDS = 5.0  # of computing, for one text: a thousand times what any conversation takes
MEMORY = 2 * 2**30  # bytes beyond what the process holds already, likewise
_SEE = "see to its loops, or name another (data.template.chat_template=my.jinja)"


class Endless(UserError):
    """A template computes and computes, or writes and writes."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """In which a chat template may write one text, and is ended where it takes too long, or too much memory.

    By the process's own time, as a machine may be busy with others, and that of the system for it, which memory takes.
    Signals reach a process's first thread alone; other threads write only what that of the job's own process has
    written before.

    Raises:
        Endless: it took too long, or too much.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise Endless(
            f"data.template: the chat template has computed for {SECONDS:.0f} s on one text and not come to an end; "
            f"{_SEE}"
        )

    before, allowed = signal.signal(signal.SIGPROF, end), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_less(_held() + MEMORY, allowed[0]), allowed[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except MemoryError as error:
        raise Endless(
            f"data.template: the chat template wants more than {MEMORY / 2**30:g} GiB of memory for one text; {_SEE}"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, allowed)
        signal.signal(signal.SIGPROF, before)


def _held() -> int:
    """Bytes of this process that count for the limit: what it has written to, or may (``proc_pid_statm(5)``)."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


def _less(one: int, other: int) -> int:
    return one if other == resource.RLIM_INFINITY else min(one, other)
