"""Which configurations are trained again, and which of them wins."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from raytune_lora.config.search import ConfirmConfig
from raytune_lora.tuning.confirm import SEED, best_configurations, planned, verdict, welch
from raytune_lora.tuning.summary import lines
from raytune_lora.tuning.trials import CONFIRM, Record, Trial


def trial(name: str, loss: float | None, status: str = "completed", **facts: Any) -> Trial:
    return Trial(name, facts.pop("params", {"method.r": 8}), status, eval_loss=loss, **facts)


def again(name: str, seed: int, loss: float | None, status: str = "completed") -> Trial:
    return trial(f"{name}-s{seed}", loss, status, params={"method.r": 8, SEED: seed}, confirms=name)


def record(*trials: Trial, confirmed: list[str] | None = None, winner: str = "") -> Record:
    known = Record({each.trial_id: each for each in trials})
    if confirmed is not None:
        known.phases[CONFIRM] = {"confirmed": confirmed, "winner": winner}
    return known


def found(*trials: Trial, confirmed: list[str]) -> dict[str, Any]:
    said = verdict(record(*trials, confirmed=confirmed), 0)
    assert said is not None
    return said


# ------------------------------------------------------------------------------------------------------------- the runs


def test_the_best_that_were_trained_to_their_end_are_confirmed() -> None:
    known = record(
        trial("0000", 2.0),
        trial("0001", 0.1, "stopped"),
        trial("0002", 0.1, "diverged"),
        trial("0003", 1.0),
        trial("0004", 1.5),
        again("0003", 1, 0.2),
    )
    assert [each.trial_id for each in best_configurations(known, 2)] == ["0003", "0004"]
    assert [each.trial_id for each in best_configurations(known, 9)] == ["0003", "0004", "0000"]
    assert best_configurations(known, 0) == []


def test_each_configuration_has_as_many_runs_as_seeds_the_first_one_included() -> None:
    runs = planned(record(trial("0000", 2.0), trial("0001", 1.0)), ConfirmConfig(top=2, seeds=3), seed=5)
    assert [run.trial_id for run in runs] == ["0001-s6", "0001-s7", "0000-s6", "0000-s7"]
    assert [(run.params, run.confirms) for run in runs[:2]] == [
        ({"method.r": 8, SEED: 6}, "0001"),
        ({"method.r": 8, SEED: 7}, "0001"),
    ]


def test_a_searched_seed_is_the_one_that_is_left() -> None:
    runs = planned(record(trial("0000", 2.0, params={SEED: 40})), ConfirmConfig(top=1, seeds=2), seed=0)
    assert [run.trial_id for run in runs] == ["0000-s41"]


def test_after_a_kill_what_ended_is_not_run_again_and_what_ran_goes_on() -> None:
    running = again("0000", 2, 1.9, status="running")
    known = record(trial("0000", 2.0), again("0000", 1, 1.8), running)
    assert planned(known, ConfirmConfig(top=1, seeds=4), seed=0)[0] is running
    assert [run.trial_id for run in planned(known, ConfirmConfig(top=1, seeds=4), seed=0)] == ["0000-s2", "0000-s3"]


# ----------------------------------------------------------------------------------------------------------- the winner


def test_the_lowest_mean_wins_and_not_the_luckiest_run() -> None:
    trials = [trial("0000", 1.0), trial("0001", 0.5), again("0000", 1, 1.02), again("0001", 1, 2.5)]
    said = found(*trials, confirmed=["0001", "0000"])
    assert (said["winner"], said["runner_up"], said["differs"]) == ("0000", "0001", False)
    first = said["configurations"][0]
    assert (first["mean"], first["standard_deviation"]) == (pytest.approx(1.01), pytest.approx(0.0141421, abs=1e-6))
    assert [(run["trial_id"], run["seed"], run["eval_loss"]) for run in first["runs"]] == [
        ("0000", 0, 1.0),
        ("0000-s1", 1, 1.02),
    ]
    assert "no more than noise" in said["words"]


def test_the_best_model_is_the_best_run_of_the_winner() -> None:
    known = record(trial("0000", 1.0), trial("0001", 0.5), again("0000", 1, 0.9), again("0001", 1, 2.5))
    best = known.best()
    assert best is not None
    assert best.trial_id == "0001", "until it is confirmed, no run that confirms counts"
    known.phases[CONFIRM] = {"confirmed": ["0001", "0000"], "winner": "0000"}
    best = known.best()
    assert best is not None
    assert best.trial_id == "0000-s1"


def test_a_configuration_that_does_not_hold_comes_last() -> None:
    trials = [trial("0000", 1.0), trial("0001", 0.5), again("0000", 1, 1.1), again("0001", 1, 0.4, "diverged")]
    said = found(*trials, confirmed=["0001", "0000"])
    assert said["winner"] == "0000"
    assert said["configurations"][1]["runs"][1] == {
        "trial_id": "0001-s1",
        "seed": 1,
        "status": "diverged",
        "eval_loss": None,
    }
    assert (said["p"], said["differs"]) == (None, None)
    assert "not all of its runs" in said["words"]


def test_a_clear_difference_is_said() -> None:
    trials = [trial("0000", 1.0), trial("0001", 2.0)]
    trials += [again("0000", seed, 1 + seed / 100) for seed in (1, 2)]
    trials += [again("0001", seed, 2 - seed / 100) for seed in (1, 2)]
    said = found(*trials, confirmed=["0000", "0001"])
    assert said["differs"] is True
    assert said["p"] < 1e-4
    assert said["words"].startswith(
        "configuration 0000 has a mean loss of 1.0100 ± 0.0100 (3 runs), and 0001, the next"
    )
    assert "more than noise" in said["words"]


def test_a_single_configuration_is_compared_with_none() -> None:
    said = found(trial("0000", 1.0), again("0000", 1, 1.1), confirmed=["0000"])
    assert (said["winner"], said["runner_up"], said["p"], said["differs"]) == ("0000", None, None, None)
    assert "only one" in said["words"]


def test_nothing_is_said_before_it_is_done() -> None:
    assert verdict(record(trial("0000", 1.0), again("0000", 1, 1.1)), 0) is None


def test_the_summary_says_it_and_counts_the_search_s_trials_alone() -> None:
    trials = [trial("0000", 1.0), again("0000", 1, 1.1)]
    results: dict[str, Any] = {
        "baseline": {"eval_loss": 2.0, "exact_match": None},
        "best": {"trial_id": "0000", "eval_loss": 1.0, "exact_match": None, "adapter": "best/adapter"},
        "trials": [{"status": t.status, "confirms": t.confirms, "error": None} for t in trials],
        "data": {"rows": {"validation": 8, "test": 8}},
        "seconds": {"total": 1.0},
        "confirmation": found(*trials, confirmed=["0000"]),
        "ended_by": {"budget": "hours", "why": "it was late", "remedy": "budget.hours=<more> (or null)"},
    }
    assert lines(results, "/s")[0].splitlines()[:4] == [
        "trials: 1 completed; 1 s in all",
        "ended early: it was late",
        "to search on: resume=/s budget.hours=<more> (or null)",
        f"confirmed: {results['confirmation']['words']}",
    ]


# ------------------------------------------------------------------------------------------------------------- the test


def test_the_p_is_that_of_welch_s_test() -> None:
    from scipy.stats import ttest_ind  # type: ignore[import-untyped]

    draw = random.Random(0)
    for _ in range(20):
        a, b = ([draw.gauss(mean, 1 + mean) for _ in range(draw.randint(2, 6))] for mean in (0.0, 1.0))
        assert welch(a, b) == pytest.approx(ttest_ind(a, b, equal_var=False).pvalue, rel=1e-9)
        assert welch(a, b) == welch(b, a)


def test_p_is_below_a_twentieth_once_in_twenty_where_there_is_no_difference() -> None:
    draw = random.Random(1)
    ps = [welch([draw.gauss(0, 1) for _ in range(5)], [draw.gauss(0, 3) for _ in range(5)]) or 0.0 for _ in range(2000)]
    assert statistics.fmean(p < 0.05 for p in ps) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("a", "b", "p"), [([1.0], [1.0, 2.0], None), ([1.0, 1.0], [2.0, 2.0], 0.0), ([1.0, 1.0], [1.0, 1.0], 1.0)]
)
def test_samples_without_a_spread(a: list[float], b: list[float], p: float | None) -> None:
    assert welch(a, b) == p
