"""What is kept of very many lengths and words in little memory, and of parts of them adds up: histograms and sketches.

Counts, smallest, largest and mean are exact; quantiles are within 2.5 % (half a bin), numbers of distinct n-grams
within 0.8 % (one standard error of the sketch).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

# -------------------------------------------------------------------------------------------------------------- lengths

_RATIO = 1.05  # of a bin's upper to its lower edge
_PER_LOG = 1 / math.log(_RATIO)
_SHOWN_BINS = 4  # bins in one bar of the report


@dataclass
class Lengths:
    """A histogram of lengths whose bins grow geometrically by 5 %."""

    count: int = 0
    total: int = 0
    low: int = 0
    high: int = 0
    bins: dict[int, int] = field(default_factory=dict)  # floor(log(length) / log(1.05)) -> rows; -1: length 0

    def add(self, length: int) -> None:
        if not self.count or length < self.low:
            self.low = length
        if length > self.high:
            self.high = length
        self.count += 1
        self.total += length
        index = int(math.log(length) * _PER_LOG) if length else -1
        self.bins[index] = self.bins.get(index, 0) + 1

    def merge(self, other: Lengths) -> None:
        if other.count:
            self.low = min(self.low, other.low) if self.count else other.low
        self.high = max(self.high, other.high)
        self.count += other.count
        self.total += other.total
        for index, rows in other.bins.items():
            self.bins[index] = self.bins.get(index, 0) + rows

    def quantile(self, share: float) -> float:
        """The length that ``share`` of the rows do not exceed, within 2.5 %; 0 without rows."""
        if not self.count:
            return 0.0
        value = _weighted_quantile([(_middle(index), rows) for index, rows in self.bins.items()], share)
        return min(max(value, self.low), self.high)

    def spread(self) -> tuple[float, float]:
        """Median of the logarithm, and the median absolute deviation (MAD) from it."""
        logs = [(math.log(max(_middle(index), 1.0)), rows) for index, rows in self.bins.items()]
        center = _weighted_quantile(logs, 0.5)
        return center, _weighted_quantile([(abs(log - center), rows) for log, rows in logs], 0.5)

    def report(self) -> dict[str, Any]:
        bars: Counter[int] = Counter()
        for index, rows in self.bins.items():
            bars[index // _SHOWN_BINS] += rows
        edges = [(bar, math.ceil(_RATIO ** (bar * _SHOWN_BINS)) if bar >= 0 else 0) for bar in sorted(bars)]
        return {
            "min": self.low,
            "max": self.high,
            "mean": round(self.total / self.count, 1) if self.count else 0.0,
            **{f"p{percent}": round(self.quantile(percent / 100)) for percent in (50, 90, 99)},
            "histogram": [[edge, bars[bar]] for bar, edge in edges],  # each bar's least length, and its rows
        }


def _middle(index: int) -> float:
    """The geometric middle of a bin's whole numbers: exact where it holds only one."""
    if index < 0:
        return 0.0
    least, most = math.ceil(_RATIO**index - 1e-9), math.ceil(_RATIO ** (index + 1) - 1e-9) - 1
    return math.sqrt(least * max(least, most))


def _weighted_quantile(weighted: list[tuple[float, int]], share: float) -> float:
    left = share * sum(weight for _, weight in weighted)
    for value, weight in sorted(weighted):
        left -= weight
        if left <= 0:
            return value
    return weighted[-1][0] if weighted else 0.0


# ------------------------------------------------------------------------------------------------------------ diversity

_ORDERS = 3  # n-grams of 1, 2 and 3 words
_INDEX_BITS = 14  # 16,384 registers, 16 KiB for each order
_RANK_BITS = 64 - _INDEX_BITS
SKETCH_ERROR = 1.04 / math.sqrt(2**_INDEX_BITS)  # relative standard error
_LONGEST = 20_000  # characters of a text whose n-grams are counted
_PENDING = 16_384  # characters that are gathered before they are counted
_BUFFER = 2**17  # units of UTF-16: holds the two together, at up to two units a character
_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it vanishes
_SPACE = 32  # this code and smaller ones separate words


def _lowered() -> NDArray[np.uint16]:
    """What each unit of UTF-16 counts as: a capital of ASCII as its small letter, punctuation of ASCII as a space."""
    units = np.arange(2**16, dtype=np.uint16)
    for code in range(1, 128):
        sign = chr(code)
        units[code] = ord(sign.lower()) if sign.isalnum() or sign == "'" else _SPACE
    return units


_LOWERED = _lowered()


@dataclass
class Distinct:
    """How many different n-grams of words there are, by HyperLogLog (Flajolet et al. 2007).

    A word is what stands between spaces and ASCII punctuation, and each character of Chinese and Japanese. Capitals
    of ASCII count as small letters; n-grams do not reach from one text to the next.
    """

    registers: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((_ORDERS, 2**_INDEX_BITS), dtype=np.uint8))
    totals: list[int] = field(default_factory=lambda: [0] * _ORDERS)  # n-grams seen, of each order
    pending: list[str] = field(default_factory=list)  # texts not counted yet
    waiting: int = 0  # characters of them

    def add(self, text: str) -> None:
        self.pending.append(text if len(text) <= _LONGEST else text[:_LONGEST])
        self.waiting += min(len(text), _LONGEST) + 1
        if self.waiting >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Count what is pending: numpy is fast only for many words at once."""
        if not self.pending:
            return
        words, texts = _words("\0".join([*self.pending, ""]))
        self.pending, self.waiting = [], 0
        grams = words
        for order in range(_ORDERS):
            if order:  # an n-gram is the one of n - 1 words before it, and a word of the same text
                grams = _mixed(grams[:-1] * np.uint64(_BASE) + words[order:])
                inside = texts[order:] == texts[: len(texts) - order]
            kept = grams[inside] if order else grams
            self.totals[order] += len(kept)
            rest = (kept & np.uint64(2**_RANK_BITS - 1)).astype(np.float64)  # exact: fewer than 53 bits
            ranks = (_RANK_BITS + 1 - np.frexp(rest)[1]).astype(np.uint8)  # 1 + leading zeros
            registers, index = self.registers[order], (kept >> np.uint64(_RANK_BITS)).astype(np.intp)
            higher = ranks > registers[index]  # soon few are
            np.maximum.at(registers, index[higher], ranks[higher])

    def merge(self, other: Distinct) -> None:
        self.flush()
        other.flush()
        np.maximum(self.registers, other.registers, out=self.registers)
        self.totals = [mine + theirs for mine, theirs in zip(self.totals, other.totals, strict=True)]

    def distinct(self) -> list[int]:
        """Different n-grams of each order."""
        self.flush()
        return [min(round(_cardinality(r)), total) for r, total in zip(self.registers, self.totals, strict=True)]

    def report(self) -> dict[str, Any]:
        """Words, different words, and the share of n-grams that are different (distinct-n, Li et al. 2016)."""
        distinct = self.distinct()
        shares = {f"distinct_{n + 1}": round(distinct[n] / max(self.totals[n], 1), 4) for n in range(_ORDERS)}
        return {"words": self.totals[0], "types": distinct[0], **shares}


def _words(text: str) -> tuple[Words, NDArray[np.int64]]:
    """The hash of every word of texts that end in NUL, and the number of the text that it is in.

    The hash is polynomial, from prefix sums, so that no loop runs over words; it is the same in every process.
    """
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), dtype="<u2")
    data = _LOWERED.take(units, mode="clip")  # without a look at each whether it is in the table: all are
    space = data <= _SPACE
    wide = data - np.uint16(0x3000) < 0x7000  # kana and Han characters
    begins = wide.copy()
    begins[1:] |= wide[:-1]
    begins[1:] |= space[:-1]
    begins[0] = True
    begins &= ~space
    starts = np.flatnonzero(begins)
    ends = np.flatnonzero((space | begins)[1:] & ~space[:-1]) + 1
    powers = _powers()
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data * powers[: len(data)], out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * powers[_BUFFER - starts]  # as if all began at one place
    before = np.searchsorted(starts, np.flatnonzero(data == 0))  # words before each text's end
    return _mixed(hashes), np.repeat(np.arange(len(before)), np.diff(before, prepend=0))


@cache
def _powers() -> Words:
    powers = np.full(_BUFFER + 1, _BASE, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _mixed(values: Words) -> Words:
    """High bits that depend on every bit of the value: one round of SplitMix64's finalizer (Steele et al. 2014)."""
    values = values ^ (values >> np.uint64(32))
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _cardinality(registers: NDArray[np.uint8]) -> float:
    """The improved raw estimator of Ertl 2017 (arXiv:1702.01284, algorithm 6): unbiased from none to very many."""
    size = len(registers)
    counts = np.bincount(registers, minlength=_RANK_BITS + 2)
    full, empty = 1 - counts[_RANK_BITS + 1] / size, counts[0] / size
    if empty == 1:
        return 0.0
    tau, weight, before = 1 - full, 1.0, -1.0
    while full not in (0, 1) and tau != before:
        full, weight, before = math.sqrt(full), weight / 2, tau
        tau -= (1 - full) ** 2 * weight
    total = size * tau / 3
    for rank in range(_RANK_BITS, 0, -1):
        total = (total + counts[rank]) / 2
    sigma, weight, before = empty, 1.0, -1.0
    while sigma != before:
        empty, before = empty * empty, sigma
        sigma += empty * weight
        weight *= 2
    return float(size * size / (2 * math.log(2) * (total + size * sigma)))
