"""Clusters that lose what a sweep stands on: their head with its driver, and for a while the network of a machine.

And one whose machines have clocks that are wrong by an hour, when a worker is lost there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_jobs import ROOT
from tests.integration.test_survives import went_well

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize("trouble", [["head"], ["pause"], ["worker", "--skew", "3600"]], ids=" ".join)
def test_all_trials_are_accounted_for(trouble: list[str], tmp_path: Path) -> None:
    bench = [sys.executable, str(ROOT / "jobs" / "bench" / "kills.py"), *trouble, "--kills", "1", "--trials", "2"]
    done = subprocess.run([*bench, "--output", str(tmp_path / "sweep")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["kills"]) == 1
    went_well(tmp_path / "sweep", 2)
