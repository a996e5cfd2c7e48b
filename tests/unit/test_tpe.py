"""TPE over trials as they stood at a rung."""

from __future__ import annotations

import statistics
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytune_lora.tuning.tpe import Tpe

SPACE = {"x": FloatDistribution(0, 1), "y": FloatDistribution(1e-3, 1, log=True)}


def ended(x: float, losses: dict[int, float], whole: bool = False, **facts: Any) -> FrozenTrial:
    return create_trial(
        state=TrialState.COMPLETE if whole else TrialState.PRUNED,
        value=min(losses.values()) if whole else None,
        params={"x": x, "y": 0.1},
        distributions=SPACE,
        intermediate_values=losses,
        **facts,
    )


def studied(*trials: FrozenTrial, startup: int = 4, share: float = 0.0) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=Tpe(startup, share, seed=0))
    study.add_trials(trials)
    return study


def proposed(study: optuna.Study, count: int = 30) -> list[float]:
    return [study.ask(SPACE).params["x"] for _ in range(count)]


def lucky() -> list[FrozenTrial]:
    """Three whole trials that had no competition, and ten that were better as far as they came."""
    return [ended(0.9, {100: 3.0, 300: 2.9}, whole=True)] * 3 + [
        ended(0.2 + 0.01 * n, {100: 1.0 if n < 3 else 1.5}) for n in range(10)
    ]


def test_trials_are_compared_where_enough_have_come() -> None:
    trials = lucky()
    assert statistics.median(proposed(studied(*trials))) < 0.4
    # a fourth whole one: enough have come to the end, and compare there
    assert statistics.median(proposed(studied(*trials, trials[0]))) > 0.6


def test_a_trial_that_runs_counts_where_it_was_measured() -> None:
    study = studied(*lucky())
    running = create_trial(
        state=TrialState.RUNNING,
        params={"x": 0.9, "y": 0.1},
        distributions=SPACE,
        intermediate_values={100: 3.0, 300: 0.5},
    )
    study.add_trial(running)
    assert statistics.median(proposed(study)) > 0.6  # the fourth to come to 300, and the best there


def test_an_infeasible_point_is_avoided() -> None:
    bad = [ended(0.9 + 0.005 * n, {100: 0.1}, system_attrs={"constraints:finite": 1.0}) for n in range(10)]
    good = [ended(0.1 * n, {100: 1.0}) for n in range(8)]
    assert max(proposed(studied(*bad, *good))) < 0.9


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
    trials = [ended(0.2, {100: 1.0})] * 30 + [ended(0.21 + 0.001 * n, {100: 2.0}) for n in range(100)]
    far = {share: sum(x > 0.5 for x in proposed(studied(*trials, share=share), 100)) for share in (0.0, 0.5, 1.0)}
    assert far[0.0] < 10 < far[0.5] < 35 < far[1.0] < 65


def test_a_long_search_is_learned_from_in_part_the_best_always() -> None:
    study = studied(ended(0.5, {100: 0.1}), *(ended(0.2, {100: 1.0 + n}) for n in range(3000)))
    proposed(study, 2)
    sampler: Any = study.sampler
    known = sampler._view(study).trials
    assert len(known) <= 250 + 2
    assert {trial.number for trial in known} >= {0, 1, 2, 2999, 3000}


def test_parameters_that_not_all_trials_have_are_modelled_too() -> None:
    other = {"x": SPACE["x"], "z": FloatDistribution(0, 1)}
    trials = [ended(0.2, {100: 1.0 + n}) for n in range(10)] + [
        create_trial(
            state=TrialState.PRUNED,
            params={"x": 0.2, "z": 0.05 * n},
            distributions=other,
            intermediate_values={100: 0.1 * (1 + abs(n - 3))},
        )
        for n in range(10)
    ]
    study = studied(*trials)
    zs = [study.ask(other).params["z"] for _ in range(60)]
    assert statistics.median(zs) < 0.4
