"""What ``jobs/prepare.py`` shows: counts, and rows with the trained part apart from the masked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytune_lora.cli import job
from raytune_lora.config.compose import compose
from raytune_lora.data.store import IGNORED
from raytune_lora.tuning.inspect import CLOSE, OPEN, marked, show_data


def row(tokenizer: Any, prompt: str, answer: str) -> dict[str, list[int]]:
    prompt_ids, answer_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}


def test_without_colour_brackets_tell_what_is_trained(tokenizer: Any) -> None:
    shown = marked(row(tokenizer, "질문: 1+1? [b]", "둘 [/b]"), tokenizer, colour=False)
    assert shown.plain == f"질문: 1+1? [b]{OPEN}둘 [/b]<eos>{CLOSE}"


def test_with_colour_it_is_green_and_the_rest_is_dimmed(tokenizer: Any) -> None:
    shown = marked(row(tokenizer, "ask", "tell"), tokenizer, colour=True)
    assert shown.plain == "asktell<eos>"
    assert [(shown.plain[span.start : span.end], span.style) for span in shown.spans] == [
        ("ask", "dim"),
        ("tell<eos>", "bold green"),
    ]


def test_the_job_shows_counts_and_rows(
    cache: Path, tiny_folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = [f"model.path={tiny_folder}", f"data.path={rows}", f"cache={cache}", "evaluation.examples=2"]
    assert job("prepare", mine) == 0
    out = capsys.readouterr().out
    assert "train      1" in out
    assert "left out   0 rows, longer than 512 tokens" in out
    assert out.count("tokens are trained") == out.count(OPEN) == out.count("<eos>" + CLOSE) == 2


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
