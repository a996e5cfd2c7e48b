"""Folders of this node that stand for some in a store, here one of fsspec's in memory, and the checkpoints in them."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from raytune_lora import storage
from raytune_lora.artifacts import build_once, read_manifest
from raytune_lora.config.schema import DiskConfig
from raytune_lora.errors import StorageError
from raytune_lora.training.duty import _arrive
from raytune_lora.training.place import CHECKPOINTS, send_files
from raytune_lora.tuning.disk import GB, Quota
from raytune_lora.tuning.trials import Record, Trial
from raytune_lora.working_copy import WorkingCopy


@pytest.fixture
def uri() -> str:
    return f"memory://{secrets.token_hex(4)}/sweeps/mine"


def node(tmp_path: Path, name: str, uri: str) -> WorkingCopy:
    """A trial's folder on a node of that name."""
    return WorkingCopy.of(uri, str(tmp_path / name)).within("trials", "0000")


def checkpoint(copy: WorkingCopy, step: int, loss: float | None, content: str = "weights") -> str:
    """A checkpoint of a trial, here and in the store."""
    name = f"checkpoint-{step:08d}"

    def build(work: Path) -> dict[str, Any]:
        (work / "adapter").mkdir()
        (work / "adapter" / "it").write_text(content)
        return {"step": step, "report": {"eval_loss": loss}}

    build_once(copy.path / name, build)
    copy.send_whole(name)
    return name


def test_a_folder_is_found_again_on_each_node(tmp_path: Path, uri: str) -> None:
    first = WorkingCopy.of(f"{uri}/", str(tmp_path / "first")).within("trials", "0000")
    second = WorkingCopy.at(uri, str(tmp_path / "second"), first.path)
    assert second == node(tmp_path, "second", uri)
    assert second.uri == first.uri == f"{uri}/trials/0000"
    assert first.path != second.path
    assert first.name(first.path / "checkpoint-1") == second.name(second.path / "checkpoint-1")
    for output in (None, str(tmp_path / "sweep")):
        assert WorkingCopy.at(output, "~/other", tmp_path / "x") == WorkingCopy(tmp_path / "x")
    assert WorkingCopy(tmp_path).name(tmp_path / "x") == str(tmp_path / "x")


def test_files_go_and_come_and_checkpoints_stay(tmp_path: Path, uri: str) -> None:
    first, second = node(tmp_path, "first", uri), node(tmp_path, "second", uri)
    checkpoint(first, 1, 0.5)
    (first.path / "logs").mkdir()
    (first.path / "logs" / "worker-0.log").write_text("a line")
    (first.path / "steps.jsonl").write_text("{}")
    send_files(first)
    second.path.mkdir(parents=True)
    (second.path / "steps.jsonl").write_text("old and longer")
    (second.path / "stale").touch()
    second.clear(keep=("steps*",))
    second.bring("*", but=(f"{CHECKPOINTS}/*",))
    assert {path.name: path.read_text() for path in second.path.rglob("*") if path.is_file()} == {
        "worker-0.log": "a line",
        "steps.jsonl": "{}",
    }


def test_a_checkpoint_comes_whole_and_as_the_store_has_it(tmp_path: Path, uri: str) -> None:
    first, second = node(tmp_path, "first", uri), node(tmp_path, "second", uri)
    name = checkpoint(first, 1, 0.5)
    other = build_once(second.path / name, lambda work: {"step": (work / "other").write_text("")})
    assert second.bring_whole(name) == second.path / name
    assert (second.path / name / "adapter" / "it").read_text() == "weights"
    assert [path.name for path in second.path.glob(CHECKPOINTS)] == [name], "a lock is none"
    manifest = read_manifest(second.path / name)
    assert manifest != other
    assert list(manifest["sha256"]) == ["adapter/it"]  # type: ignore[index]
    home = WorkingCopy.of(uri, str(tmp_path / "third"))
    assert home.here(first.name(first.path / name)) == home.path / "trials" / "0000" / name
    second.remove(name)
    with pytest.raises(storage.NotWhole):
        first.bring_whole("checkpoint-00000001")
    assert second.manifests(CHECKPOINTS) == {}


def test_what_is_not_whole_in_the_store_does_not_count(tmp_path: Path, uri: str) -> None:
    copy = node(tmp_path, "first", uri)
    names = [checkpoint(copy, step, 1.0 / step) for step in (1, 2, 3)]
    storage.write(f"{copy.uri}/{names[2]}/adapter/it", b"cut")
    storage.write(f"{copy.uri}/checkpoint-00000004/adapter/it", b"its manifest never came")
    assert list(copy.manifests(CHECKPOINTS)) == names[:2]
    assert copy.manifests(CHECKPOINTS)[names[0]]["report"] == {"eval_loss": 1.0}


def test_a_quota_counts_and_deletes_what_is_in_the_store(tmp_path: Path, uri: str) -> None:
    trials = WorkingCopy.of(uri, str(tmp_path / "driver")).within("trials")
    record = Record()
    for trial_id, status in (("0000", "failed"), ("0001", "completed"), ("0002", "running")):
        own = WorkingCopy.of(uri, str(tmp_path / "worker")).within("trials", trial_id)
        for step in (1, 2):
            checkpoint(own, step, 1.0 / step, "x" * 10_000)
        record.trials[trial_id] = Trial(
            trial_id, {}, status=status, eval_loss=0.5, checkpoint=f"{own.uri}/checkpoint-00000002"
        )
    one = sum(trials.sizes(f"*/{CHECKPOINTS}").values()) / 6
    Quota(DiskConfig(sweep_gb=2.5 * one / GB, keep_best=1), trials).keep(record)
    assert list(trials.sizes(f"*/{CHECKPOINTS}")) == ["0001/checkpoint-00000002", "0002/checkpoint-00000002"]


def test_a_store_that_refuses_halts_as_a_full_disk_does(tmp_path: Path) -> None:
    copy = WorkingCopy(tmp_path, "nonsense://bucket/x")
    (tmp_path / "file").touch()
    for work in (lambda: copy.send(tmp_path / "file"), lambda: copy.bring("*"), lambda: copy.manifests("*")):
        with pytest.raises(StorageError, match="nonsense://bucket/x"):
            work()


def test_a_task_makes_no_folder_where_the_storage_is_gone(tmp_path: Path) -> None:
    """Below a mount point without its mount, it would be on the node's own disk, and checkpoints in it."""
    with pytest.raises(FileNotFoundError, match="was its storage unmounted"):
        _arrive(WorkingCopy(tmp_path / "sweep" / "trials" / "0000"), 0)
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "sweep").mkdir()
    assert _arrive(WorkingCopy(tmp_path / "sweep" / "trials" / "0000"), 0).parent.is_dir()
