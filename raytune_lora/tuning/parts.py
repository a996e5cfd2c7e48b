"""The journal of a sweep in an object store, where nothing can be added to an object.

Each event is an object of its own, written before anything is done about it; every so often, and when a sweep goes on,
those since the last time become one. An object's name says which events it holds, by number, and who wrote it: the
label of a driver sorts after those of the drivers before it. What an earlier driver, slow or cut off, writes past the
first event of a later one never happened.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raytune_lora import storage
from raytune_lora.errors import StorageError
from raytune_lora.working_copy import as_trouble

_NAME = re.compile(r"(\d{8})-(\d{8})\.([0-9a-z-]+)\.jsonl")
_MANY = 256  # events of their own before they become one object
_AT_ONCE = 8  # requests
_TRIES = 3  # to read while another makes one object of many


@dataclass(frozen=True)
class Part:
    """An object of the journal."""

    first: int  # numbers of events
    last: int
    label: str  # of the driver that wrote it

    @property
    def name(self) -> str:
        return f"{self.first:08d}-{self.last:08d}.{self.label}.jsonl"


class Parts:
    """A driver's way to the journal of its sweep."""

    def __init__(self, uri: str, label: str = "", check: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            uri: of the folder of parts.
            label: of the driver, after that of every driver before it.
            check: raises where the driver may no longer write.
        """
        self._uri = uri
        self._label = label
        self._check = check
        self._next = 0  # number of the next event
        self._loose: list[bytes] = []  # the newest events, each an object of its own
        self.cleaning = threading.Thread()  # deletes what counts no longer

    def open(self) -> bytes:
        """All events, one a line, to go on after them.

        Raises:
            StorageError: a part is missing or damaged, or the store refuses or does not answer.
        """
        parts, lines = _read(self._uri)
        whole = next((at for at, part in reversed(list(enumerate(parts, 1))) if part.first < part.last), 0)
        self._next = len(lines)
        self._loose = lines[parts[whole].first :] if whole < len(parts) else []
        self._unite()
        return b"".join(lines)

    def check(self) -> None:
        """See that this driver may write.

        Raises:
            StorageError: another may.
        """
        self._check()

    def append(self, line: bytes) -> None:
        """Write an event down; it counts once this returns.

        Raises:
            StorageError: the store refuses or does not answer, or another driver may write.
        """
        self._check()
        with as_trouble():
            storage.write(self._at(Part(self._next, self._next, self._label)), line)
        self._next += 1
        self._loose.append(line)
        if len(self._loose) == _MANY:
            self._unite()

    def _unite(self) -> None:
        """Make one object of the newest events; those that it replaces are deleted after that, and nobody waits."""
        if not self._loose:
            return
        one = Part(self._next - len(self._loose), self._next - 1, self._label)
        self._check()
        with as_trouble():
            storage.write(self._at(one), b"".join(self._loose))
        self._loose = []
        self.cleaning = threading.Thread(target=self._clean, daemon=True)
        self.cleaning.start()

    def _clean(self) -> None:
        with contextlib.suppress(storage.StorageError), ThreadPoolExecutor(_AT_ONCE) as pool:  # else the next time
            there = _parts(self._uri)
            for _ in pool.map(lambda part: storage.delete(self._at(part)), set(there) - set(valid(there))):
                pass

    def _at(self, part: Part) -> str:
        return storage.join(self._uri, part.name)


def read(uri: str) -> bytes:
    """All events of a journal, one a line; another may be writing to it.

    Raises:
        StorageError: a part is missing or damaged, or the store refuses or does not answer.
    """
    return b"".join(_read(uri)[1])


def _read(uri: str) -> tuple[list[Part], list[bytes]]:
    """The parts that count, in order, and their events."""
    for left in reversed(range(_TRIES)):
        with as_trouble(), ThreadPoolExecutor(_AT_ONCE) as pool:
            parts = valid(_parts(uri))
            contents = list(pool.map(lambda part: storage.read(storage.join(uri, part.name)), parts))
        number, lines = 0, list[bytes]()
        for part, content in zip(parts, contents, strict=True):
            found = [] if content is None else content.splitlines(keepends=True)
            if part.first != number or (content is None and not left):
                raise StorageError(f"{uri}: event {number} of the journal is missing, and {part.name} comes after it")
            if content is None:  # it has become part of another
                break
            if len(found) != part.last - part.first + 1 or not content.endswith(b"\n"):
                raise StorageError(f"{uri}/{part.name} is damaged: it does not hold the events that its name says")
            number, lines = part.last + 1, lines + found
        else:
            return parts, lines
    raise StorageError(f"{uri}: the journal changes while it is read; try again")


def _parts(uri: str) -> list[Part]:
    matches = [found for name in storage.sizes(uri) if (found := _NAME.fullmatch(name))]
    return [Part(int(found[1]), int(found[2]), found[3]) for found in matches]


def valid(parts: list[Part]) -> list[Part]:
    """The parts that count, in order; those that others hold in full, or that came too late, do not."""
    kept, start = list[Part](), math.inf
    for label in sorted({part.label for part in parts}, reverse=True):
        own = [part for part in parts if part.label == label]
        kept += [part for part in own if part.last < start]
        start = min(start, *(part.first for part in own))
    found, number = list[Part](), 0
    for part in sorted(kept, key=lambda part: (part.first, -part.last)):
        if part.first >= number:
            found.append(part)
            number = part.last + 1
    return found
