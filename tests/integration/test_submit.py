"""The README's `ray job submit`, on a Ray cluster that is started for it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import readme

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(400)]

OPEN = {"RAY_AUTH_MODE": "disabled"}  # between processes of one test on this machine
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    """A head node of its own, ended by its process group."""
    port = free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"]
    command += [f"--port={free_port()}", f"--dashboard-port={port}", "--object-store-memory=134217728"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # another Ray on the machine has the usual one
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **OPEN})
    yield f"http://127.0.0.1:{port}"
    os.killpg(head.pid, signal.SIGKILL)
    head.wait(60)


def test_submitted_to_a_cluster(dashboard: str, tmp_path: Path, cache: Path, tiny_folder: Path, rows: Path) -> None:
    text = readme.command("ray job submit")
    for old, new in {
        "<folder or owner/name>": str(tiny_folder),
        "<file>.jsonl": str(rows),
        "workers=4": "workers=2",
        "gpus_per_worker=1": "gpus_per_worker=0",
        "search.concurrent=8": "search.concurrent=1",
        "/shared/sweeps/mine": str(tmp_path / "mine"),
        "/shared/cache": str(cache),
        "-- python": f"-- {sys.executable}",
        "--working-dir .": f"--working-dir {readme.ROOT}",
    }.items():
        assert old in text
        text = text.replace(old, new)
    small = ["search.trials=2", "training.global_batch=8", "training.micro_batch=4", "training.max_steps=2"]
    small += ["evaluation.generate_rows=2", "evaluation.loss_rows=8", "evaluation.max_new_tokens=8"]
    command = [RAY, *shlex.split(text)[1:], *small]
    wait_until_up(dashboard)
    done = subprocess.run(
        command,
        env={**os.environ, **OPEN, "RAY_ADDRESS": dashboard},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert results["state"] == "finished"
    assert len(results["trials"]) == 2
    names = {actor["class_name"]: actor["repr_name"] for actor in listed(f"{dashboard}/api/v0/actors?detail=true")}
    assert names["Board"] == "mine board"
    assert names["RayTrainWorker"] == "mine group 0"
    assert names["ImplicitFunc"] == "mine trials"


def listed(url: str) -> list[dict[str, Any]]:
    """What the state API lists, those that ended included."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    return found


def wait_until_up(url: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no dashboard at {url}")
