"""Every tracker keeps what it is given, and none can stop the training or slow it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config import validate
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import TrackingConfig
from raytune_lora.training import tracking
from raytune_lora.training.tracking import TrackedTrial, Tracker, Trackers, base, tracker_class
from raytune_lora.training.tracking.base import Values
from raytune_lora.training.tracking.fanout import _BACKLOG
from raytune_lora.tuning.job import plain_run

Point = tuple[int, dict[str, float]]  # a step, and its numbers that are not None

STEPS: list[tuple[int, dict[str, float | None]]] = [
    (1, {"samples_seen": 8, "loss": 4.25, "eval_loss": None, "mfu": None}),
    (2, {"samples_seen": 16, "loss": 3.5, "eval_loss": 3.75, "mfu": None}),
    (3, {"samples_seen": 24, "loss": 3.25, "eval_loss": None, "mfu": None}),
]


def measured(values: Values) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


@pytest.fixture
def trial(tmp_path: Path) -> TrackedTrial:
    folder = tmp_path / "mine" / "trials" / "0003"
    folder.mkdir(parents=True)
    return TrackedTrial.of(plain_run(compose(["experiment=tiny", f"output={tmp_path / 'mine'}"])), folder)


# ------------------------------------------------------------------------------------------------------------- contract


def read_jsonl(trial: TrackedTrial) -> list[Point]:
    lines = [json.loads(line) for line in (trial.folder / "steps.jsonl").read_text().splitlines()]
    assert all(list(line) == ["step", *STEPS[0][1]] for line in lines), "a line has all keys, null where not measured"
    return [(line.pop("step"), measured(line)) for line in lines]


def read_tensorboard(trial: TrackedTrial) -> list[Point]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trial.folder / "tensorboard"))
    events.Reload()
    assert "config/text_summary" in events.Tags()["tensors"]
    found: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return sorted(found.items())


def read_wandb(trial: TrackedTrial) -> list[Point]:
    """By the reader of W&B's own command line."""
    (folder,) = (trial.folder / "wandb").glob("offline-run-*")
    tool = Path(sys.executable).parent / "wandb"
    shown = subprocess.run([tool, "leet", "inspect", "--json", str(folder)], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert (run["run_group"], run["display_name"], run["run_id"]) == ("mine", "mine/0003", trial.run_id)
    assert run["config"]["update"]["training"]["learning_rate"] == 0.003
    lines = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(line.pop("step"), {k: v for k, v in line.items() if not k.startswith("_")}) for line in lines]


def read_mlflow(trial: TrackedTrial) -> list[Point]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{trial.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raytune-lora")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine/0003", "FINISHED")
    assert run.data.params["training.learning_rate"] == "0.003"
    found: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    return sorted(found.items())


READERS: dict[str, Callable[[TrackedTrial], list[Point]]] = {
    "jsonl": read_jsonl,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}


def test_every_tracker_is_read_back_by_a_test() -> None:
    """Ray's gauges need a running Ray: tests/integration/test_tracking.py."""
    assert tracking.kinds() == sorted([*READERS, "ray"])
    assert set(validate.TRACKERS) == set(tracking.kinds()) - {"jsonl"}


@pytest.mark.parametrize(
    "kind", ["jsonl", "tensorboard", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("wandb", "mlflow"))]
)
def test_what_a_tracker_took_its_own_library_reads(
    kind: str, trial: TrackedTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    tracker = tracker_class(kind)(TrackingConfig())
    tracker.start(trial)
    for step, values in STEPS:
        tracker.log(step, values)
    tracker.close()
    expected = [(step, measured(values)) for step, values in STEPS]
    assert READERS[kind](trial) == expected
    if kind in ("tensorboard", "mlflow"):  # what a trial does again, when it goes on, takes the old one's place
        again = tracker_class(kind)(TrackingConfig())
        again.start(trial)
        again.log(3, {"loss": 2.0})
        again.close()
        assert [point for point in READERS[kind](trial) if point[0] < 3] == expected[:2]
        assert READERS[kind](trial)[2][1]["loss"] == 2.0


def test_a_trial_that_goes_on_is_known_again(trial: TrackedTrial) -> None:
    cfg = plain_run(compose(["experiment=tiny"]))
    assert TrackedTrial.of(cfg, trial.folder).run_id == trial.run_id
    other = trial.folder.parent / "0004"
    other.mkdir()
    assert TrackedTrial.of(cfg, other).run_id != trial.run_id


# ---------------------------------------------------------------------------------------------- trackers that go wrong


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.fixture
def broken(own_registry: None) -> Callable[[str, BaseException], Tracker]:
    """A tracker that raises in one of its methods."""

    class Broken(Tracker):
        kind = "broken"

        def __init__(self, where: str, error: BaseException) -> None:
            super().__init__(TrackingConfig())
            self._where, self._error = where, error

        def _step(self, where: str) -> None:
            if where == self._where:
                raise self._error

        def start(self, trial: TrackedTrial) -> None:
            self._step("start")

        def log(self, step: int, values: Values) -> None:
            self._step("log")

        def close(self) -> None:
            self._step("close")

    return Broken


@pytest.fixture
def hanging(own_registry: None) -> Iterator[Tracker]:
    """A tracker whose server never answers."""
    end = threading.Event()

    class Hanging(Tracker):
        kind = "hanging"

        def start(self, trial: TrackedTrial) -> None:
            end.wait(60)

        def log(self, step: int, values: Values) -> None: ...

        def close(self) -> None: ...

    yield Hanging(TrackingConfig())
    end.set()


@pytest.mark.parametrize("where", ["start", "log", "close"])
@pytest.mark.parametrize("error", [ConnectionError("it is away"), SystemExit(1)], ids=["error", "exit"])
def test_one_that_fails_is_reported_once_and_the_others_go_on(
    where: str, error: BaseException, broken: Any, trial: TrackedTrial, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers([broken(where, error), tracker_class("jsonl")(TrackingConfig())], trial)
    for step, values in STEPS:
        trackers.log(step, values)
    trackers.close()
    assert len(read_jsonl(trial)) == len(STEPS)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "tracker broken failed: it is switched off, the training goes on"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_one_that_hangs_is_not_waited_for(
    hanging: Tracker, trial: TrackedTrial, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers([hanging, tracker_class("jsonl")(TrackingConfig())], trial, patience=0.5)
    began = time.monotonic()
    for step, values in STEPS:
        trackers.log(step, values)
    assert time.monotonic() - began < 0.4, "a step waited for it"
    trackers.close()
    assert 0.4 < time.monotonic() - began < 5
    assert len(read_jsonl(trial)) == len(STEPS)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "tracker hanging did not finish in time; what it had not sent is lost"
    ]


def test_one_that_hangs_keeps_no_more_than_its_backlog(
    hanging: Tracker, trial: TrackedTrial, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers([hanging], trial)
    for step in range(_BACKLOG + 10):
        trackers.log(step, {})
    began = time.monotonic()
    trackers.close()
    assert time.monotonic() - began < 5, "it was switched off, so nobody waits for it"
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"tracker hanging has not taken {_BACKLOG} steps"
    ]


def test_a_name_belongs_to_one_tracker(own_registry: None) -> None:
    with pytest.raises(TypeError, match="two trackers 'wandb'"):
        type("Second", (Tracker,), {"kind": "wandb"})


# ---------------------------------------------------------------------------------------------------------- preflight


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = TrackingConfig(trackers=["ray", "mlflow", "wandb", "tensorboard"])
    assert tracking.problems(cfg) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tracking.problems(cfg) == [
        "tracking.trackers: mlflow needs the package mlflow-skinny: pip install mlflow-skinny",
        "tracking.trackers: wandb needs the package wandb: pip install wandb",
        "tracking.trackers: tensorboard needs the package tensorboard: pip install tensorboard",
    ]
    assert tracking.problems(TrackingConfig()) == []
