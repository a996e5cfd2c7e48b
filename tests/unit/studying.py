"""Studies of trials of two parameters, for the samplers that see trials as they stood at a rung."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

SPACE: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(1e-3, 1, log=True)}
STOPPED, RUNNING, WHOLE = TrialState.PRUNED, TrialState.RUNNING, TrialState.COMPLETE


def trial(x: float, losses: dict[int, float], state: TrialState = STOPPED, **facts: Any) -> FrozenTrial:
    value = min(losses.values(), default=1.0) if state is WHOLE else None
    params = {"x": x, "y": 0.1}
    return create_trial(
        state=state, value=value, params=params, distributions=SPACE, intermediate_values=losses, **facts
    )


def studied(sampler: optuna.samplers.BaseSampler, *trials: FrozenTrial) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(trials)
    return study


def proposed(study: optuna.Study, count: int) -> list[float]:
    return [study.ask(SPACE).params["x"] for _ in range(count)]
