"""Sweeps whose folder is in an object store, on machines whose disks have nothing of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from raytune_lora import storage
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import StorageError
from raytune_lora.training.place import CHECKPOINTS, GO_ON, STOP, Place
from raytune_lora.tuning import parts, status
from raytune_lora.working_copy import WorkingCopy
from tests import s3
from tests.integration.conftest import Configure
from tests.integration.test_jobs import finish, nothing_left, start, wait_for

pytestmark = [pytest.mark.timeout(400)]

TINY = ("experiment=tiny", "deepspeed=off", "evaluation.generate_rows=0", "search.concurrent=1", "cluster.lease=10")
RATES = "+space.rate={key: training.learning_rate, kind: categorical, choices: [0.003, 0.001]}"
SPACE = ("~space.rank", "~space.alpha", "~space.dropout", "~space.learning_rate", RATES)
SWEEP = (*TINY, *SPACE, "search.trials=2", "search.sampler=grid", "scheduler=none")


def events(uri: str, kind: str) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for line in parts.read(f"{uri}/journal").splitlines()]
    except StorageError:  # it changes while it is read
        return []
    return [event for event in found if event["event"] == kind]


def reported(uri: str, process: subprocess.Popen[str], trial: str) -> None:
    """Wait until a trial has been measured."""
    wait_for(lambda: any(e["trial_id"] == trial for e in events(uri, "trial_result")) or process.poll() is not None)


def trials(results: bytes | None) -> list[dict[str, Any]]:
    """What is the same of a trial, wherever and in how many sittings it ran."""
    same = ("trial_id", "status", "params", "eval_loss", "samples_seen")
    return [{key: trial[key] for key in same} for trial in json.loads(results or b"")["trials"]]


def points(results: bytes | None) -> list[dict[str, Any]]:
    """What was measured; of what nobody had read yet when a sweep was killed, the last is told again."""
    return [{"trial_id": t["trial_id"], **p} for t in json.loads(results or b"")["trials"] for p in t["curve"]]


def losses(steps: bytes | None) -> set[tuple[int, float]]:
    """The loss of each step; those after a checkpoint that a trial went on from were made twice, to the same losses."""
    lines = map(json.loads, (steps or b"").splitlines())
    return {(line["step"], line["loss"]) for line in lines}


# --------------------------------------------------------------------------------------------------------- one worker


def train(copy: WorkingCopy, cfg: RunConfig, store: TokenStore, steps: int = 100) -> list[dict[str, Any]]:
    """Train in this process, until a number of steps, and return what was reported."""
    from raytune_lora.training import worker

    reports: list[dict[str, Any]] = []
    left = iter(range(steps))

    def report(metrics: dict[str, Any]) -> bool:
        name = metrics["checkpoint"].removeprefix(f"{copy.uri}/")
        assert copy.uri is None or name in copy.manifests(CHECKPOINTS), "it is told of before it lasts"
        reports.append(metrics)
        return True

    copy.path.mkdir(parents=True, exist_ok=True)
    stopped = lambda: GO_ON if next(left, None) is not None else STOP  # noqa: E731
    worker.train(cfg, store, Place(0, 1, copy.path, report, stopped, ask_every=0, uri=copy.uri))
    return reports


@pytest.mark.timeout(200)
def test_a_trial_goes_on_from_what_is_whole_in_the_store(
    bucket: str, proxy: s3.Proxy, configure: Configure, store: TokenStore, tmp_path: Path
) -> None:
    cfg = configure("deepspeed=off", "evaluation.every=16", "training.keep_checkpoints=2")
    whole = train(WorkingCopy(tmp_path / "whole"), cfg, store)
    proxy.faults += [s3.Fault(kind, "PUT", "checkpoint-") for kind in ("busy", "cut_request")]
    first, second, third = (WorkingCopy(tmp_path / name, f"{bucket}/run/trials/0000") for name in ("a", "b", "c"))
    began = train(first, cfg, store, steps=6)
    assert [report["samples_seen"] for report in began] == [16, 32, 48]
    names = list(first.manifests(CHECKPOINTS))
    storage.write(f"{first.uri}/{names[-1]}/trained-00000.safetensors", b"cut")

    went_on = train(second, cfg, store)
    assert [report["samples_seen"] for report in went_on] == [32, 48, 64], "what is there is told again"
    assert went_on[0]["checkpoint"] == f"{first.uri}/{names[-2]}"
    assert [r["eval_loss"] for r in began[:1] + went_on] == [r["eval_loss"] for r in whole]
    assert sorted(second.manifests(CHECKPOINTS)) == sorted(path.name for path in (tmp_path / "whole").glob(CHECKPOINTS))
    assert [r["samples_seen"] for r in train(third, cfg, store)] == [48, 64], "it had come to its end"

    proxy.faults.append(s3.Fault("denied", "PUT", "checkpoint-", times=100))
    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        train(WorkingCopy(tmp_path / "d", f"{bucket}/run/trials/0001"), cfg, store)


# ---------------------------------------------------------------------------------------------------------- whole jobs


@pytest.mark.slow
@pytest.mark.e2e
def test_rays_logs_hold_no_key_of_the_store(bucket: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Whoever sees a cluster's dashboard can read them; the trial reaches the store all the same."""
    keys = {f"AWS_{name}": token_hex(16) for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # a short name, for Ray's sockets
        monkeypatch.setenv("RAY_TMPDIR", folder)
        finish(start("sweep", *SWEEP, "search.trials=1", f"output={bucket}/sweep", f"cache={cache}"))
        files = [file for file in Path(folder).rglob("*") if file.is_file() and not file.is_symlink()]
        assert any(file.name == "gcs_server.out" for file in files)
        assert any(file.name.startswith("runtime_env") for file in files)
        holding = {
            f"{file.name}: {name}" for file in files for name, v in keys.items() if v.encode() in file.read_bytes()
        }
    assert holding == set()
    assert [trial["status"] for trial in trials(storage.read(f"{bucket}/sweep/results.json"))] == ["completed"]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_sweep_that_is_killed_twice_goes_on_elsewhere(
    bucket: str, proxy: s3.Proxy, tmp_path: Path, cache: Path
) -> None:
    uri, whole = f"{bucket}/sweeps/mine", tmp_path / "whole"
    finish(start("sweep", *SWEEP, f"output={whole}", f"cache={cache}"))
    proxy.faults += [s3.Fault(kind, "PUT", "journal/", times=2) for kind in ("busy", "cut_request")]
    proxy.faults += [s3.Fault(kind, "PUT", "checkpoint-", times=2) for kind in ("busy", "cut_request")]
    for number in (0, 1):  # killed in each trial, on a machine that is never seen again
        typed = (*SWEEP, f"output={uri}", "resume=auto", f"cache={cache}", f"cluster.node_cache={tmp_path / 'node'}")
        process = start("sweep", *typed)
        reported(uri, process, f"000{number}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        nothing_left(process.pid)
        shutil.rmtree(tmp_path / "node")
    out, _ = finish(start("sweep", f"resume={uri}", f"cluster.node_cache={tmp_path / 'other'}"))
    assert f"resume={uri}" not in out
    here, there = (whole / "results.json").read_bytes(), storage.read(f"{uri}/results.json")
    assert trials(there) == trials(here)
    assert [point for point in points(there) if point not in points(here)] == []
    assert sorted(event["trial_id"] for event in events(uri, "trial_ended")) == ["0000", "0001"]
    for trial in ("0000", "0001"):
        again = losses(storage.read(f"{uri}/trials/{trial}/steps.jsonl"))
        assert len(again) == 8
        assert again == losses((whole / "trials" / trial / "steps.jsonl").read_bytes())
    best = "best/adapter/adapter_model.safetensors"
    assert storage.read(f"{uri}/{best}") == (whole / best).read_bytes()
    assert storage.read(f"{uri}/study.db")
    found = status.summary(status.look(uri, tmp_path))
    assert (found["state"], found["name"], found["folder"]) == ("finished", "mine", uri)
    assert status.detail(status.look(uri, tmp_path), "0001")["lines"]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_store_that_is_gone_halts_a_run_in_order(bucket: str, proxy: s3.Proxy, tmp_path: Path, cache: Path) -> None:
    uri = f"{bucket}/run"
    typed = (*TINY[1:3], "model=tiny", "data=fake", "training.max_steps=400", "training.global_batch=8")
    typed += ("evaluation.every=64", "evaluation.loss_rows=8", "training.patience=null", f"cache={cache}")
    process = start("train", *typed, f"output={uri}", f"cluster.node_cache={tmp_path / 'node'}", TINY[-1])
    reported(uri, process, "0000")
    # refused, and not busy: that is not tried again for a minute
    outage = [
        s3.Fault("denied", method, bucket[5:], times=10**6) for method in ("GET", "PUT", "POST", "DELETE", "HEAD")
    ]
    proxy.faults += outage
    _, err = finish(process, status=1)
    nothing_left(process.pid)
    for fault in outage:
        fault.times = 0
    assert "error: " in err
    assert f"go on with resume={uri}" in err
    assert "Traceback" not in err
    assert not events(uri, "trial_ended")
    before = len(events(uri, "trial_result"))
    finish(start("train", f"resume={uri}", f"cluster.node_cache={tmp_path / 'other'}"))
    (trial,) = trials(storage.read(f"{uri}/results.json"))
    assert (trial["status"], trial["samples_seen"]) == ("completed", 3200)
    assert len(events(uri, "trial_result")) > before


@pytest.mark.slow
@pytest.mark.e2e
def test_a_store_that_falls_silent_is_noticed_while_nothing_is_written(
    bucket: str, proxy: s3.Proxy, tmp_path: Path, cache: Path
) -> None:
    typed = (*SWEEP, "training.max_steps=20000", "evaluation.every=160000", f"cache={cache}")
    process = start("sweep", *typed, f"output={bucket}/mine", f"cluster.node_cache={tmp_path / 'node'}")
    wait_for(lambda: list((tmp_path / "node").rglob("trials/0000/logs/worker-0.log")) or process.poll() is not None)
    began = time.monotonic()
    proxy.faults += [s3.Fault("silent", method, times=10**6, seconds=300) for method in ("GET", "PUT", "POST", "HEAD")]
    _, err = finish(process, status=1)
    seconds = time.monotonic() - began
    proxy.faults.clear()
    nothing_left(process.pid)
    assert "has taken no sign of life for 8 s (cluster.lease=10)" in err
    assert "Traceback" not in err
    assert seconds < 60, "five times a lease, with all that it takes to end"
