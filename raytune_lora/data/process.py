"""One stretch of records, from what was read to token ids: checked, masked, encoded and summed up. N: usable rows.

It runs in several processes at once; nothing here depends on other rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_lora.config.data import Action, DataConfig, PiiConfig, QualityConfig
from raytune_lora.data import duplicates, formats, pii, quality
from raytune_lora.data.duplicates import Shingles
from raytune_lora.data.encode import Encoded, encode, spell
from raytune_lora.data.findings import Findings
from raytune_lora.data.given import SAID, split_said
from raytune_lora.data.harmful import Words, load_words
from raytune_lora.data.rows import Fault, Record, Row, leaves
from raytune_lora.data.sources import BENCHMARK, MAIN, MIX, TEST, VALIDATION, Source
from raytune_lora.data.statistics import Statistics
from raytune_lora.data.templates import RowRefused

_UNTRAINED = "the template writes nothing of it that is trained"


@dataclass(frozen=True)
class Settings:
    """What a process is told once."""

    cfg: DataConfig
    tokenizer: Any  # None: rows are checked and not encoded
    sources: tuple[Source, ...]


@dataclass
class Part:
    """What a stretch of records came to."""

    path: Path  # Arrow file of its usable rows: where, text, said (the answer), shingles, and the store's columns
    read: Counter[int]  # records, by the index of their source
    left_out: Counter[tuple[int, str]]  # rows, by the index of their source and the reason: a finding or TOO_LONG
    cut: int  # rows that were shortened
    source: NDArray[np.uint8]  # (N,) index into the sources
    row: NDArray[np.uint64]  # (N,) digests of the whole rows
    prompt: NDArray[np.uint64]  # (N,) digests of what comes before the last answer; 0 where nothing does
    tokens: NDArray[np.int32]  # (N,) of a row; characters, where there is no tokenizer
    trained: NDArray[np.int32]  # (N,) tokens of a row that are trained
    stratum: list[str]  # (N,)
    format: list[str]  # (N,) names
    said: NDArray[np.int8]  # (N,) which split a row's own column says, as an index of ``given.SAID``
    others: dict[str, set[int]]  # what each other column of rows to train on says in the same words
    ends: Counter[int]  # by token: the rows, benchmarks' aside, whose last answer it ends
    largest_id: int  # of those rows' tokens

    def table(self) -> Any:
        """The file's rows, memory-mapped."""
        with pa.memory_map(str(self.path)) as source:
            return pa.ipc.open_file(source).read_all()


TOO_LONG = "too_long"  # why a row is left out: more than ``max_length`` tokens, or nothing trained is left of them
Processed = tuple[Part, Findings, Statistics]


@dataclass
class _Usable:
    source: int
    where: str
    row: Row
    format: str
    said: int


class Processor:
    """Turns stretches of records into parts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        cfg = settings.cfg
        self._actions = quality_actions(cfg.quality)
        self._checks = [name for name in quality.CHECKS if self._actions[name] is not Action.off]
        self._pii = pii_actions(cfg.pii)
        self._kinds = [kind for kind, action in self._pii.items() if action is not Action.off]
        self._words: Words | None = None
        if self._actions["harmful"] is not Action.off:
            self._words = load_words(cfg.quality.harmful_words)
        self._alike = any(self._actions[name] is not Action.off for name in ("near_duplicates", "leakage"))

    def __call__(self, path: Path, records: Sequence[tuple[int, Record]]) -> Processed:
        """Process a stretch.

        Args:
            path: of the Arrow file to write.
            records: each with the index of its source.
        """
        findings, statistics = Findings(), Statistics()
        self._left_out: Counter[tuple[int, str]] = Counter()
        self._others: dict[str, set[int]] = {}
        found = [self._usable(source, record, findings) for source, record in records]
        rows = [usable for usable in found if usable is not None]
        kept, ids = rows, list[Encoded]()
        if self._settings.tokenizer is not None:
            kept, ids = self._encoded(rows, findings)
        trained = [sum(label >= 0 for label in one.labels) for one in ids]
        roles = [self._settings.sources[usable.source].role for usable in kept]
        own = [one for one, role in zip(ids, roles, strict=False) if role != BENCHMARK]  # none without a tokenizer
        for number, usable in enumerate(kept):
            if self._settings.sources[usable.source].role != BENCHMARK:
                tokens = len(ids[number].input_ids) if ids else None
                statistics.add(usable.row, tokens, trained[number] if ids else None, usable.format)
        texts = ["\n".join(usable.row.texts()) for usable in kept]
        self._write(path, kept, texts, ids)
        part = Part(
            path=path,
            read=Counter(source for source, _ in records),
            left_out=self._left_out,
            cut=sum(one.cut for one in ids),
            source=np.array([usable.source for usable in kept], np.uint8),
            row=np.array([duplicates.row_digest(usable.row) for usable in kept], np.uint64),
            prompt=np.array([duplicates.prompt_digest(usable.row) for usable in kept], np.uint64),
            tokens=np.array([len(one.input_ids) for one in ids] if ids else list(map(len, texts)), np.int32),
            trained=np.array(trained if ids else [0] * len(kept), np.int32),
            stratum=[usable.row.stratum for usable in kept],
            format=[usable.format for usable in kept],
            said=np.array([usable.said for usable in kept], np.int8),
            others=self._others,
            ends=Counter(one.input_ids[one.end] for one in own if one.end is not None),
            largest_id=max((max(one.input_ids) for one in own), default=0),
        )
        return part, findings, statistics

    def _encoded(self, rows: list[_Usable], findings: Findings) -> tuple[list[_Usable], list[Encoded]]:
        """The rows and their tokens, without those that the template cannot write or that are left out then."""
        refused, untrained = dict[int, RowRefused](), set[int]()
        plain = [usable.row for usable in rows]
        encoded = encode(plain, self._settings.cfg, self._settings.tokenizer, refused, untrained)
        taken: list[tuple[_Usable, Encoded]] = []
        for number, (usable, ids) in enumerate(zip(rows, encoded, strict=True)):
            text = "\n".join(usable.row.texts())
            if error := refused.get(number):
                findings.add("wrong_types", usable.where, text, str(error), [error.reason])
                self._leave_out(usable.source, "wrong_types")
                continue
            if ids is None:
                if number in untrained:
                    findings.add("nothing_trained", usable.where, text, _UNTRAINED, [_UNTRAINED])
                self._leave_out(usable.source, "nothing_trained" if number in untrained else TOO_LONG)
                continue
            said: dict[str, list[str]] = {}
            for note in ids.notes if self._settings.sources[usable.source].role != BENCHMARK else ():
                if self._actions[note.finding] is not Action.off:
                    said.setdefault(note.finding, []).append(note.detail)
            for finding, details in said.items():
                findings.add(finding, usable.where, text, "; ".join(dict.fromkeys(details)), details)
            if dropping := [finding for finding in said if self._actions[finding] is Action.drop]:
                self._leave_out(usable.source, dropping[0])
            else:
                taken.append((usable, ids))
        return [usable for usable, _ in taken], [ids for _, ids in taken]

    def _usable(self, source: int, record: Record, findings: Findings) -> _Usable | None:
        """A row that can be trained on, with personal data masked where asked for; None where it is left out."""
        of, stratify = self._settings.sources[source], self._settings.cfg.stratify
        parsed = record.value
        if not isinstance(parsed, Fault):
            parsed = formats.parse(parsed, of.format, of.columns, None if of.role.startswith(MIX) else stratify)
        if isinstance(parsed, Fault):
            findings.add(parsed.kind, record.where, _shown(record.value), parsed.reason, [parsed.reason])
            self._leave_out(source, parsed.kind)
            return None
        row, name = parsed
        if of.role == BENCHMARK:
            return _Usable(source, record.where, row, name, 0)
        said = split_said(record.value.get(of.split_column)) if of.split_column else 0
        as_named = said and (of.role not in (VALIDATION, TEST) or SAID[said] == of.role)
        unused = [name for name in row.unused if not as_named or name != of.split_column]
        if of.role == MAIN:
            for name in unused:
                if 0 not in (seen_there := self._others.setdefault(name, set())):
                    seen_there.add(split_said(record.value.get(name)))
        if unused and self._actions["unused_fields"] is not Action.off:
            names = [name or "(a column without a name)" for name in unused]
            findings.add("unused_fields", record.where, _shown(record.value), ", ".join(names), names)
            if self._actions["unused_fields"] is Action.drop:
                self._leave_out(source, "unused_fields")
                return None
        seen: list[str] = []
        for finding, detail in quality.check(row, self._checks):
            findings.add(finding, record.where, "\n".join(row.texts()), detail)
            seen.append(finding)
        if self._words is not None and (words := [word for text in row.texts() for word in self._words.find(text)]):
            findings.add("harmful", record.where, "\n".join(row.texts()), ", ".join(dict.fromkeys(words)))
            seen.append("harmful")
        masked, reason = self._without_pii(row, record.where, findings)
        reason = next((finding for finding in seen if self._actions[finding] is Action.drop), reason)
        if reason is not None:
            self._leave_out(source, reason)
            return None
        return _Usable(source, record.where, masked, name, said)

    def _leave_out(self, source: int, reason: str) -> None:
        """Count a row that is left out, once, by the first reason."""
        self._left_out[source, reason] += 1

    def _without_pii(self, row: Row, where: str, findings: Findings) -> tuple[Row, str | None]:
        """The row with what is to be masked masked, and the finding for which it is left out."""
        if not self._kinds:
            return row, None
        found = {text: pii.find(text, self._kinds) for text in (*row.texts(), *leaves(list(row.tools)))}
        kinds = {match.kind for matches in found.values() for match in matches}
        for kind in (kind for kind in pii.KINDS if kind in kinds):
            text, matches = next((t, m) for t, m in found.items() if any(match.kind == kind for match in m))
            around = pii.hidden(text, matches)
            findings.add(f"pii.{kind}", where, around)
        if dropping := [kind for kind in pii.KINDS if kind in kinds and self._pii[kind] is Action.drop]:
            return row, f"pii.{dropping[0]}"
        if not any(self._pii[kind] is Action.mask for kind in kinds):
            return row, None

        def masked(text: str) -> str:
            return pii.mask(text, [m for m in found.get(text, ()) if self._pii[m.kind] is Action.mask])

        return row.mapped(masked), None

    def _write(self, path: Path, rows: list[_Usable], texts: list[str], ids: list[Encoded]) -> None:
        columns: dict[str, Any] = {
            "where": pa.array([usable.where for usable in rows], pa.string()),
            "text": pa.array(texts, pa.large_string()),
            "said": pa.array(["\n".join(usable.row.turns[-1].texts()) for usable in rows], pa.large_string()),
        }
        if self._alike:
            columns["shingles"] = Shingles.of(texts).column()
        if self._settings.tokenizer is not None:
            columns["input_ids"] = _lists([one.input_ids for one in ids])
            columns["labels"] = _lists([one.labels for one in ids])
            columns["prompt_length"] = pa.array([one.prompt_length for one in ids], pa.int32())
            answers = [one.answer for one in ids]
            texts_of = iter(spell([answer for answer in answers if answer is not None], self._settings.tokenizer))
            written = [None if answer is None else next(texts_of) for answer in answers]
            lengths = [None if answer is None else len(answer) for answer in answers]
            columns["answer"] = pa.array(written, pa.string())
            columns["answer_length"] = pa.array(lengths, pa.int32())
        table = pa.table(columns)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


def quality_actions(cfg: QualityConfig) -> dict[str, Action]:
    """What is done about each finding."""
    return {name: value for name, value in vars(cfg).items() if isinstance(value, Action)}


def pii_actions(cfg: PiiConfig) -> dict[str, Action]:
    """What is done about each kind."""
    return {kind: getattr(cfg, kind) or cfg.action for kind in pii.KINDS}


def _lists(rows: list[list[int]]) -> Any:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.fromiter((value for row in rows for value in row), np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _shown(value: Any) -> str:
    return "" if isinstance(value, Fault) else str(value)[:1000]
