"""TPE over trials as they stood at a rung."""

from __future__ import annotations

import statistics
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytune_lora.tuning.tpe import Tpe
from tests.unit.studying import SPACE, WHOLE, studied, trial
from tests.unit.studying import proposed as proposed_by


def learning(*trials: FrozenTrial, share: float = 0.0) -> optuna.Study:
    return studied(Tpe(4, share, seed=0), *trials)


def proposed(study: optuna.Study, count: int = 30) -> list[float]:
    return proposed_by(study, count)


def lucky() -> list[FrozenTrial]:
    """Three whole trials that had no competition, and ten that were better as far as they came."""
    return [trial(0.9, {100: 3.0, 300: 2.9}, WHOLE)] * 3 + [
        trial(0.2 + 0.01 * n, {100: 1.0 if n < 3 else 1.5}) for n in range(10)
    ]


def test_trials_are_compared_where_enough_have_come() -> None:
    trials = lucky()
    assert statistics.median(proposed(learning(*trials))) < 0.4
    # a fourth whole one: enough have come to the end, and compare there
    assert statistics.median(proposed(learning(*trials, trials[0]))) > 0.6


def test_a_trial_that_runs_counts_where_it_was_measured() -> None:
    study = learning(*lucky())
    running = create_trial(
        state=TrialState.RUNNING,
        params={"x": 0.9, "y": 0.1},
        distributions=SPACE,
        intermediate_values={100: 3.0, 300: 0.5},
    )
    study.add_trial(running)
    assert statistics.median(proposed(study)) > 0.6  # the fourth to come to 300, and the best there


def test_an_infeasible_point_is_avoided() -> None:
    bad = [trial(0.9 + 0.005 * n, {100: 0.1}, system_attrs={"constraints:finite": 1.0}) for n in range(10)]
    good = [trial(0.1 * n, {100: 1.0}) for n in range(8)]
    assert max(proposed(learning(*bad, *good))) < 0.9


def test_without_early_stopping_it_is_plain_tpe() -> None:
    def search(sampler: optuna.samplers.BaseSampler) -> list[dict[str, Any]]:
        study = optuna.create_study(sampler=sampler)
        for _ in range(20):
            trial = study.ask(SPACE)
            study.tell(trial, (trial.params["x"] - 0.3) ** 2)
        return [trial.params for trial in study.trials]

    plain = optuna.samplers.TPESampler(n_startup_trials=4, multivariate=True, group=True, constant_liar=True, seed=0)
    assert search(Tpe(4, 0.0, seed=0)) == search(plain)


def test_a_share_of_the_trials_is_random() -> None:
    trials = [trial(0.2, {100: 1.0})] * 30 + [trial(0.21 + 0.001 * n, {100: 2.0}) for n in range(100)]
    far = {share: sum(x > 0.5 for x in proposed(learning(*trials, share=share), 100)) for share in (0.0, 0.5, 1.0)}
    assert far[0.0] < 10 < far[0.5] < 35 < far[1.0] < 65


def test_a_long_search_is_learned_from_in_part_the_best_always() -> None:
    study = learning(trial(0.5, {100: 0.1}), *(trial(0.2, {100: 1.0 + n}) for n in range(3000)))
    proposed(study, 2)
    sampler: Any = study.sampler
    known = sampler._view(study).trials
    assert len(known) <= 250 + 2
    assert {trial.number for trial in known} >= {0, 1, 2, 2999, 3000}


def test_parameters_that_not_all_trials_have_are_modelled_too() -> None:
    other = {"x": SPACE["x"], "z": FloatDistribution(0, 1)}
    trials = [trial(0.2, {100: 1.0 + n}) for n in range(10)] + [
        create_trial(
            state=TrialState.PRUNED,
            params={"x": 0.2, "z": 0.05 * n},
            distributions=other,
            intermediate_values={100: 0.1 * (1 + abs(n - 3))},
        )
        for n in range(10)
    ]
    study = learning(*trials)
    zs = [study.ask(other).params["z"] for _ in range(60)]
    assert statistics.median(zs) < 0.4
