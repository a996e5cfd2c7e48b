"""JSON: one value of a text, and the records of a file that may be larger than memory, read piece by piece.

What is no JSON becomes a ``Fault`` in its place, and reading goes on at the next record whose start can be told.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, BinaryIO, NoReturn

from raytune_lora.data import files
from raytune_lora.data.rows import Fault, Record
from raytune_lora.errors import UserError

LISTS = ("data", "rows", "train", "examples", "records", "samples")  # keys whose list is a JSON file's records
_OTHER = object()  # in place of a record that is in another list than is meant
_STRAY = "no name of a split or of rows, beside lists that have one"


# ------------------------------------------------------------------------------------------------------------ one value


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


def too_long(what: str) -> Fault:
    """What is said of a line or a value of more than ``files.LONGEST``."""
    return Fault("unreadable", f"{what} of more than {files.LONGEST // 2**20} MiB, or something in it is not closed")


# --------------------------------------------------------------------------------------------------------------- a file


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
            if len(self._text) - self._at > files.LONGEST:
                raise _NoEndError(too_long("a value").reason)
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
        block = self._file.read(max(files.BLOCK, len(ahead)))
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


def read_json(
    file: str, content: BinaryIO, stream: files.Stream, keys: Sequence[str] | None = None, stray: Sequence[str] = ()
) -> Iterator[Record]:
    """The records of a JSON file (see ``readers.read_file``).

    Args:
        file: its name.
        content: its bytes, unpacked, of ``stream``, which knows whether they are damaged.
        keys: whose lists are meant, of an object with several; None: the one of ``LISTS``.
        stray: whose lists are told as faults, item by item.

    Raises:
        UserError: two of its keys hold lists of records.
    """
    window = _Window(content)
    number = 0
    for number, value in enumerate(_values(file, window, keys, stray), 1):
        if value is _OTHER:
            continue
        yield Record(f"{file}#{number}", stream.damage if window.lost and stream.damage else value)
    if stream.damage and not window.lost:
        yield Record(f"{file}#{number + 1}", stream.damage)


def list_keys(file: str, known: Callable[[str], object]) -> list[str]:
    """The keys of a JSON file's first object that hold lists of objects, in order, and of those that follow it.

    Args:
        file: its name.
        known: whether a key's list may hold rows; what follows an object without such a list is not read.

    Raises:
        UserError: the file cannot be read.
    """
    found: list[str] = []
    with files.opened(file) as raw:
        window = _Window(io.BufferedReader(files.unpacked(raw, files.suffixes(file)[1]), files.BLOCK))
        try:
            while window.take("{"):
                before = len(found)
                for key in _lists(window):
                    found.append(key)
                if window.lost or not any(map(known, found[before:])):
                    break
                window.take(",")
        except _NoEndError:  # which is told where the rows are read
            pass
    return found


def _lists(window: _Window) -> Iterator[str]:
    """The keys of an object behind its brace that hold lists of objects.

    Raises:
        _NoEndError: it is no JSON.
    """
    for key in _fields(window):
        if not _holds_rows(window):
            window.value()
            continue
        yield key
        for _ in _items(window):
            pass
        if window.lost:
            return


def _values(file: str, window: _Window, keys: Sequence[str] | None, stray: Sequence[str]) -> Iterator[Any]:
    """The records among the values of a text, and ``_OTHER`` for each that is in another list than is meant."""
    listed: str | None = None
    if window.peek() == "{":
        listed = yield from _object(file, window, keys, stray)
        window.take(",")
    while not window.lost and (sign := window.peek()):
        if sign == "[":
            yield from _items(window)
        elif sign == "{" and listed:
            yield from _object(file, window, keys, stray)
            window.take(",")
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


def _fields(window: _Window) -> Iterator[str]:
    """The keys of an object behind its brace; whoever takes them takes each value from the window.

    Raises:
        _NoEndError: it is no JSON.
    """
    while not window.take("}"):
        key = window.value()
        if not isinstance(key, str) or not window.take(":"):
            raise _NoEndError("not JSON: no key and colon in an object")
        yield key
        if not window.take(",") and window.peek() != "}":
            raise _NoEndError("not JSON: no comma after a value")


def _holds_rows(window: _Window) -> bool:
    return window.peek() == "[" and window.peek(after=1) == "{"


def _object(
    file: str, window: _Window, keys: Sequence[str] | None, stray: Sequence[str]
) -> Generator[Any, None, str | None]:
    """The object that comes next: the items of the lists that are meant, or itself if it holds no list of rows.

    Returns:
        The last key that holds such a list.
    """
    fields: dict[str, Any] = {}
    listed: str | None = None
    window.take("{")
    try:
        for key in _fields(window):
            if not _holds_rows(window) or (keys is None and key not in LISTS):
                fields[key] = window.value()
                continue
            if keys is None and listed:
                raise UserError(two_lists(file, [listed, key]))
            listed = key
            for item in _items(window):
                if keys is None or key in keys:
                    yield item
                else:
                    yield Fault("unreadable", f"in the list {key!r}: {_STRAY}") if key in stray else _OTHER
            if window.lost:
                return listed
        if window.peek() not in _AFTER_ITEM:
            raise _NoEndError("not JSON: something follows the object")
    except _NoEndError as error:
        yield window.recover(error.fault, "")
    else:
        if not listed:
            yield next((value for value in fields.values() if isinstance(value, Fault)), fields)
    return listed


def two_lists(file: str, keys: Sequence[str]) -> str:
    """What is said of a file with several lists of rows that are not of different splits."""
    return f"data: {file} has two lists of rows ({', '.join(keys)}); write each to its own file"
