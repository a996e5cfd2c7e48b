"""Where rows come from: files of the user's, data sets of the hub, or a generator with a seed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from raytune_lora.config.data import DataConfig, ExtractionDataConfig, FakeDataConfig, FileDataConfig, Format
from raytune_lora.data import given
from raytune_lora.data.extraction import extraction_records, version
from raytune_lora.data.files import expand, identity, is_hub_name
from raytune_lora.data.formats import FIELDS, OPTIONAL, parse
from raytune_lora.data.given import split_named
from raytune_lora.data.readers import hub_commit, hub_splits, read_file, read_hub
from raytune_lora.data.rows import Fault, Record
from raytune_lora.errors import UserError

MAIN, VALIDATION, TEST, BENCHMARK = "data", "validation", "test", "benchmark"  # what a source is for
MIX = "mix."  # and the name of the one that is mixed in
_TRIED = 100  # records looked at before anything starts
_SHOWN = 5  # of their faults
Found = TypeVar("Found")


@dataclass(frozen=True)
class Source:
    """One stream of records."""

    role: str  # MAIN, VALIDATION, TEST, BENCHMARK, or MIX and a name
    name: str  # as the user knows it
    records: Callable[[], Iterator[Record]]
    identity: Callable[[], Any]  # what the records are a function of
    format: Format = Format.auto
    columns: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # the first few names and how many more, where it is made of files
    split_column: str | None = None  # that may say which split a row is of


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
        found = [_by_column(source, cfg, cfg.stratify) for source in _own(cfg, cfg.path)]
    for name, mix in cfg.mix.items():
        if mix.path is None:
            raise UserError(
                f"data.mix.{name}.path: no data; name a file to mix in (data.mix.{name}.path=general.jsonl)"
            )
        mixed = _files(f"{MIX}{name}", f"data.mix.{name}.path", mix.path, mix.format, mix.columns)
        found.append(_by_column(mixed, cfg, None))
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


def _own(cfg: FileDataConfig, path: str) -> list[Source]:
    """The data set's own rows: those to train on, and the validation and test rows that the config or its files give.

    Raises:
        UserError: a file is missing, or which split it is for cannot be told.
    """
    asked = {VALIDATION: cfg.validation_path, TEST: cfg.test_path}
    found = [_hub(role, path, splits, cfg) for role, splits in _hub_splits(cfg, path).items()]
    if not is_hub_name(path):
        others = {role: own for role, own in asked.items() if own is not None and not is_hub_name(own)}
        named = {
            os.path.realpath(file)
            for role, own in others.items()
            for file in _of_user(f"data.{role}_path", partial(expand, own))
        }
        parts = _of_user("data.path", lambda: given.divided("data.path", path, named))
        if twice := [role for role, own in asked.items() if own is not None and role in parts]:
            rows = ", ".join(name for role in twice for name in given.names(parts[role]))
            keys = " and ".join(f"data.{role}_path" for role in twice)
            raise UserError(
                f"data.path: {path} holds {' and '.join(twice)} rows ({rows}) beside those of {keys}; leave {keys} "
                "out to take these, or name only the files to train on in data.path"
            )
        main = parts.pop(given.TRAIN)
        found = [_pieces(MAIN, path, main, cfg.format, cfg.columns)]
        found += [_pieces(role, f"{path} ({role})", some, cfg.format, cfg.columns) for role, some in parts.items()]
    for role, own in asked.items():
        if own is not None:
            found = [source for source in found if source.role != role]
            found.append(_files(role, f"data.{role}_path", own, cfg.format, cfg.columns, cfg))
    return found


def _by_column(source: Source, cfg: DataConfig, stratify: str | None) -> Source:
    """The source with the column that may say its rows' splits, unless it is for something else."""
    column = cfg.split_column if isinstance(cfg, FileDataConfig) else FileDataConfig.split_column
    return replace(source, split_column=None if column in (*source.columns.values(), stratify) else column)


def _files(
    role: str, key: str, path: str, form: Format, columns: Mapping[str, str], hub: FileDataConfig | None = None
) -> Source:
    """What a path of one purpose gives."""
    if is_hub_name(path):
        same = hub is not None and path == hub.path  # and then its subset and revision
        of = FileDataConfig(path=path, subset=hub.subset, revision=hub.revision) if hub and same else FileDataConfig()
        held = role in (VALIDATION, TEST)
        splits = (
            [name for name in hub_splits(path, of.subset, of.revision) if split_named(name) == role] if held else []
        )
        return replace(_hub(role, path, splits or [role if held else of.split], of), format=form, columns=columns)
    pieces = _of_user(key, lambda: given.undivided(key, path, any_split=role == BENCHMARK))
    return _pieces(role, f"{path} ({role})", pieces, form, columns)


def _pieces(role: str, name: str, pieces: list[given.Piece], form: Format, columns: Mapping[str, str]) -> Source:
    def records() -> Iterator[Record]:
        for piece in pieces:
            yield from read_file(piece.file, piece.keys, piece.stray)

    def content() -> Any:
        return [identity([piece.file for piece in pieces]), [[piece.keys, piece.stray] for piece in pieces]]

    return Source(role, name, records, content, form, columns, tuple(given.names(pieces)))


def _hub_splits(cfg: FileDataConfig, path: str) -> dict[str, list[str]]:
    """The splits of a hub data set by purpose: the one to train on, and those that are there for the rest."""
    if not is_hub_name(path):
        return {}
    splits = {MAIN: [cfg.split]}
    if cfg.split == FileDataConfig.split:
        for name in hub_splits(path, cfg.subset, cfg.revision):
            if (role := split_named(name)) in (VALIDATION, TEST):
                splits.setdefault(role, []).append(name)
    return splits


def _hub(role: str, path: str, splits: list[str], of: FileDataConfig) -> Source:
    def records() -> Iterator[Record]:
        for split in splits:
            yield from read_hub(path, subset=of.subset, split=split, revision=of.revision)

    def content() -> Any:
        return [path, of.subset, splits, hub_commit(path, of.revision)]

    name = path if role == MAIN else f"{path} ({role})"
    return Source(role, name, records, content, of.format, of.columns, tuple(splits))


def _of_user(key: str, find: Callable[[], Found]) -> Found:
    """What is found for a key, which a refusal then names."""
    try:
        return find()
    except UserError as error:
        raise UserError(
            [
                problem if problem.startswith(f"{key}: ") else f"{key}: {problem.removeprefix('data: ')}"
                for problem in error.problems
            ]
        ) from error


def _generated(cfg: DataConfig) -> Source:
    make: Callable[[Any], Iterator[dict[str, str]]] = {
        FakeDataConfig: _fake,
        ExtractionDataConfig: lambda cfg: extraction_records(cfg.rows, cfg.korean, cfg.seed),
    }[type(cfg)]

    def records() -> Iterator[Record]:
        for number, value in enumerate(make(cfg), 1):
            yield Record(f"{cfg.kind}#{number}", value)

    settings: dict[str, Any] = {name: vars(cfg)[name] for name in ("rows", "korean", "seed") if name in vars(cfg)}
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
