"""Object stores: small objects, and whole folders, under a URI. A local path or ``file://`` works just so.

S3, Google Cloud Storage and Azure Blob Storage are spoken to by pyarrow's clients, any other protocol by fsspec. The
clients try a request again by themselves, after pauses that double and vary (S3's up to 20 s each), so nothing here
does. Credentials come from where each store's own tools find them, never from a URI: that is written to files and logs.

A folder is whole when it holds ``manifest.json`` (see ``artifacts``), which is sent last and removed first. There it
also has the SHA-256 of each file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raytune_lora.artifacts import DIGESTS, MANIFEST, build_once, named, read_manifest
from raytune_lora.errors import Passing, UserError
from raytune_lora.names import Outside, checked, inside

S3, GCS, AZURE = ("s3", "s3a"), ("gs", "gcs"), ("abfs", "abfss", "az")
_BLOCK = 16 * 2**20  # bytes of a request
_AT_ONCE = 8  # files
_PASSING = r"NETWORK_CONNECTION|HTTP status 5|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"  # of S3


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for."""

    attempts: int = 8  # at each request: with the pauses between them about a minute
    silence: float = 20.0  # seconds without a byte after which an attempt has failed
    seconds: float = 60.0  # in all, of a client that counts no attempts


PATIENT = Patience()
QUICK = Patience(attempts=3, silence=5.0, seconds=10.0)  # to look whether it is there


_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)([^/?#]*)")


class StorageError(Passing):
    """A store refuses, does not answer, or does not hold what it should."""


class Missing(StorageError):
    """There is no such object."""


class NotWhole(StorageError):
    """There is no whole folder."""


class Damaged(NotWhole):
    """The folder looks whole, but a file is not what the manifest says."""


# ---------------------------------------------------------------------------------------------------------------- names


def local_path(path: str) -> Path | None:
    """The absolute path of what lies in the file system here; None of a URI of a store.

    Raises:
        UserError: it looks like a URI and names no bucket: it would be a folder called ``s3:``.
    """
    found = _URI.match(path)
    if found and found[1] not in ("file", "memory") and not (found[2] == "//" and found[3]):
        raise UserError(f"{path} names no bucket; write {found[1]}://<bucket>/<path>, or ./{path} for a folder here")
    if "://" in path and not path.startswith("file://"):
        return None
    return Path(path.removeprefix("file://")).expanduser().absolute()


def join(uri: str, *names: str) -> str:
    """The URI of something in a folder."""
    return "/".join([uri.rstrip("/"), *names])


def shown(uri: str) -> str:
    """The URI without what may be secret in it."""
    return re.sub(r"//[^@/]*:[^@/]*@", "//***@", uri.partition("?")[0])


# --------------------------------------------------------------------------------------------------------- file systems


def file_system(uri: str, patience: Patience = PATIENT) -> tuple[Any, str]:
    """The fsspec file system of a URI or local path, and the path in it.

    Raises:
        StorageError: there is no client for it, or it holds credentials.
    """
    scheme, _, rest = uri.partition("://")
    if scheme not in (*S3, *GCS, *AZURE):
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        try:
            fs, root = url_to_fs(str(local_path(uri) or uri))
        except ImportError as error:
            raise StorageError(
                f"{shown(uri)} needs a package that is not installed ({error}); pip install it"
            ) from error
        except ValueError as error:
            raise StorageError(f"{shown(uri)}: {error}") from error
        return fs, str(root)
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise StorageError(
            f"{shown(uri)} holds more than a bucket and a path; leave it out: credentials and options come from the "
            f"environment ({_SETTINGS[_kind(scheme)]})"
        )
    bucket = rest.partition("/")[0]
    return _CLIENTS[_kind(scheme)](bucket, patience, _environment()), rest.rstrip("/")


def _kind(scheme: str) -> str:
    return next(names[0] for names in (S3, GCS, AZURE) if scheme in names)


def _environment() -> tuple[tuple[str, str], ...]:
    """What the clients read of the environment, so that another environment is given another client."""
    prefixes = ("AWS_", "GOOGLE_", "AZURE_")
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(prefixes)))


@lru_cache
def _s3(bucket: str, patience: Patience, environment: tuple[tuple[str, str], ...]) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    settings = dict(environment)
    endpoint = urlsplit(settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL") or "")
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    if not region and not endpoint.netloc:
        region = resolve_s3_region(bucket)
    client = S3FileSystem(
        scheme=endpoint.scheme or "https",
        endpoint_override=endpoint.netloc + endpoint.path.rstrip("/") or None,
        region=region,
        connect_timeout=min(patience.silence, 5.0),
        request_timeout=patience.silence,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=patience.attempts),
        allow_delayed_open=True,  # a small object is one PUT
    )
    return ArrowFSWrapper(client, skip_instance_cache=True)


@lru_cache
def _gcs(_bucket: str, patience: Patience, _environment: tuple[tuple[str, str], ...]) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import GcsFileSystem

    client = GcsFileSystem(retry_time_limit=timedelta(seconds=patience.seconds))
    return ArrowFSWrapper(client, skip_instance_cache=True)


@lru_cache
def _azure(_bucket: str, _patience: Patience, environment: tuple[tuple[str, str], ...]) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import AzureFileSystem

    settings = dict(environment)
    if not (account := settings.get("AZURE_STORAGE_ACCOUNT_NAME")):
        raise StorageError("Azure Blob Storage needs the account's name: set AZURE_STORAGE_ACCOUNT_NAME")
    client = AzureFileSystem(
        account,
        account_key=settings.get("AZURE_STORAGE_ACCOUNT_KEY"),
        sas_token=settings.get("AZURE_STORAGE_SAS_TOKEN"),
    )
    return ArrowFSWrapper(client, skip_instance_cache=True)


_CLIENTS: dict[str, Callable[..., Any]] = {"s3": _s3, "gs": _gcs, "abfs": _azure}
_SETTINGS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_REGION; AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME, with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


# --------------------------------------------------------------------------------------------------------------- errors


def reason(error: BaseException) -> str:
    """What a store's client says, in short."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    text = re.sub(r"^.*?AWS Error ", "", text, flags=re.DOTALL)
    text = re.sub(r"^google::cloud::Status\((.*?)\s*error_info=.*$", r"\1", text, flags=re.DOTALL)
    return re.sub(r"\s*\(Request ID:.*?\)|; Details:.*$", "", text, flags=re.DOTALL).strip()


@contextlib.contextmanager
def _told(uri: str, what: str, patience: Patience) -> Iterator[None]:
    """Turns what a client raises into an error that names the URI, what was tried and the remedy.

    Raises:
        Missing: where there is nothing of that name.
        StorageError: instead of any other exception, since every client has its own.
    """
    try:
        yield
    except StorageError:
        raise
    except Outside as error:
        raise StorageError(error.problems) from error
    except Exception as error:
        kind = Missing if isinstance(error, (FileNotFoundError, NotADirectoryError)) else StorageError
        why = reason(error)
        raise kind(f"{shown(uri)} cannot be {what} ({why}); {_remedy(uri, why, patience)}") from error


def _remedy(uri: str, why: str, patience: Patience) -> str:
    if local_path(uri) is not None:
        return "make room, or name another folder"
    scheme = uri.partition("://")[0]
    settings = _SETTINGS[_kind(scheme)] if scheme in (*S3, *GCS, *AZURE) else "the address"
    if re.search(r"NO_SUCH_BUCKET|Bucket '.*' not found", why):
        return "make the bucket first, or name another"
    if re.search(_PASSING, why):
        tried = f"it was tried {patience.attempts} times"
        return f"{tried}; see that the store answers, and check the environment ({settings})"
    return f"check the right to read and write there, and the environment ({settings})"


# -------------------------------------------------------------------------------------------------------------- objects


def read(uri: str, patience: Patience = PATIENT) -> bytes | None:
    """A small object's content; None where there is no such object.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    try:
        with _told(uri, "read", patience):
            fs, root = file_system(uri, patience)
            return bytes(fs.cat_file(root))
    except Missing:
        return None


def write(uri: str, content: bytes, patience: Patience = PATIENT) -> None:
    """Put a small object: a reader finds the old content or the new, never a part.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    with _told(uri, "written", patience):
        fs, root = file_system(uri, patience)
        _put(fs, root, iter([content]))


def sizes(uri: str, patience: Patience = PATIENT) -> dict[str, int]:
    """The bytes of each object under a URI, by its name from there; empty where there is nothing.

    Raises:
        StorageError: the store refuses or does not answer, or a name would lead out of a folder.
    """
    try:
        with _told(uri, "read", patience):
            fs, root = file_system(uri, patience)
            start = len(root.rstrip("/")) + 1
            found = fs.find(root, detail=True)
            files = {name[start:]: info["size"] for name, info in sorted(found.items()) if info["type"] == "file"}
            return {checked(name, shown(uri)): size for name, size in files.items()}
    except Missing:
        return {}


def delete(uri: str, patience: Patience = PATIENT) -> None:
    """Remove an object, or all that is in a folder; its manifest first, so that the rest is never taken for whole.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    for name in (MANIFEST, None):
        with contextlib.suppress(Missing), _told(uri, "deleted", patience):
            fs, root = file_system(join(uri, name) if name else uri, patience)
            fs.rm(root, recursive=name is None)


def problems(uri: str) -> list[str]:
    """Why a folder in a store, or here, cannot be written to and read from; found by doing both."""
    probe = join(uri, f".writable-{secrets.token_hex(4)}")
    try:
        write(probe, b"", QUICK)
        with _told(uri, "read", QUICK):
            fs, root = file_system(probe, QUICK)
            fs.info(root)
            fs.rm_file(root)
    except StorageError as error:
        return [problem.replace(shown(probe), shown(uri)) for problem in error.problems]
    return []


def _put(fs: Any, root: str, blocks: Iterator[bytes]) -> None:
    """Stores show an object when it is whole; here, it is written beside and renamed."""
    local = "file" in fs.protocol
    at = root
    if local:
        os.makedirs(os.path.dirname(root), exist_ok=True)
        at = str(Path(root).with_name(f".{Path(root).name}.{secrets.token_hex(4)}"))
    with fs.open(at, "wb") as sink:
        for block in blocks:
            sink.write(block)
    if local:
        os.replace(at, root)


# -------------------------------------------------------------------------------------------------------------- folders


def whole(uri: str, patience: Patience = PATIENT) -> dict[str, Any] | None:
    """The manifest of a whole folder; None where it is missing, unreadable, or an object has another size than it says.

    Raises:
        StorageError: the store refuses or does not answer, or a name in the manifest would lead out of the folder.
    """
    manifest = manifest_of(uri, patience)
    if manifest is None:
        return None
    found = sizes(uri, patience)
    return manifest if all(found.get(name) == size for name, size in manifest["files"].items()) else None


def manifest_of(uri: str, patience: Patience = PATIENT) -> dict[str, Any] | None:
    """The manifest of a folder, whole or not; None where it is missing or unreadable.

    Raises:
        StorageError: the store refuses or does not answer, or a name in the manifest would lead out of the folder.
    """
    try:
        manifest: dict[str, Any] = json.loads(read(join(uri, MANIFEST), patience) or b"")
        if manifest[DIGESTS].keys() != manifest["files"].keys():
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    with _told(uri, "read", patience):
        for name in named(manifest):
            checked(name, shown(join(uri, MANIFEST)))
    return manifest


def upload(folder: Path, uri: str, patience: Patience = PATIENT) -> None:
    """Send a whole folder, its manifest last; nothing, where the same is there already.

    Args:
        folder: with a manifest, as ``artifacts.build_once`` leaves it.
        uri: of the folder that it becomes.
        patience: with the store.

    Raises:
        StorageError: the store refuses or does not answer; what was sent is not taken for whole, and sent again.
        ValueError: the folder is not whole.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} is not whole")
    names = list(manifest["files"])
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        manifest[DIGESTS] = dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))
        there = whole(uri, patience)
        if there == manifest:
            return
        if there is not None:
            delete(uri, patience)  # readers take what is being replaced for neither
        for _ in pool.map(lambda name: _send(folder / name, join(uri, name), patience), names):
            pass
    write(join(uri, MANIFEST), json.dumps(manifest, ensure_ascii=False, indent=2).encode(), patience)


def download(uri: str, folder: Path, patience: Patience = PATIENT) -> dict[str, Any]:
    """Bring a whole folder here, by one process at a time; nothing, where it is here already.

    Returns:
        Its manifest.

    Raises:
        NotWhole: there is no whole folder.
        Damaged: a file is not what the manifest says.
        StorageError: the store refuses or does not answer.
    """
    return build_once(folder, lambda work: fetch(uri, work, patience))


def fetch(uri: str, work: Path, patience: Patience = PATIENT) -> dict[str, Any]:
    """Fill an empty folder with a whole folder's files, each compared with what the manifest says of it.

    Returns:
        The manifest.

    Raises:
        NotWhole: there is no whole folder.
        Damaged: a file is not what the manifest says.
        StorageError: the store refuses or does not answer, or a name would lead out of the folder.
    """
    manifest = whole(uri, patience)
    if manifest is None:
        raise NotWhole(f"{shown(uri)} is not there, or not whole; begin the job anew, which makes it")
    digests = manifest.pop(DIGESTS)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda name: _bring(uri, name, work, patience), digests)
        brought = dict(zip(digests, found, strict=True))
    for name, digest in digests.items():
        if brought[name] != digest:
            raise Damaged(f"{shown(join(uri, name))} is damaged: it is not what {MANIFEST} says; begin the job anew")
    return manifest


def _send(path: Path, uri: str, patience: Patience) -> None:
    with _told(uri, "written", patience):
        fs, root = file_system(uri, patience)
        _put(fs, root, _blocks(path))


def _bring(uri: str, name: str, folder: Path, patience: Patience) -> str:
    """The SHA-256 of the object whose content is in the folder's file of that name now."""
    at = join(uri, name)
    digest = hashlib.sha256()
    try:
        with _told(at, "read", patience):
            path = inside(folder, name, shown(uri))
            path.parent.mkdir(parents=True, exist_ok=True)
            fs, root = file_system(at, patience)
            with path.open("wb") as sink, fs.open(root, "rb") as source:
                while block := source.read(_BLOCK):
                    sink.write(block)
                    digest.update(block)
    except Missing as error:
        raise NotWhole(f"{shown(at)} is gone; begin the job anew, which makes it") from error
    return digest.hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
