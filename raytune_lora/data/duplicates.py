"""Rows that say the same: exactly, nearly, or with another answer. N: rows, P: permutations, H: shingles of all rows.

Near duplicates are rows whose shingles (pairs of words) have a weighted Jaccard index of a threshold or more. A shingle
that many rows share, such as those of an instruction that all rows begin with, says nothing about two of them, and
weighs next to nothing; one that a few share weighs 1. Candidates are found by MinHash and banding (Broder 1997;
Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3), where the shingle of the lowest hash over its
weight stands for a row (Moulton and Jiang 2018, Maximally consistent sampling and the Jaccard index of probability
distributions), in arrays of a fixed size a row; each candidate pair is then compared exactly.

Rows that are so alike still ask different things where what they share is a passage or an instruction around a question
of their own; ``ask_alike`` tells them apart by the sentences that the other row has not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.data.rows import Row

PERMUTATIONS = 64  # of a signature
_BANDS = 16  # of four permutations each: rows that share 0.7 of their shingles meet with a probability of 0.988
_WORDS = 2  # a shingle; with three, one word changed in a row of twenty would be a third of it
_CHARACTERS = 5  # a shingle of a script that has no spaces between words
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")
_SENTENCE_END = re.compile(r"[\r\n]+|(?<=[.?!:;])\s+|(?<=[\u3002\uff1f\uff01\uff1b\u0964\u061f])")
_LONGEST_WORD = 24  # characters; what is longer on average is written without spaces
MOST_SHINGLES = 20_000  # of one row: a field of megabytes is known by its beginning
_FEW = 20  # rows, and in small data a tenth of all but 5 at least: shingles of more rows than that weigh less
_FEWEST = 5
_ALL_PAIRED = _FEW  # rows of one key that are all compared with each other; of more, each with two others
_CELL = np.uint32(2**22 - 1)
_CELLS = 2**22

Digests = NDArray[np.uint64]


def prompt_digest(row: Row) -> int:
    """64 bits that stand for what comes before the last answer; 0 where nothing does."""
    if not row.prompt:
        return 0
    return _digest("\x00".join([*(replace(turn, trained=True).identity() for turn in row.prompt), *_tools(row)]))


def row_digest(row: Row) -> int:
    """64 bits that stand for the whole row."""
    return _digest("\x00".join([*(f"{turn.role}\x00{turn.identity()}" for turn in row.turns), *_tools(row)]))


def _tools(row: Row) -> list[str]:
    return [json.dumps(row.tools, ensure_ascii=False)] if row.tools else []


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shingles(text: str, words: int = _WORDS, characters: int = _CHARACTERS) -> set[bytes]:
    """The runs of words of a text, case and punctuation aside; of characters where words are not set apart.

    Args:
        text: of a row, or a part of it.
        words: in a run.
        characters: in a run, of a script without spaces.
    """
    found = _WORD.findall(text.lower())
    width, between = words, " "
    if not found or sum(map(len, found)) > _LONGEST_WORD * len(found):
        found, width, between = list("".join(found) or text.strip()), characters, ""
    del found[MOST_SHINGLES:]
    return {between.join(found[i : i + width]).encode() for i in range(max(1, len(found) - width + 1))}


def words(text: str) -> set[bytes]:
    """The words of a text; its pairs of characters, where words are not set apart."""
    return shingles(text, 1, 2)


def overlap(a: str, b: str, of: Callable[[str], set[bytes]] = words) -> float:
    """The Jaccard index of what two texts are made of."""
    first, second = of(a), of(b)
    return len(first & second) / len(first | second)


@dataclass(frozen=True)
class Asked:
    """What comes before a row's last answer, and that answer."""

    text: str  # nothing before plain text
    said: str

    @cached_property
    def sentences(self) -> dict[str, None]:
        """The sentences and lines of what is asked, or of plain text; case and punctuation aside, in order."""
        return {" ".join(_WORD.findall(part)): None for part in _SENTENCE_END.split((self.text or self.said).lower())}


def ask_alike(a: Asked, b: Asked, least: float) -> bool:
    """Whether two rows that share most of their words ask nearly the same, and not only about the same passage.

    Sentences of what is asked that both rows have are set aside. Of the rest, ``least`` of the pairs of words must be
    common; half of that share of the words, where the answers are alike as well: a word changed somewhere in a long
    text is then found in a short sentence too. Where the answers are not, another number makes another question. Plain
    text asks nothing, and ``least`` of its words must be common.

    Args:
        a: of a row.
        b: of another.
        least: share of common words or pairs of words, 0 to 1.
    """
    first, second = a.sentences, b.sentences
    own = (
        "\n".join(each for each in first if each not in second),
        "\n".join(each for each in second if each not in first),
    )
    if not any(own):
        return True
    if not a.text and not b.text:
        return not all(own) or overlap(*own) >= least
    if overlap(a.said, b.said) >= least:
        return not all(own) or overlap(*own) >= least / 2
    numbers, others = (set(_NUMBER.findall(each)) for each in own)
    return all(own) and numbers == others and overlap(*own, of=shingles) >= least


@dataclass(frozen=True)
class Shingles:
    """The hashes of many rows' shingles, each row's distinct and ascending."""

    hashes: NDArray[np.uint32]  # (H,)
    starts: NDArray[np.int64]  # (N,) where each row's begin; no row is without

    @classmethod
    def of(cls, texts: Sequence[str]) -> Shingles:
        """Those of texts."""
        rows = [np.unique(np.fromiter(map(zlib.crc32, shingles(text)), np.uint32)) for text in texts]
        return cls(np.concatenate([np.zeros(0, np.uint32), *rows]), _starts([len(row) for row in rows]))

    def column(self) -> Any:
        """As a column of a table, (N,) lists."""
        import pyarrow as pa

        ends = np.append(self.starts, len(self.hashes)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(self.hashes))

    @classmethod
    def from_column(cls, column: Any) -> Shingles:
        """From such a column."""
        lists = column.combine_chunks()
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        return cls(lists.flatten().to_numpy(zero_copy_only=False), _starts(lengths))

    def row(self, number: int) -> NDArray[np.uint32]:
        """Of one row."""
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.hashes)
        return self.hashes[self.starts[number] : end]

    def digests(self) -> Digests:
        """64 bits that stand for each row's set, (N,)."""
        if not len(self.starts):
            return np.zeros(0, np.uint64)
        mixed = self.hashes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        return np.add.reduceat(mixed * np.uint64(0xBF58476D1CE4E5B9), self.starts)


def _starts(lengths: Any) -> NDArray[np.int64]:
    return (
        (np.cumsum(lengths, dtype=np.int64) - np.asarray(lengths, np.int64)) if len(lengths) else np.zeros(0, np.int64)
    )


class Weights:
    """How much each shingle says: 1 where a few rows have it, ``(few / rows) ** 4`` where more do."""

    def __init__(self, parts: Iterable[Shingles], counted: NDArray[np.bool_]) -> None:
        """
        Args:
            parts: all rows, part by part.
            counted: (N,) the rows that count; copies of a row say nothing about how common its shingles are.
        """
        rows = np.zeros(_CELLS, np.int64)  # that have a shingle, by its hash; few of so many share a cell
        at, waiting = 0, list[NDArray[np.uint32]]()
        for part in parts:
            mine = counted[at : at + len(part.starts)]
            at += len(part.starts)
            lengths = np.diff(np.append(part.starts, len(part.hashes)))
            waiting.append(part.hashes[np.repeat(mine, lengths)] & _CELL)
            if sum(map(len, waiting)) >= _CELLS:
                rows += np.bincount(np.concatenate(waiting), minlength=_CELLS)
                waiting = []
        rows += np.bincount(np.concatenate([np.zeros(0, np.uint32), *waiting]), minlength=_CELLS)
        few = min(max(int(counted.sum()) / 10, _FEWEST), _FEW)
        beyond = np.maximum(1, rows / few).astype(np.float32)
        self._inverse = beyond * beyond * beyond * beyond

    def signatures(self, part: Shingles) -> NDArray[np.uint32]:
        """The MinHash signature of each row, (N, P)."""
        found = np.empty((PERMUTATIONS, len(part.starts)), np.float32)
        inverse = self._inverse[part.hashes & _CELL]
        for number, (factor, shift) in enumerate(zip(*_permutations(), strict=True)):
            if len(part.starts):
                found[number] = np.minimum.reduceat((part.hashes * factor + shift) * inverse, part.starts)
        return found.T.copy().view(np.uint32)

    def similarity(self, first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
        """The weighted Jaccard index of two rows' shingles."""
        both = self._sum(np.intersect1d(first, second, assume_unique=True))
        return both / (self._sum(first) + self._sum(second) - both)

    def _sum(self, hashes: NDArray[np.uint32]) -> float:
        return float((1 / self._inverse[hashes & _CELL].astype(np.float64)).sum())


@lru_cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Factors and shifts of hash functions modulo 2**32, (P,) each."""
    draw = np.random.default_rng(1)
    factors, shifts = draw.integers(0, 2**32, (2, PERMUTATIONS), np.uint32)
    return factors | np.uint32(1), shifts


def near_pairs(
    signatures: Sequence[NDArray[np.uint32]], rows: NDArray[np.int64], near: Callable[[int, int], bool]
) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of rows that are near; enough of them to join each cluster, all in small ones.

    Args:
        signatures: of all rows, part by part, each (N, P).
        rows: the numbers of those that are compared, (M,), in order.
        near: whether two rows are, by exact comparison.
    """
    seen: set[int] = set()
    width = PERMUTATIONS // _BANDS
    for band in range(_BANDS):
        # band by band, since all signatures in one array would be held twice
        keys = np.concatenate([_keys(part_NP[:, band * width : (band + 1) * width]) for part_NP in signatures])
        for earlier, later in _meeting(keys[rows], rows):
            pair = earlier << 32 | later  # one number takes a third of the memory of a tuple
            if pair not in seen:
                seen.add(pair)
                if near(earlier, later):
                    yield earlier, later


def _keys(band_NW: NDArray[np.uint32]) -> Digests:
    keys = np.zeros(len(band_NW), np.uint64)
    for column in band_NW.T:
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _meeting(keys_M: Digests, rows_M: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Of the rows of equal key, each with all others, or with the first and the one before it where they are many."""
    for members in groups(keys_M):
        if len(members) <= _ALL_PAIRED:
            yield from itertools.combinations(rows_M[members].tolist(), 2)
            continue
        first, *others = rows_M[members].tolist()
        before = first
        for after in others:
            yield first, after
            if before != first:
                yield before, after
            before = after


def groups(keys_N: Digests) -> Iterator[NDArray[np.int64]]:
    """The rows of each key that occurs more than once, in order."""
    order = np.argsort(keys_N, kind="stable")
    sorted_keys = keys_N[order]
    starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
    ends = np.r_[starts[1:], len(order)]
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        yield order[start:end]


class Clusters:
    """Rows joined into clusters; a cluster is known by its earliest row (union-find with path halving)."""

    def __init__(self, rows: int) -> None:
        self._parent = np.arange(rows)

    def join(self, a: int, b: int) -> None:
        """Make one cluster of two rows' clusters."""
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)

    def root(self, row: int) -> int:
        """The earliest row of a row's cluster."""
        parent = self._parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    def roots(self) -> NDArray[np.int64]:
        """Of every row, (N,)."""
        roots = self._parent.copy()
        while (higher := roots[roots] != roots).any():
            roots[higher] = roots[roots[higher]]
        return roots
