"""How a task can end, and what a failure means for it."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_lora.errors import DivergedError, UserError

FAILED, DIVERGED, OOM, STOPPED = "failed", "diverged", "oom", "stopped"
_OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Ended:
    """The end of a task: well where the status is empty."""

    status: str = ""
    error: str | None = None
    everywhere: bool = False  # all workers end so at the same step, so that their group can go on with another task


def classify(error: BaseException) -> Ended:
    """What a failure means, also one that Ray has wrapped."""
    if isinstance(error, DivergedError):
        return Ended(DIVERGED, str(error), everywhere=True)
    if isinstance(error, UserError):
        return Ended(FAILED, str(error), everywhere=True)
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    texts = [f"{type(failure).__name__}: {failure}" for failure in failures]
    for text in texts:
        if any(mark in text for mark in _OUT_OF_MEMORY):
            return Ended(OOM, _last_line(text))
    return Ended(FAILED, _last_line(texts[0]))


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()
