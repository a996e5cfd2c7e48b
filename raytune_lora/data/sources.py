"""Where rows come from: a file of the user's, or a generator with a seed.

A source is a function from its config to rows. Reading a file checks every row and says what is wrong with which line.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_lora.config.schema import DataConfig, ExtractionDataConfig, FakeDataConfig, FileDataConfig
from raytune_lora.data.extraction import extraction_rows
from raytune_lora.data.templates import Row
from raytune_lora.errors import UserError

_SHOWN = 5  # malformed rows named one by one


def read_rows(cfg: DataConfig) -> list[Row]:
    """All rows of the data set, checked.

    Raises:
        UserError: the file is missing, empty, or has malformed rows (each with file, line and reason).
    """
    return _SOURCES[type(cfg)](cfg)


def source_identity(cfg: DataConfig) -> Any:
    """What the rows are a function of: the file's digest, or the generator's settings."""
    if isinstance(cfg, FileDataConfig):
        return hashlib.sha256(_path(cfg).read_bytes()).hexdigest()
    return [type(cfg).__name__, vars(cfg)]


def problems(cfg: DataConfig) -> list[str]:
    """What is wrong with the source; a file is read through."""
    try:
        if isinstance(cfg, FileDataConfig):
            _file_rows(cfg)
        if isinstance(cfg, ExtractionDataConfig):
            extraction_rows(1, cfg.korean, cfg.seed)
    except UserError as error:
        return error.problems
    return []


def _path(cfg: FileDataConfig) -> Path:
    if cfg.path is None:
        raise UserError(
            "data.path: no data; name a JSONL file of rows with instruction, input and output (data.path=my.jsonl), "
            "or try data=extraction or data=fake"
        )
    path = Path(cfg.path).expanduser().absolute()
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"data.path: {path} {what}; name a JSONL file of rows with instruction, input and output")
    return path


def _file_rows(cfg: FileDataConfig) -> list[Row]:
    path = _path(cfg)
    rows: list[Row] = []
    faults: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = _parse(line)
                if isinstance(row, Row):
                    rows.append(row)
                else:
                    faults.append(f"{path}:{number}: {row}")
    except OSError as error:
        raise UserError(f"data.path: {path} cannot be read ({error.strerror}); name another file") from error
    if faults:
        more = [f"{path}: {len(faults) - _SHOWN} more malformed rows"] if len(faults) > _SHOWN else []
        raise UserError([*faults[:_SHOWN], *more])
    if not rows:
        raise UserError(f"data.path: {path} has no rows; it needs one JSON object a line")
    return rows


def _parse(line: bytes) -> Row | str:
    """A row, or the reason why the line is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        return f"not JSON: {error}"
    if not isinstance(value, dict):
        return f"a row is a JSON object with instruction, input and output, not {type(value).__name__}"
    for key in ("instruction", "input", "output"):
        text = value.get(key, "" if key == "input" else None)
        if text is None:
            return f"no {key!r}; a row has instruction, output and, where there is one, input"
        if not isinstance(text, str):
            return f"{key!r} must be a string (got {type(text).__name__})"
        if key != "input" and not text.strip():
            return f"{key!r} is empty"
        if not _encodable(text):
            return f"{key!r} holds half a character (a lone surrogate)"
    return Row(value["instruction"], value.get("input", ""), value["output"])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fake_rows(cfg: FakeDataConfig) -> list[Row]:
    """Words to be repeated in capitals: a task that a random model starts to learn within a few steps."""
    rng = random.Random(cfg.seed)
    rows = []
    for number in range(cfg.rows):
        word = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 8)))
        rows.append(Row("Write in capitals.", f"{word} {number}", f"{word.upper()} {number}"))
    return rows


_SOURCES: dict[type, Callable[[Any], list[Row]]] = {
    FileDataConfig: _file_rows,
    FakeDataConfig: _fake_rows,
    ExtractionDataConfig: lambda cfg: extraction_rows(cfg.rows, cfg.korean, cfg.seed),
}
