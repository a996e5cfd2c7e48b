"""A Gaussian process over what trials have at a rung, or would have had."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from raytune_lora.tuning.at_rung import AtRung, loss_at, steps, whole

_FINEST = 0.1  # of the median's distance from the lowest loss: differences below it count little


class Gp(AtRung):
    """Optuna's Gaussian process with expected improvement; what runs is taken into account.

    A trial that came to the rung counts with its lowest loss until there, one that did not, stopped or running, with
    its last lowest one and what the others have gained from there to the rung (their median). An infeasible trial
    counts as much as the worst feasible one. The model is of the logarithm of the distance from the lowest loss: most
    of a space is far worse than its best part, and losses as they are would leave that part flat. Where a model cannot
    be fitted the point is a random one.
    """

    def __init__(self, startup: int, share: float, seed: int) -> None:
        """
        Args:
            startup: random trials before it learns.
            share: of the later trials, those that are random too.
            seed: of all that is drawn.
        """
        inner = optuna.samplers.GPSampler(n_startup_trials=max(1, startup), seed=seed, warn_independent_sampling=False)
        super().__init__(inner, startup, share, seed)

    def _modelled(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The dimensions that all ended trials have."""
        spaces = [of.distributions for of in self._spaces.values()] or [{}]
        shared = [name for name in sorted(spaces[0]) if all(name in space for space in spaces)]
        return {name: spaces[0][name] for name in shared if not spaces[0][name].single()}

    def _liked(self, view: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        view.trials = [known for known in view.trials if search_space.keys() <= known.params.keys()]
        if not view.trials:  # a driver loads torch only for a model
            return {}
        import torch

        torch_linalg: Any = torch.linalg
        # its matrices are small: more threads only wait for each other
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super()._liked(view, trial, search_space)
        except (torch_linalg.LinAlgError, np.linalg.LinAlgError):  # no reason to end a search: the next one has more
            return {}
        finally:
            torch.set_num_threads(threads)

    def _as_of(self, trials: list[FrozenTrial], rung: int) -> list[FrozenTrial]:
        feasible = [trial for trial in trials if not _infeasible(trial)]
        losses = _at_rung(feasible, rung)
        if len(losses) < self._enough:
            return []
        unknown = [t for t in feasible if t.number not in losses and t.state is TrialState.RUNNING]
        worst = max(losses.values())
        losses |= {trial.number: worst for trial in trials if _infeasible(trial)}
        lowest = min(losses.values())
        fine = _FINEST * (statistics.median(losses.values()) - lowest) or 1.0
        known = [trial for trial in trials if trial.number in losses]
        return [*(_plain(t, math.log(losses[t.number] - lowest + fine)) for t in known), *unknown]


def _at_rung(trials: list[FrozenTrial], rung: int) -> dict[int, float]:
    """By number, the lowest loss until the rung of each trial that was measured: its own or what is to be expected."""
    there = [trial for trial in trials if rung and math.isfinite(loss_at(trial, rung))]
    gains: dict[int, float] = {rung: 0.0}
    found = {}
    for trial in trials:
        at = min(steps(trial), rung)
        if trial.state is TrialState.COMPLETE and steps(trial) <= rung:  # whole; in an earlier sweep, that may be less
            found[trial.number] = float(trial.values[0])
        elif at and math.isfinite(loss := loss_at(trial, at)):
            if at not in gains:
                # where batches differ, not all have been measured by then
                both = ((loss_at(other, rung), loss_at(other, at)) for other in there)
                gained = [late - early for late, early in both if math.isfinite(early)]
                gains[at] = statistics.median(gained) if gained else 0.0
            found[trial.number] = loss + gains[at]
    return found


def _infeasible(trial: FrozenTrial) -> bool:
    return any(broken > 0 for key, broken in trial.system_attrs.items() if key.startswith("constraints:"))


def _plain(trial: FrozenTrial, value: float) -> FrozenTrial:
    """A whole trial whose being infeasible is in its value."""
    there = whole(trial, value)
    there.system_attrs = {key: of for key, of in trial.system_attrs.items() if not key.startswith("constraints:")}
    return there
