"""Population based training (Jaderberg et al. 2017, arXiv:1711.09846), at equal samples seen.

Members of a population train side by side. Every interval all of them pause, and each of the worst quarter is replaced
by a child: a new trial that begins from the weights and the optimizer's state of one of the best quarter, with its
parameters perturbed. Fewer workers than members take turns. A member that ended before the others (it diverged, failed,
or gained nothing for ``training.patience`` validations) is replaced too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raytune_lora.config.search import CHANGEABLE, SchedulerConfig
from raytune_lora.tuning.trials import COMPLETED, ENDED_BADLY, RUNNING, Record, Trial
from raytune_lora.tuning.turns import Child, Turn, Turns

_QUANTILE = 4  # one member in so many is replaced, and as many are copied
_RESAMPLED = 0.25  # of the parameters of a child, drawn anew instead of perturbed
_FACTORS = (0.8, 1.2)


class Population(Turns):
    """Members of a population and the children that replace them."""

    def __init__(self, record: Record, trials: int, cfg: SchedulerConfig, *, total: int, every: int, seed: int) -> None:
        """
        Args:
            record: of the sweep, as it grows.
            trials: members and children at most; once there are as many, all members go on to their end.
            cfg: the population's size and its interval.
            total: samples of a whole trial.
            every: samples between two validations.
            seed: of the choice among the best.
        """
        super().__init__(record, trials)
        self._size = cfg.population
        self._interval = min(cfg.grace or every, total)
        self._total = total
        self._seed = seed

    def next(self, out: Mapping[str, Trial]) -> Trial | Child | Turn:
        known = self._known(out)
        if sum(trial.parent is None for trial in known.values()) < self._size:
            return Turn.NEW
        replaced = {trial.replaces for trial in known.values()}
        racing = [t for t in known.values() if t.trial_id not in replaced and _races(t)]
        behind = min((self._done(t) for t in racing), default=0)
        for child in self._children(behind, known, out):
            if child.replaces.trial_id not in replaced and len(known) < self._trials:
                return child
        idle = [t for t in racing if t.trial_id not in out and self._done(t) == behind]
        if all(name in self._record.trials for name in out):  # a child must be on record before its parent goes on
            waited_for = {t.parent for t in known.values() if not t.curve and not t.ended}
            for trial in sorted(idle, key=lambda t: t.trial_id):
                if trial.trial_id not in waited_for:
                    return trial
        return Turn.WAIT if out else Turn.END

    def terms(self, trial: Trial) -> dict[str, Any]:
        """Until when it trains now, and of a child that has not begun, from where."""
        further = self._interval * (self._round(trial.samples_seen) + 1)
        interrupted = trial.status == RUNNING and trial.until is not None
        found: dict[str, Any] = {"until": trial.until if interrupted else further}
        if trial.parent is not None and not trial.curve:
            found |= {"parent": trial.parent, "born": trial.born, "replaces": trial.replaces}
            found["inherits"] = self._record.trials[trial.parent].latest
        return found

    def _round(self, samples_seen: float) -> int:
        """How many intervals that is."""
        return int(samples_seen // self._interval)

    def _done(self, trial: Trial) -> int:
        """The rounds that a member has behind it: one that has measured at the end of a round has still to pause."""
        if trial.status == RUNNING and trial.until is not None:
            return self._round(trial.until) - 1
        return self._round(trial.samples_seen)

    def _children(self, now: int, known: Mapping[str, Trial], out: Mapping[str, Trial]) -> Iterator[Child]:
        """Those that are due at the end of a round, whether they are there already or not.

        None once a member has gone on: its checkpoint of then may be gone.
        """
        before = [t for t in known.values() if self._round(t.born) < now]
        gone = {t.replaces for t in before}
        members = [t for t in before if t.trial_id not in gone]
        able = [t for t in members if _races(t)]
        moved = (t.trial_id in out or t.status == RUNNING or self._done(t) > now for t in able)
        if not able or now * self._interval >= self._total or any(moved):
            return
        ranked = sorted(able, key=lambda t: (self._loss_at(t, now), t.trial_id))
        count = max(1, self._size // _QUANTILE)
        best, rest = ranked[:count], ranked[count:]
        for loser in [*(t for t in members if not _races(t)), *rest[-count:]]:
            draw = random.Random(f"{self._seed}/{now}/{loser.trial_id}")
            yield Child(draw.choice(best), loser)

    def _loss_at(self, trial: Trial, now: int) -> float:
        points = (point["eval_loss"] for point in trial.curve if point["samples_seen"] >= now * self._interval)
        return next(points, math.inf)


def _races(trial: Trial) -> bool:
    """Whether it can go on, had it not been replaced."""
    return trial.status not in (COMPLETED, *ENDED_BADLY)


def perturbed(params: dict[str, Any], distributions: dict[str, BaseDistribution], seed: str) -> dict[str, Any]:
    """The parameters of a child.

    A number is multiplied by 0.8 or 1.2 and moves by a step at least, a choice becomes its neighbour in the list; one
    parameter in four is drawn anew. All stay within the space. What is not in ``CHANGEABLE`` is inherited.

    Args:
        params: of the parent, by the sampler's names.
        distributions: of the same.
        seed: of the draws.
    """
    found = dict(params)
    for name, own in distributions.items():
        if name.partition(" / ")[0] in CHANGEABLE:
            draw = random.Random(f"{seed}/{name}")
            found[name] = _anew(own, draw) if draw.random() < _RESAMPLED else _beside(own, params[name], draw)
    return found


def _beside(own: BaseDistribution, value: Any, draw: random.Random) -> Any:
    factor = draw.choice(_FACTORS)
    if isinstance(own, CategoricalDistribution):
        at = own.choices.index(value) + (1 if factor > 1 else -1)
        return own.choices[min(max(at, 0), len(own.choices) - 1)]
    assert isinstance(own, (FloatDistribution, IntDistribution))
    if own.step is None:
        return min(max(value * factor, own.low), own.high)
    steps = round(value * (factor - 1) / own.step) or (1 if factor > 1 else -1)
    moved = round(min(max(value + steps * own.step, own.low), own.high), 12)
    return moved if isinstance(own, FloatDistribution) else int(moved)


def _anew(own: BaseDistribution, draw: random.Random) -> Any:
    if isinstance(own, CategoricalDistribution):
        return draw.choice(own.choices)
    assert isinstance(own, (FloatDistribution, IntDistribution))
    if own.log:
        value = math.exp(draw.uniform(math.log(own.low), math.log(own.high)))
        return min(max(value if isinstance(own, FloatDistribution) else round(value), own.low), own.high)
    if own.step is None:
        return draw.uniform(own.low, own.high)
    return round(own.low + own.step * draw.randint(0, round((own.high - own.low) / own.step)), 12)
