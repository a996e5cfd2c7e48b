"""Weights & Biases: a run a trial, grouped by sweep."""

from __future__ import annotations

from typing import Any

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values


class Wandb(Tracker):
    """Offline, the run lies in the trial's folder until ``wandb sync`` uploads it.

    Numbers are plotted over ``step``, one of the numbers, rather than W&B's own count of calls: that one only grows,
    and would refuse the steps that a trial takes again when it goes on from a checkpoint.
    """

    kind = "wandb"
    module = package = "wandb"
    _run: Any

    def start(self, trial: TrackedTrial) -> None:
        import wandb

        online = self.cfg.wandb_mode.value == "online"
        self._run = wandb.init(
            project=self.cfg.project,
            group=trial.sweep,
            name=f"{trial.sweep}/{trial.name}",
            id=trial.run_id,
            resume="allow" if online else None,
            config=trial.config,
            dir=str(trial.folder),
            mode="online" if online else "offline",
            reinit="create_new",  # the process trains other trials before and after this one
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Values) -> None:
        self._run.log({"step": step, **{name: value for name, value in values.items() if value is not None}})

    def close(self) -> None:
        self._run.finish()
