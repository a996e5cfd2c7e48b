"""TPE as BOHB uses it: trials are compared where enough of them have come, and some are drawn at random.

Optuna's own takes every whole trial for better than every stopped one. With early stopping the first whole ones are
those that had no competition, so it learns from luck. BOHB (Falkner et al. 2018, arXiv:1807.01774) compares trials at
the highest rung that enough of them have reached, and draws some at random, as the model may be wrong for good.
"""

from __future__ import annotations

import copy
import heapq
import math
import random
from collections.abc import Container, Iterable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

_MOST, _BEST = 250, 50  # trials that it learns from: the best ones and the latest


class Tpe(optuna.samplers.BaseSampler):
    """TPE over trials as they stood at a rung.

    The rung is the highest number of samples at which ``startup`` trials or more were measured, those that run
    included; a trial that came so far counts with its lowest loss until there. What was stopped before counts as worse,
    the earlier the worse. So a search that stops no trial early and one of several objectives are plain TPE's, but for
    the trials at random. An ask costs the same however long the search is: beyond 250 trials it learns from
    the 50 best and the latest.
    """

    def __init__(self, startup: int, share: float, seed: int) -> None:
        """
        Args:
            startup: random trials before it learns.
            share: of the later trials, those that are random too.
            seed: of all that is drawn.
        """
        self._inner = optuna.samplers.TPESampler(
            n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
        )
        self._enough, self._share, self._draw = max(1, startup), share, random.Random(seed)
        # with the seed itself it would draw again what the inner one begins with
        self._random = optuna.samplers.RandomSampler(seed=self._draw.randrange(2**32))
        self._at_random = False
        self._read = 0  # trials of the study that were looked at
        self._open: list[int] = []  # numbers of those that had not ended
        self._ended: list[FrozenTrial] = []
        self._spaces: dict[frozenset[str], FrozenTrial] = {}  # a trial of each set of parameters

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self._update(study)
        self._at_random = self._draw.random() < self._share
        view: Any = _View(study, self._spaces.values())
        return self._inner.infer_relative_search_space(view, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point that the model likes best of those it draws; nothing where it is another trial's turn at random."""
        if self._at_random:
            return {}
        view: Any = _View(study, self._as_of_rung(study))
        return self._inner.sample_relative(view, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value of a parameter that no ended trial has had, or of a trial at random."""
        if self._at_random:
            return self._random.sample_independent(study, trial, param_name, param_distribution)
        view: Any = _View(study, self._as_of_rung(study))
        return self._inner.sample_independent(view, trial, param_name, param_distribution)

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

    def _as_of_rung(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials to learn from, and those that run: each as it was at the rung."""
        trials = _Numbered(study)
        running = [trials[number] for number in self._open if trials[number].state is TrialState.RUNNING]
        came = heapq.nlargest(self._enough, (_steps(trial) for trial in (*self._ended, *running)))
        rung = came[-1] if len(came) == self._enough else 0
        if rung and len(study.directions) == 1:
            return [_as_of(trial, rung) for trial in (*self._few(rung), *running)]
        return [*self._few(0), *running]

    def _few(self, rung: int) -> list[FrozenTrial]:
        """Of the ended trials the best and the latest; the others are forgotten."""
        if len(self._ended) > _MOST:
            earlier, latest = self._ended[: _BEST - _MOST], self._ended[_BEST - _MOST :]
            best = heapq.nsmallest(_BEST, earlier, key=lambda trial: _loss(trial, rung))
            self._ended = [*best, *latest]
        return self._ended


def _steps(trial: FrozenTrial) -> int:
    """Samples at the last measure."""
    return max(trial.intermediate_values, default=0)


def _loss(trial: FrozenTrial, rung: int) -> float:
    """The lowest loss until a rung; infinite for a trial that did not come so far."""
    measured = (loss for step, loss in trial.intermediate_values.items() if step <= rung and math.isfinite(loss))
    return min(measured, default=math.inf) if _steps(trial) >= rung else math.inf


def _as_of(trial: FrozenTrial, rung: int) -> FrozenTrial:
    """A trial that came as far as a rung as one that ended there; any other as it is."""
    loss = _loss(trial, rung)
    if not math.isfinite(loss):
        return trial
    there = copy.copy(trial)
    there.state, there.values = TrialState.COMPLETE, [loss]
    return there


class _Numbered:
    """A study's trials by their numbers: without a pass over all of them where none is left out."""

    def __init__(self, study: optuna.Study) -> None:
        trials = study.get_trials(deepcopy=False)
        self.end = trials[-1].number + 1 if trials else 0
        whole = len(trials) == self.end
        self._trials: Any = trials if whole else {trial.number: trial for trial in trials}
        self._numbers: Any = range(self.end) if whole else self._trials

    def __contains__(self, number: int) -> bool:
        return number in self._numbers

    def __getitem__(self, number: int) -> FrozenTrial:
        trial: FrozenTrial = self._trials[number]
        return trial


class _View:
    """A study of which a sampler sees some trials only, or as they were earlier."""

    def __init__(self, study: optuna.Study, trials: Iterable[FrozenTrial]) -> None:
        self._whole = study
        self._trials = list(trials)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]
