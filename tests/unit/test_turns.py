"""Stopped trials that go on when they have risen among the best of their rung."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from raytune_lora.config import validate
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import SweepConfig
from raytune_lora.tuning.study import counted
from raytune_lora.tuning.trials import Record
from tests.unit.playing import EVERY, Disk, Killed, Play, Weights, outcome

TOTAL = 128
# the loss at the first rung, and what is left of it at the end; the third starts slowly and wins
CURVES = [(1.0, 0.8), (0.9, 0.9), (1.05, 0.1), (2.0, 1.0), (2.1, 1.0), (2.2, 1.0), (2.3, 0.9), (2.4, 1.0)]
SLOW = 2


def config(concurrent: int = 1, **settings: Any) -> SweepConfig:
    cfg = compose(["experiment=tiny", "search=grid", f"search.trials={len(CURVES)}", "scheduler.reduction=2"])
    cfg.space = compose(["experiment=tiny", "+space.x={key: training.seed, kind: int, low: 0, high: 7}"]).space
    cfg.space = {"x": cfg.space["x"]}
    cfg.search.concurrent, cfg.scheduler.grace = concurrent, EVERY
    for key, value in settings.items():
        setattr(cfg.scheduler, key, value)
    return cfg


def curve(number: int, samples: int) -> float:
    first, share = CURVES[number]
    return first * (1 - (1 - share) * (samples - EVERY) / (TOTAL - EVERY))


class Sweep:
    """The slow starter is whichever parameters come third."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, Disk()
        self.order: list[int] = []
        folder.mkdir()

    def train(self, weights: Weights, params: dict[str, Any]) -> float:
        seed = params["training.seed"]
        if seed not in self.order:
            self.order.append(seed)
        return curve(self.order.index(seed), weights[0] + EVERY)

    def play(self, cfg: SweepConfig, killed_after: int | None = None) -> Play:
        return Play(self.folder, cfg, self.train, TOTAL, self.disk).run(killed_after)


def test_a_slow_starter_is_found_where_stopped_trials_go_on_and_not_without(tmp_path: Path) -> None:
    best = {}
    for resumes in (False, True):
        record = Sweep(tmp_path / str(resumes)).play(config(resume_stopped=resumes)).record
        assert len(record.searched) == record.ended == len(CURVES)
        best[resumes] = record.best()
    assert best[False] is not None
    assert best[False].trial_id == "0000"
    assert best[True] is not None
    assert (best[True].trial_id, best[True].resumed) == (f"000{SLOW}", 1)
    assert best[True].eval_loss == pytest.approx(curve(SLOW, TOTAL))
    assert [point["samples_seen"] for point in best[True].curve] == list(range(EVERY, TOTAL + 1, EVERY))


@pytest.mark.parametrize("kind", ["asha", "hyperband"])
@pytest.mark.parametrize("concurrent", [1, 3])
def test_after_a_kill_at_any_moment_the_search_ends_as_without(kind: str, concurrent: int, tmp_path: Path) -> None:
    cfg = config(concurrent, resume_stopped=True)
    cfg.scheduler.kind = type(cfg.scheduler.kind)(kind)
    whole = Sweep(tmp_path / "whole").play(cfg)
    assert kind == "hyperband" or any(trial.resumed for trial in whole.record.searched)
    for moment in range(1, whole.events, 7):
        sweep = Sweep(tmp_path / str(moment))
        with pytest.raises(Killed):
            sweep.play(cfg, moment)
        again = sweep.play(cfg)
        assert len(again.record.searched) == again.record.ended == len(CURVES)
        assert study_of(again) == study_of(again.record)
        if concurrent == 1 and kind == "asha":  # a trial's bracket follows from its name, and the order from the kill
            assert outcome(again.record) == outcome(whole.record)


def test_the_sampler_and_a_later_sweep_see_a_trial_that_went_on_once(tmp_path: Path) -> None:
    cfg = config(resume_stopped=True)
    sweep = Sweep(tmp_path / "sweep")
    found = sweep.play(cfg)
    everything = found.study.get_trials(deepcopy=False)
    again = {t.user_attrs["continues"]: t for t in everything if "continues" in t.user_attrs}
    assert {name for name, trial in found.record.trials.items() if trial.resumed} == again.keys()
    assert again[f"000{SLOW}"].state is TrialState.COMPLETE
    assert everything[SLOW].state is TrialState.PRUNED
    assert everything[SLOW].params == again[f"000{SLOW}"].params
    hidden = {int(name) for name in again}
    later = Play(sweep.folder, cfg, sweep.train, TOTAL, sweep.disk)
    for seen in (found.searcher._asked, later.searcher._asked):  # what went on while it looked, and before
        for states in (None, (TrialState.COMPLETE, TrialState.PRUNED)):
            numbers = {t.number for t in seen.get_trials(deepcopy=False, states=states)}
            assert numbers == set(range(len(everything))) - hidden


@pytest.mark.parametrize("kind", ["median", "none"])
def test_without_rungs_nothing_can_rise(kind: str) -> None:
    (problem,) = validate.problems(compose(["experiment=tiny", f"scheduler={kind}", "scheduler.resume_stopped=true"]))
    assert problem.startswith("scheduler.resume_stopped needs rungs")


def study_of(of: Play | Record) -> list[tuple[Any, ...]]:
    """Each trial once: what the study says of it, or what the record does."""
    if isinstance(of, Record):
        states = {"completed": "COMPLETE", "stopped": "PRUNED"}
        curves = ([(int(point["samples_seen"]), point["eval_loss"]) for point in t.curve] for t in of.searched)
        return sorted((*t.params.items(), states[t.status], own) for t, own in zip(of.searched, curves, strict=True))
    failed = (TrialState.FAIL, TrialState.WAITING)
    own = [t for t in counted(of.study.get_trials(deepcopy=False)) if t.state not in failed]
    return sorted((*t.params.items(), t.state.name, sorted(t.intermediate_values.items())) for t in own)
