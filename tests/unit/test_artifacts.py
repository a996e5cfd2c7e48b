"""Folders built once: by two processes at a time, after an interruption, after damage."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.artifacts import MANIFEST, build_once, fingerprint, read_manifest, write_json

ROOT = Path(__file__).resolve().parents[2]
_BUILDER = """
import sys, time
from pathlib import Path
from raytune_lora.artifacts import build_once

def build(work):
    with open(sys.argv[2], "a") as counter:
        counter.write("built\\n")
    time.sleep(0.5)
    (work / "data").write_text("x" * 100)
    return {"by": "one of two"}

print(build_once(Path(sys.argv[1]), build))
"""


def build(work: Path) -> dict[str, Any]:
    """A small artifact."""
    (work / "part").mkdir()
    (work / "part" / "data").write_text("content")
    (work / "part" / "data").chmod(0o600)
    return {"facts": [1, "둘"]}


def never(work: Path) -> dict[str, Any]:
    """For a folder that is whole."""
    raise AssertionError("built again")


def interrupted(work: Path) -> dict[str, Any]:
    """Fails half-way."""
    (work / "data").write_text("half")
    raise KeyboardInterrupt


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "shelf" / "it"
    built = build_once(folder, build)
    assert built == {"facts": [1, "둘"], "files": {"part/data": 7}}
    assert build_once(folder, never) == built == read_manifest(folder) == json.loads((folder / MANIFEST).read_text())


def test_a_built_folder_is_for_all_to_read(tmp_path: Path) -> None:
    build_once(tmp_path / "it", build)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "it", *(tmp_path / "it").rglob("*")]}
    assert modes == {"it": 0o755, "part": 0o755, "data": 0o644, MANIFEST: 0o644}


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    built = build_once(tmp_path / "it", lambda work: {"inode": work.stat().st_ino, "whole": (tmp_path / "it").exists()})
    assert built["inode"] == (tmp_path / "it").stat().st_ino
    assert not built["whole"]


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    folder, counter = tmp_path / "it", tmp_path / "counter"
    command = [sys.executable, "-c", _BUILDER, str(folder), str(counter)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    builders = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [builder.communicate(timeout=60)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert answers[0] == answers[1] == "{'by': 'one of two', 'files': {'data': 100}}\n"
    assert counter.read_text() == "built\n"


# -------------------------------------------------------------------------------------------------------- interruptions


def test_an_interrupted_build_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    with pytest.raises(KeyboardInterrupt):
        build_once(folder, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["it.lock"]
    assert read_manifest(folder) is None
    assert build_once(folder, build) == read_manifest(folder)


def test_what_a_killed_build_left_is_swept_away(tmp_path: Path) -> None:
    for name in (".it.abc.building", ".item.abc.building"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("half")
    build_once(tmp_path / "it", build)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".item.abc.building", "it", "it.lock"]


def test_a_folder_without_a_manifest_is_not_whole(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    folder.mkdir()
    (folder / "stray").write_text("x")
    build_once(folder, build)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "part"]


# --------------------------------------------------------------------------------------------------------------- damage


def cut_file(folder: Path) -> None:
    os.truncate(folder / "part" / "data", 3)


def lost_file(folder: Path) -> None:
    (folder / "part" / "data").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 10)


def empty_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 0)


def binary_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")


def list_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def null_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("null")


def foreign_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": [1]}')


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    "damage",
    [
        cut_file,
        lost_file,
        cut_manifest,
        empty_manifest,
        binary_manifest,
        list_manifest,
        null_manifest,
        foreign_manifest,
        no_folder,
    ],
)
def test_a_damaged_folder_is_built_anew(damage: Any, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    built = build_once(folder, build)
    damage(folder)
    assert read_manifest(folder) is None
    assert build_once(folder, build) == built
    assert (folder / "part" / "data").read_text() == "content"


# ----------------------------------------------------------------------------------------------- files and fingerprints


def test_json_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"이름": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"이름": [1, None]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    write_json(path, "\udcff")
    assert json.loads(path.read_text(encoding="utf-8")) == "\udcff"
    write_json(path, {"이름": [1, None]})
    with path.open() as reader:
        write_json(path, {"new": True})
        assert json.load(reader) == {"이름": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"new": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_fingerprint_stands_for_values_whatever_their_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint(1), fingerprint("1"), fingerprint(1, 1), fingerprint([1, 1]), fingerprint(None)}) == 5
    assert fingerprint("값", 1.5) == "6e43c0635172bd9d"
