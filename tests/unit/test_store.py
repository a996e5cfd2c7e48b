"""The token store: who goes into which split, what is trained, and when it is built."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.schema import DataConfig, ExtractionDataConfig, FakeDataConfig, FileDataConfig
from raytune_lora.data.sources import read_rows
from raytune_lora.data.store import IGNORED, SPLITS, TokenStore, prepare, split_of
from raytune_lora.data.templates import Row, alpaca
from raytune_lora.errors import UserError

Prepare = Callable[..., TokenStore]


@pytest.fixture
def prepared(tokenizer: Any, tmp_path: Path) -> Prepare:
    """Prepare a store in a cache of the test's own."""

    def run(cfg: DataConfig, tokenizer_id: str = "bytes") -> TokenStore:
        return prepare(cfg, tokenizer, tokenizer_id, tmp_path / "cache")

    return run


def file(tmp_path: Path, rows: list[Row]) -> FileDataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
    return FileDataConfig(path=str(path), validation=0.2, test=0.2, max_length=200)


def rows(count: int) -> list[Row]:
    return read_rows(FakeDataConfig(rows=count))


# --------------------------------------------------------------------------------------------------------------- splits


def test_the_splits_are_near_their_shares() -> None:
    splits = [split_of(row, 0.1, 0.2) for row in rows(4000)]
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert splits.count(split) / 4000 == pytest.approx(share, abs=0.02)


def test_a_row_stays_in_its_split_whatever_is_added(prepared: Prepare, tmp_path: Path) -> None:
    few = prepared(file(tmp_path, rows(100)))
    many = prepared(file(tmp_path, rows(150)[::-1]))
    for split in SPLITS:
        assert set(few.split(split)["prompt"]) <= set(many.split(split)["prompt"])


def test_the_answer_decides_nothing() -> None:
    assert all(split_of(row, 0.3, 0.3) == split_of(replace(row, output="x"), 0.3, 0.3) for row in rows(100))


def test_a_share_of_zero_takes_no_row() -> None:
    assert {split_of(row, 0.1, 0.0) for row in rows(300)} == {"train", "validation"}


# ---------------------------------------------------------------------------------------------------- tokens and labels


def test_the_answer_and_its_end_are_trained_and_the_prompt_is_not(prepared: Prepare, tokenizer: Any) -> None:
    cfg = ExtractionDataConfig(rows=60, korean=0.5, max_length=1000)
    store = prepared(cfg)
    expected = {alpaca(row): row.output for row in read_rows(cfg)}
    seen = [row for split in SPLITS for row in store.split(split)]
    assert {row["prompt"]: row["answer"] for row in seen} == expected
    for row in seen:
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        answer_ids = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        assert row["input_ids"] == prompt_ids + answer_ids
        assert row["labels"] == [IGNORED] * len(prompt_ids) + answer_ids


class Framing:
    """A tokenizer that puts a token before a text and its end after it, as some do."""

    eos_token_id = 9

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [100 + ord(sign) for sign in text]
        return {"input_ids": [8, *ids, 9] if add_special_tokens else ids}


def test_an_end_that_the_tokenizer_puts_after_the_prompt_is_taken_off(tmp_path: Path) -> None:
    store = prepare(file(tmp_path, rows(50)), Framing(), "framing", tmp_path)
    for row in store.split("train"):
        assert row["input_ids"][0] == 8
        assert row["input_ids"].count(9) == 1
        assert row["input_ids"][-1] == row["labels"][-1] == 9


def test_rows_that_are_too_long_are_dropped_and_counted(prepared: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    long = [Row("i", f"{'x' * 300} {number}", "o") for number in range(7)]
    cfg = file(tmp_path, rows(60) + long)
    store = prepared(cfg)
    assert store.manifest["dropped_too_long"] == 7
    assert sum(store.rows.values()) == 60
    lengths = {split: [len(row["input_ids"]) for row in store.split(split)] for split in SPLITS}
    assert {split: sum(each) for split, each in lengths.items()} == store.manifest["tokens"]
    longest = max(max(each) for each in lengths.values())
    assert prepared(replace(cfg, max_length=longest)).manifest["dropped_too_long"] == 7
    assert prepared(replace(cfg, max_length=longest - 1)).manifest["dropped_too_long"] > 7


# ---------------------------------------------------------------------------------------------- what cannot be prepared


def test_data_that_is_all_too_long_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"40 rows are longer than data\.max_length=20 tokens"):
        prepared(replace(file(tmp_path, rows(40)), max_length=20))
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "tokens").iterdir())


@pytest.mark.parametrize(("validation", "test", "empty"), [(1e-9, 0.2, "validation"), (0.2, 1e-9, "test")])
def test_a_split_without_rows_is_refused(
    validation: float, test: float, empty: str, prepared: Prepare, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"data\.{empty}=1e-09 leaves no row in the {empty} split.*raise the share"):
        prepared(replace(file(tmp_path, rows(60)), validation=validation, test=test))


def test_a_malformed_file_leaves_no_store(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: no 'instruction'"):
        prepared(FileDataConfig(path=str(tmp_path / "bad.jsonl")))
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "tokens").iterdir())


# ----------------------------------------------------------------------------------------------------- when it is built


@pytest.mark.parametrize(
    "other",
    [
        FakeDataConfig(rows=61),
        FakeDataConfig(rows=60, seed=1),
        FakeDataConfig(rows=60, max_length=500),
        FakeDataConfig(rows=60, validation=0.2),
        FakeDataConfig(rows=60, test=0.2),
    ],
    ids=["rows", "seed", "max_length", "validation", "test"],
)
def test_each_setting_has_a_store_of_its_own(other: FakeDataConfig, prepared: Prepare) -> None:
    store = prepared(FakeDataConfig(rows=60))
    assert prepared(other).folder != store.folder
    assert prepared(FakeDataConfig(rows=60)).folder == store.folder


def test_each_tokenizer_and_each_content_has_a_store_of_its_own(prepared: Prepare, tmp_path: Path) -> None:
    first = prepared(file(tmp_path, rows(60)))
    assert prepared(file(tmp_path, rows(60)), "another").folder != first.folder
    assert prepared(file(tmp_path, [*rows(60), Row("i", "", "o")])).folder != first.folder


def state(store: TokenStore) -> dict[Path, tuple[int, int]]:
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_a_store_is_built_once(prepared: Prepare) -> None:
    store = prepared(FakeDataConfig(rows=60))
    before = state(store)
    assert prepared(FakeDataConfig(rows=60)) == store
    assert state(store) == before
    assert store.rows == {"train": 51, "validation": 6, "test": 3}


@pytest.mark.parametrize("pattern", ["train/*.arrow", "validation/state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_store_is_built_anew(pattern: str, damage: str, prepared: Prepare) -> None:
    cfg = FakeDataConfig(rows=60)
    store = prepared(cfg)
    whole = [list(store.split(split)) for split in SPLITS]
    (victim,) = store.folder.glob(pattern)
    if damage == "cut":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    again = prepared(cfg)
    assert again == store
    assert [list(again.split(split)) for split in SPLITS] == whole
