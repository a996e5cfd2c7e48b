"""Rows that say the same: exactly, nearly, or with another answer. N: rows, P: permutations.

Near duplicates are found by MinHash over pairs of words and banding (Broder 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, chapter 3), in arrays of a fixed size a row, and each candidate pair is then compared
exactly.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.data.rows import Row

PERMUTATIONS = 64  # of a signature
_BANDS = 16  # of four permutations each: rows that share 0.7 of their shingles meet with a probability of 0.988
_WORDS = 2  # a shingle; with three, one word changed in a row of twenty would be a third of it
_CHARACTERS = 5  # a shingle of a script that has no spaces between words
_WORD = re.compile(r"\w+")
_LONGEST_WORD = 24  # characters; what is longer on average is written without spaces
MOST_SHINGLES = 20_000  # of one row: a field of megabytes is known by its beginning

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


def shingles(text: str) -> set[bytes]:
    """The pairs of words of a text, case and punctuation aside; groups of characters where words are not set apart."""
    words = _WORD.findall(text.lower())
    width, between = _WORDS, " "
    if not words or sum(map(len, words)) > _LONGEST_WORD * len(words):
        words, width, between = list("".join(words) or text.strip()), _CHARACTERS, ""
    del words[MOST_SHINGLES:]
    return {between.join(words[i : i + width]).encode() for i in range(max(1, len(words) - width + 1))}


def similarity(a: str, b: str) -> float:
    """The Jaccard index of two texts' shingles."""
    first, second = shingles(a), shingles(b)
    return len(first & second) / len(first | second)


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """The MinHash signature of each text, (N, P)."""
    found = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for number, text in enumerate(texts):
        sketch = _sketch().copy()
        sketch.update_batch(list(shingles(text)))
        found[number] = sketch.hashvalues
    return found


@lru_cache
def _sketch() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32, scheme="affine32")


def near_pairs(
    signatures: Sequence[NDArray[np.uint32]], rows: NDArray[np.int64], text: Callable[[int], str], threshold: float
) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of rows whose similarity is at least ``threshold``; enough of them to join each cluster.

    Args:
        signatures: of all rows, part by part, each (N, P).
        rows: the numbers of those that are compared, (M,), in order.
        text: of a row, for the exact comparison.
        threshold: Jaccard index.
    """
    seen: set[tuple[int, int]] = set()
    width = PERMUTATIONS // _BANDS
    for band in range(_BANDS):
        # band by band, since all signatures in one array would be held twice
        keys = np.concatenate([_keys(part_NP[:, band * width : (band + 1) * width]) for part_NP in signatures])
        for pair in _meeting(keys[rows], rows):
            if pair not in seen:
                seen.add(pair)
                if similarity(text(pair[0]), text(pair[1])) >= threshold:
                    yield pair


def _keys(band_NW: NDArray[np.uint32]) -> Digests:
    keys = np.zeros(len(band_NW), np.uint64)
    for column in band_NW.T:
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _meeting(keys_M: Digests, rows_M: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Of the rows of equal key, each with the first and with the one before it."""
    for members in groups(keys_M):
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
