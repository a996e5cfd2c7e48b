"""Every metric that Prometheus can read of a sweep, by name; the dashboards and alerts use no others of ours.

No label names a trial, or the database of metrics would grow with each. What a trial measures is labelled by its
*slot*, the number of the worker group that trains it, and ``trial_number`` says which trial that is at the time; the
best trials of a sweep are labelled by *rank*. So a sweep has at most ``most_series`` series, whatever its trials.

Ray adds labels of its own, and one of them, WorkerId, is another for each process: where worker groups are made anew
for each trial (``cluster.reuse_workers=false``), have Prometheus drop it, as k8s/components/monitoring does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raytune_lora.training.failures import DIVERGED, FAILED, LOST, OOM, QUOTA, STOPPED

PREFIX = "raytune_lora_"  # Ray puts ``ray_`` before it
STATES = ("waiting", "running", "paused", "completed", STOPPED, FAILED, DIVERGED, OOM, LOST, QUOTA)  # of trials
BUDGETS = ("trials", "hours", "wall_hours", "gpu_hours")
RANKS = 10  # of the best trials, from 1 on

TRIAL, SWEEP = ("sweep", "slot"), ("sweep",)
_VALUES = {"sweep": 1, "state": len(STATES), "budget": len(BUDGETS), "rank": RANKS}  # how many a label has


@dataclass(frozen=True)
class Series:
    """A metric: a gauge, or a counter where its name ends in ``_total``."""

    name: str
    meaning: str
    labels: tuple[str, ...]

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{PREFIX}{self.name}"


SERIES = {
    series.name: series
    for series in (
        # what the first worker of a group measures; see ``watch``
        Series("trial_number", "Number of the trial that the group trains", TRIAL),
        Series("trial_step", "Optimizer steps done", TRIAL),
        Series("trial_last_step_timestamp_seconds", "Unix time of the last step's end", TRIAL),
        Series("trial_samples_seen", "Samples trained on", TRIAL),
        Series("trial_loss", "Training loss of the last step, nats a token", TRIAL),
        Series("trial_eval_loss", "Validation loss last measured, nats a token", TRIAL),
        Series("trial_learning_rate", "Learning rate", TRIAL),
        Series("trial_grad_norm", "Norm of the gradient before clipping", TRIAL),
        Series("trial_step_seconds", "Wall time of the last step", TRIAL),
        Series("trial_data_wait_seconds", "Of the last step, the wait for data", TRIAL),
        Series("trial_tokens_per_second", "Tokens that are not padding, of the whole group", TRIAL),
        Series("trial_mfu_ratio", "Model FLOPs utilization, a share of 1", TRIAL),
        Series("trial_memory_bytes", "GPU memory of the first worker; resident memory where it has no GPU", TRIAL),
        Series("trial_checkpoint_seconds", "Wall time that the last checkpoint took", TRIAL),
        Series("trial_checkpoint_timestamp_seconds", "Unix time of the last checkpoint, or else of the start", TRIAL),
        # what the journal says
        Series("sweep_trials", "Trials in a state", (*SWEEP, "state")),
        Series("sweep_samples_total", "Samples trained on, all trials together", SWEEP),
        Series("sweep_gpu_seconds_total", "Seconds in optimizer steps, times the GPUs of each trial", SWEEP),
        Series("sweep_elapsed_seconds", "Time at work, in all sittings", SWEEP),
        Series("sweep_budget_used_ratio", "Share of a budget that is used", (*SWEEP, "budget")),
        Series("sweep_last_event_timestamp_seconds", "Unix time of the journal's last event", SWEEP),
        Series(
            "sweep_baseline_eval_loss", "Validation loss of the base model on the rows of trials, nats a token", SWEEP
        ),
        Series("sweep_best_eval_loss", "Lowest validation loss of a trial, the best trials by rank", (*SWEEP, "rank")),
        Series("sweep_best_trial_number", "Number of the trial of that rank", (*SWEEP, "rank")),
        # the sweep's folder
        Series("sweep_checkpoint_bytes", "Size of the checkpoints of all trials", SWEEP),
        Series("sweep_disk_free_bytes", "Free space where the sweep's folder is", SWEEP),
        Series("sweep_disk_size_bytes", "Size of the disk where the sweep's folder is", SWEEP),
    )
}


def most_series(slots: int) -> int:
    """The most series that one sweep has at a time.

    Args:
        slots: worker groups at a time: ``search.concurrent``.
    """
    values = _VALUES | {"slot": slots}
    return sum(math.prod(values[label] for label in series.labels) for series in SERIES.values())
