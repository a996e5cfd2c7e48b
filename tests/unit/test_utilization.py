"""FLOPs of a token and peaks of devices, and the tokens of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_lora.training.plan import Plan, permutation
from raytune_lora.training.tracking.utilization import flops_per_token, peak_flops, worker_peak
from raytune_lora.training.tracking.watch import StepTokens


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_token(tied: bool, tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folder, tie_word_embeddings=tied))
    table = model.get_input_embeddings().weight.numel()
    whole = sum(p.numel() for p in model.parameters()) - (0 if tied else table)
    assert flops_per_token(model) == 6 * whole
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert flops_per_token(adapted) == 4 * whole + 6 * trained


def test_partitioned_and_packed_weights_count_whole() -> None:
    class Params4bit(torch.nn.Parameter):
        """As bitsandbytes has it: two weights a byte."""

    model = torch.nn.Module()
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]  # as transformers' models have it
    model.partitioned = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    model.partitioned.ds_numel = 100  # type: ignore[attr-defined]
    model.packed = Params4bit(torch.empty((50, 1), dtype=torch.uint8), requires_grad=False)
    model.packed_wide = Params4bit(torch.empty((25, 1), dtype=torch.bfloat16), requires_grad=False)
    assert flops_per_token(model) == 4 * 300


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 836),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
    ],
)
def test_peak_of_a_known_device(device: str, tera: float) -> None:
    assert peak_flops(device) == tera * 1e12


@pytest.mark.parametrize(
    "device", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD Instinct MI300X", ""]
)
def test_no_peak_of_another_device(device: str) -> None:
    assert peak_flops(device) is None


def test_no_peak_for_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert worker_peak(torch.bfloat16) == 989e12
    assert worker_peak(torch.float32) is None


def test_tokens_of_a_step_are_those_of_its_rows() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2]
    split = Dataset.from_dict({"input_ids": [[0] * n for n in lengths], "labels": [[0] * n for n in lengths]})
    plan = Plan(rows=7, total=17, global_batch=4, micro_batch=1, workers=2, every=4, seed=3)
    tokens = StepTokens(split, plan)
    for step in range(1, plan.steps + 1):
        positions = range((step - 1) * 4, min(step * 4, 17))  # the last step's padding does not count
        assert tokens(step) == sum(lengths[int(permutation(7, p // 7, 3)[p % 7])] for p in positions)
