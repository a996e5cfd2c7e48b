"""Ray's own metrics: gauges that Prometheus and the Ray dashboard read from every node."""

from __future__ import annotations

import math
from typing import Any

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values

PREFIX = "raytune_lora_"  # Ray puts ``ray_`` before it


class RayGauges(Tracker):
    """A gauge a number, tagged by sweep and trial.

    A gauge lives as long as the worker's process, which outlives the trial: closing sets it to NaN, so that the graph
    ends with the trial.
    """

    kind = "ray"

    def start(self, trial: TrackedTrial) -> None:
        self._tags = {"sweep": trial.sweep, "trial": trial.name}
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, values: Values) -> None:
        for name, value in {"step": step, **values}.items():
            if value is not None:
                self._gauge(name).set(float(value), tags=self._tags)

    def close(self) -> None:
        for gauge in self._gauges.values():
            gauge.set(math.nan, tags=self._tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(PREFIX + name, f"{name} of a trial", tag_keys=tuple(self._tags))
        return self._gauges[name]
