"""TensorBoard event files in the trial's folder."""

from __future__ import annotations

from typing import Any

import yaml

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values

FOLDER = "tensorboard"  # in the trial's folder


class TensorBoard(Tracker):
    """A scalar a number, and the config as text."""

    kind = "tensorboard"
    module = package = "tensorboard"
    _writer: Any

    def start(self, trial: TrackedTrial) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(trial.folder / FOLDER))
        text = yaml.safe_dump(trial.config, sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", f"```yaml\n{text}```")

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
