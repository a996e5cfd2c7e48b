"""Checkpoints: all that every worker needs to go on, and the adapter.

Trainer and DeepSpeed write each worker's part into one folder on shared storage. When all parts are there, the first
worker writes the manifest and renames the folder, so that a half-written checkpoint is never taken for a whole one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from raytune_lora.artifacts import MANIFEST, read_manifest, write_json

SAVING = "saving"  # beside the whole checkpoints: where parts are written
_PREFIX = "checkpoint-"


def latest(folder: Path) -> Path | None:
    """The whole checkpoint of a trial's folder that saw most steps."""
    for path in sorted(folder.glob(f"{_PREFIX}*"), reverse=True):
        if read_manifest(path) is not None:
            return path
    return None


def report_of(checkpoint: Path) -> dict[str, Any]:
    """What was reported with a whole checkpoint, or would have been had the run not been killed in between."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise ValueError(f"{checkpoint} is not a whole checkpoint")
    return dict(manifest["report"]) | {"checkpoint": str(checkpoint)}


def commit(parts: Path, folder: Path, step: int, report: dict[str, Any], rank: int, workers: int) -> Path:
    """Make a whole checkpoint of what the workers wrote; all of them call it.

    Of older ones only that of the lowest validation loss is kept.

    Args:
        parts: what Trainer wrote.
        folder: of the trial.
        step: optimizer steps done.
        report: that goes with it; its ``eval_loss`` decides which checkpoint is the best.
        rank: of this worker.
        workers: that wrote parts.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    if workers > 1:
        torch.distributed.barrier()
    if rank == 0:
        files = {str(p.relative_to(parts)): p.stat().st_size for p in sorted(parts.rglob("*")) if p.is_file()}
        write_json(parts / MANIFEST, {"step": step, "report": report, "workers": workers, "files": files})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(parts, target)
        _keep_best(folder, target)
    return target


def _keep_best(folder: Path, newest: Path) -> None:
    found: dict[Path, dict[str, Any]] = {
        path: manifest for path in folder.glob(f"{_PREFIX}*") if (manifest := read_manifest(path)) is not None
    }
    best = min(found, key=lambda path: (found[path]["report"]["eval_loss"], -found[path]["step"]))
    for path in found:
        if path not in (best, newest):
            shutil.rmtree(path)
