"""When a search ends before its last trial.

Once a budget is reached no trial starts, and those that run end at their next step as stopped, each with what it last
measured and its checkpoint of then. What follows a search (confirming, measuring the best model) is not cut short.
"""

from __future__ import annotations

from collections.abc import Callable

from raytune_lora.config.search import BudgetConfig
from raytune_lora.tuning.trials import Journal

SPACE = "space"  # what ends a search that no budget ends: nothing is left to propose


class Budget:
    """A sweep's budget, over its journal."""

    def __init__(self, cfg: BudgetConfig, journal: Journal, trials: int, tell: Callable[[str], None]) -> None:
        """
        Args:
            cfg: what may be spent.
            journal: of the sweep; the end of the search is recorded in it.
            trials: that the search is to have; once they have ended, no budget ends it.
            tell: called with why the search ends.
        """
        self._cfg = cfg
        self._journal = journal
        self._trials = trials
        self._tell = tell

    def spent(self) -> bool:
        """Whether the search is to end; the first time that it is, the journal is told."""
        record = self._journal.record
        if record.ended_by is None and record.ended < self._trials:
            found = reached(self._cfg, self._journal)
            if found is not None:
                self.end(*found)
        return record.ended_by is not None

    @property
    def is_out_of_points(self) -> bool:
        """Whether the search ends as nothing is left to propose: what runs goes on to its end."""
        ended = self._journal.record.ended_by
        return ended is not None and ended["budget"] == SPACE

    def end(self, budget: str, why: str) -> None:
        """Record that the search ends."""
        self._journal.append("ended_by", budget=budget, why=why)
        self._tell(f"the search ends: {why}")


def reached(cfg: BudgetConfig, journal: Journal) -> tuple[str, str] | None:
    """The first budget that is reached, and why in words.

    Hours count all sittings of the sweep, the time between them aside; wall hours count that too, so that a sweep that
    is started again and again still ends. GPU-hours are the seconds that the search's trials spent in optimizer steps
    up to their last measure, times the GPUs that each had; on the CPU they are none.

    Args:
        cfg: what may be spent.
        journal: of the sweep.
    """
    record, clock, elapsed = journal.record, journal.clock, journal.elapsed
    if cfg.hours is not None and clock >= 3600 * cfg.hours:
        return "hours", f"budget.hours={cfg.hours:g}, and the sweep has been at work for {clock / 3600:.2f} hours"
    if cfg.wall_hours is not None and elapsed >= 3600 * cfg.wall_hours:
        return "wall_hours", f"budget.wall_hours={cfg.wall_hours:g}, and the sweep began {elapsed / 3600:.2f} hours ago"
    if cfg.gpu_hours is not None:
        used = record.gpu_seconds / 3600
        if used >= cfg.gpu_hours:
            return "gpu_hours", f"budget.gpu_hours={cfg.gpu_hours:g}, and the trials have used {used:.2f}"
    if cfg.target is not None:
        best = record.leader
        if best is not None and best.eval_loss is not None and best.eval_loss <= cfg.target:
            return "target", f"budget.target={cfg.target:g}, and trial {best.trial_id} has {best.eval_loss:.4f}"
    if cfg.patience is not None and record.in_vain >= cfg.patience:
        last = "the last trial" if record.in_vain == 1 else f"the last {record.in_vain} trials"
        return "patience", f"budget.patience={cfg.patience}, and {last} had no lower loss"
    return None


def remedy(budget: str) -> str:
    """The override with which a sweep that a budget ended goes on searching."""
    if budget == SPACE:
        return "search.constraints.relations=[<looser>] (or search.constraints.memory_gb=<more>)"
    return f"budget.{budget}={'<lower>' if budget == 'target' else '<more>'} (or null)"


def reopen(journal: Journal, cfg: BudgetConfig, trials: float) -> None:
    """Let a search that a budget ended go on where the config now leaves it more.

    The best model, and the confirmation where there was one, are found again after it.

    Args:
        journal: of the sweep.
        cfg: what may be spent now.
        trials: that the search is to have; infinite where those that were stopped may go on.
    """
    record = journal.record
    if record.ended_by is not None and record.ended < trials and reached(cfg, journal) is None:
        journal.append("reopened")
