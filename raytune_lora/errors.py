"""Errors that a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Sequence

# storage that is full, cannot be written, or is no longer there
_DISK_NUMBERS = (
    errno.ENOSPC,
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
)
_DISK_WORDS = (  # of libraries that keep no number: safetensors, torch, SQLite
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "database or disk is full",
    "disk I/O error",
    "attempt to write a readonly database",
    "unable to open database file",
    "PytorchStreamWriter failed writing",
)


class UserError(Exception):
    """One or more problems with what the user asked for.

    Each problem states the rule, the values found and the remedy, in one sentence or two. The command line prints them
    without a traceback and exits with status 2.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        return type(self), (self.problems,)


class Passing(UserError):
    """What refuses may be gone by itself: another process, a network, a store, a machine that is not there yet."""


class Refused(UserError):
    """A job cannot work, as was found on the cluster before anything was measured: its folder is not kept."""


class DivergedError(Exception):
    """The loss or the gradient stopped being a finite number."""

    def __init__(self, step: int, value: float) -> None:
        self.step = step
        self.value = value
        super().__init__(f"the loss is {value} at step {step}")

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float]]:
        return type(self), (self.step, self.value)


class MovedError(Exception):
    """A run was asked to leave its workers, and has been saved."""


class QuotaError(Exception):
    """A run's files would take more room than it may have."""


class StorageError(Exception):
    """Storage is full or cannot be written, so that a job cannot go on for now."""


class JobFailed(Exception):
    """A job could not go on; the message says why, and where to look or what to do."""


class Halted(JobFailed):
    """A job cannot go on for now, and nothing of its own is to blame."""


def disk_trouble(error: BaseException) -> str | None:
    """What is wrong with the storage where that, in the end, is why an error came; None where it is not."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StorageError):
            return str(seen)
        if isinstance(seen, OSError) and seen.errno in _DISK_NUMBERS and not isinstance(seen, ConnectionError):
            where = f": {seen.filename}" if seen.filename else ""
            return f"{seen.strerror}{where}"
        if words := next((words for words in _DISK_WORDS if words in str(seen)), None):
            return words
        seen = seen.__cause__ or seen.__context__
    return None
