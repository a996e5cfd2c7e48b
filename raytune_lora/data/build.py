"""From sources to splits on disk and a report of what is in them.

Records are read in the calling process, in stretches that other processes turn into parts; then all rows are looked at
together, in arrays, and written to their splits. Only a few stretches are held in memory, and about 400 bytes a row.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.config.data import Action, DataConfig, QualityConfig, Truncation
from raytune_lora.data import pii, statistics
from raytune_lora.data.findings import Findings
from raytune_lora.data.process import TOO_LONG, Part, Processed, Processor, Settings, pii_actions, quality_actions
from raytune_lora.data.rows import Record
from raytune_lora.data.sampling import held_out_order
from raytune_lora.data.sources import MAIN, TEST, VALIDATION, Source
from raytune_lora.data.splits import OUT, SPLITS, Split
from raytune_lora.data.statistics import Statistics
from raytune_lora.errors import UserError

VERSION = 10  # of what becomes of a row: a change of that makes older stores stale
_STRETCH = 1000  # records a part
_AT_ONCE = 10_000  # rows of a held-out split that are put in order in memory
_PARTS = "parts"
OWN = (MAIN, VALIDATION, TEST)  # roles of sources whose rows left out are the data set's
_FEW_ROWS = 3  # that a share gives a split, under which it may well be none by chance
TOGETHER = "keep together"  # what is done about rows that would leak if each were put into a split by itself
REPORT = "data_report.json"
KEPT = ("input_ids", "labels", "prompt_length", "answer", "answer_length")  # columns of the store


class DataRefused(UserError):
    """The data is not fit to be trained on; ``report`` says all that is known of it."""

    def __init__(self, problems: str | Sequence[str], report: dict[str, Any]) -> None:
        super().__init__(problems)
        self.report = report


def survey(cfg: DataConfig, sources: Sequence[Source], tokenizer: Any, work: Path) -> dict[str, Any]:
    """Check all rows, divide them, and write the splits where there is a tokenizer.

    Args:
        cfg: the data set.
        sources: what it is made of.
        tokenizer: of the base model; None checks the rows only.
        work: folder for ``<split>.arrow`` and, in ``parts``, what is not needed afterwards.

    Returns:
        What ``data_report.json`` says; ``report.data`` documents it.

    Raises:
        DataRefused: no row is left, a split has no row, or a gate is closed.
    """
    (work / _PARTS).mkdir()
    parts, findings, figures = list[Part](), Findings(), Statistics()
    for part, found, seen in _processed(Settings(cfg, tokenizer, tuple(sources)), work / _PARTS):
        parts.append(part)
        findings.merge(found)
        figures.merge(seen)
    split = Split(cfg, sources, parts, figures.outlier_bounds())
    findings.merge(split.findings)
    rows = {name: int((split.of == number).sum()) for number, name in enumerate(SPLITS)}
    report = _report(cfg, split.sources, parts, split, rows, findings, figures, tokenized=tokenizer is not None)
    report["gate"] = _gate(cfg, report)
    if report["gate"]:
        raise DataRefused(report["gate"], report)
    if tokenizer is not None:
        _write(cfg, work, parts, split)
    return report


def _processed(settings: Settings, folder: Path) -> Iterator[Processed]:
    """The parts, in order; a pool of processes where there is enough to do."""
    stretches = enumerate(_stretches(settings.sources))
    first = list(islice(stretches, 2))
    processes = settings.cfg.processes or len(os.sched_getaffinity(0))
    if len(first) < 2 or processes == 1:
        process = Processor(settings)
        for number, stretch in chain(first, stretches):
            yield process(folder / f"{number:06}.arrow", stretch)
        return
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported there
    with ProcessPoolExecutor(processes, context, _start, (settings,)) as pool:
        waiting: deque[Future[Processed]] = deque()
        try:
            for number, stretch in chain(first, stretches):
                waiting.append(pool.submit(_process, folder / f"{number:06}.arrow", stretch))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"data: one of {processes} processes that prepare the rows was ended from outside, as happens where "
                "memory is short; take fewer (data.processes=1)"
            ) from error


_processor: Processor


def _start(settings: Settings) -> None:
    global _processor
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _processor = Processor(settings)


def _process(path: Path, stretch: list[tuple[int, Record]]) -> Processed:
    return _processor(path, stretch)


def _stretches(sources: Sequence[Source]) -> Iterator[list[tuple[int, Record]]]:
    stretch: list[tuple[int, Record]] = []
    for number, source in enumerate(sources):
        for record in source.records():
            stretch.append((number, record))
            if len(stretch) == _STRETCH:
                yield stretch
                stretch = []
    if stretch:
        yield stretch


def _write(cfg: DataConfig, work: Path, parts: Sequence[Part], split: Split) -> None:
    """Training rows as they came, for a run shuffles them; the others so that the first few are a sample of all."""
    import pyarrow as pa

    schema = parts[0].table().select(KEPT).schema
    starts = np.cumsum([0, *(len(part.row) for part in parts)])
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(split.of == number)
        if name != "train":
            strata = [name for part in parts for name in part.stratum] if cfg.stratify else None
            rows = rows[held_out_order(split.row[rows], strata and [strata[row] for row in rows.tolist()])]
        with pa.OSFile(str(work / f"{name}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for table in _tables(parts, starts, rows):
                writer.write_table(table)


def _tables(parts: Sequence[Part], starts: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[Any]:
    """The rows of a split in the order given, a table at a time.

    Args:
        parts: hold the rows.
        starts: (parts + 1,) number of each part's first row.
        rows: their numbers.
    """
    import pyarrow as pa

    for first in range(0, len(rows), _AT_ONCE):
        chosen = rows[first : first + _AT_ONCE]
        order = np.argsort(chosen, kind="stable")
        of, at = np.unique(np.searchsorted(starts, chosen[order], side="right") - 1, return_index=True)
        found = [
            parts[part].table().select(KEPT).take(members - starts[part])
            for part, members in zip(of, np.split(chosen[order], at[1:]), strict=True)
        ]
        yield pa.concat_tables(found).take(np.argsort(order, kind="stable")).combine_chunks()


# --------------------------------------------------------------------------------------------------------- what is said


def _report(
    cfg: DataConfig,
    sources: Sequence[Source],
    parts: Sequence[Part],
    split: Split,
    rows: dict[str, int],
    findings: Findings,
    figures: Statistics,
    *,
    tokenized: bool,
) -> dict[str, Any]:
    read = sum((part.read for part in parts), Counter[int]())
    read.update(split.moved)
    left_out = sum((part.left_out for part in parts), split.left_out)
    reasons = [_ordered({name: n for (i, name), n in left_out.items() if i == of}) for of in range(len(sources))]
    own = [i for i, source in enumerate(sources) if source.role in OWN]
    tokens = {name: int(split.tokens[split.of == number].sum()) for number, name in enumerate(SPLITS)}
    trained = {name: int(split.trained[split.of == number].sum()) for number, name in enumerate(SPLITS)}
    on = {name: action for name, action in quality_actions(cfg.quality).items() if action is not Action.off}
    found = {name: findings.report(name) | {"action": action.value} for name, action in on.items()}
    kinds = {kind: action for kind, action in pii_actions(cfg.pii).items() if action is not Action.off}
    personal = {kind: findings.report(f"pii.{kind}") | {"action": action.value} for kind, action in kinds.items()}
    if "leakage" in found and not split.leaks:
        found["leakage"]["action"] = TOGETHER
    for finding in (*found.values(), *personal.values()):
        for example in finding["examples"]:  # a report is passed on more easily than the data
            example["text"] = pii.hidden(example["text"], pii.find(example["text"]))
    return {
        "schema_version": 1,
        "sources": [
            {"role": source.role, "name": source.name, "files": list(source.files), "left_out": why}
            for source, why in zip(sources, reasons, strict=True)
        ],
        "rows": {
            "read": {source.name: read[i] for i, source in enumerate(sources)},
            "left_out": sum(read[i] for i in own) - int((np.isin(split.source, own) & (split.of != OUT)).sum()),
            "splits": rows,
            "reasons": _ordered(sum((Counter(reasons[i]) for i in own), Counter[str]())),
            "too_long": sum(reasons[i].get(TOO_LONG, 0) for i in own),
            "cut": sum(part.cut for part in parts),
            "groups": split.groups,
        },
        "max_length": cfg.max_length if tokenized else None,
        "truncation": cfg.truncation.value,
        "tokens": tokens if tokenized else None,
        "trained_tokens": trained if tokenized else None,
        "stop_ids": sorted(set().union(*(part.ends for part in parts))) if tokenized else None,
        "largest_id": max((part.largest_id for part in parts), default=0) if tokenized else None,
        "findings": found | {"pii": personal},
        "mixed": split.mixed,
        "statistics": figures.report(),
        "padding": padding(split.tokens[split.of == 0]) if tokenized else None,
        "advice": statistics.advice(
            rows["train"],
            {"trained": trained["train"]} if tokenized else {},
            findings.counts,
            sum(mixed["share"] for mixed in split.mixed.values()),
        ),
    }


def _ordered(reasons: Mapping[str, int]) -> dict[str, int]:
    """The most common first, as the checks are listed where they are as common."""
    order = [*vars(QualityConfig()), *pii.KINDS]
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], [*order, item[0]].index(item[0]))))


def padding(tokens_N: np.typing.NDArray[np.int32], batch: int = 4, seed: int = 0) -> float:
    """The share of padding in batches of ``batch`` rows in chance order: what packing saves.

    Args:
        tokens_N: lengths of rows.
        batch: rows side by side.
        seed: of the order.
    """
    whole = len(tokens_N) // batch * batch
    if not whole:
        return 0.0
    lengths = np.random.default_rng(seed).permutation(tokens_N)[:whole].reshape(-1, batch).astype(np.int64)
    return round(1 - float(lengths.sum()) / float((lengths.max(1) * batch).sum()), 4)


def every_finding(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The report's findings by name; of personal data, ``pii.email`` and the like."""
    found = {name: finding for name, finding in report["findings"].items() if name != "pii"}
    return found | {f"pii.{kind}": finding for kind, finding in report["findings"]["pii"].items()}


def in_short(report: dict[str, Any]) -> str:
    """The report in one line."""
    rows, seen = report["rows"], {name: f for name, f in every_finding(report).items() if f["count"]}
    line = "data: " + ", ".join(f"{count} rows to {name}" for name, count in rows["splits"].items() if count)
    line += f"; {rows['left_out']} left out: {why_left_out(report)}" if rows["left_out"] else ""
    if seen:
        line += "; found: " + ", ".join(f"{f['count']} {name} ({f['action']})" for name, f in seen.items())
    return line + f"; see {REPORT}"


def why_left_out(report: dict[str, Any], reasons: dict[str, int] | None = None) -> str:
    """How many rows are left out for which reason, each row once: those of ``reasons``, or the data set's own."""
    cut = "with nothing to train within" if report["truncation"] != Truncation.drop.value else "longer than"
    length = f"{cut} data.max_length={report['max_length']} tokens"
    counts = (report["rows"]["reasons"] if reasons is None else reasons).items()
    return ", ".join(f"{count} {length if name == TOO_LONG else name}" for name, count in counts)


def _gate(cfg: DataConfig, report: dict[str, Any]) -> list[str]:
    """Why the data must not be trained on."""
    rows, every = report["rows"], every_finding(report)
    found = []
    for name, finding in every.items():
        if finding["action"] == Action.stop.value and finding["count"]:
            example = finding["examples"][0]
            detail = f": {example['detail']}" if example["detail"] else ""
            found.append(f"data: {name} in {finding['count']} rows, the first at {example['where']}{detail}")
    if empty := [name for name, count in rows["read"].items() if not count]:
        return [f"data: there are no rows in {name}; name another file" for name in empty]
    own = [source["name"] for source in report["sources"] if source["role"] in OWN]
    read = sum(rows["read"][name] for name in own)
    dropped = {name: f for name, f in every.items() if f["action"] == Action.drop.value and f["count"]}
    reasons = why_left_out(report)
    first = next((f["examples"][0] for f in dropped.values() if f["examples"]), None)
    example = f"; the first at {first['where']}: {first['detail']}" if first else ""
    if rows["reasons"].get(TOO_LONG) and cfg.truncation is Truncation.drop:
        example += "; for those that are too long raise data.max_length, or set data.truncation=right to cut them"
    if not rows["splits"]["train"]:
        reasons = reasons or f"rows of the splits: {rows['splits']}"
        return [*found, f"data: no row is left to train on, of {read} read ({reasons}{example})"]
    gone = rows["left_out"] / read
    if gone > cfg.quality.max_dropped:
        found.append(
            f"data: {gone:.0%} of the rows would be left out, more than data.quality.max_dropped="
            f"{cfg.quality.max_dropped:g} ({reasons}{example})"
        )
    for name, share in (("validation", cfg.validation), ("test", cfg.test)):
        if share > 0 and not rows["splits"][name]:
            found.append(
                f"data.{name}={share:g} leaves no row in the {name} split (rows: {rows['splits']}): "
                f"{_remedy(cfg, name, share, rows['groups'])}"
            )
    return found


def _remedy(cfg: DataConfig, name: str, share: float, groups: dict[str, int]) -> str:
    """What gives a split rows: where rows that stay together are too few groups to divide, no share does."""
    if groups["rows"] * share < _FEW_ROWS or groups["count"] * share >= _FEW_ROWS:
        return "add rows or raise the share"
    return (
        f"{groups['rows']} rows make {groups['count']} groups of rows that share most of their text or ask the same, "
        f"the largest of {groups['largest']}, and a group stays in one split; name {name} rows by data.{name}_path, "
        "add rows that differ more, or raise data.quality.similarity (the share from which rows stay together; now "
        f"{cfg.quality.similarity:g})"
    )
