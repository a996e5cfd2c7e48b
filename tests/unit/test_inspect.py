"""What ``jobs/prepare.py`` shows: counts, and rows with the trained part apart from the masked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytune_lora.cli import job
from raytune_lora.config.compose import compose
from raytune_lora.data.encode import IGNORED
from raytune_lora.tuning.inspect import CLOSE, OPEN, marked, pieces, show_data
from tests import readme


def row(tokenizer: Any, prompt: str, answer: str) -> dict[str, list[int]]:
    prompt_ids, answer_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}


def test_without_colour_brackets_tell_what_is_trained(tokenizer: Any) -> None:
    shown = marked(list(pieces(row(tokenizer, "질문: 1+1? [b]", "둘 [/b]"), tokenizer)), colour=False)
    assert shown.plain == f"질문: 1+1? [b]{OPEN}둘 [/b]<eos>{CLOSE}"


def test_with_colour_it_is_green_and_the_rest_is_dimmed(tokenizer: Any) -> None:
    shown = marked(list(pieces(row(tokenizer, "ask", "tell"), tokenizer)), colour=True)
    assert shown.plain == "asktell<eos>"
    assert [(shown.plain[span.start : span.end], span.style) for span in shown.spans] == [
        ("ask", "dim"),
        ("tell<eos>", "bold green"),
    ]


def test_the_job_shows_counts_and_rows_and_writes_the_reports(
    cache: Path, tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    mine = [
        f"model.path={tiny_folder}",
        f"data.path={rows}",
        f"cache={cache}",
        "evaluation.examples=2",
        f"output={out}",
    ]
    assert job("prepare", mine) == 0
    said = capsys.readouterr().out
    assert f"read       200 rows from {rows}" in said
    assert "train      1" in said
    assert "left out   0 rows\n" in said
    assert said.count("-- row") == said.count(OPEN) == said.count("<eos>" + CLOSE) == 2
    report = json.loads((out / "data_report.json").read_text())
    assert sum(report["rows"]["splits"].values()) == 200
    assert report["cost"]["tokens_per_epoch"] == report["tokens"]["train"]
    assert len(report["preview"]) == 2
    assert "<html" in (out / "data_report.html").read_text()
    assert job("prepare", mine) == 2
    assert "is not empty" in capsys.readouterr().err


def test_no_model_is_needed_to_see_what_is_in_the_data(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the README; every finding with the number of rows that were planted."""
    good = [
        {"instruction": "Say it.", "input": f"number {n} of {n * 7919 % 1009}", "output": f"it {n}"} for n in range(60)
    ]
    bad = [good[0], good[1], good[2] | {"output": "another"}, {"instruction": "", "output": "x"}, {"instruction": "x"}]
    personal = {"instruction": "Write to", "input": "kim@example.com, 4111 1111 1111 1111", "output": "done"}
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*good, *bad, personal]) + "{broken\n")
    out = tmp_path / "report"
    arguments = readme.arguments("jobs/prepare.py data.path=", {"my.jsonl": str(path), "reports/mine": str(out)})
    assert job("prepare", [*arguments, f"cache={cache}"]) == 0
    report = json.loads((out / "data_report.json").read_text())
    found = report["findings"]
    expected = {
        "exact_duplicates": 2,
        "contradictions": 1,
        "empty_fields": 1,
        "missing_fields": 1,
        "unreadable": 1,
        "near_duplicates": 0,
    }
    assert {name: found[name]["count"] for name in expected} == expected
    assert (found["pii"]["email"]["count"], found["pii"]["credit_card"]["count"]) == (1, 1)
    assert "kim@example.com" not in (out / "data_report.json").read_text()
    assert report["tokens"] is None
    assert "name a model" in capsys.readouterr().out


def test_data_that_is_not_fit_is_reported_and_refused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "my.jsonl", tmp_path / "report"
    path.write_text("not json\n" * 9)
    assert job("prepare", [f"data.path={path}", f"output={out}", f"cache={cache}"]) == 2
    report = json.loads((out / "data_report.json").read_text())
    assert report["findings"]["unreadable"]["count"] == 9
    assert report["gate"][0] in capsys.readouterr().err.replace("error: ", "")


def test_where_a_model_is_named_none_is_asked_for(
    tmp_path: Path, cache: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text("not json\n" * 9 + json.dumps({"instruction": "i", "output": "o"}) + "\n")
    assert job("prepare", [f"data.path={path}", f"model.path={tiny_folder}", f"cache={cache}"]) == 2
    assert "name a model" not in capsys.readouterr().out


def test_a_terminal_gets_colours(cache: Path, tiny_folder: Path, rows: Path) -> None:
    cfg = compose([f"model.path={tiny_folder}", f"data.path={rows}", f"cache={cache}", "evaluation.examples=1"])
    stream = io.StringIO()
    show_data(cfg, Console(file=stream, force_terminal=True, soft_wrap=True))
    assert "\x1b[1;32m" in stream.getvalue()
    assert OPEN not in stream.getvalue()


@pytest.mark.parametrize(
    ("override", "told"),
    [("search.trials=2", "prepare has no search"), ("resume=sweeps/mine", "prepare finds by itself")],
)
def test_what_it_does_not_take_is_refused(override: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("prepare", [override]) == 2
    assert told in capsys.readouterr().err
