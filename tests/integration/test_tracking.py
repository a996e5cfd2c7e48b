"""Trackers in real worker groups, and in Ray's own metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
import ray

from raytune_lora.config.compose import compose
from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import TrackingConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from raytune_lora.training.plan import plan_run
from raytune_lora.training.tracking import TrackedTrial, Tracker, tracker_class
from raytune_lora.training.tracking.series import most_series
from raytune_lora.training.tracking.watch import StepTokens
from raytune_lora.tuning.folder import SweepFolder
from raytune_lora.tuning.gauges import exported as sweep_exported
from raytune_lora.tuning.trials import MEASURED as MEASURED_BY_TRIALS
from raytune_lora.tuning.trials import Journal
from tests.integration import tasks
from tests.integration.conftest import METRICS_INTERVAL, Configure
from tests.integration.running import losses, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NUMBERS = ["samples_seen", "loss", "eval_loss", "learning_rate", "grad_norm"]
MEASURED = ["step_seconds", "data_wait_seconds", "checkpoint_seconds", "tokens_per_second", "memory_bytes", "mfu"]


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
        assert 0 < line["data_wait_seconds"] < line["step_seconds"]
    after = [line["step"] for line in lines if line["checkpoint_seconds"] is not None]
    assert after == [line["step"] + 1 for line in lines[:-1] if line["eval_loss"] is not None]
    assert all(line["checkpoint_seconds"] > 0 for line in lines if line["step"] in after)


def series(sweep: str) -> list[tuple[str, str, str]]:
    """What the node gives to Prometheus of a sweep: each series' name, labels and value."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return re.findall(rf'^ray_raytune_lora_(\w+)\{{(.*sweep="{sweep}".*)\}} (\S+)$', text, re.M)


def exported(sweep: str) -> dict[tuple[str, str], float]:
    """The values, by metric and its label beside ``sweep``."""
    own = re.compile(r'(?:slot|state|rank|budget)="(\w+)"')
    return {(name, "".join(own.findall(labels))): float(value) for name, labels, value in series(sweep)}


def test_ray_exports_the_numbers_of_a_trial_until_it_ends(
    ray_instance: None, configure: Configure, tmp_path: Path
) -> None:
    sweep = uuid.uuid4().hex
    folder = tmp_path / sweep / "0007"
    folder.mkdir(parents=True)
    tracker = tracker_class("ray")(TrackingConfig())
    tracker.start(TrackedTrial.of(configure(), folder, slot=3))

    def wait_for(value: float | None) -> None:
        deadline = time.monotonic() + 90
        while exported(sweep).get(("trial_loss", "3")) != value:
            assert time.monotonic() < deadline, f"Ray does not show {value}: {exported(sweep)}"
            time.sleep(0.5)

    began = time.time()
    tracker.log(1, {"loss": 4.25, "mfu": None, "step_seconds": 2.0, "checkpoint_seconds": 1.5})
    wait_for(4.25)
    shown = time.monotonic()
    while time.monotonic() < shown + 5 * METRICS_INTERVAL:  # Ray keeps what is not set again for two
        assert exported(sweep)["trial_loss", "3"] == 4.25
        time.sleep(0.5)
    found = exported(sweep)
    assert found["trial_number", "3"] == 7
    assert ("trial_mfu_ratio", "3") not in found
    assert found["trial_checkpoint_seconds", "3"] == 1.5
    assert found["trial_checkpoint_timestamp_seconds", "3"] == pytest.approx(began - 2, abs=1), "before the step"
    tracker.close()
    wait_for(None)


def test_a_job_says_which_sweep_it_is() -> None:
    """By the table that the dashboard's jobs page shows; in a process that starts its own Ray."""
    program = """
import ray
from raytune_lora.cluster.connect import connected
from raytune_lora.config.schema import ClusterConfig

with connected(ClusterConfig(), name="mine"):
    jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info()
    print([job.config.metadata["raytune_lora"] for job in jobs.values()])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["['mine']"], done.stderr


def test_ten_thousand_trials_are_no_more_series_than_four(
    ray_instance: None, configure: Configure, tmp_path: Path
) -> None:
    """By Ray's real exporter, and with all that a tracker and a journal have to say."""
    sweep, slots, trials = uuid.uuid4().hex, 4, 10_000
    values = dict.fromkeys([*NUMBERS, *MEASURED], 1.0)
    config = to_plain(configure())
    journal = Journal(tmp_path / "journal.jsonl")
    budgets = ["budget.hours=1", "budget.wall_hours=1", "budget.gpu_hours=1"]
    told = compose(["experiment=tiny", "tracking=ray", *budgets])
    folder = SweepFolder(tmp_path / sweep)
    folder.trials.mkdir(parents=True)
    journal.record.add({"event": "phase", "name": "baseline", "eval_loss": 9.0})
    with sweep_exported(told, folder, journal, trials):
        at_work: list[Tracker] = []
        for number in range(trials):
            name = f"{number:04d}"
            if len(at_work) == slots:
                at_work.pop(0).close()
            at_work.append(tracker_class("ray")(TrackingConfig()))
            trial = TrackedTrial(name, sweep, folder.path, folder.trials, number % slots, config, name)
            at_work[-1].start(trial)
            at_work[-1].log(1, values)
            journal.record.add({"event": "trial_started", "trial_id": name, "params": {}, "gpus": 1})
            measured = dict.fromkeys(MEASURED_BY_TRIALS, 1) | {"eval_loss": number / trials, "training_seconds": 1.0}
            journal.record.add({"event": "trial_result", "trial_id": name, **measured})
        newest = set(range(trials - slots, trials))
        deadline = time.monotonic() + 60
        while (
            (found := exported(sweep)).get(("sweep_trials", "running")) != trials
            or {found.get(("trial_number", str(slot))) for slot in range(slots)} != newest
            or len(found) < most_series(slots)
        ):
            assert time.monotonic() < deadline, f"{len(found)} of {most_series(slots)}: {found}"
            time.sleep(0.5)
        assert len(series(sweep)) == most_series(slots)
        for tracker in at_work:
            tracker.close()
