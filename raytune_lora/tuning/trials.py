"""Trials and the journal that records them.

The journal is the truth of a sweep: JSON lines, each on disk before anything is done about it. What a sweep knows is
the fold of its journal, so a sweep that was killed knows all that it knew.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_lora.training.failures import DIVERGED, FAILED, OOM

COMPLETED = "completed"
ENDED_BADLY = (FAILED, DIVERGED, OOM)

# what a validation reports
MEASURED = (
    "samples_seen",
    "eval_loss",
    "train_loss",
    "training_seconds",
    "trainable_parameters",
    "peak_memory_bytes",
    "micro_batch",
    "checkpoint",
    "last",
)


@dataclass
class Trial:
    """What is known of one trial."""

    trial_id: str
    params: dict[str, Any]  # by dotted config key
    status: str = "running"
    samples_seen: int = 0
    eval_loss: float | None = None  # the lowest measured
    checkpoint: str | None = None  # of that loss
    seconds: float = 0.0  # from start to end, all its starts together
    training_seconds: float = 0.0  # in optimizer steps
    trainable_parameters: int | None = None
    peak_memory_bytes: int | None = None  # of the first worker
    micro_batch: int | None = None  # smaller than the config's where memory ran out
    last: bool = False  # whether it was trained to its end
    error: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)  # samples_seen, eval_loss, train_loss

    @property
    def ended(self) -> bool:
        return self.status != "running"


@dataclass
class Record:
    """What is known of a sweep or run: the fold of a journal."""

    trials: dict[str, Trial] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)  # finished ones: seconds and what they measured

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        kind = event["event"]
        if kind == "phase":
            self.phases[event["name"]] = event
        elif kind == "trial_started":
            self.trials.setdefault(event["trial_id"], Trial(event["trial_id"], event["params"])).status = "running"
        elif kind == "trial_result":
            self._result(self.trials[event["trial_id"]], event)
        elif kind == "trial_ended":
            trial = self.trials[event["trial_id"]]
            trial.status, trial.error = event["status"], event["error"]
            trial.seconds += event["seconds"]

    @property
    def ended(self) -> int:
        """How many trials have ended, well or badly."""
        return sum(trial.ended for trial in self.trials.values())

    def best(self) -> Trial | None:
        """The trial with the lowest validation loss among those that did not end badly."""
        able = [t for t in self.trials.values() if t.eval_loss is not None and t.status not in ENDED_BADLY]
        return min(able, key=lambda t: (t.eval_loss, t.trial_id), default=None)

    @staticmethod
    def _result(trial: Trial, event: dict[str, Any]) -> None:
        seen = event["samples_seen"]
        # a trial that goes on from a checkpoint measures again what it measured after it
        trial.curve = [point for point in trial.curve if point["samples_seen"] < seen]
        trial.curve.append({key: event[key] for key in ("samples_seen", "eval_loss", "train_loss")})
        trial.samples_seen = seen
        trial.training_seconds = event["training_seconds"]
        trial.trainable_parameters = event["trainable_parameters"]
        trial.peak_memory_bytes = event["peak_memory_bytes"]
        trial.micro_batch, trial.last = event["micro_batch"], event["last"]
        if math.isfinite(event["eval_loss"]) and (trial.eval_loss is None or event["eval_loss"] <= trial.eval_loss):
            trial.eval_loss, trial.checkpoint = event["eval_loss"], event["checkpoint"]


class Journal:
    """An append-only file of events, and the record they add up to."""

    def __init__(
        self, path: Path, watch: Callable[[dict[str, Any], Record], None] = lambda _event, _record: None
    ) -> None:
        """
        Args:
            path: of the file; what it holds already is read.
            watch: called with each new event once it is on disk and in the record.
        """
        self.record = Record()
        self._path = path
        self._watch = watch
        whole = 0
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1  # a line cut short by a kill was never acted on
            for line in data[:whole].splitlines():
                self.record.add(json.loads(line))
            os.truncate(path, whole)

    def append(self, event: str, **values: Any) -> None:
        """Record one event durably."""
        entry = {"time": time.time(), "event": event, **values}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's own escape
            file.flush()
            os.fsync(file.fileno())
        self.record.add(entry)
        self._watch(entry, self.record)


def trial_name(number: int) -> str:
    """The name of the study's trial of that number."""
    return f"{number:04d}"
