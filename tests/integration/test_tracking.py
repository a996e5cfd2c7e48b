"""Trackers in real worker groups, and in Ray's own metrics."""

from __future__ import annotations

import json
import re
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
import ray

from raytune_lora.config.schema import TrackingConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from raytune_lora.training.plan import plan_run
from raytune_lora.training.tracking import TrackedTrial, tracker_class
from raytune_lora.training.tracking.watch import StepTokens
from tests.integration import tasks
from tests.integration.conftest import METRICS_INTERVAL, Configure
from tests.integration.running import losses, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NUMBERS = ["samples_seen", "loss", "eval_loss", "learning_rate", "grad_norm"]
MEASURED = ["step_seconds", "tokens_per_second", "memory_bytes", "mfu"]


def test_trackers_that_fail_leave_the_losses_as_they_are(
    pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    cfg = configure("workers=2", "method.dropout=0.1", "tracking=tensorboard")
    reports = run(pair, store, tmp_path / "well", cfg)
    cfg.tracking.trackers = ["tensorboard", *tasks.BROKEN]
    run(pair, store, tmp_path / "broken", cfg, tasks.train_with_broken_trackers)
    assert losses(tmp_path / "broken") == losses(tmp_path / "well")
    log = (tmp_path / "broken" / "logs" / "worker-0.log").read_text()
    for kind in tasks.BROKEN:
        assert log.count(f"tracker {kind} failed: it is switched off") == 1
        assert log.count(f"{kind} is away") == 1
    assert "switched off" not in (tmp_path / "broken" / "logs" / "worker-1.log").read_text()
    for name in ("well", "broken"):
        assert list((tmp_path / name / "tensorboard").iterdir())

    lines = [json.loads(line) for line in (tmp_path / "well" / "steps.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["step", *NUMBERS, *MEASURED]] * 8
    assert {line["samples_seen"]: line["eval_loss"] for line in lines if line["eval_loss"] is not None} == {
        report["samples_seen"]: report["eval_loss"] for report in reports
    }
    tokens = StepTokens(store.split("train"), plan_run(cfg, store.rows["train"]))
    for line in lines:
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(tokens(line["step"]))
        assert line["memory_bytes"] > 100 * 2**20
        assert line["mfu"] is None, "the peak of a CPU is not known"


def exported() -> dict[tuple[str, str], float]:
    """What the node gives to Prometheus of our gauges, by name and trial."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    found = re.findall(r'^ray_raytune_lora_(\w+)\{.*trial="(\w+)".*\} (\S+)$', text, re.M)
    return {(name, trial): float(value) for name, trial, value in found}


def test_ray_exports_the_numbers_of_a_trial_until_it_ends(
    ray_instance: None, configure: Configure, tmp_path: Path
) -> None:
    name = uuid.uuid4().hex
    (tmp_path / name).mkdir()
    tracker = tracker_class("ray")(TrackingConfig())
    tracker.start(TrackedTrial.of(configure(), tmp_path / name))

    def wait_for(value: float | None) -> None:
        deadline = time.monotonic() + 90
        while exported().get(("loss", name)) != value:
            assert time.monotonic() < deadline, f"Ray does not show {value}: {exported()}"
            time.sleep(0.5)

    tracker.log(1, {"loss": 4.25, "mfu": None})
    wait_for(4.25)
    shown = time.monotonic()
    while time.monotonic() < shown + 5 * METRICS_INTERVAL:  # Ray keeps what is not set again for two
        assert exported()["loss", name] == 4.25
        time.sleep(0.5)
    assert ("mfu", name) not in exported()
    tracker.close()
    wait_for(None)
