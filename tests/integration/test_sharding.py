"""Base models divided among the workers while they load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from tests.integration import tasks
from tests.integration.conftest import Configure
from tests.integration.running import losses, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOLERANCE = 2e-6  # fp32 on CPU: what is left is the order of sums between processes
QLORA = ("quantization=nf4", "method.dropout=0")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_no_worker_holds_more_than_its_part_of_the_loaded_model(
    quantization: str, pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    """Before DeepSpeed's engine starts. What it takes of memory is in jobs/bench/loading_memory.py."""
    cfg = configure("deepspeed=zero3", "workers=2", f"quantization={quantization}", "training.max_steps=1")
    run(pair, store, tmp_path, cfg, tasks.train_and_note_parts)
    for rank in range(2):
        noted = json.loads((tmp_path / f"parts-{rank}.json").read_text())
        assert noted["whole"] == 0
        assert noted["part"] == pytest.approx(noted["all"] / 2, rel=0.01)


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
