"""Which split each row goes to, and which rows stay out, by looking at all of them at once. N: usable rows.

The split is a function of the row's text, so that adding rows moves none; rows that say nearly the same, or ask the
same, stay together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.config.data import Action, DataConfig, FileDataConfig
from raytune_lora.data import duplicates, given
from raytune_lora.data.duplicates import Shingles
from raytune_lora.data.findings import SHOWN, Findings
from raytune_lora.data.process import Part
from raytune_lora.data.sources import BENCHMARK, MAIN, MIX, TEST, VALIDATION, Source
from raytune_lora.errors import UserError

SPLITS = ("train", "validation", "test")
OUT = -1  # in no split
_TRAIN, _VALIDATION, _TEST = range(3)
_AT_HAND = 100  # rows that are compared with others, in memory
_COMMON = 20  # rows, and a tenth of all: a prompt of more rows than that keeps none of them together

_ABOUT_ONE = 20  # rows alike stay together where they are no more than this part of all: few groups divide badly

Mask = NDArray[np.bool_]


@dataclass
class Split:
    """Of every usable row: its split, or ``OUT``."""

    cfg: DataConfig
    sources: Sequence[Source]
    parts: Sequence[Part]
    outliers: tuple[float, float]  # shortest and longest row that is none, as ``Part.tokens`` counts
    findings: Findings = field(default_factory=Findings)
    left_out: Counter[tuple[int, str]] = field(default_factory=Counter)  # rows by the source's index and the finding
    groups: dict[str, int] = field(init=False)  # of the main source's rows that stay together: count, largest, rows

    def __post_init__(self) -> None:
        self.source = self._joined("source", np.uint8)
        self.row = self._joined("row", np.uint64)
        self.prompt = self._joined("prompt", np.uint64)
        self.tokens = self._joined("tokens", np.int32)
        self.trained = self._joined("trained", np.int32)
        self._starts = np.cumsum([0, *(len(part.row) for part in self.parts)])
        self.moved: Counter[int] = Counter()  # rows by the source that they came to, and less than none where they left
        self._given()
        self.of = np.full(len(self.row), OUT, np.int8)
        self._mine = ~self._role(BENCHMARK)
        self._duplicates()
        self._contradictions()
        self._near_duplicates()
        self._mixed_formats()
        self._outliers()
        self._divide()
        self._leakage()
        self._mix()

    def _joined(self, name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in self.parts)])

    # -------------------------------------------------------------------------------------- what a column says

    def _given(self) -> None:
        """Makes sources of the rows that their column says are for validation and for test.

        Where it says one split for all rows, that is what the user has named. Another column that does is asked about.

        Raises:
            UserError: it says so of some rows, and what the others are for cannot be told.
        """
        said = self._joined("said", np.int8)
        known = list(self.sources)
        for index, source in enumerate(known):
            rows = np.flatnonzero(self.source == index)
            found = {given.SAID[number] for number in np.unique(said[rows])}
            held = [split for split in (VALIDATION, TEST) if split in found]
            if source.role in (VALIDATION, TEST) or not held or len(found) == 1:
                continue
            if source.role != MAIN or None in found or given.TRAIN not in found:
                without = self._where(int(rows[said[rows] == 0][0])) if None in found else None
                raise UserError(given.column_refused(source.role, source.name, str(source.split_column), held, without))
            if twice := [other for other in known if other.role in held]:
                rows_of = [(other.role, other.name) for other in twice]
                raise UserError(given.column_twice(source.name, str(source.split_column), rows_of))
            for split in held:
                mine = rows[said[rows] == given.SAID.index(split)]
                self.source[mine] = len(self.sources)
                self.moved.update({index: -len(mine), len(self.sources): len(mine)})
                files = (f"rows whose {source.split_column!r} says so",)
                of = replace(source, role=split, name=f"{source.name} ({split})", files=files)
                self.sources = [*self.sources, of]
        main = next(source for source in known if source.role == MAIN)
        if main.split_column == FileDataConfig.split_column and len(self.sources) == len(known):
            self._refuse_other_columns(main.name)

    def _refuse_other_columns(self, name: str) -> None:
        """Raise for a column of another name that says of each row to train on which split it is of."""
        says: dict[str, set[int]] = {}
        for part in self.parts:
            for column, numbers in part.others.items():
                says.setdefault(column, set()).update(numbers)
        for column, numbers in says.items():
            held = [split for split in (VALIDATION, TEST) if given.SAID.index(split) in numbers]
            if held and 0 not in numbers and given.SAID.index(given.TRAIN) in numbers:
                raise UserError(given.other_column(name, column, held))

    # ------------------------------------------------------------------------------------------------ rows alike

    def _duplicates(self) -> None:
        """Later rows equal to an earlier one of the same source's purpose."""
        self._dropped = ~self._mine
        self._again = np.zeros(len(self.row), bool)
        for role in self._roles():
            rows = np.flatnonzero(self._role(role))
            first = np.zeros(len(rows), bool)
            first[np.unique(self.row[rows], return_index=True)[1]] = True
            self._again[rows[~first]] = True
        first_of = {int(self.row[i]): i for i in np.flatnonzero(np.isin(self.row, self.row[self._again]))[::-1]}
        self._find("exact_duplicates", self._again, lambda i: f"the same as {self._where(first_of[int(self.row[i])])}")

    def _contradictions(self) -> None:
        """Rows that ask what an earlier row asks, and answer otherwise."""
        asked = np.flatnonzero(self._mine & ~self._again & (self.prompt != 0))
        self._otherwise = np.zeros(len(self.row), bool)
        first_of: dict[int, int] = {}
        for members in duplicates.groups(self.prompt[asked]):
            rows = asked[members]
            self._otherwise[rows[1:]] = self.row[rows[1:]] != self.row[rows[0]]
            first_of |= dict.fromkeys(map(int, rows[1:]), int(rows[0]))
        self._find("contradictions", self._otherwise, lambda i: f"answers otherwise than {self._where(first_of[i])}")

    def _near_duplicates(self) -> None:
        """Joins rows that are alike or ask the same; counts those that are nearly the same as an earlier one.

        Rows about one passage are alike without being nearly the same.
        """
        self._alike, self._near = duplicates.Clusters(len(self.row)), duplicates.Clusters(len(self.row))
        near_to: dict[int, int] = {}
        if (self._on("near_duplicates") or self._on("leakage")) and self.parts:
            asked, least = lru_cache(_AT_HAND)(self._asked), self.cfg.quality.similarity
            for earlier, later in self._alike_pairs():
                self._alike.join(earlier, later)
                if self._ask_the_same(earlier, later) or duplicates.ask_alike(asked(earlier), asked(later), least):
                    self._near.join(earlier, later)
                    near_to.setdefault(later, earlier)
        self._asking = self.prompt.copy()
        for members in duplicates.groups(self.prompt):
            if len(members) > max(_COMMON, len(self.prompt) // 10):
                self._asking[members] = 0
        for keys in (self.row, self._asking):
            for members in duplicates.groups(keys):
                if keys[members[0]] != 0:
                    for member in members[1:]:
                        self._alike.join(int(members[0]), int(member))
                        self._near.join(int(members[0]), int(member))
        near = np.zeros(len(self.row), bool)
        near[[i for i, j in near_to.items() if self._role_of(i) == self._role_of(j)]] = True
        self._find("near_duplicates", near & self._mine, lambda i: f"nearly {self._where(near_to[i])}")

    def _alike_pairs(self) -> Iterator[tuple[int, int]]:
        parts = [Shingles.from_column(table["shingles"]) for table in self._tables]
        digests = np.concatenate([part.digests() for part in parts])
        distinct = np.flatnonzero(~self._again)
        counted = np.zeros(len(self.row), bool)
        counted[distinct[np.unique(digests[distinct], return_index=True)[1]]] = True
        weights = duplicates.Weights(parts, counted)

        def of(row: int) -> NDArray[np.uint32]:
            part = int(np.searchsorted(self._starts, row, side="right")) - 1
            return parts[part].row(row - int(self._starts[part]))

        least = self.cfg.quality.similarity

        def alike(earlier: int, later: int) -> bool:
            similarity = weights.similarity(of(earlier), of(later))
            if not self._ask_the_same(earlier, later):
                return similarity >= least
            # Only the answers differ: the same share of their words is enough, of whose changes each takes two pairs.
            said, other = (str(self._cell(row, "said")) for row in (earlier, later))
            return similarity >= (3 * least - 1) / (3 - least) and duplicates.overlap(said, other) >= least

        return duplicates.near_pairs([weights.signatures(part) for part in parts], distinct, alike)

    def _asked(self, row: int) -> duplicates.Asked:
        said = str(self._cell(row, "said"))
        return duplicates.Asked(self._text(row).removesuffix(said).strip(), said)

    def _ask_the_same(self, earlier: int, later: int) -> bool:
        return bool(self.prompt[earlier] != 0 and self.prompt[earlier] == self.prompt[later])

    # ---------------------------------------------------------------------------------------------- single rows

    def _mixed_formats(self) -> None:
        formats = np.array([name for part in self.parts for name in part.format], dtype=object)
        rows = np.flatnonzero(self._role(MAIN))
        if len(common := Counter(formats[rows]).most_common()) < 2:
            return
        other = np.zeros(len(self.row), bool)
        other[rows[formats[rows] != common[0][0]]] = True
        self._find("mixed_formats", other, lambda i: f"{formats[i]}, where most rows are {common[0][0]}")

    def _outliers(self) -> None:
        low, high = self.outliers
        beyond = ((self.tokens < low) | (self.tokens > high)) & self._mine
        unit = "tokens" if any(part.trained.any() for part in self.parts) else "characters"
        self._find("outliers", beyond, lambda i: f"{self.tokens[i]} {unit}; most rows have {low:.0f} to {high:.0f}")

    # --------------------------------------------------------------------------------------------------- splits

    def _divide(self) -> None:
        """By the position, in 0 to 1, of each cluster's earliest row."""
        root = self._alike.roots()
        many = np.bincount(root, minlength=len(root))[root] > len(root) // _ABOUT_ONE
        near = self._near.roots()
        root = np.where(many, near, root)
        key = np.where(self._asking != 0, self._asking, self.row)
        self._root, self._position = root, key.astype(np.float64) / 2**64
        own = self._role(MAIN)
        main = own & ~np.isin(near, near[self._held_out()])
        shares = self._shares()
        sizes = np.unique(root[main], return_counts=True)[1]
        self.groups = {"count": len(sizes), "largest": int(sizes.max(initial=0)), "rows": int(main.sum())}
        self.of[own] = _TRAIN  # those that were held out elsewhere, to be found as leaks
        self.of[main] = (
            self._stratified(main, shares) if self.cfg.stratify else _at(self._position[root[main]], *shares)
        )
        self._alone = _at(self._position, *shares)  # where each row would be by itself
        for role, split in ((VALIDATION, _VALIDATION), (TEST, _TEST)):
            self.of[self._role(role)] = split
        self.of[self._dropped] = OUT

    def _held_out(self) -> Mask:
        """Rows that something else than their position keeps from training; a row like them is in no other split."""
        if not self._on("leakage"):
            return np.zeros(len(self.row), bool)
        mask: Mask = (self._role(VALIDATION, TEST) & ~self._dropped) | ~self._mine
        return mask

    def _shares(self) -> tuple[float, float]:
        """Of the main source's rows that are for validation and for test; none where files are."""
        roles = set(self._roles())
        return (
            0.0 if VALIDATION in roles else self.cfg.validation,
            0.0 if TEST in roles else self.cfg.test,
        )

    def _stratified(self, main: Mask, shares: tuple[float, float]) -> NDArray[np.int8]:
        """The same shares of each stratum, to the row: its clusters in the order of their positions."""
        strata = np.array([name for part in self.parts for name in part.stratum], dtype=object)[main]
        positions, splits = self._position[self._root[main]], np.zeros(int(main.sum()), np.int8)
        for name in set(strata):
            members = np.flatnonzero(strata == name)
            order = members[np.lexsort((self._root[main][members], positions[members]))]
            splits[order] = _at((np.arange(len(order)) + 0.5) / len(order), *shares)
        _, first = np.unique(self._root[main], return_index=True)
        leader = dict(zip(self._root[main][first].tolist(), splits[first].tolist(), strict=True))
        return np.array([leader[root] for root in self._root[main].tolist()], np.int8)

    def _leakage(self) -> None:
        """Rows to train on, or to divide, that are nearly, or ask the same as, a row held out from them."""
        self.leaks = False
        if not self._on("leakage"):
            return
        near, held = self._near.roots(), dict[int, int]()
        for i in np.flatnonzero((self.of > _TRAIN) | ~self._mine):
            held.setdefault(int(near[i]), int(i))
        leaked = np.zeros(len(self.row), bool)
        train = np.flatnonzero(
            (self.of == _TRAIN) | (self._role(*(MIX + name for name in self.cfg.mix)) & ~self._dropped)
        )
        leaked[[i for i in train if int(near[i]) in held]] = True
        alone = self._role(MAIN) & (self.of != OUT) & (self.of != self._alone) & (self._root != np.arange(len(self.of)))
        moved = np.zeros_like(alone) if self.cfg.stratify else alone
        self.leaks = bool(leaked.any())
        self._find(
            "leakage",
            leaked | moved,
            lambda i: (
                f"nearly {self._where(held[int(near[i])])}, which is not for training"
                if leaked[i]
                else f"kept in {SPLITS[self.of[i]]} with {self._where(int(self._root[i]))}, which "
                + ("is nearly the same" if near[i] == near[self._root[i]] else "shares most of its text")
            ),
            drop=leaked,
        )

    def _mix(self) -> None:
        """Of each source that is mixed in, as many rows as make its share, in the order of their digests."""
        own = int((self.of == _TRAIN).sum())
        share = sum(mix.share for mix in self.cfg.mix.values())
        self.mixed: dict[str, dict[str, float]] = {}
        for name, mix in self.cfg.mix.items():
            rows = np.flatnonzero(self._role(MIX + name) & ~self._dropped)
            wanted = round(own / (1 - share) * mix.share)
            taken = np.sort(rows[np.argsort(self.row[rows], kind="stable")[:wanted]])
            self.of[taken] = _TRAIN
            self.mixed[name] = {"asked": mix.share, "rows": len(taken), "available": len(rows)}
        total = int((self.of == _TRAIN).sum())
        for mixed in self.mixed.values():
            mixed["share"] = round(mixed["rows"] / total, 4) if total else 0.0

    # --------------------------------------------------------------------------------------------------- helpers

    def _find(self, name: str, rows: Mask, detail: Callable[[int], str], *, drop: Mask | None = None) -> None:
        """Record a finding, and leave its rows (or those of ``drop``) out where the config says so."""
        if not self._on(name):
            return
        for i in np.flatnonzero(rows)[:SHOWN].tolist():
            self.findings.add(name, self._where(i), self._text(i), detail(i))
        self.findings.counts[name] = int(rows.sum())
        if getattr(self.cfg.quality, name) is Action.drop:
            gone = rows if drop is None else drop
            for source, count in zip(*np.unique(self.source[gone & ~self._dropped], return_counts=True), strict=True):
                self.left_out[int(source), name] += int(count)
            self._dropped |= gone
            self.of[gone] = OUT

    def _on(self, name: str) -> bool:
        return getattr(self.cfg.quality, name) is not Action.off

    def _roles(self) -> Iterator[str]:
        return iter(dict.fromkeys(source.role for source in self.sources))

    def _role(self, *roles: str) -> Mask:
        mask: Mask = np.isin(self.source, [i for i, source in enumerate(self.sources) if source.role in roles])
        return mask

    def _role_of(self, row: int) -> str:
        return self.sources[int(self.source[row])].role

    def _where(self, row: int) -> str:
        return str(self._cell(row, "where"))

    def _text(self, row: int) -> str:
        return str(self._cell(row, "text"))

    def _cell(self, row: int, column: str) -> Any:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._tables[part][column][row - int(self._starts[part])].as_py()

    @cached_property
    def _tables(self) -> list[Any]:
        return [part.table() for part in self.parts]


def _at(positions: NDArray[np.float64], validation: float, test: float) -> NDArray[np.int8]:
    return np.select([positions < test, positions < test + validation], [_TEST, _VALIDATION], _TRAIN).astype(np.int8)
