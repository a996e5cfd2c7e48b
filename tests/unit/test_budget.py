"""When a search ends before its last trial, as the journal tells it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.search import BudgetConfig
from raytune_lora.tuning import trials
from raytune_lora.tuning.budget import Budget, reached, remedy, reopen
from raytune_lora.tuning.trials import BEST, CONFIRM, TRIALS, Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def measure(journal: Journal, name: str, loss: float, training_seconds: float = 1.0, samples_seen: int = 8) -> None:
    facts = dict.fromkeys(("train_loss", "trainable_parameters", "peak_memory_bytes", "micro_batch", "checkpoint"))
    facts |= {"samples_seen": samples_seen, "eval_loss": loss, "training_seconds": training_seconds, "last": False}
    journal.append("trial_result", trial_id=name, **facts)


def write(journal: Journal, name: str, loss: float | None, status: str | None = "completed", **facts: Any) -> None:
    journal.append("trial_started", trial_id=name, params={}, **facts)
    if loss is not None:
        measure(journal, name, loss)
    if status is not None:
        journal.append("trial_ended", trial_id=name, status=status, error=None, seconds=1.0)


def found(cfg: BudgetConfig, journal: Journal) -> str | None:
    what = reached(cfg, journal)
    return what and what[0]


# ------------------------------------------------------------------------------------------------------------- each one


def sittings(path: Path, monkeypatch: pytest.MonkeyPatch, *spans: tuple[float, float]) -> Journal:
    """The journal of a sweep in its last sitting.

    Args:
        path: of its file.
        monkeypatch: by which the clocks are set.
        spans: Unix times at which the sittings begin and, the last one aside, end.
    """
    now = [0.0]
    monkeypatch.setattr(trials.time, "time", lambda: now[0])
    monkeypatch.setattr(trials.time, "monotonic", lambda: now[0] % 10_000)  # of another machine each time
    for began, ends in spans:
        now[0] = began
        journal = Journal(path)
        now[0] = ends
        if (began, ends) != spans[-1]:
            journal.append("clock")
    return journal


def test_hours_are_those_at_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = BudgetConfig(hours=2.0)
    assert found(cfg, sittings(path, monkeypatch, (1000, 7000), (90_000, 91_199))) is None
    path.unlink()
    assert found(cfg, sittings(path, monkeypatch, (1000, 7000), (90_000, 91_200))) == "hours"


def test_wall_hours_are_those_since_the_first_sitting_began(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = BudgetConfig(wall_hours=2.0)
    assert found(cfg, sittings(path, monkeypatch, (10_000, 10_060), (17_000, 17_199))) is None
    path.unlink()
    late = sittings(path, monkeypatch, (10_000, 10_060), (17_000, 17_200))
    assert late.clock == 260
    assert found(cfg, late) == "wall_hours"


def test_a_clock_that_is_behind_takes_nothing_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = sittings(path, monkeypatch, (10_000, 17_000), (5_000, 5_200))
    assert journal.elapsed == journal.clock == 7200


def test_the_clock_adds_up_over_sittings_and_stands_still_between_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(trials.time, "monotonic", lambda: now[0])
    first = Journal(path, began=990.0)
    assert first.clock == 10
    now[0] += 90
    first.append("phase", name="prepare", seconds=1.0)
    now[0] += 59
    first.keep_time()
    assert len(path.read_text().splitlines()) == 1
    now[0] += 2
    first.keep_time()
    assert [json.loads(line)["clock"] for line in path.read_text().splitlines()] == [100.0, 161.0]
    now[0] = 5.0  # another process, on another machine, long after
    second = Journal(path)
    now[0] += 20
    assert second.clock == 181


def test_gpu_hours_are_training_seconds_times_the_gpus_of_then(path: Path) -> None:
    journal, cfg = Journal(path), BudgetConfig(gpu_hours=2.0)
    journal.append("trial_started", trial_id="0000", params={}, gpus=1)
    measure(journal, "0000", 2.0, training_seconds=1800)
    journal.append("trial_started", trial_id="0000", params={}, gpus=4)  # it goes on with more
    measure(journal, "0000", 2.0, training_seconds=1800)  # the report of its checkpoint again
    measure(journal, "0000", 1.0, training_seconds=2700, samples_seen=16)
    assert journal.record.gpu_seconds == 1800 + 4 * 900
    assert found(cfg, journal) is None
    write(journal, "0000-s1", 1.0, confirms="0000", gpus=10_000)
    assert found(cfg, journal) is None, "what confirms is not the search's"
    measure(journal, "0000", 1.0, training_seconds=3200, samples_seen=24)
    assert found(cfg, journal) == "gpu_hours"
    assert Journal(path).record.gpu_seconds == journal.record.gpu_seconds


def test_training_on_the_cpu_uses_no_gpu_hours(path: Path) -> None:
    journal = Journal(path)
    journal.append("trial_started", trial_id="0000", params={}, gpus=0)
    measure(journal, "0000", 2.0, training_seconds=1e9)
    assert found(BudgetConfig(gpu_hours=1e-9), journal) is None


def test_a_target_is_reached_by_a_trial_that_runs_and_not_by_one_that_ended_badly(path: Path) -> None:
    journal, cfg = Journal(path), BudgetConfig(target=0.5)
    write(journal, "0000", 0.6)
    write(journal, "0001", 0.4, status="diverged")
    write(journal, "0002", math.nan)
    assert found(cfg, journal) is None
    write(journal, "0003", 0.5, status=None)
    assert found(cfg, journal) == "target"
    assert found(cfg, Journal(path)) == "target"


def test_patience_counts_the_trials_that_ended_since_the_last_gain(path: Path) -> None:
    journal, cfg = Journal(path), BudgetConfig(patience=2)
    ends: list[tuple[float | None, str]] = [
        (None, "failed"),
        (1.0, "completed"),
        (1.0, "completed"),
        (0.9, "stopped"),
        (0.1, "oom"),
        (2.0, "stopped"),
    ]
    said = []
    for number, (loss, status) in enumerate(ends):
        write(journal, f"{number:04d}", loss, status)
        said.append((journal.record.in_vain, found(cfg, journal)))
    assert said == [(1, None), (0, None), (1, None), (0, None), (1, None), (2, "patience")]
    write(journal, "0006", 0.8, status=None)
    assert found(cfg, journal) == "patience", "a trial that still runs has not ended"


def test_without_a_budget_none_is_reached(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = sittings(path, monkeypatch, (0, 1e9), (2e9, 3e9))
    for number in range(5):
        write(journal, f"{number:04d}", 0.0, gpus=8)
    assert found(BudgetConfig(), journal) is None


# ------------------------------------------------------------------------------------------------------------- the end


def test_the_end_is_recorded_and_told_once(path: Path) -> None:
    journal, told = Journal(path), list[str]()
    budget = Budget(BudgetConfig(target=0.5), journal, 4, told.append)
    write(journal, "0000", 0.6)
    assert not budget.spent()
    write(journal, "0001", 0.4)
    assert [budget.spent() for _ in range(3)] == [True] * 3
    assert told == ["the search ends: budget.target=0.5, and trial 0001 has 0.4000"]
    assert Journal(path).record.ended_by == {"budget": "target", "why": "budget.target=0.5, and trial 0001 has 0.4000"}


def test_a_search_whose_trials_have_all_ended_is_ended_by_no_budget(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000", 0.1)
    assert not Budget(BudgetConfig(target=0.5), journal, 1, pytest.fail).spent()


def test_a_spent_budget_stays_spent_though_the_clock_is_read_anew(path: Path) -> None:
    Journal(path).append("ended_by", budget="hours", why="it was late")
    assert Budget(BudgetConfig(hours=1.0), Journal(path), 4, pytest.fail).spent()


def test_a_larger_budget_reopens_the_search_and_what_came_after_it(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000", 0.4)
    Budget(BudgetConfig(target=0.5), journal, 4, lambda _: None).spent()
    for name in ("baseline", TRIALS, CONFIRM, BEST):
        journal.append("phase", name=name, seconds=1.0, winner="0000")
    reopen(journal, BudgetConfig(target=0.45), 4)
    assert journal.record.ended_by is not None, "0.4 is enough for that too"
    reopen(journal, BudgetConfig(target=0.3), 4)
    for record in (journal.record, Journal(path).record):
        assert record.ended_by is None
        assert list(record.phases) == ["baseline"]
    assert not Budget(BudgetConfig(target=0.3), journal, 4, pytest.fail).spent()


def test_no_watcher_is_told_of_the_bookkeeping(path: Path) -> None:
    journal = Journal(path, lambda event, record: pytest.fail(event["event"]))
    for event in ("clock", "reopened"):
        journal.append(event)
    journal.append("ended_by", budget="hours", why="it was late")


def test_the_remedy_is_an_override() -> None:
    assert [remedy(name) for name in ("hours", "target")] == [
        "budget.hours=<more> (or null)",
        "budget.target=<lower> (or null)",
    ]
