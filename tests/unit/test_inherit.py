"""A checkpoint as the beginning of another run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.artifacts import read_manifest, write_json
from raytune_lora.training.inherit import inherit


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "parent" / "checkpoint-00000004"
    (folder / "adapter").mkdir(parents=True)
    files = {"adapter/weights": b"weights", "optimizer-00000": b"states"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    report = {"eval_loss": 1.5, "samples_seen": 32, "training_seconds": 7.0, "last": False}
    manifest = {"step": 4, "report": report, "files": {name: len(content) for name, content in files.items()}}
    write_json(folder / "manifest.json", manifest)
    return folder


def test_the_same_files_stay_when_the_other_forgets_them_and_its_seconds_are_not_counted(checkpoint: Path) -> None:
    child = checkpoint.parents[1] / "child"
    child.mkdir()
    before = (checkpoint / "manifest.json").read_bytes()
    inherit(checkpoint, child)
    own = child / checkpoint.name
    assert os.path.samefile(own / "optimizer-00000", checkpoint / "optimizer-00000")
    assert (checkpoint / "manifest.json").read_bytes() == before
    shutil.rmtree(checkpoint)
    assert (own / "adapter" / "weights").read_bytes() == b"weights"
    manifest = read_manifest(own)
    assert manifest is not None
    assert manifest["report"] == {"eval_loss": 1.5, "samples_seen": 32, "training_seconds": 0.0, "last": False}


def test_storage_without_hard_links_gets_copies(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    child = checkpoint.parents[1] / "child"
    inherit(checkpoint, child)
    assert read_manifest(child / checkpoint.name) is not None
    assert not os.path.samefile(child / checkpoint.name / "optimizer-00000", checkpoint / "optimizer-00000")


def test_one_that_was_cut_short_is_begun_again_and_one_that_is_whole_is_left_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = checkpoint.parents[1] / "child"

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr("raytune_lora.training.inherit.write_json", die)
        with pytest.raises(KeyboardInterrupt):
            inherit(checkpoint, child)
    assert list(child.glob("checkpoint-*")) == []
    inherit(checkpoint, child)
    (further := child / "checkpoint-00000008").mkdir()
    write_json(further / "manifest.json", {"files": {}})
    shutil.rmtree(child / checkpoint.name)
    inherit(checkpoint, child)
    assert [path.name for path in child.iterdir()] == [further.name], "it has gone on by itself"


def test_a_damaged_one_is_no_beginning(checkpoint: Path) -> None:
    (checkpoint / "optimizer-00000").write_bytes(b"cut")
    with pytest.raises(RuntimeError, match="child was to begin from it"):
        inherit(checkpoint, checkpoint.parents[1] / "child")
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 4
