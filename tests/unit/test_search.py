"""The study as a Tune searcher, and the scheduler: both go on after a kill as if there had been none."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import Sampler, Scheduler, SchedulerConfig, SearchConfig
from raytune_lora.tuning.scheduler import Asha, build, rungs
from raytune_lora.tuning.search import StudySearcher, open_study, reconcile, report, tell
from raytune_lora.tuning.space import lookup
from raytune_lora.tuning.trials import Record, Trial, trial_name

CURVE = [{"samples_seen": 16.0, "eval_loss": 2.0, "train_loss": 2.0}]


@pytest.fixture(scope="module")
def cfg() -> SweepConfig:
    return compose(["experiment=quickstart"])


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study(tmp_path, SearchConfig(startup_trials=2))


def searcher(study: optuna.Study, cfg: SweepConfig, interrupted: list[Trial] | None = None) -> StudySearcher:
    return StudySearcher(study, cfg.space, cfg, interrupted or [])


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def trial(number: int, status: str, loss: float | None = None, **facts: Any) -> Trial:
    return Trial(trial_name(number), facts.pop("params", {}), status, eval_loss=loss, **facts)


def record(*trials: Trial) -> Record:
    return Record({each.trial_id: each for each in trials})


# ------------------------------------------------------------------------------------------------------------ proposing


def test_the_config_as_it_stands_comes_first(study: optuna.Study, cfg: SweepConfig) -> None:
    searching = searcher(study, cfg)
    first, second = searching.suggest("a"), searching.suggest("b")
    assert first == {"trial_id": "0000", "params": {d.key: lookup(cfg, d.key) for d in cfg.space.values()}}
    assert second["trial_id"] == "0001"
    assert second["params"] != first["params"]


@pytest.mark.parametrize("sampler", Sampler)
def test_the_same_seed_proposes_the_same(sampler: Sampler, tmp_path: Path, cfg: SweepConfig) -> None:
    proposals = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        study = open_study(tmp_path / name, SearchConfig(sampler=sampler, startup_trials=2, seed=seed))
        searching = searcher(study, cfg)
        proposals.append([searching.suggest(str(number))["params"] for number in range(4)])
    assert proposals[0] == proposals[1]
    assert proposals[0][0] == proposals[2][0]
    assert proposals[0][1:] != proposals[2][1:]


def test_a_loss_is_told_to_the_study_once(study: optuna.Study, cfg: SweepConfig) -> None:
    searcher(study, cfg).suggest("a")
    known = trial(0, "running")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a step told twice
        for seen, loss in ((16, 3.0), (32, 2.0)):
            known.curve.append({"samples_seen": seen, "eval_loss": loss, "train_loss": loss})
            report(study, known)
    assert study.get_trials()[0].intermediate_values == {16: 3.0, 32: 2.0}
    assert states(study) == ["RUNNING"]


def test_the_last_loss_of_a_stopped_trial_is_in_the_study(study: optuna.Study, cfg: SweepConfig) -> None:
    """Tune tells a searcher of all results but the one it stops a trial at."""
    searcher(study, cfg).suggest("a")
    known = trial(0, "stopped", 3.0)
    known.curve = [{"samples_seen": 16, "eval_loss": 3.0, "train_loss": 3.0}]
    tell(study, known)
    assert study.get_trials()[0].intermediate_values == {16: 3.0}
    assert states(study) == ["PRUNED"]


@pytest.mark.parametrize(
    ("ended", "state", "value"),
    [
        (trial(0, "completed", 1.5), "COMPLETE", 1.5),
        (trial(0, "stopped", 1.5), "PRUNED", None),
        (trial(0, "failed", 1.5), "FAIL", None),
        (trial(0, "diverged"), "FAIL", None),
        (trial(0, "oom"), "FAIL", None),
        (trial(0, "completed"), "FAIL", None),
    ],
    ids=lambda value: value.status if isinstance(value, Trial) else "",
)
def test_the_study_is_told_how_a_trial_ended(
    ended: Trial, state: str, value: float | None, study: optuna.Study, cfg: SweepConfig
) -> None:
    searcher(study, cfg).suggest("a")
    for _ in range(2):
        tell(study, ended)
    assert states(study) == [state]
    assert study.trials[0].value == value


# --------------------------------------------------------------------------------------------------------- after a kill


def killed(folder: Path, cfg: SweepConfig) -> tuple[Record, list[dict[str, Any]]]:
    """Four trials: ended, ended but the study not told of it, running, and asked for but never started."""
    study = open_study(folder, cfg.search)
    searching = searcher(study, cfg)
    proposals = [searching.suggest(str(number)) for number in range(4)]
    known = [trial(n, "running", params=proposals[n]["params"]) for n in range(3)]
    known[0].status, known[0].eval_loss = "completed", 1.0
    known[1].status, known[1].eval_loss = "completed", 2.0
    known[2].curve, known[2].samples_seen = list(CURVE), 16
    report(study, known[2])
    tell(study, known[0])
    return record(*known), proposals


def test_the_study_catches_up_with_the_journal(tmp_path: Path, cfg: SweepConfig) -> None:
    known, _ = killed(tmp_path, cfg)
    for _ in range(2):
        study = open_study(tmp_path, cfg.search)
        interrupted = reconcile(study, known)
        assert [each.trial_id for each in interrupted] == ["0002"]
        assert states(study) == ["COMPLETE", "COMPLETE", "RUNNING", "FAIL", "WAITING"]
        assert [each.value for each in study.trials[:2]] == [1.0, 2.0]


def test_an_interrupted_trial_goes_on_first_with_its_parameters(tmp_path: Path, cfg: SweepConfig) -> None:
    known, proposals = killed(tmp_path, cfg)
    study = open_study(tmp_path, cfg.search)
    searching = searcher(study, cfg, reconcile(study, known))
    assert searching.suggest("new a") == proposals[2]
    again = trial(2, "completed", 1.0)
    again.curve = [{"samples_seen": seen, "eval_loss": 1.0, "train_loss": 1.0} for seen in (16, 32)]
    tell(study, again)
    assert study.trials[2].intermediate_values == {16: 2.0, 32: 1.0}
    assert states(study) == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL", "WAITING"]


def test_what_never_started_is_proposed_again_and_then_something_new(tmp_path: Path, cfg: SweepConfig) -> None:
    known, proposals = killed(tmp_path, cfg)
    study = open_study(tmp_path, cfg.search)
    searching = searcher(study, cfg, reconcile(study, known)[1:])
    assert searching.suggest("a") == {"trial_id": "0004", "params": proposals[3]["params"]}
    fresh = searching.suggest("b")
    assert fresh["trial_id"] == "0005"
    assert fresh["params"] not in [proposal["params"] for proposal in proposals]


def test_a_first_trial_that_never_started_is_still_the_config(tmp_path: Path, cfg: SweepConfig) -> None:
    first = searcher(open_study(tmp_path, cfg.search), cfg).suggest("a")
    study = open_study(tmp_path, cfg.search)
    again = searcher(study, cfg, reconcile(study, Record())).suggest("b")
    assert again == {"trial_id": "0001", "params": first["params"]}


def test_a_finished_study_stays_as_it_is(tmp_path: Path, cfg: SweepConfig) -> None:
    study = open_study(tmp_path, cfg.search)
    searcher(study, cfg).suggest("a")
    ended = trial(0, "completed", 1.0)
    tell(study, ended)
    assert reconcile(study, record(ended)) == []
    searching = searcher(study, cfg)
    assert states(study) == ["COMPLETE"]
    assert searching.suggest("b")["trial_id"] == "0001"
    assert study.trials[0].state is TrialState.COMPLETE


# -------------------------------------------------------------------------------------------------------- the scheduler


def asha(*trials: Trial, total: int = 64, **settings: Any) -> TrialScheduler:
    cfg = SchedulerConfig(**{"reduction": 2.0, **settings})
    return build(cfg, total=total, every=16, record=record(*trials))


def decide(scheduler: TrialScheduler, name: str, samples_seen: int, loss: float) -> str:
    live: Any = SimpleNamespace(trial_id=name)
    none: Any = None
    scheduler.on_trial_add(none, live)
    return scheduler.on_trial_result(none, live, {"samples_seen": samples_seen, "eval_loss": loss})


def ended(number: int, *losses: float) -> Trial:
    points = [{"samples_seen": 16.0 * n, "eval_loss": loss, "train_loss": 0.0} for n, loss in enumerate(losses, 1)]
    return trial(number, "completed", min(losses), curve=points)


def test_a_bad_trial_stops_at_a_rung_and_a_good_one_goes_on() -> None:
    scheduler = asha()
    assert [decide(scheduler, str(n), 16, loss) for n, loss in enumerate([2.0, 1.0, 3.0, 0.5])] == [
        TrialScheduler.CONTINUE,
        TrialScheduler.CONTINUE,
        TrialScheduler.STOP,
        TrialScheduler.CONTINUE,
    ]
    assert decide(scheduler, "whole", 64, 0.1) == TrialScheduler.STOP


def test_what_earlier_trials_reached_counts_after_a_kill() -> None:
    past = [ended(0, 2.0, 1.5, 1.2, 1.0), ended(1, 1.0, 0.8, 0.7, 0.6)]
    assert decide(asha(*past), "0", 16, 3.0) == TrialScheduler.STOP
    assert decide(asha(*past), "0", 16, 0.9) == TrialScheduler.CONTINUE
    assert decide(asha(*past), "0", 32, 3.0) == TrialScheduler.STOP
    assert decide(asha(), "0", 16, 3.0) == TrialScheduler.CONTINUE


def test_a_replay_leaves_the_scheduler_as_the_trials_did() -> None:
    losses = [(2.0, 1.5), (1.0, 0.8), (1.4, 1.3)]
    lived = asha()
    for number, both in enumerate(losses):
        for rung, loss in zip((16, 32), both, strict=True):
            decide(lived, str(number), rung, loss)
    replayed = asha(*(ended(number, *both) for number, both in enumerate(losses)))
    assert isinstance(lived, Asha)
    assert isinstance(replayed, Asha)
    values = [[(rung, sorted(seen.values())) for rung, seen in each._brackets[0]._rungs] for each in (lived, replayed)]
    assert values[0] == values[1]


def test_a_trial_that_still_runs_is_not_replayed() -> None:
    running = trial(0, "running", 0.1, curve=[{"samples_seen": 16.0, "eval_loss": 0.1, "train_loss": 0.1}])
    assert decide(asha(running), "0", 16, 3.0) == TrialScheduler.CONTINUE


def test_a_grace_longer_than_a_trial_stops_none() -> None:
    scheduler = asha(grace=1000)
    assert [decide(scheduler, str(n), 48, float(n)) for n in range(4)] == [TrialScheduler.CONTINUE] * 4
    assert rungs(SchedulerConfig(grace=1000), total=64, every=16) == []


def test_no_scheduler_stops_none() -> None:
    scheduler = asha(kind=Scheduler.none)
    assert isinstance(scheduler, FIFOScheduler)
    assert decide(scheduler, "0", 16, math.inf) == TrialScheduler.CONTINUE
    assert rungs(SchedulerConfig(kind=Scheduler.none), total=64, every=16) == []


@pytest.mark.parametrize(
    ("grace", "reduction", "total", "expected"),
    [
        (None, 2.0, 64, [16, 32]),
        (None, 2.0, 65, [16, 32, 64]),
        (32, 3.0, 1000, [32, 96, 288, 864]),
        (None, 2.5, 200, [16, 40, 100]),
        (None, 3.0, 16, []),
    ],
)
def test_the_rungs_are_those_that_the_scheduler_has(
    grace: int | None, reduction: float, total: int, expected: list[int]
) -> None:
    scheduler = asha(total=total, grace=grace, reduction=reduction)
    assert isinstance(scheduler, Asha)
    own = sorted(rung for rung, _ in scheduler._brackets[0]._rungs if rung < total)
    assert rungs(SchedulerConfig(grace=grace, reduction=reduction), total=total, every=16) == expected == own
