"""What a sweep's metrics say of its journal and its folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.compose import compose
from raytune_lora.training.tracking.series import BUDGETS, RANKS, SERIES, STATES, most_series
from raytune_lora.tuning.folder import SweepFolder
from raytune_lora.tuning.gauges import SweepGauges
from raytune_lora.tuning.trials import Journal
from tests import readme

Key = tuple[str, str]  # a metric, and the value of its label beside ``sweep``


def result(seen: int, loss: float) -> dict[str, Any]:
    return {
        "samples_seen": seen,
        "eval_loss": loss,
        "train_loss": loss,
        "training_seconds": seen / 8,
        "trainable_parameters": 100,
        "peak_memory_bytes": None,
        "micro_batch": 4,
        "checkpoint": f"/checkpoint-{seen}",
        "last": False,
    }


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def gauges(journal: Journal, folder: Path, *overrides: str, trials: int = 8) -> SweepGauges:
    return SweepGauges(compose(["experiment=tiny", *overrides]), SweepFolder(folder), journal, trials)


def shown(gauges: SweepGauges) -> dict[Key, float]:
    """What is read, after seeing that each metric has the labels that it is declared with."""
    found: dict[Key, float] = {}
    for name, value, labels in gauges.read():
        assert ("sweep", *labels) == SERIES[name].labels
        found[name, next(iter(labels.values()), "")] = value
    return found


def states(found: dict[Key, float]) -> dict[str, float]:
    return {state: found["sweep_trials", state] for state in STATES if found["sweep_trials", state]}


def test_trials_by_state_and_the_best_of_them(journal: Journal, tmp_path: Path) -> None:
    read = gauges(journal, tmp_path, "budget.hours=2", "budget.gpu_hours=1")
    assert states(shown(read)) == {"waiting": 8}
    for name, loss, status in (
        ("0000", 2.0, "completed"),
        ("0001", 1.0, "failed"),
        ("0002", 1.5, "stopped"),
        ("0003", 3.0, None),
        ("0004", None, "oom"),
    ):
        journal.append("trial_started", trial_id=name, params={}, gpus=2)
        if loss is not None:
            journal.append("trial_result", trial_id=name, **result(16, loss))
        if status is not None:
            journal.append("trial_ended", trial_id=name, status=status, error=None, seconds=1.0)
    journal.append("phase", name="baseline", seconds=1.0, eval_loss=6.0, trial_loss=5.0)
    found = shown(read)
    assert states(found) == {"waiting": 3, "running": 1, "completed": 1, "stopped": 1, "failed": 1, "oom": 1}
    best = [(found["sweep_best_trial_number", str(n)], found["sweep_best_eval_loss", str(n)]) for n in (1, 2, 3)]
    assert best == [(2, 1.5), (0, 2.0), (3, 3.0)], "a trial that failed is none of the best"
    assert ("sweep_best_eval_loss", "4") not in found
    assert found["sweep_baseline_eval_loss", ""] == 5.0
    assert found["sweep_samples_total", ""] == 4 * 16
    assert found["sweep_gpu_seconds_total", ""] == 4 * 2 * 2
    assert found["sweep_budget_used_ratio", "trials"] == 4 / 8
    assert found["sweep_budget_used_ratio", "gpu_hours"] == 16 / 3600
    assert 0 < found["sweep_budget_used_ratio", "hours"] < 0.01
    assert time.time() - 60 < found["sweep_last_event_timestamp_seconds", ""] <= time.time()


def test_the_clock_is_no_progress_and_the_end_of_a_budget_lets_nobody_wait(journal: Journal, tmp_path: Path) -> None:
    read = gauges(journal, tmp_path)
    journal.append("trial_started", trial_id="0000", params={})
    before = shown(read)["sweep_last_event_timestamp_seconds", ""]
    journal.append("clock")
    assert shown(read)["sweep_last_event_timestamp_seconds", ""] == before
    journal.append("ended_by", budget="hours", why="enough")
    assert states(shown(read)) == {"running": 1}


def test_a_run_that_confirms_is_no_trial_that_was_waited_for(journal: Journal, tmp_path: Path) -> None:
    read = gauges(journal, tmp_path, trials=1)
    journal.append("trial_started", trial_id="0000", params={})
    journal.append("trial_ended", trial_id="0000", status="completed", error=None, seconds=1.0)
    journal.append("trial_started", trial_id="0000-s1", params={}, confirms="0000")
    assert states(shown(read)) == {"running": 1, "completed": 1}


def test_checkpoints_are_measured_as_trials_get_on(journal: Journal, tmp_path: Path) -> None:
    read = gauges(journal, tmp_path)
    checkpoint = tmp_path / "trials" / "0000" / "checkpoint-00000002"
    (checkpoint / "adapter").mkdir(parents=True)
    (checkpoint / "adapter" / "weights").write_bytes(b"x" * 1000)
    (checkpoint / "manifest.json").write_bytes(b"x" * 10)
    journal.append("trial_started", trial_id="0000", params={})
    assert shown(read)["sweep_checkpoint_bytes", ""] == 1010
    (checkpoint / "manifest.json").unlink()
    assert shown(read)["sweep_checkpoint_bytes", ""] == 1010, "nothing new in the journal, nothing looked at"
    journal.append("trial_result", trial_id="0000", **result(16, 1.0))
    assert shown(read)["sweep_checkpoint_bytes", ""] == 1000
    disk = shown(read)
    assert 0 < disk["sweep_disk_free_bytes", ""] < disk["sweep_disk_size_bytes", ""]


def test_ten_thousand_trials_are_read_in_milliseconds_and_are_no_more_series(journal: Journal, tmp_path: Path) -> None:
    read = gauges(journal, tmp_path, "budget.hours=2", "budget.wall_hours=4", "budget.gpu_hours=1", trials=10_000)
    journal.record.add({"event": "phase", "name": "baseline", "eval_loss": 9.0})
    for number in range(10_000):
        name = f"{number:04d}"
        journal.record.add({"event": "trial_started", "trial_id": name, "params": {}})
        journal.record.add({"event": "trial_result", "trial_id": name, **result(8, number / 1000)})
    for _ in range(10_000 // 64 + 1):
        found = list(read.read())
    began = time.process_time()
    found = list(read.read())
    assert time.process_time() - began < 0.5
    of_sweeps = sum(name.startswith("sweep_") for name in SERIES)
    assert len(found) == of_sweeps - 4 + len(STATES) + len(BUDGETS) + 2 * RANKS
    slot = len(SERIES) - of_sweeps
    assert most_series(4) == len(found) + 4 * slot
    said = f"the same number of series, {most_series(1)} and {slot} for each further slot"
    assert said in readme.ROOT.joinpath("README.md").read_text()
