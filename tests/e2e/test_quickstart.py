"""The quickstart, as a newcomer runs it: a real model, a real sweep, numbers from its results."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 480  # seconds on two cores, from a warm install


def test_quickstart(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    began = time.monotonic()
    done = subprocess.run(
        ["make", "sweep", f"ARGS=output={folder}"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "results.json").read_text())
    training = sum(trial["training_seconds"] for trial in results["trials"])
    print(f"\nquickstart: {seconds:.0f} s by the clock, {training:.0f} s in steps of two groups; {results['seconds']}")
    print(f"baseline {results['baseline']}, best {results['best']}")
    assert str(folder / "report.html") in done.stdout
    assert len(results["trials"]) >= 8
    statuses = [trial["status"] for trial in results["trials"]]
    assert statuses.count("stopped") >= 1
    assert statuses.count("completed") >= 1
    assert results["baseline"]["exact_match"] <= 0.05
    assert results["best"]["exact_match"] >= 0.4
    assert results["best"]["eval_loss"] < 0.25 * results["baseline"]["eval_loss"]
    assert len(results["examples"]) == 5
    assert results["data"]["rows"]["train"] >= 480
    assert sum(results["data"]["rows"].values()) >= 600
    assert seconds < LIMIT * (2 if os.environ.get("CI") else 1)
