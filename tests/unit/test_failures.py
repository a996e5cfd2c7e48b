"""What a failure means: Ray's own errors, as Ray raises them, with the texts that gloo and the system give."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from raytune_lora.config.schema import ClusterConfig, RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import DivergedError, Halted, MovedError, QuotaError, StorageError, disk_trouble
from raytune_lora.training.failures import (
    DISK,
    DIVERGED,
    FAILED,
    LOST,
    MOVED,
    OOM,
    QUOTA,
    STOPPED,
    UNPLACED,
    Ended,
    classify,
    halting,
    not_its_own,
)
from raytune_lora.training.task import Task, TaskFailed
from raytune_lora.tuning import isolated

GLOO = RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711")
DIED = WorkerHealthCheckFailedError("the health check failed", ActorDiedError())
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/shared/trials/0000")


def group(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("", dict(enumerate(failures)))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (group(DIED), LOST),
        (group(GLOO, DIED), LOST),
        (group(GLOO), LOST),
        (ActorDiedError(), LOST),
        (group(GLOO, ValueError("a bug")), FAILED),
        (group(DIED, ValueError("a bug")), FAILED),
        (group(GLOO, MemoryError("out of memory")), OOM),
        (group(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")), OOM),
        (group(RuntimeError("NCCL error … ncclUnhandledCudaError: Failed to CUDA calloc async 608 bytes")), OOM),
        (group(ValueError("a bug"), FULL), DISK),
        (group(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")), DISK),
        (DivergedError(3, float("nan")), DIVERGED),
        (MovedError("saved"), MOVED),
        (QuotaError("too much"), QUOTA),
        (KeyError("x"), FAILED),
    ],
)
def test_kind(error: Exception, status: str) -> None:
    assert classify(error).status == status


def test_what_ends_everywhere_leaves_the_group_at_work() -> None:
    assert all(classify(error).everywhere for error in (DivergedError(1, 0.0), MovedError(""), QuotaError("")))
    assert not any(classify(error).everywhere for error in (group(DIED), group(FULL), KeyError("x")))


def test_trouble_with_storage_is_found_behind_other_errors() -> None:
    wrapped = RuntimeError("the study cannot be written")
    wrapped.__cause__ = sqlite3.OperationalError("database or disk is full")
    assert disk_trouble(wrapped) == "database or disk is full"
    assert disk_trouble(FULL) == "No space left on device: /shared/trials/0000"
    assert disk_trouble(StorageError("full")) == "full"
    assert disk_trouble(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None


@pytest.mark.parametrize(
    ("status", "losses", "again"),
    [
        (LOST, 1, True),
        (LOST, 3, True),
        (LOST, 4, False),
        (MOVED, 9, True),
        (FAILED, 0, False),
        (DIVERGED, 0, False),
        (QUOTA, 0, False),
        (DISK, 0, False),
        (STOPPED, 0, False),
    ],
)
def test_who_is_tried_again_as_it_was(status: str, losses: int, again: bool) -> None:
    task = Task("a", print, RunConfig(), TokenStore(Path("a"), {}), Path("a"), attempt=2)
    following = isolated._again(task, Ended(status), losses)
    assert (following is not None) == again
    if following is not None:
        assert following.attempt == 3
        assert following.cfg == task.cfg


def test_short_of_memory_it_is_tried_with_less_until_there_is_no_less() -> None:
    task = Task("a", print, RunConfig(), TokenStore(Path("a"), {}), Path("a"))
    sizes = []
    while (following := isolated._again(task, Ended(OOM), 0)) is not None:
        task = following
        sizes.append(task.cfg.training.micro_batch)
    assert sizes == [2, 1]


def test_what_is_not_a_trials_own_halts_the_job_and_ends_no_trial() -> None:
    assert isinstance(halting(DISK, "full"), StorageError)
    assert isinstance(halting(UNPLACED, "no worker group could start"), Halted)
    assert [halting(status, "x") for status in (FAILED, LOST, OOM, DIVERGED, QUOTA, STOPPED, "")] == [None] * 7
    gone = not_its_own(classify(RayActorError("the board's process ended")))
    assert isinstance(halting(gone.status, gone.error), Halted)
    assert not_its_own(Ended(FAILED, "a bug")) == Ended(FAILED, "a bug")


def test_losses_are_counted_since_the_last_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that come and go take a trial on as long as each of them takes it further."""
    task = Task("a", print, RunConfig(cluster=ClusterConfig(retries=1)), TokenStore(Path("a"), {}), Path("a"))
    machines = iter([[16], [16, 32], [16, 32, 48], [48], [64]])  # what each measures before it is lost

    def stream(_board: Any, _task: Task, again: bool) -> Iterator[dict[str, Any]]:
        yield from ({"samples_seen": seen} for seen in next(machines))
        raise TaskFailed(Ended(LOST, "a worker's machine was lost"))

    monkeypatch.setattr(isolated, "stream", stream)
    reports: list[dict[str, Any]] = []
    with pytest.raises(TaskFailed, match="a worker's machine was lost"):
        reports.extend(isolated.attempts(None, task))  # extend takes them one by one
    assert next(machines) == [64], "the fourth took it no further, and was the second loss since"
    assert [r["attempt"] for r in reports if "attempt" in r] == [1, 2, 3]
