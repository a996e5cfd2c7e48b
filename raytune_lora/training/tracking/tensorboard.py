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
    _writer: Any = None

    def start(self, trial: TrackedTrial) -> None:
        self._trial = trial

    def log(self, step: int, values: Values) -> None:
        if self._writer is None:
            self._open(step)
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, first: int) -> None:
        """A file whose steps take the place of those from ``first`` on in older files of the trial."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._trial.folder / FOLDER), purge_step=first)
        text = yaml.safe_dump(self._trial.config, sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", f"```yaml\n{text}```", first)
