"""The DeepSpeed configuration: exactly what is in the golden files, for each group in conf/deepspeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.compose import compose
from raytune_lora.config.groups import groups
from raytune_lora.training.deepspeed import deepspeed_config, without_mlflow
from raytune_lora.training.plan import plan_run
from raytune_lora.tuning.job import plain_run

GOLDEN = Path(__file__).parent / "golden" / "deepspeed"
ON_GPUS = ("model=tiny", "data=fake", "workers=2", "gpus_per_worker=1", "training.max_steps=4")


def settings(*overrides: str) -> dict[str, Any] | None:
    cfg = plain_run(compose([*ON_GPUS, *overrides]))
    return deepspeed_config(cfg, plan_run(cfg, 100))


@pytest.mark.parametrize("group", groups()["deepspeed"])
def test_as_in_the_golden_file(group: str) -> None:
    found = settings(f"deepspeed={group}", "deepspeed.nvme_path=/local/nvme")
    assert found == json.loads((GOLDEN / f"{group}.json").read_text())
    assert "auto" not in json.dumps(found)


@pytest.mark.parametrize("group", [name for name in groups()["deepspeed"] if name != "off"])
def test_deepspeed_itself_knows_every_key(group: str, tmp_path: Path) -> None:
    with without_mlflow():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    found = settings(f"deepspeed={group}", f"deepspeed.nvme_path={tmp_path}")
    assert found is not None
    parsed = DeepSpeedZeroConfig(**found["zero_optimization"])  # it refuses a key that it does not know
    assert parsed.stage == found["zero_optimization"]["stage"]


def test_on_the_cpu_it_is_without_pinned_memory_or_overlap() -> None:
    found = settings("deepspeed=zero3_offload", "gpus_per_worker=0")
    assert found is not None
    zero = found["zero_optimization"]
    assert not zero["overlap_comm"]
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
