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
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

_OP = "deepspeed_shm_comm"
_BUILDER = ".builder"  # in an op's folder: the machine whose process of this package builds there
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


def prepare_builds() -> None:
    """Have torch find its tools, keep what it builds apart, and build whatever DeepSpeed asks for under our lock."""
    find_ninja()
    own_cache()
    cpp_extension.FileBaton = Baton  # type: ignore[attr-defined]  # where torch has imported it


class Baton(FileBaton):
    """The lock under which torch builds an extension, given back when its holder dies.

    Torch's own is a file: one that a killed process has left is waited for without end. Here one process of the machine
    builds at a time. It waits for another no longer than a build takes, and what one that was killed has left is taken
    away. Where the extension is there already, torch sees that under the lock, and builds nothing.
    """

    def __init__(self, lock_file_path: str, *arguments: Any, **settings: Any) -> None:
        """
        Args:
            lock_file_path: torch's lock, in the folder of the extension.
            arguments: of torch's own.
            settings: of torch's own.
        """
        super().__init__(lock_file_path, *arguments, **settings)
        self._op = Path(lock_file_path).parent
        self._alone = FileLock(self._op.parent / ".building", timeout=_BUILD)

    def try_acquire(self) -> bool:
        """
        Returns:
            True.

        Raises:
            Timeout: another is at it for longer than a build takes; an ``OSError``.
        """
        self._alone.acquire()
        try:
            while not super().try_acquire():
                take_away(self._op)
                self._op.mkdir(exist_ok=True)
            (self._op / _BUILDER).write_text(platform.node())
        except BaseException:
            self._alone.release()
            raise
        return True

    def release(self) -> None:
        try:
            (self._op / _BUILDER).unlink(missing_ok=True)
            super().release()
        finally:
            self._alone.release()


def build_shared_memory_op() -> str:
    """Build the op, or tell DeepSpeed to do without it in all workers of the group.

    Returns:
        what was done, as a sentence.
    """
    prepare_builds()
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    start, reason = time.monotonic(), None
    try:
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


def take_away(op: Path) -> None:
    """Remove what was left of a build, with torch's lock on it, once whoever began it cannot be at it any more.

    Where that was a process of this package on this machine, it is dead: we hold its lock. Another machine may share
    the folder and not the lock, and another program knows torch's alone: they are waited for as long as a build takes.

    Args:
        op: the folder of the op.
    """
    lock, began = op / "lock", time.monotonic()
    while lock.exists():
        with contextlib.suppress(FileNotFoundError):
            mine = (op / _BUILDER).is_file() and (op / _BUILDER).read_text() == platform.node()
            old = time.time() - lock.stat().st_mtime > _BUILD  # by another machine's clock, which may be wrong
            if mine or old or time.monotonic() - began > _BUILD:
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
