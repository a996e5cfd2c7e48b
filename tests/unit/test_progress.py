"""What people see while a sweep runs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytune_lora.tuning.progress import Progress, Tally
from raytune_lora.tuning.trials import Journal

RESULT = {
    "samples_seen": 16,
    "eval_loss": 1.23456,
    "train_loss": 2.0,
    "training_seconds": 3.0,
    "trainable_parameters": 10,
    "peak_memory_bytes": None,
    "micro_batch": 4,
    "last": False,
    "checkpoint": "/c",
}
PARAMS = {"method.r": 16, "training.learning_rate": 0.00012345, "method.target_modules": ["q_proj", "v_proj"]}


def followed(tmp_path: Path) -> tuple[Progress, Journal]:
    """Made in the test itself, where the stream is caught that it keeps."""
    progress = Progress("quickstart", total=8)
    journal = Journal(tmp_path / "journal.jsonl", progress.watch)
    progress.know(64, journal.record)
    return progress, journal


def tell(journal: Journal, trial_id: str, *, status: str | None = None, error: str | None = None) -> None:
    journal.append("trial_started", trial_id=trial_id, params=PARAMS)
    if status != "oom":
        journal.append("trial_result", trial_id=trial_id, **RESULT)
    if status is not None:
        journal.append("trial_ended", trial_id=trial_id, status=status, error=error, seconds=7.4)


def table(progress: Progress, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({}, "0:00 prepare done in 3 s"),
        ({"eval_loss": 2.5, "exact_match": None}, "0:00 prepare done in 3 s, validation loss 2.5000"),
        (
            {"eval_loss": 2.5, "eval_loss_rows": 74, "exact_match": 0.25, "exact_match_rows": 24},
            "0:00 prepare done in 3 s, validation loss 2.5000 on 74 rows, exact match 0.25 on 24 rows",
        ),
    ],
)
def test_a_phase_says_what_it_measured(
    facts: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, journal = followed(tmp_path)
    journal.append("phase", name="prepare", seconds=3.1, **facts)
    assert capsys.readouterr().err == line + "\n"


def test_a_trial_has_a_line_for_each_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, journal = followed(tmp_path)
    tell(journal, "0003", status="completed")
    assert capsys.readouterr().err.splitlines() == [
        "0:00 trial 0003 started: r=16, learning_rate=0.000123, target_modules=['q_proj', 'v_proj']",
        "0:00 trial 0003: validation loss 1.2346 after 16 samples",
        "0:00 trial 0003 completed after 16 samples, 7 s; 1 ended, lowest validation loss 1.2346 (trial 0003)",
    ]


@pytest.mark.parametrize("error", ["RuntimeError: it broke", "no [/tmp/x] and [bold] in [red]text[/red]", "길" * 300])
def test_a_failure_is_told_in_full_whatever_it_holds(
    error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress, journal = followed(tmp_path)
    tell(journal, "0000", status="oom", error=error)
    assert capsys.readouterr().err.splitlines()[-1] == f"0:00 trial 0000 oom after 0 samples, 7 s: {error}; 1 ended"
    assert "oom" in table(progress)


def test_machines_are_told_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("mine", 4, as_json=True)
    journal = Journal(tmp_path / "journal.jsonl", progress.watch)
    with progress.shown(), progress.doing("running trials"):
        tell(journal, "0003", status="oom", error='no "luck"\n길')
        progress.note("ending in order")
    lines = capsys.readouterr().err.splitlines()
    told = [json.loads(words) for words in lines]
    assert [line["event"] for line in told] == ["doing", "trial_started", "trial_ended", "note"]
    assert all(line["sweep"] == "mine" and abs(line["time"] - time.time()) < 60 for line in told)
    ended = next(line for line in told if line["event"] == "trial_ended")
    assert (ended["trial_id"], ended["error"]) == ("0003", 'no "luck"\n길')
    assert ended["message"].startswith('trial 0003 oom after 0 samples, 7 s: no "luck"')
    assert str(Tally(4, "\n".join(lines))) == "1 of 4 trials ended"


def test_what_is_being_done_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress, _ = followed(tmp_path)
    with progress.shown(), progress.doing("measuring the base model"):
        assert "measuring the base model" in table(progress)
    assert "measuring" not in table(progress)
    assert capsys.readouterr().err == "0:00 measuring the base model\n"


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_shows_each_trial_within_100_columns(tmp_path: Path) -> None:
    progress, journal = followed(tmp_path)
    for number, status in enumerate(["completed", "stopped", "oom", "diverged", None]):
        tell(journal, f"{number:04d}", status=status)
    shown = table(progress).splitlines()
    assert max(len(line) for line in shown) <= 100
    assert shown[0].startswith("quickstart: 4 of 8 trials ended, 0:00")
    for column in ("trial", "status", "r", "learning_rate", "samples", "eval loss", "seconds"):
        assert column in shown[2]
    rows = [line.strip("│ ").split("│") for line in shown if line.startswith("│")]
    assert [[cell.strip() for cell in row][:4] for row in rows if row[0].strip().isdigit()] == [
        ["0000", "completed", "16", "0.000123"],
        ["0001", "stopped", "16", "0.000123"],
        ["0002", "oom", "16", "0.000123"],
        ["0003", "diverged", "16", "0.000123"],
        ["0004", "running", "16", "0.000123"],
    ]
    assert "1.2346" in table(progress)
    assert "16/64" in table(progress)


def test_before_the_first_trial_there_is_no_table(tmp_path: Path) -> None:
    progress, _ = followed(tmp_path)
    assert table(progress).strip() == ""


def test_only_the_last_trials_are_shown(tmp_path: Path) -> None:
    progress, journal = followed(tmp_path)
    for number in range(25):
        tell(journal, f"{number:04d}", status="completed")
    shown = table(progress)
    assert "0024" in shown
    assert "0005" in shown
    assert "0004" not in shown


def test_what_was_done_before_is_shown(tmp_path: Path) -> None:
    tell(followed(tmp_path)[1], "0000", status="completed")
    progress, _ = followed(tmp_path)
    assert "quickstart: 1 of 8 trials ended" in table(progress)


def test_going_on_elsewhere_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, journal = followed(tmp_path)
    journal.append("moved", changes={"workers": 2, "deepspeed": {"stage": 3}})
    assert "going on with workers=2" in capsys.readouterr().err
