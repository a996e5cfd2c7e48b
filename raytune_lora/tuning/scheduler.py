"""Who goes on and who stops, compared at equal samples seen.

Each scheduler is one of Tune's, taught two things. It knows trials by the sweep's own names, so that what an earlier
process measured can be replayed into it; and a measure that it has seen is not judged again, so that a trial that goes
on from a checkpoint is not compared twice. After a resume it decides as it would have decided without the kill, with
one exception: where the kill fell between a decision to stop a trial and its end, that trial runs on to the next
decision.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import Scheduler, SchedulerConfig
from raytune_lora.tuning.population import Population
from raytune_lora.tuning.thrift import Fifo, Thrifty
from raytune_lora.tuning.trials import Record
from raytune_lora.tuning.turns import Promotions, Turns

_GRACE = 5  # one in this many of a whole run's samples is seen before a trial may be stopped
_OTHERS = 3  # trials that must have come as far before the median of them says anything


def build(cfg: SchedulerConfig, *, total: int, every: int, record: Record) -> TrialScheduler:
    """The scheduler, with what earlier trials reached replayed into it.

    Args:
        cfg: which, and how hard it cuts.
        total: samples of a whole trial.
        every: samples between two validations.
        record: of a sweep that goes on.
    """
    if cfg.kind in (Scheduler.none, Scheduler.pbt):  # a member of a population pauses by itself
        return Fifo()
    grace = min(_grace(cfg, total=total, every=every), total)  # beyond it, no trial would ever be stopped early
    scheduler: _Remembering
    if cfg.kind is Scheduler.median:
        scheduler = Median(grace)
    else:
        brackets = len(rungs(cfg, total=total, every=every)) if cfg.kind is Scheduler.hyperband else 1
        scheduler = Asha(total, grace, cfg.reduction, max(1, brackets))
    for trial in record.trials.values():
        for point in trial.curve if trial.confirms is None else ():
            scheduler.replay(trial.trial_id, int(point["samples_seen"]), point["eval_loss"])
    return scheduler


def turns(cfg: SweepConfig, scheduler: TrialScheduler, record: Record, *, total: int, every: int) -> Turns:
    """Who says whose turn it is in a sweep.

    Args:
        cfg: of the sweep.
        scheduler: that ``build`` made.
        record: of the sweep, as it grows.
        total: samples of a whole trial.
        every: samples between two validations.
    """
    trials = cfg.search.trials
    if cfg.scheduler.kind is Scheduler.pbt:
        return Population(record, trials, cfg.scheduler, total=total, every=every, seed=cfg.search.seed)
    if cfg.scheduler.resume_stopped and isinstance(scheduler, Asha):
        return Promotions(record, trials, scheduler.promotable)
    return Turns(record, trials)


def rungs(cfg: SchedulerConfig, *, total: int, every: int) -> list[int]:
    """Samples seen at which trials are compared; of HyperBand, the later brackets leave out the first of them."""
    found, rung = [], float(_grace(cfg, total=total, every=every))
    while cfg.kind in (Scheduler.asha, Scheduler.hyperband) and rung < total:
        found.append(round(rung))
        rung *= cfg.reduction
    return found


def _grace(cfg: SchedulerConfig, *, total: int, every: int) -> int:
    """Samples before a trial may be stopped: as configured, or the first validation after a fifth of a run.

    What learns slowly and ends well is behind before that: on a surrogate whose best point does (the benchmark
    ``search_quality``), stopping at a tenth never found it, and at a fifth it took less than half of random's samples.
    """
    return cfg.grace or every * math.ceil(total / (_GRACE * every))


@dataclass(frozen=True)
class _Named:
    """Stands for a trial by the one thing that the schedulers look at; Tune's own id is new in each process."""

    trial_id: str


class _Remembering(Thrifty):
    """What the schedulers share."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._seen: dict[_Named, int] = {}  # samples at the last measure of each trial

    def replay(self, trial_id: str, samples_seen: int, eval_loss: float) -> None:
        """Take in what a trial measured in an earlier process."""
        self._measure(None, _Named(trial_id), samples_seen, eval_loss)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "samples_seen" not in result or "eval_loss" not in result:
            return TrialScheduler.CONTINUE
        name = _Named(trial.config["trial_id"])
        return self._measure(tune_controller, name, result["samples_seen"], result["eval_loss"])

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: what the trial measured last is known, and a failed one's last result holds no measure."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing: a trial that never measured anything is not known."""

    def _measure(self, controller: Any, name: _Named, samples_seen: int, eval_loss: float) -> str:
        if samples_seen <= self._seen.get(name, -1):
            return TrialScheduler.CONTINUE
        self._seen[name] = samples_seen
        return self._judge(controller, name, samples_seen, eval_loss)

    def _judge(self, controller: Any, name: _Named, samples_seen: int, eval_loss: float) -> str:
        raise NotImplementedError


class Asha(_Remembering, ASHAScheduler):
    """ASHA (Li et al. 2020, arXiv:1810.05934), and with several brackets asynchronous HyperBand (the same paper).

    Bracket ``s`` compares its trials from rung ``s`` on, so that one that begins slowly has a chance in a later one.
    Which bracket a trial is in follows from its name; Tune would draw it anew after a resume.
    """

    def __init__(self, total: int, grace: int, reduction: float, brackets: int) -> None:
        super().__init__(
            time_attr="samples_seen",
            metric="eval_loss",
            mode="min",
            max_t=total,
            grace_period=grace,
            reduction_factor=reduction,
            brackets=brackets,
        )

    def bracket_of(self, trial_id: str) -> int:
        """The bracket of a trial, drawn as Tune draws it: by a softmax over the brackets' numbers of rungs."""
        sizes = np.array([len(bracket._rungs) for bracket in self._brackets])
        weights = np.exp(sizes - sizes.max())
        return random.Random(f"bracket/{trial_id}").choices(range(len(sizes)), weights.tolist())[0]

    def _judge(self, controller: Any, name: _Named, samples_seen: int, eval_loss: float) -> str:
        if samples_seen >= self._max_t:
            return TrialScheduler.STOP
        trial: Any = name
        return self._brackets[self.bracket_of(name.trial_id)].on_result(trial, samples_seen, -eval_loss)

    def promotable(self, stopped: Collection[str]) -> str | None:
        """Of stopped trials, one that is among the best ``1 / reduction`` of the last rung that it came to.

        The highest rung comes first, and there the lowest loss.
        """
        found = []
        for bracket in self._brackets:
            above: set[str] = set()
            for rung, recorded in bracket._rungs:  # the highest first
                losses = ((-reward, name) for name, reward in recorded.items())
                best = heapq.nsmallest(int(len(recorded) / bracket.rf), losses)
                found += [(-rung, loss, name) for loss, name in best if name in stopped and name not in above]
                above |= recorded.keys()
        return min(found)[2] if found else None


class Median(_Remembering, MedianStoppingRule):
    """The median stopping rule (Golovin et al. 2017, Google Vizier).

    A trial stops where its lowest loss so far is higher than the median of the other trials' mean losses up to as many
    samples.
    """

    def __init__(self, grace: int) -> None:
        super().__init__(
            time_attr="samples_seen",
            metric="eval_loss",
            mode="min",
            grace_period=grace,
            min_samples_required=_OTHERS,
            min_time_slice=np.inf,  # else Tune pauses a trial where too few have come as far
        )

    def _judge(self, controller: Any, name: _Named, samples_seen: int, eval_loss: float) -> str:
        result = {"samples_seen": samples_seen, "eval_loss": eval_loss}
        self._stopped_trials.discard(name)
        trial: Any = name
        return MedianStoppingRule.on_trial_result(self, controller, trial, result)
