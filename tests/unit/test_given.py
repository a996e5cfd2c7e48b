"""Splits that data gives itself, by names and keys, beside what the ``datasets`` library makes of the same names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from datasets.data_files import DataFilesDict, get_data_patterns

from raytune_lora.config.data import FileDataConfig, MixConfig
from raytune_lora.data.given import split_named
from raytune_lora.data.rows import Fault
from raytune_lora.data.sources import MAIN, TEST, VALIDATION, sources
from raytune_lora.errors import UserError


def row(number: int) -> dict[str, str]:
    return {"instruction": f"i {number}", "output": "o"}


def rows(count: int) -> list[dict[str, str]]:
    return [row(number) for number in range(count)]


def folder(tmp_path: Path, **counts: int) -> str:
    for name, count in counts.items():
        file = tmp_path / name.replace("__", "/").replace("_of_", "-of-")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(count)))
    return str(tmp_path)


def divided(**settings: Any) -> dict[str, int]:
    """Rows by what they are for."""
    found = sources(FileDataConfig(**settings))
    return {source.role: sum(not isinstance(r.value, Fault) for r in source.records()) for source in found}


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        sources(FileDataConfig(**settings))
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "validation", "test"),
        ("train-00000_of_00002", "train-00001_of_00002", "test-00000_of_00001"),
        ("train__a", "train__b", "dev__a", "eval__c"),
        ("data__training", "data__valid", "data__evaluation"),
        ("my-train", "my-val", "my-testing"),
        ("a__train_1", "a__train_2", "a__dev"),
        ("one", "two"),
    ],
)
def test_files_are_for_what_datasets_takes_them(names: tuple[str, ...], tmp_path: Path) -> None:
    path = folder(tmp_path, **{name: number for number, name in enumerate(names, 1)})
    expected: dict[str, int] = {}
    for split, files in DataFilesDict.from_patterns(get_data_patterns(path), path).items():
        count = sum(len(Path(file).read_text().splitlines()) for file in files)
        expected[{"train": MAIN}.get(str(split), str(split))] = count
    assert divided(path=path) == expected
    assert divided(path=f"{path}/**") == expected


@pytest.mark.parametrize("name", ["latest", "contest", "training_test", "evaluate", "devotion", "retrain", "rows"])
def test_a_word_within_another_and_two_splits_at_once_say_nothing(name: str) -> None:
    assert split_named(name) is None


def test_rows_beside_named_keys_are_trained_on_whatever_the_files_name(tmp_path: Path) -> None:
    (tmp_path / "eval_suite.json").write_text(json.dumps({"data": rows(5), "test": rows(2)}))
    assert divided(path=str(tmp_path)) == {MAIN: 5, TEST: 2}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("trainset", "train"),
        ("myTest", "test"),
        ("VAL2", "validation"),
        ("held_out", "test"),
        ("my-holdout", "test"),
        ("unit_tests", "test"),
        ("validate", "validation"),
        ("학습데이터", "train"),
        ("검증", "validation"),
        ("평가용", "test"),
    ],
)
def test_a_split_is_seen_however_it_is_written(name: str, split: str) -> None:
    assert split_named(name) == split


def test_what_one_names_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    path = folder(tmp_path, train=5, validation=3, test=2)
    assert divided(path=f"{path}/test.jsonl") == {MAIN: 2}
    assert divided(path=f"{path}/tra*.jsonl", validation_path=f"{path}/test.jsonl") == {MAIN: 5, VALIDATION: 2}
    own = {"validation_path": f"{path}/validation.jsonl", "test_path": f"{path}/test.jsonl"}
    assert divided(path=path, **own) == {MAIN: 5, VALIDATION: 3, TEST: 2}
    assert "beside those of data.validation_path" in refused(path=path, validation_path=f"{path}/test.jsonl")


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([{"train": rows(5), "test": rows(2)}, {"train": rows(3), "test": rows(1)}], {MAIN: 8, TEST: 3}),
        ([{"train": rows(5)}, {"test": rows(2)}, {"dev": rows(1)}], {MAIN: 5, TEST: 2, VALIDATION: 1}),
        ([{"data": rows(5)}, {"data": rows(2)}], {MAIN: 7}),
        ([row(1), row(2), {"train": rows(3)}], {MAIN: 3}),
    ],
)
@pytest.mark.parametrize("between", ["", "\n", ",\n"])
def test_objects_one_after_the_other_give_the_splits_of_all(
    between: str, objects: Any, expected: Any, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(between.join(map(json.dumps, objects)))
    assert divided(path=str(tmp_path / "x.json")) == expected


def test_a_file_that_another_key_names_is_not_trained_on(tmp_path: Path) -> None:
    path = folder(tmp_path, a=5, held=3)
    assert divided(path=path, test_path=f"{path}/held.jsonl") == {MAIN: 5, TEST: 3}


def test_what_cannot_be_told_is_refused_with_the_keys(tmp_path: Path) -> None:
    path = folder(tmp_path, train=5, extra=3, test=2)
    said = refused(path=path)
    assert "extra.jsonl (no split)" in said
    assert "data.validation_path and data.test_path" in said
    path = folder(tmp_path / "held", dev=5, test=3)
    assert "nothing to train on" in refused(path=path)
    mixed = {"general": MixConfig(path=folder(tmp_path / "mix", train=5, test=3))}
    assert "data.mix.general.path" in refused(path=f"{path}/dev.jsonl", mix=mixed)


def test_files_of_no_named_split_are_trained_on_beside_held_ones(tmp_path: Path) -> None:
    assert divided(path=folder(tmp_path, a=5, b=3, test=2)) == {MAIN: 8, TEST: 2}
    assert divided(path=folder(tmp_path / "c", train_a=5, b=3)) == {MAIN: 8}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"train": rows(5), "validation": rows(3), "test": rows(2)}, {MAIN: 5, VALIDATION: 3, TEST: 2}),
        ({"version": 1, "test": rows(2), "dev": rows(3), "data": rows(5)}, {MAIN: 5, VALIDATION: 3, TEST: 2}),
        ({"train": rows(5), "test": []}, {MAIN: 5}),
        ({"validation": rows(5)}, {MAIN: 5}),
        ({"train_a": rows(5), "train_b": rows(2)}, {MAIN: 7}),
        ([row(1), row(2)], {MAIN: 2}),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_keys_of_a_json_object_say_the_split(content: Any, expected: Any, indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content, indent=indent))
    assert divided(path=str(tmp_path / "x.json")) == expected


def test_rows_of_a_list_without_a_known_name_are_counted_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"bonus": rows(3), "train": rows(5), "test": rows(2)}))
    train, test = sources(FileDataConfig(path=str(tmp_path / "x.json")))
    found = [(record.where.rpartition("#")[2], record.value) for record in train.records()]
    assert [number for number, value in found if not isinstance(value, Fault)] == ["4", "5", "6", "7", "8"]
    strays = [value.reason for _, value in found if isinstance(value, Fault)]
    assert len(strays) == 3
    assert "'bonus'" in strays[0]
    assert [record.where.rpartition("#")[2] for record in test.records()] == ["9", "10"]


def test_a_data_set_saved_to_disk_is_read_by_its_splits(tmp_path: Path) -> None:
    both = DatasetDict({"train": Dataset.from_list(rows(6)), "test": Dataset.from_list(rows(4))})
    both.save_to_disk(tmp_path / "saved")
    assert divided(path=str(tmp_path / "saved")) == {MAIN: 6, TEST: 4}
    Dataset.from_list(rows(1200)).save_to_disk(tmp_path / "one", num_shards=2)
    (source,) = sources(FileDataConfig(path=str(tmp_path / "one")))
    assert [record.value for record in source.records()] == rows(1200)
