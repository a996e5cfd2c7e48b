"""From a path to a stream of records: JSONL, JSON, CSV and Parquet, also compressed, here or in an object store.

No reader holds more than a window of a file. A record that cannot be read becomes a ``Fault`` in its place and reading
goes on behind it; only what concerns a file as a whole (it is not there, its table is damaged) is a ``UserError``.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from raytune_lora.data.rows import Fault, Record
from raytune_lora.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst")  # may follow each suffix but .parquet, which is packed within
LISTS = (
    "data",
    "rows",
    "train",
    "examples",
    "records",
    "samples",
)  # keys whose list of objects is a JSON file's records
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of the datasets library
LONGEST = 64 * 2**20  # bytes of a line, characters of a field or value; beyond, something is not closed
BLOCK = 2**18  # bytes read at once
PARQUET_ROWS = 512  # made into Python objects at once
_NUL = "holds a NUL byte"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_REMEDY = f"known are {', '.join(SUFFIXES)}, and with {' or '.join(PACKED)} after it each but .parquet"


# --------------------------------------------------------------------------------------------------------------- paths


def is_hub_name(path: str) -> bool:
    """Whether a path is ``owner/name`` of a data set on the hub: such a form, no known suffix, and nothing here."""
    return bool(_HUB_NAME.fullmatch(path)) and not _known(path) and not Path(path).exists()


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
    files = [file for file in found if _known(file) and (is_file or PurePosixPath(file).name not in METADATA)]
    if not files:
        what = "has no suffix that is known" if is_file else "holds no file of a known suffix"
        raise UserError(f"data: {path} {what}; {_REMEDY}")
    return sorted(files)


def identity(files: list[str]) -> list[list[Any]]:
    """What the files' content is addressed by: [name, bytes, SHA-256], of a URI [URI, bytes, its tag or time].

    Raises:
        UserError: a file cannot be read.
    """
    return [_remote_identity(file) if "://" in file else _local_identity(file) for file in files]


def _known(file: str) -> bool:
    suffix, packed = _suffixes(file)
    return suffix in SUFFIXES and not (packed and suffix == ".parquet")


def _suffixes(file: str) -> tuple[str, str]:
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
        fs, root = _file_system(path)
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


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        fs, root = url_to_fs(path)
    except ImportError as error:
        raise UserError(f"data: {path} needs a package that is not installed ({error}); pip install it") from error
    return fs, str(root)


def _local_identity(file: str) -> list[Any]:
    digest, size = hashlib.sha256(), 0
    with _opened(file) as raw:
        while block := raw.read(BLOCK):
            digest.update(block)
            size += len(block)
    return [os.path.basename(file), size, digest.hexdigest()]


def _remote_identity(file: str) -> list[Any]:
    with _as_user_errors(file):
        fs, root = _file_system(file)
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
def _opened(file: str) -> Iterator[BinaryIO]:
    """The file's bytes, as they lie there."""
    with _as_user_errors(file):
        if "://" not in file:
            with open(file, "rb", buffering=0) as raw:
                yield raw
        else:
            fs, root = _file_system(file)
            with fs.open(root, "rb") as raw:
                yield raw


@contextmanager
def _as_user_errors(file: str) -> Iterator[None]:
    """Turns what a file system says into an error that names the file.

    Raises:
        UserError: instead of OSError, and, since every kind of remote storage has exceptions of its own, of a URI
            instead of any.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"data: {file} cannot be read ({error.strerror or error}); name another file") from error
    except Exception as error:
        if "://" not in file:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"data: {file} cannot be read ({reason}); check the address and the right to read") from error


# ------------------------------------------------------------------------------------------------------------- records


def read_file(file: str) -> Iterator[Record]:
    """The records of one file, by its suffix (see ``SUFFIXES`` and ``PACKED``).

    A JSON file is an array of objects, one object, objects one after the other, or one object in which a key of
    ``LISTS`` holds the array. A record that cannot be read has a ``Fault`` as its value. A packed file that is cut off
    or damaged gives all whole records before that and one ``Fault``.

    Args:
        file: as ``expand`` returns it; ``Record.where`` starts with it.

    Raises:
        UserError: the suffix is unknown, the file cannot be read, is UTF-16 or a damaged Parquet file, or has two
            columns of one name.
    """
    suffix, packed = _suffixes(file)
    if not _known(file):
        raise UserError(f"data: {file} has no suffix that is known; {_REMEDY}")
    with _opened(file) as raw:
        if suffix == ".parquet":
            yield from _parquet(file, raw)
            return
        stream = _Stream(_BLOCKS[packed](raw))
        content = io.BufferedReader(stream, BLOCK)
        if content.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"data: {file} is UTF-16 text; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
        if suffix in (".csv", ".tsv"):
            yield from _csv(file, content, stream, "\t" if suffix == ".tsv" else ",")
        else:
            yield from (_json if suffix == ".json" else _jsonl)(file, content, stream)


class _DamagedError(Exception):
    """A packed stream ends early or cannot be unpacked further."""


class _Stream(io.RawIOBase):
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


# --------------------------------------------------------------------------------------------------------- JSON values


class _ConstantError(ValueError):
    """NaN or Infinity, which Python writes and JSON does not have."""


def _refuse(constant: str) -> NoReturn:
    raise _ConstantError(constant)


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_LENIENT = json.JSONDecoder(parse_constant=lambda text: None, parse_int=lambda text: None)  # finds a value's end
_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')


def decode_json(text: str) -> Any:
    """The value of a JSON text, or a ``Fault`` of the kind ``unreadable``."""
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if text.startswith("\ufeff"):
            return decode_json(text[1:])
        return Fault("unreadable", _reason(text, error))
    return value


def _reason(text: str, error: Exception) -> str:
    """Why a text is no value."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"not JSON: {error.msg} at {line}column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        raw = 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF and error.object[error.start] in text
        return "not UTF-8" if raw else "holds half a character (a lone surrogate)"
    if isinstance(error, RecursionError):
        return "not JSON that can be read: it is nested too deep"
    if isinstance(error, _ConstantError):
        found = next((m for m in _STRING_OR_CONSTANT.finditer(text) if m[0][0] != '"'), None)
        return f"not JSON: {error}" + (f" at column {found.start() + 1}" if found else "")
    return f"not JSON that can be read: a number of more than {sys.get_int_max_str_digits()} digits"


def _jsonl(file: str, content: BinaryIO, stream: _Stream) -> Iterator[Record]:
    number = 0
    while line := content.readline(LONGEST):
        number += 1
        if line[-1:] != b"\n":
            if len(line) == LONGEST:
                while (part := content.readline(LONGEST)) and part[-1:] != b"\n":
                    pass
                yield Record(f"{file}:{number}", _too_long("a line"))
                continue
            if stream.damage:
                break
        if not line.isspace():
            yield Record(f"{file}:{number}", _line_value(line))
    else:
        number += 1
    if stream.damage:
        yield Record(f"{file}:{number}", stream.damage)


def _line_value(line: bytes) -> Any:
    try:
        text = line.rstrip().decode()
    except UnicodeDecodeError as error:
        return Fault("unreadable", f"not UTF-8 (byte {error.start + 1} of the line)")
    return decode_json(text)


def _too_long(what: str) -> Fault:
    return Fault("unreadable", f"{what} of more than {LONGEST // 2**20} MiB, or something in it is not closed")


# ---------------------------------------------------------------------------------------------------------- JSON files


class _NoEndError(Exception):
    """The text at a place is no value, and where it ends is not known."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault("unreadable", reason)


class _Window:
    """A part of a text that moves on, and grows only while a value does not end in it.

    ``lost`` says that nothing behind this place can be read.
    """

    def __init__(self, content: BinaryIO) -> None:
        self._file = io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="")
        self._text, self._at, self._ended = "", 0, False
        self.lost = False

    def peek(self, after: int = 0) -> str:
        """The next sign that is not white space, or nothing at the end; with ``after=1``, the one that follows it."""
        while not (match := _NEXT[after].match(self._text, self._at)) and not self._ended:
            self._grow()
        if not match:
            return ""
        self._at = match.start("first")
        return match["sign"]

    def take(self, sign: str) -> bool:
        """Step over a sign, if it is the next one."""
        found = self.peek() == sign
        self._at += found
        return found

    def value(self) -> Any:
        """The value that comes next, or a Fault if it is one that is refused.

        Raises:
            _NoEndError: it is no JSON. This place stays where it is.
        """
        self.peek()
        refused: Fault | None = None
        while True:
            try:
                value, end = (_LENIENT if refused else _DECODER).raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 12
                if self._ended or not cut:
                    start = self._at
                    here = json.JSONDecodeError(error.msg, self._text[start : error.pos + 1], error.pos - start)
                    raise _NoEndError(_reason("", here)) from error
            except ValueError as error:  # a constant or a number, which has an end all the same
                refused = Fault("unreadable", _reason("", error))
                continue
            except RecursionError as error:
                raise _NoEndError(_reason("", error)) from error
            else:
                if end < len(self._text) or self._ended:
                    part, self._at = self._text[self._at : end], end
                    return refused or _checked(part, value)
            if len(self._text) - self._at > LONGEST:
                raise _NoEndError(_too_long("a value").reason)
            self._grow()

    def item(self, margin: str | None) -> Any:
        """The item of a list that comes next, or a Fault; then this place is where the next item may be."""
        try:
            value = self.value()
            if self.peek() not in _AFTER_ITEM:
                raise _NoEndError("not JSON: something follows the value")
        except _NoEndError as error:
            return self.recover(error.fault, margin)
        return value

    def margin(self) -> str | None:
        """The white space before this place on its line; None where there is something else."""
        _, newline, margin = self._text[: self._at].rpartition("\n")
        return margin if newline and not margin.strip() else None

    def recover(self, fault: Fault, margin: str | None) -> Fault:
        """Go on at the next line on which an object starts behind that margin, which no string can hold.

        Returns:
            The fault, which says so where there is no such line.
        """
        mark = f"\n{margin}{{"
        while margin is not None:
            found = self._text.find(mark, self._at)
            if found >= 0:
                self._at = found + len(mark) - 1
                return fault
            self._at = max(self._at, len(self._text) - len(mark) + 1)
            if self._ended:
                break
            self._grow()
        self.lost = True
        return Fault(fault.kind, f"{fault.reason}; what may follow in the file is not read")

    def _grow(self) -> None:
        """Read at least as much again as lies ahead, so that a long value is tried only a few times."""
        ahead = self._text[self._at :]
        block = self._file.read(max(BLOCK, len(ahead)))
        self._text, self._at, self._ended = ahead + block, 0, not block


_NEXT = [
    re.compile(r"[ \t\r\n]*(?P<first>)(?P<sign>[^ \t\r\n])"),
    re.compile(r"[ \t\r\n]*(?P<first>)[^ \t\r\n][ \t\r\n]*(?P<sign>[^ \t\r\n])"),
]
_AFTER_ITEM = ("", ",", "]", "{", "[")


def _checked(part: str, value: Any) -> Any:
    """The value of a part of the text, or a Fault if it holds what is no character."""
    try:
        if not part.isascii():
            part.encode()
        if "\\ud" in part or "\\uD" in part:
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        return Fault("unreadable", _reason(part, error))
    return value


def _json(file: str, content: BinaryIO, stream: _Stream) -> Iterator[Record]:
    window = _Window(content)
    number = 0
    for number, value in enumerate(_values(file, window), 1):
        yield Record(f"{file}#{number}", stream.damage if window.lost and stream.damage else value)
    if stream.damage and not window.lost:
        yield Record(f"{file}#{number + 1}", stream.damage)


def _values(file: str, window: _Window) -> Iterator[Any]:
    """The records among the values of a text."""
    if window.peek() == "{":
        yield from _object(file, window)
        window.take(",")
    while not window.lost and (sign := window.peek()):
        if sign == "[":
            yield from _items(window)
        else:
            yield window.item("")
            window.take(",")


def _items(window: _Window) -> Iterator[Any]:
    """The items of the array that comes next."""
    window.take("[")
    window.peek()
    margin = window.margin()
    while not window.lost and not window.take("]"):
        if not window.peek():
            yield window.recover(Fault("unreadable", "not JSON: the array does not end"), None)
        else:
            yield window.item(margin)
            window.take(",")


def _object(file: str, window: _Window) -> Iterator[Any]:
    """The first object of a text: the items of its list, if it holds one under a key of ``LISTS``, or itself."""
    fields: dict[str, Any] = {}
    listed: str | None = None
    window.take("{")
    try:
        while not window.take("}"):
            key = window.value()
            if not isinstance(key, str) or not window.take(":"):
                raise _NoEndError("not JSON: no key and colon in an object")
            if key in LISTS and window.peek() == "[" and window.peek(after=1) == "{":
                if listed:
                    raise UserError(f"data: {file} has two lists of rows ({listed}, {key}); write each to its own file")
                listed = key
                yield from _items(window)
                if window.lost:
                    return
            else:
                fields[key] = window.value()
            if not window.take(",") and window.peek() != "}":
                raise _NoEndError("not JSON: no comma after a value")
        if window.peek() not in _AFTER_ITEM:
            raise _NoEndError("not JSON: something follows the object")
    except _NoEndError as error:
        yield window.recover(error.fault, "")
    else:
        if not listed:
            yield next((value for value in fields.values() if isinstance(value, Fault)), fields)


# ------------------------------------------------------------------------------------------------------------- tables


def _csv(file: str, content: BinaryIO, stream: _Stream, delimiter: str) -> Iterator[Record]:
    """Rows of a table, as an object by the header's names; all values are text. Quotes must be closed (RFC 4180)."""
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="")
    lines = _whole_lines(text, stream)
    head = next(lines, "")
    if delimiter == "," and "," not in head:  # as spreadsheets write it where the comma is the decimal sign
        delimiter = next((sign for sign in ";\t" if sign in head), ",")
    rows = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
    names = _header(file, rows)
    while names:
        number = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            if not stream.damage or "unexpected end" not in str(error):
                until = f" (to line {rows.line_num})" if rows.line_num > number else ""
                nul = "NUL" in str(error)  # Python 3.10 refuses it, later ones let it through
                reason = _NUL if nul else f"not CSV: {error}{until}"
                yield Record(f"{file}:{number}", Fault("unreadable", reason))
            continue
        if fields:
            yield Record(f"{file}:{number}", _fields_value(names, fields))
    if stream.damage:
        yield Record(f"{file}:{rows.line_num + 1}", stream.damage)


def _whole_lines(text: io.TextIOWrapper, stream: _Stream) -> Iterator[str]:
    """All lines, but for the last one of a damaged file if it is cut off."""
    for line in iter(partial(text.readline, LONGEST), ""):
        if stream.damage and line[-1] not in "\r\n":
            return
        yield line


def _header(file: str, rows: Any) -> list[str]:
    """The names of the columns in a table's first line that is not blank; none of an empty file."""
    try:
        names = [name.strip() for name in next((row for row in rows if any(map(str.strip, row))), [])]
    except csv.Error as error:
        raise UserError(f"data: {file}: the header cannot be read ({error}); write it as CSV") from error
    if any("\udc80" <= sign <= "\udcff" for name in names for sign in name):
        raise UserError(f"data: {file}: the header cannot be read (not UTF-8); write the table as UTF-8")
    _check_names(file, names)
    return names


def _check_names(file: str, names: list[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"data: {file} has more than one column of the name {', '.join(map(repr, twice))}; rename them")


def _fields_value(names: list[str], fields: list[str]) -> Any:
    if len(fields) != len(names):
        return Fault("unreadable", f"{len(fields)} fields where the header has {len(names)}")
    text = "".join(fields)
    if "\0" in text:
        return Fault("unreadable", _NUL)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return Fault("unreadable", "not UTF-8")
    return dict(zip(names, fields, strict=True))


def _parquet(file: str, raw: BinaryIO) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # With a buffer, pages are read one by one: a row group may be all of a large file.
        source = pq.ParquetFile(raw if "://" in file else file, pre_buffer=False, buffer_size=BLOCK)
        _check_names(file, source.schema_arrow.names)
        for batch in source.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
            for value in _batch_values(batch):
                number += 1
                yield Record(f"{file}#{number}", value)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        after = f" after row {number}" if number else ""
        raise UserError(f"data: {file} is damaged{after} ({error}); write it again") from error


def _batch_values(batch: Any) -> list[Any]:
    """A batch's rows as objects."""
    try:
        return list(batch.to_pylist())
    except ValueError:  # text that is not UTF-8, a time that Python cannot hold: in one row or more
        return [_row_value(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row_value(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return Fault("unreadable", "not UTF-8")
    except ValueError as error:
        return Fault("unreadable", f"a value that cannot be read ({error})")


# ----------------------------------------------------------------------------------------------------------------- hub


def read_hub(name: str, *, subset: str | None, split: str, revision: str | None) -> Iterator[Record]:
    """The records of a data set on the Hugging Face hub, streamed.

    Args:
        name: ``owner/name``, or a local folder laid out as one of the hub.
        subset: the configuration's name; None where there is only one.
        split: such as ``train``.
        revision: branch, tag or commit; None for the newest.

    Raises:
        UserError: there is no such data set, subset or split, or it cannot be reached or read.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split, revision=revision, streaming=True)
        for number, value in enumerate(rows, 1):
            yield Record(f"{name}#{number}", value)
    except FileNotFoundError as error:
        raise UserError(
            f"data: {name} is no data set of the hub that can be read ({_first_line(error)}); check the name and "
            "data.revision, log in (hf auth login) if it is private, or name a local file"
        ) from error
    except Exception as error:
        known = _hub_choices(name, subset, split, revision) if isinstance(error, ValueError) else None
        reason = known or f"data: {name} cannot be read from the hub ({type(error).__name__}: {_first_line(error)})"
        raise UserError(reason) from error


def _hub_choices(name: str, subset: str | None, split: str, revision: str | None) -> str | None:
    """What there is instead of a subset or a split that there is not."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    try:
        subsets = get_dataset_config_names(name, revision=revision)
        if subset not in subsets and (subset or (len(subsets) > 1 and "default" not in subsets)):
            what = f"has no subset {subset!r}" if subset else "has several subsets"
            return f"data.subset: {name} {what}; name one of {', '.join(subsets)}"
        splits = get_dataset_split_names(name, subset, revision=revision)
    except Exception:  # the first error is told instead
        return None
    return None if split in splits else f"data.split: {name} has no split {split!r}; name one of {', '.join(splits)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
