"""A Gaussian process over trials as they stood at a rung, or would have stood there."""

from __future__ import annotations

import statistics
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial

from raytune_lora.tuning.gp import Gp, _at_rung
from tests.unit.studying import RUNNING, SPACE, STOPPED, WHOLE, studied, trial
from tests.unit.studying import proposed as proposed_by


def learning(*trials: FrozenTrial, share: float = 0.0) -> optuna.Study:
    return studied(Gp(4, share, seed=0), *trials)


def proposed(study: optuna.Study, count: int = 6) -> list[float]:
    return proposed_by(study, count)


def numbered(*trials: FrozenTrial) -> list[FrozenTrial]:
    return learning(*trials).get_trials()


def test_a_trial_that_did_not_come_to_the_rung_gains_what_the_others_gained() -> None:
    others = [trial(0.1 * n, {100: 2.0 + n, 200: 1.5 + n, 300: 1.0 + n + gain}) for n, gain in enumerate((0, 0.1, 0.5))]
    stopped, running = trial(0.5, {100: 2.5}), trial(0.6, {100: 9.0, 200: 4.0}, RUNNING)
    beyond = trial(0.7, {100: 3.0, 300: 2.0, 400: 0.1})
    found = _at_rung(numbered(*others, stopped, running, beyond), 300)
    # from 100: 1.0, 0.9, 0.5 and 1.0; from 200: 0.5, 0.4 and 0.0, and 1.0 of the one that was at 3.0 there
    assert found == pytest.approx({0: 1.0, 1: 2.1, 2: 3.5, 3: 2.5 - 0.95, 4: 4.0 - 0.45, 5: 2.0})


def test_what_an_earlier_sweep_ended_is_whole_and_what_measured_nothing_unknown() -> None:
    earlier, begun = trial(0.1, {}, WHOLE), trial(0.2, {}, RUNNING)
    assert _at_rung(numbered(earlier, begun), 0) == {0: 1.0}
    assert _at_rung(numbered(earlier, begun, trial(0.3, {100: 3.0})), 100) == {0: 1.0, 2: 3.0}


def test_trials_need_not_be_measured_at_the_same_samples() -> None:
    others = [trial(0.1, {104: 2.0, 208: 1.0}), trial(0.2, {96: 2.0, 192: 1.5, 288: 1.2}), trial(0.3, {300: 5.0})]
    stopped, first = trial(0.4, {100: 3.0}), trial(0.5, {90: 3.0})
    found = _at_rung(numbered(*others, stopped, first), 208)
    # by 100 only the second one had been measured, by 90 none; the third not even by the rung
    assert found == pytest.approx({0: 1.0, 1: 1.5, 3: 2.5, 4: 3.0})


def test_it_learns_before_any_trial_is_whole() -> None:
    study = learning(*(trial(0.1 * n, {100: 1 + abs(0.1 * n - 0.3)}) for n in range(10)))
    assert statistics.median(abs(x - 0.3) for x in proposed(study)) < 0.1


def test_whole_trials_that_had_no_competition_do_not_win() -> None:
    lucky = [trial(0.9 + 0.01 * n, {100: 3.0, 300: 2.9}, WHOLE) for n in range(4)]
    better = [trial(0.1 * n, {100: 1 + abs(0.1 * n - 0.3)}) for n in range(8)]
    assert statistics.median(abs(x - 0.3) for x in proposed(learning(*lucky, *better))) < 0.15


def test_an_infeasible_point_is_avoided() -> None:
    bad = [trial(0.7 + 0.03 * n, {100: 0.1}, system_attrs={"constraints:finite": 1.0}) for n in range(10)]
    good = [trial(0.08 * n, {100: 2 - 0.08 * n}) for n in range(8)]  # better and better towards the bad
    found = proposed(learning(*bad, *good))
    assert statistics.median(found) < 0.72
    assert max(found) < 0.9


def test_a_running_trial_is_not_proposed_again() -> None:
    ended = [trial(0.1 * n, {100: 1 + abs(0.1 * n - 0.3)}) for n in range(10)]
    study = learning(*ended)
    points = [study.ask(SPACE).params for _ in range(4)]
    assert len({(round(point["x"], 3), round(point["y"], 3)) for point in points}) == 4


def test_dimensions_that_only_some_trials_have_are_drawn_by_themselves() -> None:
    other = {"x": SPACE["x"], "z": FloatDistribution(0, 1)}
    more = [
        create_trial(
            state=STOPPED, params={"x": 0.1 * n, "z": 0.5}, distributions=other, intermediate_values={100: 1 + 0.1 * n}
        )
        for n in range(8)
    ]
    study = learning(*(trial(0.1 * n, {100: 1 + 0.1 * n}) for n in range(8)), *more)
    asked = [study.ask(other).params for _ in range(10)]
    assert statistics.median(params["x"] for params in asked) < 0.2
    assert max(params["z"] for params in asked) - min(params["z"] for params in asked) > 0.3


def test_a_running_trial_without_a_modelled_dimension_is_left_out() -> None:
    other = {"x": SPACE["x"]}
    running = create_trial(
        state=RUNNING, params={"x": 0.5}, distributions=other, intermediate_values={100: 0.1, 200: 0.05}
    )
    study = learning(*(trial(0.1 * n, {100: 1 + abs(0.1 * n - 0.3)}) for n in range(10)), running)
    assert statistics.median(abs(x - 0.3) for x in proposed(study)) < 0.15


def test_a_model_that_cannot_be_fitted_leaves_the_point_to_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*arguments: Any) -> Any:
        return torch.linalg.cholesky(torch.zeros(2, 2))

    monkeypatch.setattr(optuna.samplers.GPSampler, "_sample_relative_impl", singular)
    found = proposed(learning(*(trial(0.1 * n, {100: 1 + abs(0.1 * n - 0.3)}) for n in range(10))))
    assert max(found) - min(found) > 0.3


def test_a_share_of_the_trials_is_random_and_torch_keeps_its_threads() -> None:
    threads = torch.get_num_threads()
    trials = [trial(0.1 * n, {100: 1 + abs(0.1 * n - 0.3)}) for n in range(10)]
    far = {share: sum(abs(x - 0.3) > 0.3 for x in proposed(learning(*trials, share=share), 10)) for share in (0.0, 1.0)}
    assert far[0.0] < 3 < far[1.0]
    assert torch.get_num_threads() == threads
