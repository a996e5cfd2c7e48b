"""A checkpoint as the beginning of another run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from raytune_lora.artifacts import MANIFEST, read_manifest, remove_folder, write_json
from raytune_lora.training.place import CHECKPOINTS
from raytune_lora.working_copy import WorkingCopy

_INHERITING = "inheriting"  # beside the whole checkpoints: where one is put together


def inherit(name: str, runs: WorkingCopy, run: str) -> None:
    """Give a run that has no checkpoint yet one of another run; it goes on from there with its own config.

    The files are the same ones, by hard links where the storage has them, and stay when the other run forgets its own.
    What the other run spent is not counted to this one. As with any checkpoint, the manifest comes last and then the
    folder its name, so that one that was cut short is none.

    Args:
        name: of a whole checkpoint, as reports say it.
        runs: the folder of all runs.
        run: the one that inherits it.

    Raises:
        RuntimeError: the checkpoint is missing or damaged.
        StorageError: the store refuses or does not answer.
    """
    own = runs.within(run)
    if own.manifests(CHECKPOINTS):
        return
    checkpoint = runs.here(name)
    target, work = own.path / checkpoint.name, own.path / _INHERITING
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise RuntimeError(f"{name} is missing or damaged, and {run} was to begin from it")
    shutil.rmtree(work, ignore_errors=True)
    for name in manifest["files"]:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        _link(checkpoint / name, work / name)
    manifest["report"]["training_seconds"] = 0.0
    write_json(work / MANIFEST, manifest)
    os.replace(work, target)
    if own.uri is not None:  # where it begins may be another machine
        own.send_whole(target.name)
        remove_folder(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the storage has no hard links
        shutil.copyfile(source, target)
