"""Names that come from outside stay in their folder, whoever chose them and whichever way they come."""

from __future__ import annotations

import io
import json
import os
import random
import secrets
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_lora import storage
from raytune_lora.artifacts import DIGESTS, MANIFEST, build_once, read_manifest
from raytune_lora.cluster.bring import unpack
from raytune_lora.errors import StorageError, UserError
from raytune_lora.names import Outside, inside, plain
from raytune_lora.tuning.trials import Journal, read_events
from raytune_lora.working_copy import WorkingCopy

PARTS = [
    "",
    ".",
    "..",
    "a",
    "best",
    "link",
    "...",
    "~",
    "C:",
    "C:x",
    "a\\b",
    "..\\up",
    "\0",
    "a\0b",
    "\n",
    "둘",
    " ",
    "x" * 40,
]
HOSTILE = [
    "../x",
    "a/../../x",
    "/etc/x",
    "//x",
    "a//x",
    "./x",
    "a/..",
    "..",
    ".",
    "",
    "C:/x",
    "c:x",
    "..\\x",
    "a\\b",
    "x\0",
]


def random_names(count: int) -> list[str]:
    draw = random.Random(0)
    names = ["/".join(draw.choices(PARTS, k=draw.randint(1, 5))) for _ in range(count)]
    return [draw.choice(["", "", "/", "\\\\host\\", "file://"]) + name for name in names]


def test_no_name_leads_out(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "folder"
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    (folder / "best").mkdir()
    (folder / "best" / "link").symlink_to(tmp_path / "file")
    taken = 0
    for name in random_names(5000):
        try:
            path = inside(folder, name, "the store")
        except Outside:
            continue
        taken += 1
        assert str(path.relative_to(folder)) == name, "two names never mean one file"
        assert os.path.realpath(path).startswith(f"{folder.resolve()}/")
    assert 200 < taken < 2500


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    assert not plain(name)
    with pytest.raises(Outside, match="is no name of a file in a folder, and is not followed"):
        inside(tmp_path, name, "the store")


@pytest.mark.parametrize("name", ["a", ".hidden", "a/b.c/d", "..a/b..", "sub folder/둘", "ab:c"])
def test_names_that_are_taken(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, "the store") == tmp_path / name


# ---------------------------------------------------------------------------------------------- each way that they come


@pytest.fixture
def uri() -> str:
    return f"memory://{secrets.token_hex(4)}/sweeps/mine"


def put(uri: str, name: str) -> None:
    """An object of that very name; the client in memory would tidy it."""
    fs, root = storage.file_system(uri)
    fs.pipe_file(f"{root}/best/it", b"hostile")
    fs.store[f"{root}/{name}"] = fs.store[f"{root}/best/it"]


def around(tmp_path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_keys_of_a_store(tmp_path: Path, uri: str) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "sweep.py").write_text("mine")
    put(uri, "best/../../../jobs/sweep.py")
    copy = WorkingCopy(tmp_path / "sweeps" / "mine", uri)
    ways: list[Callable[[], Any]] = [
        lambda: copy.bring("best/*"),
        lambda: copy.sizes("*"),
        lambda: copy.manifests("*"),
        lambda: copy.bring_whole("best/../../../jobs"),
        lambda: copy.here(f"{uri}/best/../../../jobs"),
        lambda: copy.bring_whole("/etc"),
    ]
    for way in ways:
        with pytest.raises(StorageError, match="is not followed: somebody may have put it there"):
            way()
    with pytest.raises(storage.NotWhole, match="other/best is not in"):
        copy.here("s3://other/best")
    assert around(tmp_path) == {"jobs/sweep.py": b"mine"}


@pytest.mark.parametrize("names", [["best/" + "x" * 256], ["best/x", "best/x/y"], ["best/" + "둘" * 86]])
def test_keys_that_can_be_no_files(names: list[str], tmp_path: Path, uri: str) -> None:
    for name in names:
        put(uri, name)
    with pytest.raises(StorageError, match="a name in the store cannot be one here"):
        WorkingCopy(tmp_path / "mine", uri).bring("best/x*", "best/둘*")


def test_links_that_lie_in_a_working_copy(tmp_path: Path, uri: str) -> None:
    put(uri, "report.html")
    (tmp_path / "copy").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "copy" / "best").symlink_to(tmp_path)
    (tmp_path / "copy" / "report.html").symlink_to(tmp_path / "mine")
    for pattern in ("best/*", "report.html"):
        with pytest.raises(StorageError, match="would be written through the link"):
            WorkingCopy(tmp_path / "copy", uri).bring(pattern)
    assert around(tmp_path)["mine"] == b"mine"
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("name", ["../victim", "/VICTIM", "a/../../victim"])
@pytest.mark.parametrize("key", ["files", DIGESTS])
def test_manifests(name: str, key: str, tmp_path: Path, uri: str) -> None:
    name = name.replace("/VICTIM", str(tmp_path / "victim"))
    (tmp_path / "victim").write_text("mine")
    build_once(tmp_path / "folder", lambda work: {"bytes": (work / "data").write_bytes(b"content")})
    storage.upload(tmp_path / "folder", f"{uri}/it")
    manifest = json.loads(storage.read(f"{uri}/it/{MANIFEST}") or b"")
    manifest[key][name] = {"files": 4, DIGESTS: "0" * 64}[key]
    if key == "files":  # as one who knows the form would write it
        manifest[DIGESTS][name] = "0" * 64
    storage.write(f"{uri}/it/{MANIFEST}", json.dumps(manifest).encode())
    copy = WorkingCopy(tmp_path / "copy", uri)
    with pytest.raises((StorageError, storage.StorageError)):
        copy.bring_whole("it")
    with pytest.raises(storage.StorageError):
        storage.download(f"{uri}/it", tmp_path / "back")
    assert (tmp_path / "victim").read_text() == "mine"

    (tmp_path / "folder" / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(tmp_path / "folder") is None, "nothing outside is looked at, or sent"


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "a/../../victim", "ok/../../victim"])
def test_archives(name: str, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for each in ("report.html", name):
            entry = tarfile.TarInfo(each)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(UserError, match="is not followed"):
        unpack(packed.getvalue(), tmp_path / "results" / "mine")
    assert around(tmp_path) == {}


def test_links_in_archives_are_left_out(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        link = tarfile.TarInfo("best")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        entry = tarfile.TarInfo("best/it")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"fine"))
    unpack(packed.getvalue(), tmp_path / "mine")
    assert around(tmp_path) == {"mine/best/it": b"fine"}


@pytest.mark.parametrize("name", ["../0000", "/etc", "0000/x", ".."])
def test_trials_of_a_journal(name: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"event": "trial_started", "trial_id": name, "params": {}}) + "\n")
    assert len(read_events(path)[0]) == 1
    with pytest.raises(UserError, match=r"the journal: '.*' is no name of a file"):
        Journal(path)
