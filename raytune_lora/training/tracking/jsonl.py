"""The step log: a JSON line a step in the trial's folder."""

from __future__ import annotations

import json
from typing import IO

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values

STEP_LOG = "steps.jsonl"  # in the trial's folder


class StepLog(Tracker):
    """Always at work; no config needs to name it."""

    kind = "jsonl"
    _file: IO[str]

    def start(self, trial: TrackedTrial) -> None:
        self._file = (trial.folder / STEP_LOG).open("a")

    def log(self, step: int, values: Values) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
