"""Planned memory against what is really there: parameters, gradients, states and saved tensors of random models."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from raytune_lora.config.compose import compose
from raytune_lora.config.methods import METHODS
from raytune_lora.config.schema import Attention, HubModelConfig, Optimizer, Quantization, SweepConfig, kind_of
from raytune_lora.models.loading import load_model
from raytune_lora.models.planned import planned_memory
from raytune_lora.models.shape import shape_of
from tests.unit.shapes import LLAMA

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench" / "planned_memory.py"
NEEDS_DATA = ("eva", "pissa", "olora", "loftq", "ir_qlora")  # they start from weights or rows, and are LoRA after it


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planned_memory", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planned_memory"] = module
    spec.loader.exec_module(module)
    return module


def config(*overrides: str) -> SweepConfig:
    return compose(["model=tiny", "data=fake", "deepspeed=off", "data.max_length=512", *overrides])


# ---------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("kind", [kind_of(cls) for cls in METHODS if kind_of(cls) not in NEEDS_DATA])
def test_activations_and_gradients_of_every_method(kind: str, bench: ModuleType) -> None:
    model = "llama_biased" if kind == "bitfit" else "llama"
    row = bench.measure(model, config(f"method={kind}", "training.micro_batch=4"), 48)
    assert row.gradients == (row.planned.gradients if kind != "full" else row.trained * 4)
    assert row.planned_kept == pytest.approx(row.kept, rel=0.1)


@pytest.mark.parametrize(
    ("model", "dropout", "micro", "length"),
    [
        ("llama", 0.0, 1, 300),
        ("llama", 0.05, 4, 64),
        ("llama_middle", 0.05, 2, 128),
        ("qwen3", 0.0, 4, 64),
        ("gemma", 0.05, 1, 300),
        ("phi3", 0.05, 4, 64),
        ("neox", 0.0, 4, 64),
    ],
)
def test_activations_of_lora_on_several_models(
    model: str, dropout: float, micro: int, length: int, bench: ModuleType
) -> None:
    cfg = config(f"method.dropout={dropout}", f"training.micro_batch={micro}")
    row = bench.measure(model, cfg, length)
    assert row.planned_kept == pytest.approx(row.kept, rel=0.06)
    assert row.planned_peak == pytest.approx(row.peak, rel=0.06)


@pytest.mark.parametrize("micro", [1, 4])
def test_gradient_checkpointing(micro: int, bench: ModuleType) -> None:
    cfg = config("training.gradient_checkpointing=true", f"training.micro_batch={micro}")
    row = bench.measure("llama", cfg, 128)
    assert row.planned_peak == pytest.approx(row.peak, rel=0.1)


def test_eager_attention_and_bf16(bench: ModuleType) -> None:
    for change in ("model.attention=eager", "model.precision=bf16"):
        row = bench.measure("llama", config(change, "training.micro_batch=4", "method.dropout=0"), 64)
        assert row.planned_kept == pytest.approx(row.kept, rel=0.06), change


# ------------------------------------------------------------------------------------------------- weights and states


def stored_bytes(model: Any) -> int:
    """Of parameters and what their quantization keeps, shared ones once."""
    sizes: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if torch.is_tensor(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()

    for parameter in model.parameters():
        add(parameter.data)
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        for tensor in (getattr(s, key, None) for s in (state, nested) for key in ("absmax", "code", "offset")):
            add(tensor)
        add(getattr(parameter, "SCB", None))
    return sum(sizes.values())


@pytest.fixture(scope="module")
def folder(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    bench.build("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "overrides",
    [["quantization=none"], ["quantization=nf4"], ["quantization=nf4_single"], ["quantization=int8"]],
    ids=lambda overrides: overrides[0],
)
def test_weights_are_exact(overrides: list[str], folder: Path) -> None:
    cfg = config(*overrides)
    model = load_model(folder, HubModelConfig(path=str(folder)), cfg.quantization)
    unquantized = load_model(folder, HubModelConfig(path=str(folder)), config().quantization)
    plan = planned_memory(cfg, shape_of(unquantized), 8)
    assert plan.weights + plan.embeddings == stored_bytes(model)


@pytest.mark.parametrize("kind", ["lora", "full", "bitfit", "layernorm"])
def test_the_optimizers_states_are_exact(kind: str, bench: ModuleType) -> None:
    cfg = config(f"method={kind}")
    name = "llama_biased" if kind == "bitfit" else "llama"
    model, plan = bench.adapted(name, cfg), planned_memory(cfg, shape_of(bench.build(name)), 8)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert plan.optimizer == sum(t.nbytes for t in states)
    assert plan.gradients == sum(p.nbytes for p in parameters)
    whole = sum(p.nbytes for p in model.parameters()) - (plan.adapter if kind == "layernorm" else 0)
    assert plan.weights + plan.embeddings + (plan.adapter if kind != "layernorm" else 0) == whole


# ------------------------------------------------------------------------------------------------------- by arithmetic


def planned(change: Callable[[SweepConfig], None] | None = None, *overrides: str, length: int = 1024) -> Any:
    cfg = config("gpus_per_worker=1", "deepspeed=zero2", "training.micro_batch=4", *overrides)
    if change is not None:
        change(cfg)
    return planned_memory(cfg, LLAMA, length)


def test_zero_divides_what_it_divides() -> None:
    for stage, parts in ((1, "optimizer"), (2, "optimizer gradients"), (3, "optimizer gradients weights embeddings")):
        four = planned(None, f"deepspeed=zero{stage}", "workers=4", "training.global_batch=64")
        one = planned(None, f"deepspeed=zero{stage}")
        for part in ("optimizer", "gradients", "weights", "embeddings"):
            ratio = getattr(one, part) / getattr(four, part)
            assert ratio == pytest.approx(4 if part in parts else 1, rel=1e-4), (stage, part)


def test_what_trains_is_planned_in_fp32_everywhere() -> None:
    """Weights, gradients and two states of four bytes each; ZeRO 1 and 2 step a copy of the weights."""
    for deepspeed, states in (("off", 2), ("zero0", 2), ("zero1", 3), ("zero2", 3), ("zero3", 2)):
        plan = planned(None, "method=full", f"deepspeed={deepspeed}")
        assert plan.adapter == plan.gradients == LLAMA.parameters * 4
        assert plan.optimizer == states * plan.adapter, deepspeed


def test_offloading_moves_what_it_moves() -> None:
    plain, offloaded = planned(None, "deepspeed=zero3"), planned(None, "deepspeed=zero3_offload")
    assert offloaded.host == plain.optimizer + plain.gradients + plain.weights + plain.embeddings
    assert offloaded.total < plain.total


def test_qlora_of_a_model_of_one_billion_parameters_is_as_one_reckons() -> None:
    """0.973 billion weights at 4.127 bits, the head and the embedding in bf16."""
    plan = planned(None, "quantization=nf4")
    assert plan.weights == pytest.approx(973_078_528 * 4.127 / 8, rel=1e-3)
    assert plan.embeddings == 2 * (1_235_814_400 - 973_078_528)


def test_more_of_anything_takes_more() -> None:
    base = planned().total
    assert planned(length=2048).total > base
    assert planned(lambda cfg: setattr(cfg.training, "micro_batch", 8)).total > base
    assert planned(lambda cfg: setattr(cfg.method, "r", 256)).total > base
    for smaller in ("training.gradient_checkpointing=true", "training.liger=true", "quantization=nf4"):
        assert planned(None, smaller).total < base, smaller
    assert planned(lambda cfg: setattr(cfg.model, "attention", Attention.eager)).total > base
    eight_bits = planned(lambda cfg: setattr(cfg.training, "optimizer", Optimizer.adamw_8bit), "deepspeed=off")
    assert eight_bits.optimizer < planned(None, "deepspeed=off").optimizer / 3


def test_parts_make_up_the_total() -> None:
    plan = planned()
    lines = [float(line.split()[1]) for line in plan.table().splitlines()]
    assert sum(lines[:-1]) == pytest.approx(lines[-1], abs=0.01)
    assert lines[-1] == pytest.approx(plan.gb, abs=1e-3)
    assert copy.deepcopy(plan) == plan
    assert Quantization.none is config().quantization.kind
