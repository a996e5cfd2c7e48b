"""How a task can end, and what a failure means for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raytune_lora.errors import DivergedError, Halted, MovedError, QuotaError, StorageError, UserError, disk_trouble

FAILED, DIVERGED, OOM, STOPPED = "failed", "diverged", "oom", "stopped"
LOST = "lost"  # a worker's process or machine ended: nothing of the task's own
MOVED = "moved"  # saved on a machine that is about to go
QUOTA = "quota"  # its checkpoints would take more room than it may have
DISK = "disk"  # storage is full or cannot be written: nothing can go on
UNPLACED = "unplaced"  # no worker group can be started: likewise
_OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace did not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",  # NCCL, of its buffers
)
# what the others of a group see when one of its workers is gone
_CUT_OFF = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "recvValue failed",
    "sendBytes failed",
    "ProcessGroupGloo",
    "NCCL",
)
_GONE = ("RayActorError", "ActorUnavailableError", "NodeDiedError", "PreemptionError")  # by name: no Ray here


@dataclass(frozen=True)
class Ended:
    """The end of a task: well where the status is empty."""

    status: str = ""
    error: str | None = None
    everywhere: bool = False  # all workers end so at the same step, so that their group can go on with another task


def classify(error: BaseException) -> Ended:
    """What a failure means, also one that Ray has wrapped.

    A group whose worker dies fails in several ways at once: the others notice in the middle of a collective. It is
    lost only where nothing but that was found; an error of the task's own comes first.
    """
    if isinstance(error, DivergedError):
        return Ended(DIVERGED, str(error), everywhere=True)
    if isinstance(error, QuotaError):
        return Ended(QUOTA, str(error), everywhere=True)
    if isinstance(error, MovedError):
        return Ended(MOVED, str(error), everywhere=True)
    if isinstance(error, UserError):
        return Ended(FAILED, str(error), everywhere=True)
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    found = [_alone(failure) for failure in failures]
    order = (DISK, OOM, FAILED, LOST)
    return min(found, key=lambda ended: order.index(ended.status))


def not_its_own(ended: Ended) -> Ended:
    """What ended the process that reads of a task, where that is not owed to the task."""
    return replace(ended, status=UNPLACED) if ended.status == LOST else ended


def halting(status: str, error: str | None) -> Exception | None:
    """What halts a whole job, where an end is none of the task's own: it goes on once the job does."""
    if status == DISK:
        return StorageError(error)
    return Halted(error) if status == UNPLACED else None


def _alone(failure: BaseException) -> Ended:
    if (trouble := disk_trouble(failure)) is not None:
        return Ended(DISK, trouble)
    text = f"{type(failure).__name__}: {failure}"
    if any(mark in text for mark in _OUT_OF_MEMORY):
        return Ended(OOM, _last_line(text))
    cause = getattr(failure, "health_check_failure", failure)
    if any(cls.__name__ in _GONE for cls in type(cause).__mro__):
        machine = getattr(cause, "preempted", False) or "node has died" in str(cause) or "node was" in str(cause)
        return Ended(LOST, "a worker's machine was lost" if machine else "a worker's process ended")
    if any(mark in text for mark in _CUT_OFF):
        return Ended(LOST, f"the workers lost each other: {_last_line(text)}")
    return Ended(FAILED, _last_line(text))


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()
