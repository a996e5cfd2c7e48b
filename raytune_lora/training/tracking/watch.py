"""What is measured at each step of a trial; the first worker measures for its whole group.

- ``samples_seen``: samples trained on, of the whole group
- ``loss``: training loss of the step; ``eval_loss``: validation loss, at the steps that measure it (nats a token)
- ``learning_rate``; ``grad_norm``: before clipping
- ``step_seconds``: wall time from the end of the step before, reading data included, validation and checkpoints not;
  ``data_wait_seconds``: of that, until the step's data was there
- ``checkpoint_seconds``: wall time of the checkpoint between the step before and this one, if there was one
- ``tokens_per_second``: tokens that are not padding, of the whole group
- ``memory_bytes``: GPU memory that the first worker's process holds; its resident memory where there is no GPU
- ``mfu``: model FLOPs utilization, a share of 1; None where the peak is not known (see ``utilization``)
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import row_lengths
from raytune_lora.models.loading import precision
from raytune_lora.training.place import Place
from raytune_lora.training.plan import Plan
from raytune_lora.training.tracking import StepLog, TrackedTrial, Tracker, Trackers, tracker_class
from raytune_lora.training.tracking.utilization import flops_per_token, worker_peak


def watchers(cfg: RunConfig, plan: Plan, place: Place, split: Any, model: Any) -> list[Watcher]:
    """The callbacks that measure: one on the first worker, none on the others.

    Args:
        cfg: the run.
        plan: of the run.
        place: of this worker.
        split: that is trained on, of the token store.
        model: that trains, with its adapters.
    """
    if place.rank != 0:
        return []
    peak = worker_peak(precision(cfg.model.precision, on_gpu=True)) if cfg.gpus_per_worker else None
    share = flops_per_token(model) / (peak * plan.workers) if peak else None
    trackers: list[Tracker] = [StepLog(cfg.tracking), *(tracker_class(k)(cfg.tracking) for k in cfg.tracking.trackers)]
    return [Watcher(plan, StepTokens(split, plan), share, trackers, TrackedTrial.of(cfg, place.folder, place.slot))]


class Watcher(TrainerCallback):
    """Measures each step and hands the numbers to the trackers; a step that is validated waits for its validation."""

    def __init__(
        self, plan: Plan, tokens: StepTokens, mfu_per_token: float | None, trackers: list[Tracker], trial: TrackedTrial
    ) -> None:
        """
        Args:
            plan: of the run.
            tokens: of each step.
            mfu_per_token: utilization at one token a second; None where the peak is not known.
            trackers: started when the training begins.
            trial: what they are told.
        """
        self._plan = plan
        self._tokens = tokens
        self._mfu_per_token = mfu_per_token
        self._to_start = trackers
        self._trial = trial
        self._trackers: Trackers | None = None
        self._step: tuple[int, dict[str, float | None]] | None = None  # measured, and not yet handed over
        self._mark = 0.0  # since when the next step has been under way
        self._saving_since = 0.0
        self._checkpoint: float | None = None  # seconds that one took since the last step

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._trackers = Trackers(self._to_start, self._trial)
        self._mark = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs:  # of the end
            return
        step, seconds = int(logs["step"]), logs["ended"] - self._mark
        tokens_per_second = self._tokens(step) / seconds
        mfu = self._mfu_per_token * tokens_per_second if self._mfu_per_token is not None else None
        values: dict[str, float | None] = {
            "samples_seen": self._plan.samples_seen(step),
            "loss": logs["loss"],
            "eval_loss": None,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "step_seconds": seconds,
            "data_wait_seconds": logs["data_wait"],
            "checkpoint_seconds": self._checkpoint,
            "tokens_per_second": tokens_per_second,
            "memory_bytes": _memory(),
            "mfu": mfu,
        }
        self._step, self._checkpoint = (step, values), None
        if not self._plan.evaluates_after(step):
            self._hand_over()
        self._mark = logs["ended"]

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step is not None:
            self._step[1]["eval_loss"] = kwargs["metrics"]["eval_loss"]
        self._hand_over()
        self._saving_since = time.perf_counter()

    def saved(self) -> None:
        """A checkpoint is whole: the next step begins."""
        self._mark = time.perf_counter()
        self._checkpoint = self._mark - self._saving_since

    def close(self) -> None:
        """End the trackers, however the training ended."""
        self._hand_over()
        if self._trackers is not None:
            self._trackers.close()

    def _hand_over(self) -> None:
        if self._step is not None and self._trackers is not None:
            step, values = self._step
            self._trackers.log(step, {name: _finite(value) for name, value in values.items()})
        self._step = None


class AfterSave(TrainerCallback):
    """Tells a watcher that a checkpoint is whole; the last of the callbacks, for others take part in saving."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._watcher.saved()


class StepTokens:
    """Tokens that are not padding in each step of a plan, on all workers together.

    Any worker can count them alone: the plan says which rows a step reads, and the store how long they are.
    """

    def __init__(self, split: Any, plan: Plan) -> None:
        self._lengths = row_lengths(split)
        self._plan = plan

    def __call__(self, step: int) -> int:
        """Tokens of the step; steps count from 1."""
        plan = self._plan
        rows = plan.rows_at(plan.samples_seen(step - 1), plan.samples_seen(step))
        return int(self._lengths[rows].sum())


def _memory() -> int:
    if torch.cuda.is_initialized():
        return int(torch.cuda.memory_reserved())
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
