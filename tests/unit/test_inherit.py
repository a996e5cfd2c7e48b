"""A checkpoint as the beginning of another run."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.artifacts import read_manifest, write_json
from raytune_lora.training.inherit import inherit
from raytune_lora.working_copy import WorkingCopy


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


def begin(checkpoint: Path) -> None:
    inherit(str(checkpoint), WorkingCopy(checkpoint.parents[1]), "child")


def test_the_same_files_stay_when_the_other_forgets_them_and_its_seconds_are_not_counted(checkpoint: Path) -> None:
    child = checkpoint.parents[1] / "child"
    child.mkdir()
    before = (checkpoint / "manifest.json").read_bytes()
    begin(checkpoint)
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
    begin(checkpoint)
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
            begin(checkpoint)
    assert list(child.glob("checkpoint-*")) == []
    begin(checkpoint)
    (further := child / "checkpoint-00000008").mkdir()
    write_json(further / "manifest.json", {"files": {}})
    shutil.rmtree(child / checkpoint.name)
    begin(checkpoint)
    assert [path.name for path in child.iterdir()] == [further.name], "it has gone on by itself"


def test_a_damaged_one_is_no_beginning(checkpoint: Path) -> None:
    (checkpoint / "optimizer-00000").write_bytes(b"cut")
    with pytest.raises(RuntimeError, match="child was to begin from it"):
        begin(checkpoint)
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 4


def test_what_is_in_a_store_begins_on_any_machine(checkpoint: Path, tmp_path: Path) -> None:
    uri = f"memory://{secrets.token_hex(4)}/trials"
    parents, drivers, childs = (WorkingCopy(tmp_path / name, uri) for name in ("parent's", "driver's", "child's"))
    shutil.copytree(checkpoint, parents.path / "0001" / checkpoint.name)
    parents.within("0001").send_whole(checkpoint.name)
    shutil.rmtree(parents.path)
    for _ in range(2):  # the second time there is nothing to do
        inherit(f"{uri}/0001/{checkpoint.name}", drivers, "0002")
        assert not (drivers.path / "0002" / checkpoint.name).exists(), "the room of this machine is not the child's"
    manifest = read_manifest(childs.within("0002").bring_whole(checkpoint.name))
    assert manifest is not None
    assert manifest["report"]["training_seconds"] == 0.0
    assert childs.within("0001").manifests("checkpoint-*")[checkpoint.name]["report"]["training_seconds"] == 7.0
