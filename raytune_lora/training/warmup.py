"""Compile ahead what DeepSpeed would compile in the first trial: ``python -m raytune_lora.training.warmup``.

On CPU, DeepSpeed joins the workers of a node with a shared-memory op of its own, built at first use (half a minute) and
kept in torch's extension cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

_OP = "deepspeed_shm_comm"
_BUILDER = ".builder"  # beside it: the machine that built last
_BUILD = 180.0  # seconds that a build may take; half a minute is usual
_LOOK = 0.2


def find_ninja() -> None:
    """Put this environment's scripts on PATH: torch starts ``ninja`` by name, even for an op that is built already."""
    scripts = sysconfig.get_path("scripts")
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if scripts not in folders:
        os.environ["PATH"] = os.pathsep.join([scripts, *filter(None, folders)])


def own_cache() -> None:
    """Keep ops apart by environment: torch builds them anew whenever another one's paths built them last."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache / "raytune-lora" / "ops" / environment)


def build_shared_memory_op() -> str:
    """Build the op, or tell DeepSpeed to do without it in all workers of the group.

    One process of the machine builds at a time. It waits for another no longer than a build takes, and what one that
    was killed has left is taken away: torch itself would wait for that one's lock for ever.

    Returns:
        what was done, as a sentence.
    """
    find_ninja()
    own_cache()
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    start, reason = time.monotonic(), None
    ops = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    try:
        with _alone(ops):
            op = build_shm_op()
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(": [")[0]
    if not _all_have_it(reason is None):
        deepspeed.ops.__compatible_ops__[_OP] = False
        reason = reason or "another worker has none"
        return f"DeepSpeed's shared-memory op cannot be built here (no C++ compiler?), gloo serves instead: {reason}"
    if op is None:
        return "DeepSpeed uses no shared-memory op on this accelerator: nothing to build"
    return f"DeepSpeed's shared-memory op is ready ({time.monotonic() - start:.0f} s)"


@contextlib.contextmanager
def _alone(ops: Path) -> Iterator[None]:
    """Be the one process of this package that builds in a folder.

    Raises:
        Timeout: another is at it for longer than a build takes; an ``OSError``.
    """
    ops.mkdir(parents=True, exist_ok=True)
    with FileLock(ops / ".building", timeout=_BUILD):  # the system gives it back when its holder dies
        builder = ops / _BUILDER
        _take_away(ops / _OP, builder.read_text() if builder.is_file() else None)
        builder.write_text(platform.node())
        yield


def _take_away(op: Path, builder: str | None) -> None:
    """Remove what was left of a build, with torch's lock on it, once whoever began it cannot be at it any more.

    Args:
        op: the folder of the op.
        builder: the machine whose process of this package built there last. Where that is this one, it is dead: we hold
            its lock. Another machine may share the folder and not the lock, and another program knows torch's alone.
    """
    lock, began = op / "lock", time.monotonic()
    while lock.exists():
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - lock.stat().st_mtime > _BUILD  # by another machine's clock, which may be wrong
            if builder == platform.node() or old or time.monotonic() - began > _BUILD:
                shutil.rmtree(op, ignore_errors=True)  # its compiler may live, and go on to write there
                return
        time.sleep(_LOOK)


def _all_have_it(mine: bool) -> bool:
    """Whether all workers of the group have built the op: one that uses it waits for ever for one that does not."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return mine
    have = torch.tensor([mine], dtype=torch.int32)
    torch.distributed.all_reduce(have, torch.distributed.ReduceOp.MIN)
    return bool(have.item())


if __name__ == "__main__":
    print(build_shared_memory_op())
