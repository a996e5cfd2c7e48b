"""Compile ahead what DeepSpeed would compile in the first trial: ``python -m raytune_lora.training.warmup``.

On CPU, DeepSpeed joins the workers of a node with a shared-memory op of its own, built at first use (half a minute) and
kept in torch's extension cache.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import time
from pathlib import Path


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
    """Build the op, or tell DeepSpeed to do without it in this process.

    Returns:
        what was done, as a sentence.
    """
    find_ninja()
    own_cache()
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    start = time.monotonic()
    try:
        op = build_shm_op()
    except (ImportError, OSError, RuntimeError) as error:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reason = str(error).strip().splitlines()[0].partition(": [")[0]
        return f"DeepSpeed's shared-memory op cannot be built here (no C++ compiler?), gloo serves instead: {reason}"
    if op is None:
        return "DeepSpeed uses no shared-memory op on this accelerator: nothing to build"
    return f"DeepSpeed's shared-memory op is ready ({time.monotonic() - start:.0f} s)"


if __name__ == "__main__":
    print(build_shared_memory_op())
