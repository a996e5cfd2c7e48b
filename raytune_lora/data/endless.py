"""A limit on what a template's own code may compute: Jinja has loops, and a model's template comes from its author."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from raytune_lora.errors import UserError

SECONDS = 5.0  # of computing, for one text: a thousand times what any conversation takes


class Endless(UserError):
    """A template computes and computes."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """In which a chat template may write one text, and is ended where it takes too long.

    By the process's own time, as a machine may be busy with others. Signals reach a process's first thread alone; other
    threads write only what that of the job's own process has written before.

    Raises:
        Endless: it took too long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise Endless(
            f"data.template: the chat template has computed for {SECONDS:.0f} s on one text and not come to an end; "
            "see to its loops, or name another (data.template.chat_template=my.jinja)"
        )

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
