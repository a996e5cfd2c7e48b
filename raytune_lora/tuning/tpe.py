"""TPE over trials as they stood at a rung."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from raytune_lora.tuning.at_rung import AtRung, View, loss_at, whole


class Tpe(AtRung):
    """Tree-structured Parzen estimators (Bergstra et al. 2011), one over all dimensions that go together.

    A trial that came to the rung counts with its lowest loss until there. What was stopped before counts as worse, the
    earlier the worse. So a search that stops no trial early and one of several objectives are plain TPE's, but for the
    trials at random.
    """

    def __init__(self, startup: int, share: float, seed: int) -> None:
        """
        Args:
            startup: random trials before it learns.
            share: of the later trials, those that are random too.
            seed: of all that is drawn.
        """
        inner = optuna.samplers.TPESampler(
            n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
        )
        super().__init__(inner, startup, share, seed)

    def _modelled(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        view: Any = View(study, self._spaces.values())
        return self._inner.infer_relative_search_space(view, trial)

    def _as_of(self, trials: list[FrozenTrial], rung: int) -> list[FrozenTrial]:
        if not rung:
            return trials
        losses = [loss_at(trial, rung) for trial in trials]
        return [
            whole(trial, loss) if math.isfinite(loss) else trial for trial, loss in zip(trials, losses, strict=True)
        ]
