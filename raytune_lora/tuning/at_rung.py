"""What samplers learn of trials of which many were stopped early.

Optuna's own take whole trials for better than stopped ones, or know nothing of stopped ones. With early stopping the
first whole ones are those that had no competition, so that a search would learn from luck. BOHB (Falkner et al. 2018,
arXiv:1807.01774) compares trials at the highest rung that enough of them have reached, and draws some at random, as the
model may be wrong for good.
"""

from __future__ import annotations

import copy
import heapq
import math
import random
from collections.abc import Container, Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

MOST, _BEST = 250, 50  # trials to learn from, and of them the best ones; the others are the latest


class AtRung(optuna.samplers.BaseSampler):
    """Lets another sampler see trials as they stood at a rung.

    The rung is the highest number of samples at which ``enough`` trials or more were measured, those that run included.
    What the others count for is the subclass's to say. An ask costs the same however long the search is: beyond 250
    trials the 50 best and the latest are learned from.
    """

    def __init__(self, inner: optuna.samplers.BaseSampler, enough: int, share: float, seed: int) -> None:
        """
        Args:
            inner: the sampler that learns.
            enough: trials, to compare at a rung.
            share: of the trials, those that are random.
            seed: of the random ones.
        """
        self._inner, self._enough, self._share = inner, max(1, enough), share
        self._draw = random.Random(seed)
        # with the seed itself it would draw again what the inner one begins with
        self._random = optuna.samplers.RandomSampler(seed=self._draw.randrange(2**32))
        self._at_random = False
        self._read = 0  # trials of the study that were looked at
        self._open: list[int] = []  # numbers of those that had not ended
        self._ended: list[FrozenTrial] = []
        self._spaces: dict[frozenset[str], FrozenTrial] = {}  # a trial of each set of parameters

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the model is of; asked once a trial, before all else."""
        self._update(study)
        self._at_random = self._draw.random() < self._share
        return self._modelled(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point that the model likes best of those it draws; nothing where it is another trial's turn at random."""
        if self._at_random:
            return {}
        return self._liked(self._view(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value of a parameter that the model has not, or of a trial at random."""
        sampler, view = (self._random, study) if self._at_random else (self._inner, self._view(study))
        return sampler.sample_independent(view, trial, param_name, param_distribution)

    def _modelled(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        raise NotImplementedError

    def _liked(self, view: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._inner.sample_relative(view, trial, search_space)

    def _as_of(self, trials: list[FrozenTrial], rung: int) -> list[FrozenTrial]:
        """The trials of a search for the lowest loss, as the model is to see them."""
        raise NotImplementedError

    def _view(self, study: optuna.Study) -> Any:
        """The study with the trials to learn from, and those that run: each as it was at the rung."""
        trials = _Numbered(study)
        running = [trials[number] for number in self._open if trials[number].state is TrialState.RUNNING]
        if len(study.directions) > 1:
            return View(study, [*self._few(0), *running])
        came = heapq.nlargest(self._enough, (steps(trial) for trial in (*self._ended, *running)))
        rung = came[-1] if len(came) == self._enough else 0
        return View(study, self._as_of([*self._few(rung), *running], rung))

    def _update(self, study: optuna.Study) -> None:
        """Look at the trials that are new or had not ended; an ended one is as it was, or another continues it."""
        trials = _Numbered(study)
        numbers, self._open = [*self._open, *range(self._read, trials.end)], []
        self._read = trials.end
        self._ended = [trial for trial in self._ended if trial.number in trials]  # without those that went on
        for number in filter(trials.__contains__, numbers):
            if not trials[number].state.is_finished():
                self._open.append(number)
            elif trials[number].state is not TrialState.FAIL:
                self._ended.append(trials[number])
                self._spaces.setdefault(frozenset(trials[number].params), trials[number])

    def _few(self, rung: int) -> list[FrozenTrial]:
        """Of the ended trials the best and the latest; the others are forgotten."""
        if len(self._ended) > MOST:
            earlier, latest = self._ended[: _BEST - MOST], self._ended[_BEST - MOST :]
            best = heapq.nsmallest(_BEST, earlier, key=lambda trial: loss_at(trial, rung))
            self._ended = [*best, *latest]
        return self._ended


def steps(trial: FrozenTrial) -> int:
    """Samples at the last measure."""
    return max(trial.intermediate_values, default=0)


def loss_at(trial: FrozenTrial, rung: int) -> float:
    """The lowest loss until a rung; infinite for a trial that did not come so far."""
    measured = (loss for step, loss in trial.intermediate_values.items() if step <= rung and math.isfinite(loss))
    return min(measured, default=math.inf) if steps(trial) >= rung else math.inf


def whole(trial: FrozenTrial, loss: float) -> FrozenTrial:
    """A trial as one that ended with a loss."""
    there = copy.copy(trial)
    there.state, there.values = TrialState.COMPLETE, [loss]
    return there


class _Numbered:
    """A study's trials by their numbers: without a pass over all of them where none is left out."""

    def __init__(self, study: optuna.Study) -> None:
        trials = study.get_trials(deepcopy=False)
        self.end = trials[-1].number + 1 if trials else 0
        complete = len(trials) == self.end
        self._trials: Any = trials if complete else {trial.number: trial for trial in trials}
        self._numbers: Any = range(self.end) if complete else self._trials

    def __contains__(self, number: int) -> bool:
        return number in self._numbers

    def __getitem__(self, number: int) -> FrozenTrial:
        trial: FrozenTrial = self._trials[number]
        return trial


class View:
    """A study of which a sampler sees some trials only, or as they were earlier."""

    def __init__(self, study: optuna.Study, trials: Iterable[FrozenTrial]) -> None:
        self._whole = study
        self.trials: Sequence[FrozenTrial] = list(trials)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]
