"""A checkpoint as the beginning of another run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from raytune_lora.artifacts import MANIFEST, read_manifest, write_json

_INHERITING = "inheriting"  # beside the whole checkpoints: where one is put together


def inherit(checkpoint: Path, folder: Path) -> None:
    """Give a run that has no checkpoint yet one of another run; it goes on from there with its own config.

    The files are the same ones, by hard links where the storage has them, and stay when the other run forgets its own.
    What the other run spent is not counted to this one. As with any checkpoint, the manifest comes last and then the
    folder its name, so that one that was cut short is none.

    Args:
        checkpoint: a whole one.
        folder: of the run that inherits it.

    Raises:
        RuntimeError: the checkpoint is missing or damaged.
    """
    target, work = folder / checkpoint.name, folder / _INHERITING
    if any(read_manifest(path) is not None for path in folder.glob("checkpoint-*")):
        return
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise RuntimeError(f"{checkpoint} is missing or damaged, and {folder.name} was to begin from it")
    shutil.rmtree(work, ignore_errors=True)
    for name in manifest["files"]:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        _link(checkpoint / name, work / name)
    manifest["report"]["training_seconds"] = 0.0
    write_json(work / MANIFEST, manifest)
    os.replace(work, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the storage has no hard links
        shutil.copyfile(source, target)
