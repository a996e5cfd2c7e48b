"""Our worker against a plain script of TRL's SFTTrainer and PEFT, each in processes of its own, on the same data."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from raytune_lora.training.plan import permutation, plan_run, stream
from tests.integration.conftest import Configure
from tests.integration.running import run, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[1] / "reference" / "sft.py"
TOLERANCE = 1e-5  # fp32 on CPU: SFTTrainer sums the loss in another order


def write_rows(store: TokenStore, cfg: RunConfig, path: Path) -> None:
    """The rows of a run in the order in which it sees them."""
    plan = plan_run(cfg, store.rows["train"])
    split = store.split("train").select_columns(["input_ids", "labels"])
    with path.open("w") as file:
        for position in range(plan.total):
            epoch, index = divmod(position, plan.rows)
            file.write(json.dumps(split[permutation(plan.rows, epoch, plan.seed)[index]]) + "\n")


def reference(model: Path, store: TokenStore, cfg: RunConfig, folder: Path) -> list[dict[str, float]]:
    """Each step of the plain script with a config's values."""
    rows, out, training = folder / "rows.jsonl", folder / "reference.json", cfg.training
    write_rows(store, cfg, rows)
    assert isinstance(cfg.method, LoraMethodConfig)
    assert training.max_steps is not None
    values = {
        "model": model,
        "rows": rows,
        "out": out,
        "r": cfg.method.r,
        "alpha": cfg.method.alpha,
        "steps": training.max_steps,
        "global-batch": training.global_batch,
        "micro-batch": training.micro_batch,
        "learning-rate": training.learning_rate,
        "lr-scheduler": training.lr_scheduler,
        "warmup-steps": math.ceil(training.warmup * training.max_steps),
        "weight-decay": training.weight_decay,
        "max-grad-norm": training.max_grad_norm,
        "seed": stream(training.seed, "weights"),
    }
    subprocess.run(
        [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in values.items())],
        check=True,
        timeout=180,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=folder,
    )
    return list(json.loads(out.read_text())["steps"])


OVERRIDES = (
    "method.dropout=0",
    "method.r=8",
    "method.alpha=24",
    "training.micro_batch=2",
    "training.warmup=0",  # transformers begins a warm-up with a step at a rate of zero; test_schedule has the others
    "training.weight_decay=0.1",
    "training.max_grad_norm=0.5",
    "training.seed=3",
)


def test_equal_to_a_script_of_sft_trainer(
    single: Pool, store: TokenStore, configure: Configure, tiny_folder: Path, tmp_path: Path
) -> None:
    theirs = reference(tiny_folder, store, configure(*OVERRIDES), tmp_path)
    for deepspeed in ("zero2", "off"):
        run(single, store, tmp_path / deepspeed, configure(*OVERRIDES, f"deepspeed={deepspeed}"))
        found = steps(tmp_path / deepspeed)
        for key in ("loss", "grad_norm", "learning_rate"):
            expected = [step[key] for step in theirs]
            assert [step[key] for step in found] == pytest.approx(expected, abs=TOLERANCE), (deepspeed, key)
