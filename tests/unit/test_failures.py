"""What a failure means: Ray's own errors, as Ray raises them, with the texts that gloo and the system give."""

from __future__ import annotations

import errno
import os
import sqlite3

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from raytune_lora.errors import DivergedError, MovedError, QuotaError, StorageError, disk_trouble
from raytune_lora.training.failures import DISK, DIVERGED, FAILED, LOST, MOVED, OOM, QUOTA, classify

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
