"""The files that a path means, here or in an object store: their names, what identifies them, and their bytes unpacked.

What a file system says of one becomes a ``UserError`` that names it. The limits of reading are here too.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from raytune_lora import storage
from raytune_lora.data.rows import Fault
from raytune_lora.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_WITHIN = (".parquet", ".arrow")  # packed within
PACKED = (".gz", ".zst")  # may follow each other suffix
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of the datasets library
LONGEST = 64 * 2**20  # bytes of a line, characters of a field or value; beyond, something is not closed
BLOCK = 2**18  # bytes read at once
_REQUEST = 8 * 2**20  # bytes asked of an object store at once
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
REMEDY = f"known are {', '.join(SUFFIXES)}, and with {' or '.join(PACKED)} after it each but {' and '.join(_WITHIN)}"


# ---------------------------------------------------------------------------------------------------------------- paths


def is_hub_name(path: str) -> bool:
    """Whether a path is ``owner/name`` of a data set on the hub: such a form, no known suffix, and nothing here."""
    return bool(_HUB_NAME.fullmatch(path)) and not known(path) and not Path(path).exists()


def expand(path: str) -> list[str]:
    """The files that a path means, sorted.

    Args:
        path: a file; a folder, which stands for all files of known suffixes in it and below, hidden ones aside; a
            pattern with ``*`` or ``**``; or a URI that fsspec knows (``s3://…``), which may also be any of these.

    Raises:
        UserError: it does not exist, or no file that it means has a known suffix.
    """
    found, is_file = _expand_uri(path) if "://" in path else _expand_local(path)
    if not found:
        what = "matches no file" if "*" in path else "does not exist" + " or cannot be reached" * ("://" in path)
        raise UserError(f"data: {path} {what}; name a file, a folder, a pattern or a URI of rows")
    files = [file for file in found if known(file) and (is_file or not _beside(PurePosixPath(file).name))]
    if not files:
        what = "has no suffix that is known" if is_file else "holds no file of a known suffix"
        raise UserError(f"data: {path} {what}; {REMEDY}")
    return sorted(files)


def _beside(name: str) -> bool:
    """Whether a file of that name holds no rows of the data set that it lies in."""
    return name in METADATA or (name.startswith(("cache-", "tmp")) and name.endswith(".arrow"))


def identity(files: list[str]) -> list[list[Any]]:
    """What the files' content is addressed by: [name, bytes, SHA-256], of a store's [URI, bytes, its tag or time].

    Raises:
        UserError: a file cannot be read.
    """
    here = ("file://", "local://")  # whose times are no finer than the file system's
    return [
        _remote_identity(file) if "://" in file and not file.startswith(here) else _local_identity(file)
        for file in files
    ]


def known(file: str) -> bool:
    """Whether a file's name says a form that can be read."""
    suffix, packed = suffixes(file)
    return suffix in SUFFIXES and not (packed and suffix in _WITHIN)


def suffixes(file: str) -> tuple[str, str]:
    """The suffix that says the form, and the one that says how it is packed (or nothing)."""
    path = PurePosixPath((file.partition("?")[0] if "://" in file else file).lower())
    return (PurePosixPath(path.stem).suffix, path.suffix) if path.suffix in PACKED else (path.suffix, "")


def _expand_local(path: str) -> tuple[list[str], bool]:
    """All files that a path means, known or not, and whether it names one file."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _below(path), False
    if os.path.exists(path):
        return [path], True
    matches = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    return [match for match in matches if os.path.isfile(match)], False


def _below(folder: str) -> list[str]:
    """All files in a folder and below that are not hidden; the folder itself, where there are none."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return files or [folder]


def _expand_uri(path: str) -> tuple[list[str], bool]:
    with _as_user_errors(path):
        fs, root = storage.file_system(path, storage.QUICK)
        try:
            kind = fs.info(root)["type"]
        except FileNotFoundError:
            kind = "pattern" if "*" in root else "nothing"
        if kind == "file":
            return [path], True
        if kind == "directory":
            found = fs.find(root, detail=True)
        else:
            found = fs.glob(root, detail=True) if kind == "pattern" else {}
        start = len(root.partition("*")[0].rstrip("/"))
        names = [name for name, info in found.items() if info["type"] == "file" and "/." not in name[start:]]
        return [fs.unstrip_protocol(name) for name in names] or [path] * (kind == "directory"), False


def _local_identity(file: str) -> list[Any]:
    digest, size = hashlib.sha256(), 0
    with opened(file) as raw:
        while block := raw.read(BLOCK):
            digest.update(block)
            size += len(block)
    return [os.path.basename(file), size, digest.hexdigest()]


def _remote_identity(file: str) -> list[Any]:
    with _as_user_errors(file):
        fs, root = storage.file_system(file)
        info = fs.info(root)
    for key in (
        "ETag",
        "etag",
        "generation",
        "md5Hash",
        "LastModified",
        "last_modified",
        "mtime",
        "updated",
        "created",
    ):
        if info.get(key) is not None:
            return [file, info.get("size"), str(info[key])]
    return [file, *_local_identity(file)[1:]]  # the store does not say when it changes, so it is read


@contextmanager
def _as_user_errors(file: str) -> Iterator[None]:
    """Turns what a file system says into an error that names the file.

    Raises:
        UserError: instead of OSError, and, since every kind of remote storage has exceptions of its own, of a URI
            instead of any.
    """
    try:
        yield
    except storage.StorageError as error:
        raise UserError([f"data: {problem}" for problem in error.problems]) from error
    except UserError:
        raise
    except Exception as error:
        if "://" not in file and not isinstance(error, OSError):
            raise
        remedy = "check the address and the right to read" if "://" in file else "name another file"
        raise UserError(f"data: {storage.shown(file)} cannot be read ({storage.reason(error)}); {remedy}") from error


# ---------------------------------------------------------------------------------------------------------------- bytes


@contextmanager
def opened(file: str) -> Iterator[BinaryIO]:
    """The file's bytes, as they lie there.

    Raises:
        UserError: it cannot be read, now or later.
    """
    with _as_user_errors(file):
        if "://" not in file:
            with open(file, "rb", buffering=0) as raw:
                yield raw
        else:
            fs, root = storage.file_system(file)
            with io.BufferedReader(fs.open(root, "rb"), _REQUEST) as raw:
                yield raw


def unpacked(raw: BinaryIO, packed: str) -> Stream:
    """The bytes of a file that is packed as its second suffix says (see ``suffixes``)."""
    return Stream(_BLOCKS[packed](raw))


class _DamagedError(Exception):
    """A packed stream ends early or cannot be unpacked further."""


class Stream(io.RawIOBase):
    """Blocks of bytes as a file. Damage ends it, and is kept for its reader to tell."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")
        self.damage: Fault | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest and not self.damage:
            try:
                self._rest = memoryview(next(self._blocks, b""))
            except _DamagedError as error:
                self.damage = Fault("unreadable", f"the file is damaged from here on ({error})")
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _plain(raw: BinaryIO) -> Iterator[bytes]:
    while block := raw.read(BLOCK):
        yield block


def _gunzip(raw: BinaryIO) -> Iterator[bytes]:
    packed = gzip.GzipFile(fileobj=raw)
    try:
        while block := packed.read1(BLOCK):  # unlike read, it loses nothing that was unpacked before an error
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _DamagedError(f"gzip: {error}") from error


def _unzstd(raw: BinaryIO) -> Iterator[bytes]:
    packed, given = _zstd_stream(raw), 0
    try:
        while block := packed.read(BLOCK):
            given += len(block)
            yield block
        return
    except OSError as error:
        if error.errno is not None:
            raise
        damage = error
    # Arrow throws away what the failing call had unpacked: that is read again, byte by byte.
    raw.seek(0)
    again, rest = _zstd_stream(raw), bytearray()
    try:
        while given:
            given -= len(again.read(min(given, BLOCK)))
        while len(rest) < BLOCK and (byte := again.read(1)):
            rest += byte
    except OSError:
        pass
    if rest:
        yield bytes(rest)
    raise _DamagedError(f"zstd: {damage}") from damage


def _zstd_stream(raw: BinaryIO) -> Any:
    """The unpacked stream; it must outlive every use of the file, which it closes when it goes."""
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


_BLOCKS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {"": _plain, ".gz": _gunzip, ".zst": _unzstd}
