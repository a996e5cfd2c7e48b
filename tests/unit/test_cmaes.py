"""CMA-ES: what its trials reached is all of its state, and nothing of a study is unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from raytune_lora.config.compose import compose
from raytune_lora.tuning.cmaes import Cmaes
from raytune_lora.tuning.search import StudySearcher
from raytune_lora.tuning.study import keep, open_study
from raytune_lora.tuning.told import tell
from raytune_lora.tuning.trials import Trial
from tests.unit.studying import SPACE, studied


def value(params: dict[str, Any]) -> float:
    return float((params["x"] - 0.3) ** 2 + params["y"])


def searched(sampler: optuna.samplers.BaseSampler, count: int, *, together: int = 1) -> optuna.Study:
    """Trials that run side by side; of each batch, the one that began last ends first."""
    study = studied(sampler)
    for _ in range(count // together):
        for trial in [study.ask(SPACE) for _ in range(together)][::-1]:
            study.tell(trial, value(trial.params))
    return study


def state(study: optuna.Study) -> Any:
    """Of a sampler that has never seen the study's trials."""
    sampler = Cmaes(seed=0)
    studied(sampler, *study.trials).ask(SPACE)
    return sampler._optimizer


def same(one: Any, other: Any) -> None:
    assert one.generation == other.generation
    for name in ("_mean", "_C", "_sigma", "_p_sigma", "_pc"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


def test_its_state_is_that_which_optuna_pickles() -> None:
    study = searched(optuna.samplers.CmaEsSampler(seed=3), 62)
    theirs = optuna.samplers.CmaEsSampler()._restore_optimizer(study.trials)
    assert theirs is not None
    assert theirs.generation == 10
    same(state(study), theirs)


@pytest.mark.parametrize("together", [1, 5])
def test_a_search_that_goes_on_has_the_state_that_it_had(together: int) -> None:
    sampler = Cmaes(seed=3)
    study = searched(sampler, 60, together=together)
    study.ask(SPACE)
    assert sampler._optimizer.generation >= 4
    same(state(study), sampler._optimizer)
    assert {key for trial in study.trials for key in trial.system_attrs} == {"cma:generation"}


def test_a_trial_that_ends_late_belongs_to_its_generation() -> None:
    sampler = Cmaes(seed=3)
    study = searched(sampler, 1)
    late = study.ask(SPACE)
    for _ in range(12):
        trial = study.ask(SPACE)
        study.tell(trial, value(trial.params))
    assert sampler._optimizer.generation == 1
    study.tell(late, 5.0)
    study.ask(SPACE)
    assert late.number in sampler._told[0]
    same(state(study), sampler._optimizer)


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


def test_a_foreign_study_runs_no_code(tmp_path: Path) -> None:
    cfg = compose(["model=tiny", "data=fake", "search=cmaes", "scheduler=none", "search.trials=64"])
    study = open_study(tmp_path, cfg.search)
    searching = StudySearcher(study, cfg.space, cfg, [])
    for number in range(8):
        proposal = searching.suggest("")
        loss = 1.0 + number / 10
        tell(study, Trial(proposal["trial_id"], proposal["params"], "completed", eval_loss=loss, last=True))
    trap = tmp_path / "sprung"
    for trial in study.trials:
        study._storage._get_trial(trial._trial_id).state = optuna.trial.TrialState.RUNNING  # an attribute can be set
        study._storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", pickle.dumps(Trap(trap)).hex())
        study._storage._get_trial(trial._trial_id).state = trial.state
    keep(study)

    optuna.samplers.CmaEsSampler()._restore_optimizer(study.trials)
    assert trap.exists(), "the trap works on Optuna's own"
    trap.rmdir()
    again = open_study(tmp_path, cfg.search)
    assert "cma:optimizer:0" in again.trials[3].system_attrs
    searching = StudySearcher(again, cfg.space, cfg, [])
    assert [searching.suggest("")["trial_id"] for _ in range(3)] == ["0008", "0009", "0010"]
    assert not trap.exists()
