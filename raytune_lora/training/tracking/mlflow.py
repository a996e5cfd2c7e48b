"""MLflow: a run a trial, on a tracking server or in a database file beside the trials."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, Values

DATABASE = "mlflow.db"  # in the folder of the sweep or run
_INTERVAL = 1.0  # seconds between two calls of the store
_MOST_METRICS, _MOST_PARAMS = 1000, 100  # that the store takes in one call
_LONGEST = 6000  # characters of a parameter's value


class Mlflow(Tracker):
    """The experiment is the project; the config's leaves are the run's parameters."""

    kind = "mlflow"
    module = "mlflow"
    package = "mlflow-skinny"
    _client: Any
    _run: str

    def start(self, trial: TrackedTrial) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._pending: list[Any] = []
        self._sent = time.monotonic()
        local = f"sqlite:///{trial.home / DATABASE}"
        uri = self.cfg.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        self._client = MlflowClient(tracking_uri=uri)
        artifacts = str(trial.home / "mlflow-artifacts") if uri == local else None
        experiment = self._experiment(artifacts)
        found = self._client.search_runs([experiment], f"tags.raytune_lora_id = '{trial.run_id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"raytune_lora_id": trial.run_id, "sweep": trial.sweep, "trial": trial.name}
        self._run = self._client.create_run(experiment, run_name=f"{trial.sweep}/{trial.name}", tags=tags).info.run_id
        params = [Param(key, str(value)[:_LONGEST]) for key, value in _leaves(trial.config)]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + _MOST_PARAMS])

    def log(self, step: int, values: Values) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(name, value, now, step) for name, value in values.items() if value is not None]
        if time.monotonic() - self._sent >= _INTERVAL or len(self._pending) >= _MOST_METRICS:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._run)

    def _send(self) -> None:
        for first in range(0, len(self._pending), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=self._pending[first : first + _MOST_METRICS])
        self._pending.clear()
        self._sent = time.monotonic()

    def _experiment(self, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        name = self.cfg.project
        if (known := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:  # another trial was faster
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
        return str(known.experiment_id)


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
