"""From a file to a stream of records: JSONL, JSON, CSV, Parquet and Arrow, also packed; and from a data set of the hub.

No reader holds more than a window of a file. A record that cannot be read becomes a ``Fault`` in its place and reading
goes on behind it; only what concerns a file as a whole (it is not there, its table is damaged) is a ``UserError``.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from raytune_lora.data import files
from raytune_lora.data.json_stream import decode_json, read_json, too_long
from raytune_lora.data.rows import Fault, Record
from raytune_lora.errors import UserError
from raytune_lora.network import hub_unreachable

PARQUET_ROWS = 512  # made into Python objects at once
_ARROW_FILE = b"ARROW1"
_SEPARATORS = ";\t|"  # of a table that has no commas between its names
_SEPARATOR_LINE = re.compile(r'"?sep=([,;|:\t])"?\s*', re.IGNORECASE)
_IN_QUOTES = re.compile(r'"(?:[^"]|"")*(?:"|\Z)')
_NUL = "holds a NUL byte"
_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_SECONDS = 10  # that the hub has to answer in


def read_file(file: str, keys: Sequence[str] | None = None, stray: Sequence[str] = ()) -> Iterator[Record]:
    """The records of one file, by its suffix (see ``files.SUFFIXES`` and ``files.PACKED``).

    A JSON file is an array of objects, one object, objects one after the other, or one object in which a key of
    ``json_stream.LISTS`` holds the array. A record that cannot be read has a ``Fault`` as its value. A packed file that
    is cut off or damaged gives all whole records before that and one ``Fault``.

    Args:
        file: as ``files.expand`` returns it; ``Record.where`` starts with it.
        keys: of a JSON object whose lists are meant.
        stray: of a JSON object whose lists are told as faults.

    Raises:
        UserError: the suffix is unknown, the file cannot be read, is UTF-16 or a damaged Parquet file, or has two
            columns of one name.
    """
    suffix, packed = files.suffixes(file)
    if not files.known(file):
        raise UserError(f"data: {file} has no suffix that is known; {files.REMEDY}")
    with files.opened(file) as raw:
        if suffix in (".parquet", ".arrow"):
            yield from (_parquet if suffix == ".parquet" else _arrow)(file, raw)
            return
        stream = files.unpacked(raw, packed)
        content = io.BufferedReader(stream, files.BLOCK)
        if content.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"data: {file} is UTF-16 text; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
        if suffix in (".csv", ".tsv"):
            yield from _csv(file, content, stream, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json":
            yield from read_json(file, content, stream, keys, stray)
        else:
            yield from _jsonl(file, content, stream)


# ---------------------------------------------------------------------------------------------------------------- lines


def _jsonl(file: str, content: BinaryIO, stream: files.Stream) -> Iterator[Record]:
    number = 0
    while line := content.readline(files.LONGEST):
        number += 1
        if line[-1:] != b"\n":
            if len(line) == files.LONGEST:
                while (part := content.readline(files.LONGEST)) and part[-1:] != b"\n":
                    pass
                yield Record(f"{file}:{number}", too_long("a line"))
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


# --------------------------------------------------------------------------------------------------------------- tables


def _csv(file: str, content: BinaryIO, stream: files.Stream, delimiter: str) -> Iterator[Record]:
    """Rows of a table, as an object by the header's names; all values are text. Quotes must be closed (RFC 4180)."""
    csv.field_size_limit(files.LONGEST)
    text = io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="")
    lines = _whole_lines(text, stream)
    head = next(lines, "")
    said = _SEPARATOR_LINE.fullmatch(head)
    if said:  # as Excel understands it
        delimiter, first = said[1], [""]  # a blank line, so that lines are counted as they are
    else:
        delimiter, first = delimiter if delimiter == "\t" else _separator(head), [head]
    rows = csv.reader(itertools.chain(first, lines), delimiter=delimiter, strict=True)
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


def _separator(head: str) -> str:
    """What separates a header's names: a comma, unless only a semicolon, tab or bar is there outside of quotes.

    Spreadsheets write a semicolon where the comma is the decimal sign.
    """
    bare = _IN_QUOTES.sub("", head)
    return "," if "," in bare else next((sign for sign in _SEPARATORS if sign in bare), ",")


def _whole_lines(text: io.TextIOWrapper, stream: files.Stream) -> Iterator[str]:
    """All lines, but for the last one of a damaged file if it is cut off."""
    for line in iter(partial(text.readline, files.LONGEST), ""):
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
    def batches() -> Iterator[Any]:
        import pyarrow.parquet as pq

        # With a buffer, pages are read one by one: a row group may be all of a large file.
        source = pq.ParquetFile(raw if "://" in file else file, pre_buffer=False, buffer_size=files.BLOCK)
        _check_names(file, source.schema_arrow.names)
        yield from source.iter_batches(batch_size=PARQUET_ROWS, use_threads=False)

    return _batch_records(file, batches())


def _arrow(file: str, raw: BinaryIO) -> Iterator[Record]:
    """A stream, as ``Dataset.save_to_disk`` writes it, or a file of Arrow's."""

    def batches() -> Iterator[Any]:
        import pyarrow as pa

        start = raw.read(len(_ARROW_FILE))
        raw.seek(0)
        if start == _ARROW_FILE:
            whole = pa.ipc.open_file(pa.PythonFile(raw, mode="r"))
            found, names = map(whole.get_batch, range(whole.num_record_batches)), whole.schema.names
        else:
            stream = pa.ipc.open_stream(pa.PythonFile(raw, mode="r"))
            found, names = iter(stream), stream.schema.names
        _check_names(file, names)
        for batch in found:
            yield from (batch.slice(at, PARQUET_ROWS) for at in range(0, batch.num_rows, PARQUET_ROWS))

    return _batch_records(file, batches())


def _batch_records(file: str, batches: Iterator[Any]) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for value in _batch_values(batch):
                number += 1
                yield Record(f"{file}#{number}", value)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        after = f" after row {number}" if number else ""
        raise UserError(f"data: {file} is damaged{after} ({error}); write it again") from error


def _batch_values(batch: Any) -> list[Any]:
    """A batch's rows as objects; a map, as Spark writes a dictionary, is an object too."""
    try:
        return list(batch.to_pylist(maps_as_pydicts="strict"))
    except (ValueError, KeyError):  # text that is not UTF-8, a time that Python cannot hold: in one row or more
        return [_row_value(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row_value(row: Any) -> Any:
    try:
        return row.to_pylist(maps_as_pydicts="strict")[0]
    except UnicodeDecodeError:
        return Fault("unreadable", "not UTF-8")
    except (ValueError, KeyError) as error:
        return Fault("unreadable", f"a value that cannot be read ({error})")


# ------------------------------------------------------------------------------------------------------------------ hub


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

    if not Path(name).is_dir() and (why := hub_unreachable()):
        raise UserError(f"data: {name} cannot be read from the hub, which does not answer ({why}); name a local file")
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


def hub_splits(name: str, subset: str | None, revision: str | None) -> list[str]:
    """The splits that a hub data set has; none where the hub does not say, which is told when rows are read."""
    from datasets import get_dataset_split_names

    if hub_unreachable():
        return []
    try:
        return list(get_dataset_split_names(name, subset, revision=revision))
    except Exception:
        return []


def hub_commit(name: str, revision: str | None) -> str:
    """The commit that a branch or tag of a hub data set stands for now; a commit stands for itself, unasked.

    Raises:
        UserError: the hub does not say.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=_HUB_SECONDS).sha)
    except Exception as error:  # the hub's client raises its own, its transport's and the operating system's
        raise UserError(
            f"data: the hub does not say which commit of {name} is {revision or 'the newest'} "
            f"({type(error).__name__}: {_first_line(error)}), so that rows prepared before may be other ones; name the "
            "commit itself (data.revision=<40 hexadecimal digits>)"
        ) from error


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
