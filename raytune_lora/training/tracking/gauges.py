"""Ray's own metrics: gauges that Prometheus and the Ray dashboard read from every node."""

from __future__ import annotations

import threading
from typing import Any

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values

PREFIX = "raytune_lora_"  # Ray puts ``ray_`` before it


class RayGauges(Tracker):
    """A gauge a number, tagged by sweep and trial, with the last value measured.

    Ray forgets a gauge that is not set for two of its export intervals (of ten seconds, unless it is told otherwise),
    and a step or a validation may take longer: a thread sets them again until the trial ends.
    """

    kind = "ray"

    def start(self, trial: TrackedTrial) -> None:
        self._tags = {"sweep": trial.sweep, "trial": trial.name}
        self._gauges: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, daemon=True, name="ray-gauges").start()

    def log(self, step: int, values: Values) -> None:
        with self._lock:
            self._last |= {"step": step, **{name: value for name, value in values.items() if value is not None}}
            self._set()

    def close(self) -> None:
        self._closed.set()

    def _refresh(self) -> None:
        from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

        while not self._closed.wait(Config.metrics_report_interval_ms() / 2000):
            with self._lock:
                self._set()

    def _set(self) -> None:
        from ray.util.metrics import Gauge

        for name, value in self._last.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(PREFIX + name, f"{name} of a trial", tag_keys=tuple(self._tags))
            self._gauges[name].set(float(value), tags=self._tags)
