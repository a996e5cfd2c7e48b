"""Where rows come from: files of the user's, data sets of the hub, or a generator with a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from raytune_lora.config.data import DataConfig, ExtractionDataConfig, FakeDataConfig, FileDataConfig, Format
from raytune_lora.data.extraction import extraction_records, version
from raytune_lora.data.files import expand, identity, is_hub_name
from raytune_lora.data.formats import FIELDS, OPTIONAL, parse
from raytune_lora.data.readers import hub_commit, read_file, read_hub
from raytune_lora.data.rows import Fault, Record
from raytune_lora.errors import UserError

MAIN, VALIDATION, TEST, BENCHMARK = "data", "validation", "test", "benchmark"  # what a source is for
MIX = "mix."  # and the name of the one that is mixed in
_TRIED = 100  # records looked at before anything starts
_SHOWN = 5  # of their faults


@dataclass(frozen=True)
class Source:
    """One stream of records."""

    role: str  # MAIN, VALIDATION, TEST, BENCHMARK, or MIX and a name
    name: str  # as the user knows it
    records: Callable[[], Iterator[Record]]
    identity: Callable[[], Any]  # what the records are a function of
    format: Format = Format.auto
    columns: Mapping[str, str] = field(default_factory=dict)


def sources(cfg: DataConfig) -> list[Source]:
    """All that a data set is made of, the main one first.

    Raises:
        UserError: a file is missing, or a package that a generator needs.
    """
    if not isinstance(cfg, FileDataConfig):
        found = [_generated(cfg)]
    elif cfg.path is None:
        raise UserError(
            "data.path: no data; name a file of rows with instruction, input and output (data.path=my.jsonl), "
            "or try data=extraction or data=fake"
        )
    else:
        found = [_files(MAIN, "data.path", cfg.path, cfg.format, cfg.columns, cfg)]
        for role, path in ((VALIDATION, cfg.validation_path), (TEST, cfg.test_path)):
            if path is not None:
                found.append(_files(role, f"data.{role}_path", path, cfg.format, cfg.columns))
    for name, mix in cfg.mix.items():
        if mix.path is None:
            raise UserError(
                f"data.mix.{name}.path: no data; name a file to mix in (data.mix.{name}.path=general.jsonl)"
            )
        found.append(_files(f"{MIX}{name}", f"data.mix.{name}.path", mix.path, mix.format, mix.columns))
    found += [_files(BENCHMARK, "data.benchmarks", path, Format.auto, {}) for path in cfg.benchmarks]
    return found


def problems(cfg: DataConfig, *, unread: bool = False) -> list[str]:
    """What is wrong with the sources.

    Args:
        cfg: the data set.
        unread: look whether they are there; otherwise the first records of each are read too.
    """
    try:
        found = sources(cfg)
    except UserError as error:
        return error.problems
    known = sorted({name for _, names in FIELDS for name in names}.union(*OPTIONAL.values()))
    unknown_fields = [
        f"{source.name}: there is no field {', '.join(unknown)} to stand a column for; known: {', '.join(known)} "
        "(data.columns.instruction=<column of the file>)"
        for source in found
        if (unknown := sorted(set(source.columns) - set(known)))
    ]
    if unknown_fields or unread:
        return unknown_fields
    try:
        return [fault for source in found for fault in _first_faults(source)]
    except UserError as error:
        return error.problems


def _first_faults(source: Source) -> list[str]:
    """Why none of the first records is a row."""
    records = list(islice(source.records(), _TRIED))
    if not records:
        return [f"{source.name}: there are no rows in it; name another file"]
    faults = [
        f"{record.where}: {found.reason}" for record in records if isinstance(found := _parsed(source, record), Fault)
    ]
    return faults[:_SHOWN] if len(faults) == len(records) else []


def _parsed(source: Source, record: Record) -> Any:
    return record.value if isinstance(record.value, Fault) else parse(record.value, source.format, source.columns)


def _files(
    role: str, key: str, path: str, form: Format, columns: Mapping[str, str], hub: FileDataConfig | None = None
) -> Source:
    name = path if role == MAIN else f"{path} ({role})"
    if is_hub_name(path):
        of = hub or FileDataConfig()
        where = [of.subset, of.split, of.revision]

        def hub_records() -> Iterator[Record]:
            return read_hub(path, subset=of.subset, split=of.split, revision=of.revision)

        return Source(role, name, hub_records, lambda: [path, where, hub_commit(path, of.revision)], form, columns)
    try:
        files = expand(path)
    except UserError as error:
        raise UserError([f"{key}: {problem.removeprefix('data: ')}" for problem in error.problems]) from error

    def records() -> Iterator[Record]:
        for file in files:
            yield from read_file(file)

    return Source(role, name, records, lambda: identity(files), form, columns)


def _generated(cfg: DataConfig) -> Source:
    make: Callable[[Any], Iterator[dict[str, str]]] = {
        FakeDataConfig: _fake,
        ExtractionDataConfig: lambda cfg: extraction_records(cfg.rows, cfg.korean, cfg.seed),
    }[type(cfg)]

    def records() -> Iterator[Record]:
        for number, value in enumerate(make(cfg), 1):
            yield Record(f"{cfg.kind}#{number}", value)

    settings = {name: vars(cfg)[name] for name in ("rows", "korean", "seed") if name in vars(cfg)}
    if isinstance(cfg, ExtractionDataConfig):
        settings["version"] = version()
    return Source(MAIN, cfg.kind, records, lambda: [cfg.kind, settings], Format.alpaca)


def _fake(cfg: FakeDataConfig) -> Iterator[dict[str, str]]:
    """Words to be repeated in capitals: a task that a random model starts to learn within a few steps."""
    rng = random.Random(cfg.seed)
    for number in range(cfg.rows):
        word = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 8)))
        answer = f"{word.upper()} {number}"
        yield {"instruction": "Write in capitals.", "input": f"{word} {number}", "output": answer}
