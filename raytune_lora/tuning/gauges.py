"""A sweep's own metrics for Prometheus: what its journal says, and the disk that it lies on."""

from __future__ import annotations

import contextlib
import heapq
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from raytune_lora.artifacts import folder_bytes
from raytune_lora.config.schema import SweepConfig
from raytune_lora.training.tracking.gauges import Exporter, Shown
from raytune_lora.training.tracking.series import BUDGETS, RANKS, STATES
from raytune_lora.tuning.folder import SweepFolder
from raytune_lora.tuning.results import BASELINE
from raytune_lora.tuning.trials import ENDED_BADLY, Journal, Trial

_MEASURED_AT_ONCE = 64  # trials whose checkpoints are measured at one reading


@contextlib.contextmanager
def exported(cfg: SweepConfig, folder: SweepFolder, journal: Journal, trials: int) -> Iterator[None]:
    """Export a sweep's metrics for the time of its work, where the tracker ``ray`` is asked for.

    Args:
        cfg: of the sweep.
        folder: of the sweep.
        journal: of the sweep.
        trials: that it is to have.
    """
    if "ray" not in cfg.tracking.trackers:
        yield
        return
    gauges = SweepGauges(cfg, folder, journal, trials)
    exporter = Exporter(gauges.read, sweep=folder.name)
    try:
        yield
    finally:
        exporter.close()


class SweepGauges:
    """Reads the metrics off the journal's record; of ten thousand trials in a few milliseconds."""

    def __init__(self, cfg: SweepConfig, folder: SweepFolder, journal: Journal, trials: int) -> None:
        """
        Args:
            cfg: says what the budgets are.
            folder: whose disk is looked at.
            journal: whose record is read, while others add to it.
            trials: that the sweep is to have.
        """
        self._budget = cfg.budget
        self._folder = folder
        self._journal = journal
        self._goal = trials
        self._checkpoints = _CheckpointSizes(folder.trials)

    def read(self) -> Iterator[Shown]:
        """The metrics as they are now."""
        trials = list(self._journal.record.trials.values())  # at once: the journal goes on
        yield from self._states(trials)
        yield from self._best(trials)
        yield from self._spent(trials)
        yield "sweep_checkpoint_bytes", self._checkpoints.total(trials), {}
        disk = shutil.disk_usage(self._folder.path)
        yield "sweep_disk_free_bytes", disk.free, {}
        yield "sweep_disk_size_bytes", disk.total, {}

    def _states(self, trials: list[Trial]) -> Iterator[Shown]:
        known = Counter(trial.status for trial in trials)
        searched = sum(trial.confirms is None for trial in trials)
        over = self._journal.record.ended_by is not None
        known["waiting"] = 0 if over else max(0, self._goal - searched)
        for state in STATES:
            yield "sweep_trials", known[state], {"state": state}

    def _best(self, trials: list[Trial]) -> Iterator[Shown]:
        baseline = self._journal.record.phases.get(BASELINE)
        if baseline is not None:
            yield "sweep_baseline_eval_loss", baseline.get("trial_loss", baseline["eval_loss"]), {}  # beside trials'
        able = [
            (trial.eval_loss, trial.trial_id)
            for trial in trials
            if trial.confirms is None and trial.eval_loss is not None and trial.status not in ENDED_BADLY
        ]
        for rank, (loss, name) in enumerate(heapq.nsmallest(RANKS, able), 1):
            yield "sweep_best_eval_loss", loss, {"rank": str(rank)}
            yield "sweep_best_trial_number", int(name), {"rank": str(rank)}

    def _spent(self, trials: list[Trial]) -> Iterator[Shown]:
        record, clock = self._journal.record, self._journal.clock
        yield "sweep_samples_total", sum(trial.samples_seen for trial in trials), {}
        yield "sweep_gpu_seconds_total", record.gpu_seconds, {}
        yield "sweep_elapsed_seconds", clock, {}
        yield "sweep_last_event_timestamp_seconds", record.progressed, {}
        used = (record.ended, clock / 3600, self._journal.elapsed / 3600, record.gpu_seconds / 3600)
        limits = (self._goal, self._budget.hours, self._budget.wall_hours, self._budget.gpu_hours)
        for budget, spent, most in zip(BUDGETS, used, limits, strict=True):
            if most is not None:
                yield "sweep_budget_used_ratio", spent / most, {"budget": budget}


class _CheckpointSizes:
    """Measures a trial's checkpoints again only when the trial has got on, and a few trials at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._measured: dict[str, tuple[int, int, str]] = {}  # bytes, and samples seen and status of then

    def total(self, trials: list[Trial]) -> int:
        """Bytes of all checkpoints."""
        moved = (t for t in trials if self._measured.get(t.trial_id, (0, 0, ""))[1:] != (t.samples_seen, t.status))
        for trial, _ in zip(moved, range(_MEASURED_AT_ONCE), strict=False):
            size = sum(folder_bytes(checkpoint) for checkpoint in (self._folder / trial.trial_id).glob("checkpoint-*"))
            self._measured[trial.trial_id] = size, trial.samples_seen, trial.status
        return sum(size for size, _, _ in self._measured.values())
