"""The schedulers: who is stopped, and that a resume in the middle changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raytune_lora.config.search import Scheduler, SchedulerConfig
from raytune_lora.tuning.scheduler import Asha, build, rungs
from raytune_lora.tuning.trials import Record, Trial, trial_name

TOTAL, EVERY = 128, 16
LOSSES = [5.0, 0.5, 4.0, 1.0, 3.0, 0.75, 6.0, 2.0, 1.5, 5.5, 0.6, 2.5]  # of 12 trials at the end, in their order
STOPPING = [Scheduler.asha, Scheduler.hyperband, Scheduler.median]


def trial(name: str, *losses: float, status: str = "completed", **facts: Any) -> Trial:
    points = [
        {"samples_seen": float(EVERY * n), "eval_loss": loss, "train_loss": loss} for n, loss in enumerate(losses, 1)
    ]
    return Trial(name, {}, status, eval_loss=min(losses), curve=points, **facts)


def scheduler(*trials: Trial, total: int = 64, **settings: Any) -> TrialScheduler:
    cfg = SchedulerConfig(**{"reduction": 2.0, **settings})
    return build(cfg, total=total, every=EVERY, record=Record({each.trial_id: each for each in trials}))


def decide(scheduler: TrialScheduler, name: str, samples_seen: int, loss: float) -> str:
    live: Any = SimpleNamespace(trial_id=f"tune-{id(scheduler)}-{name}", config={"trial_id": name})
    none: Any = None
    scheduler.on_trial_add(none, live)
    return scheduler.on_trial_result(none, live, {"samples_seen": samples_seen, "eval_loss": loss})


def loss_at(number: int, samples_seen: int) -> float:
    """A curve that falls to the trial's loss; curves do not cross."""
    return LOSSES[number] * (1 + 2 * math.exp(-samples_seen / 32))


def stream(concurrent: int) -> Iterator[tuple[int, int]]:
    """The trials' reports as they come where that many run at once: number and samples seen. Send what was decided."""
    waiting, running = list(range(len(LOSSES))), dict[int, int]()
    while waiting or running:
        while waiting and len(running) < concurrent:
            running[waiting.pop(0)] = 0
        for number in list(running):
            running[number] += EVERY
            decision = yield number, running[number]
            if decision == TrialScheduler.STOP or running[number] == TOTAL:
                del running[number]


def play(kind: Scheduler, concurrent: int, killed_after: int | None = None) -> dict[int, tuple[int, str]]:
    """How far each trial came and the last decision about it; the kill falls after that many reports."""
    cfg = SchedulerConfig(kind=kind, reduction=2.0)
    record = Record()
    deciding = build(cfg, total=TOTAL, every=EVERY, record=record)
    last: dict[int, tuple[int, str]] = {}
    reports: Any = stream(concurrent)
    number, seen = next(reports)
    try:
        for count in range(10_000):
            if count == killed_after:
                deciding = build(cfg, total=TOTAL, every=EVERY, record=record)
                for name, known in record.trials.items():  # those that go on report their last measure again
                    if known.status == "running":
                        point = known.curve[-1]
                        again = decide(deciding, name, int(point["samples_seen"]), point["eval_loss"])
                        assert again == TrialScheduler.CONTINUE
            name, loss = trial_name(number), loss_at(number, seen)
            decision = decide(deciding, name, seen, loss)
            known = record.trials.setdefault(name, Trial(name, {}))
            known.curve.append({"samples_seen": seen, "eval_loss": loss, "train_loss": loss})
            known.status = "stopped" if decision == TrialScheduler.STOP else "running"
            last[number] = seen, decision
            number, seen = reports.send(decision)
    except StopIteration:
        pass
    return last


# -------------------------------------------------------------------------------------------------- what all of them do


@pytest.mark.parametrize("concurrent", [1, 4])
@pytest.mark.parametrize("kind", STOPPING)
def test_bad_trials_are_stopped_and_the_best_never(kind: Scheduler, concurrent: int) -> None:
    last = play(kind, concurrent)
    assert last[LOSSES.index(min(LOSSES))][0] == TOTAL
    early = [number for number, (seen, _) in last.items() if seen < TOTAL]
    assert LOSSES.index(max(LOSSES)) in early
    whole = [LOSSES[number] for number in last if number not in early]
    assert fmean(LOSSES[number] for number in early) > fmean(whole)


@pytest.mark.parametrize("killed_after", [1, 7, 20, 33])
@pytest.mark.parametrize("kind", Scheduler)
def test_after_a_kill_it_decides_as_without(kind: Scheduler, killed_after: int) -> None:
    assert play(kind, 4, killed_after) == play(kind, 4)


@pytest.mark.parametrize("kind", Scheduler)
def test_a_result_without_a_measure_changes_nothing(kind: Scheduler) -> None:
    deciding = scheduler(trial("0000", 1.0), trial("0001", 1.0), trial("0002", 1.0), kind=kind)
    live: Any = SimpleNamespace(trial_id="x", config={"trial_id": "0003"})
    none: Any = None
    deciding.on_trial_add(none, live)
    failed = {"status": "failed", "error": "it broke"}
    assert deciding.on_trial_result(none, live, failed) == TrialScheduler.CONTINUE
    deciding.on_trial_complete(none, live, failed)
    assert decide(deciding, "0004", 16, 0.5) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("kind", STOPPING)
def test_runs_that_confirm_are_not_compared(kind: Scheduler) -> None:
    good = [trial(f"0000-s{seed}", 0.1, 0.1, confirms="0000") for seed in range(1, 5)]
    assert decide(scheduler(*good, kind=kind), "0001", 16, 9.0) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("kind", Scheduler)
def test_a_grace_longer_than_a_trial_stops_none(kind: Scheduler) -> None:
    deciding = scheduler(grace=1000, kind=kind)
    assert [decide(deciding, str(n), 48, float(n)) for n in range(6)] == [TrialScheduler.CONTINUE] * 6
    assert rungs(SchedulerConfig(grace=1000, kind=kind), total=64, every=16) == []


# ------------------------------------------------------------------------------------------------------ ASHA, HyperBand


def test_a_bad_trial_stops_at_a_rung_and_a_good_one_goes_on() -> None:
    deciding = scheduler()
    assert [decide(deciding, str(n), 16, loss) for n, loss in enumerate([2.0, 1.0, 3.0, 0.5])] == [
        TrialScheduler.CONTINUE,
        TrialScheduler.CONTINUE,
        TrialScheduler.STOP,
        TrialScheduler.CONTINUE,
    ]
    assert decide(deciding, "whole", 64, 0.1) == TrialScheduler.STOP


def test_what_earlier_trials_reached_counts_after_a_kill() -> None:
    past = [trial("0000", 2.0, 1.5, 1.2, 1.0), trial("0001", 1.0, 0.8, 0.7, 0.6)]
    assert decide(scheduler(*past), "0002", 16, 3.0) == TrialScheduler.STOP
    assert decide(scheduler(*past), "0002", 16, 0.9) == TrialScheduler.CONTINUE
    assert decide(scheduler(*past), "0002", 32, 3.0) == TrialScheduler.STOP
    assert decide(scheduler(), "0002", 16, 3.0) == TrialScheduler.CONTINUE


def test_a_trial_that_goes_on_is_compared_once_at_each_rung() -> None:
    running = trial("0000", 3.0, status="running")
    better = [trial("0001", 1.0), trial("0002", 1.0)]
    deciding = scheduler(running, *better)
    assert decide(deciding, "0000", 16, 3.0) == TrialScheduler.CONTINUE
    assert isinstance(deciding, Asha)
    assert sorted(deciding._brackets[0]._rungs[-1][1].values()) == [-3.0, -1.0, -1.0]
    assert decide(deciding, "0000", 32, 3.0) == TrialScheduler.CONTINUE, "it is the first there"


def test_hyperband_has_a_bracket_for_each_rung_to_begin_at_and_most_trials_are_in_the_first() -> None:
    deciding = scheduler(total=128, grace=16, kind=Scheduler.hyperband)
    assert isinstance(deciding, Asha)
    firsts = [min(rung for rung, _ in bracket._rungs) for bracket in deciding._brackets]
    cfg = SchedulerConfig(kind=Scheduler.hyperband, grace=16, reduction=2.0)
    assert firsts == rungs(cfg, total=128, every=16) == [16, 32, 64]
    drawn = [deciding.bracket_of(trial_name(number)) for number in range(200)]
    counts = [drawn.count(bracket) for bracket in range(3)]
    assert counts == sorted(counts, reverse=True)
    assert min(counts) > 0
    again = scheduler(total=128, grace=16, kind=Scheduler.hyperband)
    assert isinstance(again, Asha)
    assert [again.bracket_of(trial_name(number)) for number in range(200)] == drawn


@pytest.mark.parametrize(
    ("grace", "reduction", "total", "expected"),
    [
        (None, 2.0, 64, [16, 32]),
        (None, 2.0, 65, [16, 32, 64]),
        (32, 3.0, 1000, [32, 96, 288, 864]),
        (16, 2.5, 200, [16, 40, 100]),
        (None, 2.5, 200, [48, 120]),  # from a fifth of a run on, where there is a validation
        (None, 3.0, 16, []),
    ],
)
def test_the_rungs_are_those_that_the_scheduler_has(
    grace: int | None, reduction: float, total: int, expected: list[int]
) -> None:
    deciding = scheduler(total=total, grace=grace, reduction=reduction)
    assert isinstance(deciding, Asha)
    own = sorted(rung for rung, _ in deciding._brackets[0]._rungs if rung < total)
    assert rungs(SchedulerConfig(grace=grace, reduction=reduction), total=total, every=16) == expected == own


# ---------------------------------------------------------------------------------------------------------- the others


def test_the_median_is_of_the_others_means_up_to_as_many_samples() -> None:
    past = [trial(f"{n:04d}", first, second) for n, (first, second) in enumerate([(3.0, 1.0), (4.0, 2.0), (5.0, 3.0)])]
    deciding = scheduler(*past, kind=Scheduler.median)
    assert decide(deciding, "0003", 16, 4.1) == TrialScheduler.STOP
    assert decide(deciding, "0004", 16, 4.0) == TrialScheduler.CONTINUE
    assert decide(deciding, "0004", 32, 3.2) == TrialScheduler.STOP, "the means are 2, 3 and 4"


def test_two_trials_make_no_median() -> None:
    deciding = scheduler(trial("0000", 1.0), trial("0001", 1.0), kind=Scheduler.median)
    assert decide(deciding, "0002", 16, 9.0) == TrialScheduler.CONTINUE


def test_no_scheduler_stops_none() -> None:
    deciding = scheduler(kind=Scheduler.none)
    assert isinstance(deciding, FIFOScheduler)
    assert decide(deciding, "0000", 16, math.inf) == TrialScheduler.CONTINUE
    assert rungs(SchedulerConfig(kind=Scheduler.none), total=64, every=16) == []
