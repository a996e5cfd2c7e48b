"""Checkpoints: all that a run needs to go on, on as many workers and under whichever ZeRO stage, and the adapter.

A checkpoint is a folder: what was learned in the method's own files (``adapter/``), the trained parameters and the
optimizer's states whole and by name (``state.py``), and the manifest with the report and each file's size and digest.
The schedule, the data's position and the random streams follow from the number of steps; weights that do not train
are never written. The first worker writes it all under another name, the manifest last, and renames the folder. Where
the sweep is in an object store, what counts is what is whole there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import torch

from raytune_lora.artifacts import MANIFEST, read_manifest, remove_folder, write_json
from raytune_lora.models.export import ADAPTER
from raytune_lora.models.loading import take_back_rescaling
from raytune_lora.models.methods import Method
from raytune_lora.storage import NotWhole
from raytune_lora.training import state
from raytune_lora.training.place import CHECKPOINTS
from raytune_lora.working_copy import WorkingCopy

WEIGHTS, OPTIMIZER, EXTRA = "trained", "optimizer", "extra"  # stems of a checkpoint's files
_PREFIX = CHECKPOINTS.rstrip("?")
_logger = logging.getLogger(__name__)


class Checkpoint:
    """A whole checkpoint."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._manifest = manifest
        self.step: int = manifest["step"]  # optimizer steps done
        self.progress: dict[str, Any] = manifest["progress"]  # of the reporter
        self.report: dict[str, Any] = manifest["report"] | {"checkpoint": str(path)}  # no loss where none was measured

    def at(self, path: Path) -> Checkpoint:
        """The same, where another node has it."""
        return Checkpoint(path, self._manifest)

    @property
    def weights(self) -> state.Saved:
        """The trained parameters."""
        return state.Saved(self.path, WEIGHTS)

    @property
    def optimizer(self) -> state.Saved:
        """The optimizer's states."""
        return state.Saved(self.path, OPTIMIZER)

    def extra(self) -> dict[str, torch.Tensor]:
        """``Method.extra_state`` as it was."""
        return state.Saved(self.path, EXTRA).all()


def bring_latest(copy: WorkingCopy) -> None:
    """Have a trial's newest whole checkpoint of the store on this node, and the one that was measured last before it.

    What lies here and not there is deleted: nobody was ever told of it.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    if copy.uri is None:
        return
    there = copy.manifests(CHECKPOINTS)
    for path in sorted(copy.path.glob(CHECKPOINTS)):
        here = read_manifest(path)
        if path.name not in there or here is None or _damaged(path, here):
            remove_folder(path)
    for name in reversed(there):
        try:
            copy.bring_whole(name)
        except NotWhole as error:
            _logger.warning("%s: the run goes on from the one before it", error)
            remove_folder(copy.path / name)
            continue
        if there[name]["report"]["eval_loss"] is not None:
            return


def latest(folder: Path) -> Checkpoint | None:
    """The checkpoint of a trial's folder that saw most steps; one that is damaged is passed over with a warning."""
    for path in sorted(folder.glob(CHECKPOINTS), reverse=True):
        manifest = read_manifest(path)
        damaged = ["its manifest, or a file is missing or cut"] if manifest is None else _damaged(path, manifest)
        if manifest is not None and not damaged:
            return Checkpoint(path, manifest)
        _logger.warning("%s is damaged (%s): the run goes on from the one before it", path, ", ".join(damaged))
    return None


def reports(copy: WorkingCopy, newest: Checkpoint) -> list[dict[str, Any]]:
    """What a trial measured, in order, as far as its checkpoints up to the newest whole one tell.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    found = copy.manifests(CHECKPOINTS)
    known = {name: found[name]["report"] for name in found if name <= newest.path.name}
    return [
        report | {"checkpoint": copy.name(copy.path / name)}
        for name, report in known.items()
        if report["eval_loss"] is not None
    ]


def write_parts(folder: Path, model: Any, optimizer: Any, method: Method[Any], *, rank: int) -> None:
    """Gather a checkpoint from all workers, who call this together; the first writes it.

    Args:
        folder: made anew, in one that is there.
        model: that trains.
        optimizer: as accelerate wraps it.
        method: of the model.
        rank: of this worker.
    """
    take_back_rescaling(model)
    if rank:
        deque(state.gathered_weights(model, optimizer), maxlen=0)
        deque(state.gathered_optimizer(model, optimizer), maxlen=0)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # in what is there: where a mount was lost, a new folder would be on the node's own disk
    (folder / ADAPTER).mkdir()
    weights = dict(state.gathered_weights(model, optimizer))
    state.write(folder, WEIGHTS, weights.items())
    as_they_compute = {name: weights[name].to(p.dtype) for name, p in state.trained(model)}
    method.save(model, as_they_compute, folder / ADAPTER)
    state.write(folder, OPTIMIZER, state.gathered_optimizer(model, optimizer))
    state.write(folder, EXTRA, method.extra_state(model).items())


def commit(parts: Path, folder: Path, step: int, report: dict[str, Any], progress: dict[str, Any]) -> Path:
    """Make a whole checkpoint of what was written; the first worker calls it.

    Args:
        parts: what ``write_parts`` wrote.
        folder: of the trial.
        step: optimizer steps done.
        report: that goes with it; its ``eval_loss`` decides which checkpoint is the best, and is None where the run
            was saved between two validations.
        progress: what the reporter needs to go on.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    files = {str(p.relative_to(parts)): p for p in sorted(parts.rglob("*")) if p.is_file()}
    manifest = {
        "step": step,
        "report": report,
        "progress": progress,
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sha256": {name: _digest(path) for name, path in files.items()},
    }
    write_json(parts / MANIFEST, manifest)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(parts, target)
    return target


def _damaged(path: Path, manifest: dict[str, Any]) -> list[str]:
    return [name for name, digest in manifest["sha256"].items() if _digest(path / name) != digest]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def forget_others(copy: WorkingCopy, keep: int) -> None:
    """Keep the checkpoint of a trial with the lowest validation loss, and so many of the newest."""
    found = copy.manifests(CHECKPOINTS)
    measured = [name for name in found if found[name]["report"]["eval_loss"] is not None]
    best = min(measured, key=lambda name: (found[name]["report"]["eval_loss"], -found[name]["step"]), default=None)
    for name in list(found)[:-keep]:
        if name != best:
            copy.remove(name)
