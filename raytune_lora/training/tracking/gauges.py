"""Ray's own metrics, which Prometheus and the Ray dashboard read from every node."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values
from raytune_lora.training.tracking.series import PREFIX, SERIES

Shown = tuple[str, float, dict[str, str]]  # name of a series, its value, and labels beside the exporter's own

_PATIENCE = 5.0  # seconds at the end for a reading that is under way

_log = logging.getLogger(__name__)


class Exporter:
    """Reads values twice an export interval, in a thread of its own, and gives them to Ray until it is closed.

    Ray forgets a gauge that is not set for two of its export intervals (of ten seconds, unless it is told otherwise:
    RAY_metrics_report_interval_ms), and a step or a validation may take longer. So all are set again and again, and
    what happens at a step costs the training no more than noting it.
    """

    def __init__(self, read: Callable[[], Iterable[Shown]], **labels: str) -> None:
        """
        Args:
            read: what there is to show now; called once more at the end.
            labels: of every series.
        """
        self._read = read
        self._labels = labels
        self._metrics: dict[str, Any] = {}
        self._counted: dict[str, float] = {}  # what each counter was given so far
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ray-metrics")
        self._thread.start()

    def close(self) -> None:
        """Show the last values; Ray forgets them after a while."""
        self._closed.set()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

        pause = Config.metrics_report_interval_ms() / 2000
        try:
            while not self._closed.wait(pause):
                self._show()
            self._show()
        except Exception:  # whatever it is, the training goes on without these numbers
            _log.warning("Ray's metrics failed: they are no longer exported", exc_info=True)

    def _show(self) -> None:
        for name, value, labels in self._read():
            metric = self._metric(name, tuple(labels))
            tags = self._labels | labels
            if not SERIES[name].is_counter:
                metric.set(float(value), tags=tags)
            elif (more := value - self._counted.get(name, 0.0)) > 0:
                metric.inc(float(more), tags=tags)
                self._counted[name] = value

    def _metric(self, name: str, labels: tuple[str, ...]) -> Any:
        from ray.util.metrics import Counter, Gauge

        if name not in self._metrics:
            series = SERIES[name]
            kind = Counter if series.is_counter else Gauge
            self._metrics[name] = kind(PREFIX + name, series.meaning, tag_keys=(*self._labels, *labels))
        return self._metrics[name]


class RayGauges(Tracker):
    """The last values of a trial, labelled by sweep and slot: ``series`` lists them, and says why not by trial."""

    kind = "ray"

    def start(self, trial: TrackedTrial) -> None:
        self._last: dict[str, float] = {"checkpoint_timestamp_seconds": time.time()}
        if number := re.match(r"\d+", trial.name):
            self._last["number"] = int(number[0])
        self._lock = threading.Lock()
        self._exporter = Exporter(self._read, sweep=trial.sweep, slot=str(trial.slot))

    def log(self, step: int, values: Values) -> None:
        now = time.time()
        fresh = {"mfu_ratio" if name == "mfu" else name: v for name, v in values.items() if v is not None}
        if "checkpoint_seconds" in fresh:  # that of the step before
            fresh["checkpoint_timestamp_seconds"] = now - fresh["step_seconds"]
        with self._lock:
            self._last |= {"step": step, "last_step_timestamp_seconds": now, **fresh}

    def close(self) -> None:
        self._exporter.close()

    def _read(self) -> list[Shown]:
        with self._lock:
            return [(f"trial_{name}", value, {}) for name, value in self._last.items()]
