"""What ``jobs/bench/gpu_check.py`` does on the day a GPU is at hand, tried on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench"
NOT_THERE = ("ray", "hydra", "omegaconf", "optuna", "datasets", "trl")
PROGRAM = """
import runpy, sys
from pathlib import Path

for name in {missing}:
    sys.modules[name] = None  # as if it were not installed
sys.path.insert(0, {folder!r})
sys.argv[1:] = ["full", sys.argv[1], "cpu", sys.argv[2]]
runpy.run_path({folder!r} + "/gpu_checks.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_check_needs_neither_ray_nor_hydra(tmp_path: Path) -> None:
    program, out = PROGRAM.format(missing=NOT_THERE, folder=str(BENCH)), tmp_path / "out.jsonl"
    command = [sys.executable, "-c", program, str(tmp_path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["what"]: line["passed"] for line in lines} == {
        "full fine-tuning: losses": True,
        "weights that moved": True,
    }


def test_a_check_that_fails_is_told_and_the_next_ones_go_on(tmp_path: Path) -> None:
    (tmp_path / "model-135M").mkdir()
    (tmp_path / "model-135M" / "done").touch()  # and there is no model
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCH / "gpu_check.py"), "full", "oom", "--device=cpu", f"--keep={tmp_path}"]
    done = subprocess.run([*command, f"--json={report}"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    (failed,), (skipped,) = json.loads(report.read_text())["checks"].values()
    assert failed["passed"] is False
    assert failed["found"].startswith("failed: ")
    assert skipped["passed"] is None
    assert "FALL SHORT" in done.stdout


def test_without_a_gpu_there_is_nothing_to_check() -> None:
    command = [sys.executable, str(BENCH / "gpu_check.py")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "--device cpu" in done.stderr
