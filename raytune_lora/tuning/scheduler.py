"""Who goes on and who stops, compared at equal samples seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raytune_lora.config.search import Scheduler, SchedulerConfig
from raytune_lora.tuning.trials import Record


def build(cfg: SchedulerConfig, *, total: int, every: int, record: Record) -> TrialScheduler:
    """The scheduler, with what earlier trials reached replayed into it.

    Args:
        cfg: which, and how hard it cuts.
        total: samples of a whole trial.
        every: samples between two validations.
        record: of a sweep that goes on.
    """
    if cfg.kind is Scheduler.none:
        return FIFOScheduler()
    scheduler = Asha(
        time_attr="samples_seen",
        metric="eval_loss",
        mode="min",
        max_t=total,
        grace_period=min(cfg.grace or every, total),  # beyond it, no trial would ever be stopped early
        reduction_factor=cfg.reduction,
    )
    for trial in record.trials.values():
        for point in trial.curve if trial.ended else ():
            scheduler.replay(trial.trial_id, int(point["samples_seen"]), point["eval_loss"])
    return scheduler


def rungs(cfg: SchedulerConfig, *, total: int, every: int) -> list[int]:
    """Samples seen at which trials are compared."""
    found, rung = [], float(cfg.grace or every)
    while cfg.kind is Scheduler.asha and rung < total:
        found.append(round(rung))
        rung *= cfg.reduction
    return found


class Asha(ASHAScheduler):
    """Tune's ASHA (Li et al. 2020, arXiv:1810.05934) with a memory for trials of an earlier process."""

    def replay(self, trial_id: str, samples_seen: int, eval_loss: float) -> None:
        """Record what a trial reached at a rung."""
        stand_in: Any = SimpleNamespace(trial_id=f"earlier-{trial_id}")  # of a trial, only its id is looked at
        self._brackets[0].on_result(stand_in, samples_seen, -eval_loss)
