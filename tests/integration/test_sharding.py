"""Base models divided among the workers while they load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from tests.integration.conftest import Configure
from tests.integration.running import losses, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench" / "loading_memory.py"
TOLERANCE = 2e-6  # fp32 on CPU: what is left is the order of sums between processes
QLORA = ("quantization=nf4", "method.dropout=0")


def test_two_workers_take_half_the_memory_each(tmp_path: Path) -> None:
    """Above what the interpreter takes: the peak of each, while it quantizes the model and divides it."""
    table = tmp_path / "table.json"
    command = [sys.executable, str(BENCH), "--size", "small", "--processes", "1", "2", "--json", str(table)]
    command += ["--how", "ours", "--kinds", "nf4", "--limit", "0.65"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = json.loads(table.read_text())["rows"]
    assert two["kept_gib"] < 0.65 * one["kept_gib"]


def test_qlora_under_zero_equals_qlora_in_one_process(
    single: Pool, pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    """Gradient checkpointing on in the one, off in the other."""
    run(single, store, tmp_path / "one", configure(*QLORA, "deepspeed=off"))
    expected = losses(tmp_path / "one")
    for deepspeed in ("zero2", "zero3"):
        own = (f"deepspeed={deepspeed}", "workers=2", "training.micro_batch=2", "training.gradient_checkpointing=true")
        run(pair, store, tmp_path / deepspeed, configure(*QLORA, *own))
        assert losses(tmp_path / deepspeed) == pytest.approx(expected, abs=TOLERANCE)
