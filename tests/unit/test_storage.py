"""Folders and objects under a path here, a ``file://`` and any URI of fsspec; S3 itself is in tests/integration."""

from __future__ import annotations

import pickle
import secrets
from pathlib import Path

import pytest

from raytune_lora import storage
from raytune_lora.artifacts import build_once, read_manifest
from raytune_lora.cache import Cache
from raytune_lora.errors import UserError
from raytune_lora.tuning.folder import address


@pytest.fixture(params=["path", "file", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new place of each kind."""
    token = secrets.token_hex(4)
    return {"path": str(tmp_path / token), "file": f"file://{tmp_path / token}", "memory": f"memory://{token}"}[
        request.param
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole folder."""
    build_once(tmp_path / "folder", lambda work: {"bytes": (work / "data").write_bytes(b"content")})
    return tmp_path / "folder"


def test_objects(uri: str) -> None:
    object_ = storage.join(uri, "a", "state.json")
    assert storage.read(object_) is None
    storage.write(object_, b"one")
    storage.write(object_, b"two")
    assert storage.read(object_) == b"two"
    assert storage.sizes(uri) == {"a/state.json": 3}
    storage.delete(object_)
    storage.delete(object_)  # what is gone is gone
    assert storage.sizes(uri) == {}
    assert storage.problems(uri) == []
    assert storage.sizes(uri) == {}


def test_folders(uri: str, folder: Path, tmp_path: Path) -> None:
    assert storage.whole(uri) is None
    storage.upload(folder, uri)
    storage.upload(folder, uri)
    assert storage.whole(uri) is not None
    assert storage.download(uri, tmp_path / "back") == read_manifest(folder)
    assert (tmp_path / "back" / "data").read_bytes() == b"content"
    storage.write(storage.join(uri, "data"), b"CONTENT")
    with pytest.raises(storage.Damaged, match="data is damaged"):
        storage.download(uri, tmp_path / "again")
    storage.write(storage.join(uri, "data"), b"cut")
    assert storage.whole(uri) is None
    storage.delete(uri)
    with pytest.raises(storage.NotWhole, match="is not there"):
        storage.download(uri, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_only_a_whole_folder_is_sent(tmp_path: Path, uri: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="is not whole"):
        storage.upload(tmp_path / "folder", uri)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://bucket/x", "s3://bucket/x"),
        ("s3://key:secret@bucket/x?region=eu", "s3://***@bucket/x"),
        ("abfs://container@account/x", "abfs://container@account/x"),
        ("/a/b:c@d", "/a/b:c@d"),
    ],
)
def test_secrets_are_not_shown(uri: str, text: str) -> None:
    assert storage.shown(uri) == text


def test_what_clouds_are_spoken_to_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their clients are made without a request; no server answers for them here."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for uri, kind in {"s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "abfs", "az": "abfs"}.items():
        fs, root = storage.file_system(f"{uri}://bucket/a/b/")
        assert (fs.fs.type_name, root) == (kind, "bucket/a/b")
        assert storage.file_system(f"{uri}://bucket/c")[0] is fs
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(storage.StorageError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        storage.file_system("az://bucket/a")


@pytest.mark.parametrize("place", ["/proc/none", "nonsense://x", "file/x"])
def test_a_place_that_cannot_be_written_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / place) if place == "file/x" else place
    found = storage.problems(place)
    assert found
    assert all(problem.startswith(place) for problem in found)


def test_an_error_of_a_worker_reaches_the_driver() -> None:
    error = pickle.loads(pickle.dumps(storage.Damaged("s3://bucket/x is damaged")))
    assert isinstance(error, storage.NotWhole)
    assert error.problems == ["s3://bucket/x is damaged"]


def test_a_cache_is_a_folder_or_a_store_with_a_folder_on_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-this-node")
    assert Cache.of("~/mine", "~/node") == Cache(Path("/home/of-this-node/mine"))
    assert Cache.of("file:///shared", "~/node") == Cache(Path("/shared"))
    assert Cache.of("s3://bucket/x", "~/node") == Cache(Path("/home/of-this-node/node"), "s3://bucket/x")


def test_what_google_s_client_says_is_cut_to_its_words() -> None:
    said = "google::cloud::Status(UNAVAILABLE: no token error_info={reason=, domain=, metadata={gcloud-cpp.retry=1}})"
    assert storage.reason(OSError(said)) == "UNAVAILABLE: no token"


@pytest.mark.parametrize("path", ["s3://", "s3:///x/y", "s3:/bucket/x", "gs:////x", "az://"])
def test_an_address_without_a_bucket_is_no_folder(path: str) -> None:
    """``address`` would take ``s3://`` for a folder ``s3:`` of this machine."""
    with pytest.raises(UserError, match="names no bucket; write "):
        address(path)
    with pytest.raises(UserError, match="names no bucket; write "):
        Cache.of(path, "cache")


@pytest.mark.parametrize("path", ["a:b", "./s3:/x", "/x/s3:/y", "file:///x", "1:/x"])
def test_a_folder_with_a_colon_is_one(path: str) -> None:
    assert storage.local_path(path) is not None
