"""Where rows come from: files by the paths that users give, and generators."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.data import DataConfig, ExtractionDataConfig, FakeDataConfig, FileDataConfig, MixConfig
from raytune_lora.data.sources import Source, problems, sources

GOOD = '{"instruction": "i", "input": "n", "output": "o"}'


def file(tmp_path: Path, content: str) -> FileDataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    return FileDataConfig(path=str(path))


def only(cfg: DataConfig) -> Source:
    (source,) = sources(cfg)
    return source


def values(cfg: DataConfig) -> list[Any]:
    return [record.value for record in only(cfg).records()]


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_read_again_and_again(tmp_path: Path) -> None:
    cfg = file(tmp_path, GOOD + "\n")
    assert values(cfg) == values(cfg) == [json.loads(GOOD)]
    assert problems(cfg) == []
    (record,) = only(cfg).records()
    assert record.where == f"{cfg.path}:1"


def test_each_source_is_known_by_what_it_is_for(tmp_path: Path) -> None:
    cfg = file(tmp_path, GOOD)
    cfg.validation_path = cfg.test_path = cfg.path
    cfg.benchmarks = [str(cfg.path)]
    cfg.mix = {"general": MixConfig(path=cfg.path)}
    found = sources(cfg)
    assert [source.role for source in found] == ["data", "validation", "test", "mix.general", "benchmark"]
    assert len({source.name for source in found}) == 5


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/x.jsonl", "*.jsonl", "folder"])
def test_a_path_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (fault,) = problems(FileDataConfig(path=str(tmp_path / name)))
    assert fault.startswith("data.path: ")
    assert str(tmp_path / name) in fault
    (fault,) = problems(FakeDataConfig(mix={"x": MixConfig(path=str(tmp_path / name))}))
    assert fault.startswith("data.mix.x.path: ")


def test_no_path_is_answered_with_what_there_is() -> None:
    (fault,) = problems(FileDataConfig())
    assert "data.path=my.jsonl" in fault
    assert "data=extraction" in fault
    (fault,) = problems(FakeDataConfig(mix={"x": MixConfig()}))
    assert fault.startswith("data.mix.x.path: no data")


def test_a_column_for_no_field_is_refused(tmp_path: Path) -> None:
    cfg = file(tmp_path, GOOD)
    cfg.columns = {"instruktion": "question"}
    (fault,) = problems(cfg)
    assert "there is no field instruktion" in fault
    assert "instruction" in fault.partition("known: ")[2]


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    first = only(file(tmp_path, GOOD)).identity()
    assert only(file(tmp_path, GOOD)).identity() == first
    assert only(file(tmp_path, GOOD + "\n")).identity() != first


# ----------------------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("cls", [FakeDataConfig, ExtractionDataConfig])
def test_a_generator_is_a_function_of_its_seed(cls: type[DataConfig]) -> None:
    rows = values(cls(rows=30, seed=1))  # type: ignore[call-arg]  # of the generators
    assert len(rows) == 30
    assert rows == values(cls(rows=30, seed=1))  # type: ignore[call-arg]
    assert rows != values(cls(rows=30, seed=2))  # type: ignore[call-arg]
    assert rows[:10] == values(cls(rows=10, seed=1))  # type: ignore[call-arg]


def test_fake_rows_are_words_and_the_same_in_capitals() -> None:
    rows = values(FakeDataConfig(rows=50))
    assert all(row["output"] == row["input"].upper() and row["instruction"] for row in rows)
    assert len({row["input"] for row in rows}) == 50


def renderings(day: date) -> list[str]:
    return [
        f"{day:%B} {day.day}, {day.year}",
        f"{day.day} {day:%b} {day.year}",
        day.isoformat(),
        f"{day.year}년 {day.month}월 {day.day}일",
        f"{day:%Y.%m.%d}",
    ]


def test_an_extraction_answer_says_what_the_message_says() -> None:
    for row in values(ExtractionDataConfig(rows=200, korean=0.5, seed=3)):
        record = json.loads(row["output"])
        assert list(record) == ["name", "company", "city", "date", "amount"]
        assert row["output"] == json.dumps(record, ensure_ascii=False)
        for key in ("name", "company", "city"):
            assert record[key].strip()
            assert record[key] in row["input"]
        assert any(text in row["input"] for text in renderings(date.fromisoformat(record["date"])))
        assert type(record["amount"]) is int
        assert str(record["amount"]) in row["input"].replace(",", "")


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_the_share_of_korean_messages_is_near_what_is_asked(share: float) -> None:
    rows = values(ExtractionDataConfig(rows=600, korean=share))
    korean = [any("가" <= sign <= "힣" for sign in row["input"]) for row in rows]
    assert korean == [any("가" <= sign <= "힣" for sign in row["instruction"]) for row in rows]
    assert sum(korean) / 600 == pytest.approx(share, abs=0.05)
    assert share not in (0.0, 1.0) or sum(korean) == 600 * share
