"""One rule of precision: what trains is in fp32, and a run in 16 bits comes to what the same run in fp32 comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from raytune_lora.config.methods import METHODS
from raytune_lora.config.schema import ModelConfig, Precision, Quantization, QuantizationConfig, kind_of
from raytune_lora.models.loading import load_model
from raytune_lora.models.methods import method_for
from raytune_lora.models.methods.own import WEIGHTS as OWN
from raytune_lora.models.methods.peft_method import WEIGHTS as PEFTS
from raytune_lora.training.precision import compute_in, hold_in_fp32
from raytune_lora.training.scoring import scoring_of
from tests.unit.method_bench import Bench, config

STEPS = range(1, 5)
WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1},
    "gpt2": {"n_embd": 64, "initializer_range": 0.1},
    "mixtral": {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1},
}
FURTHER = [("gpt2", "bitfit"), ("gpt2", "layernorm"), ("gpt2", "lora"), ("mixtral", "lora"), ("mixtral", "full")]
ROUNDING = 0.04  # nats a token that four steps in bf16 may differ by; they learn up to 3.5


@pytest.fixture(scope="module")
def rounded(folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models whose weights are in bf16, so that loading them in fp32 changes nothing."""
    made: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            cfg = ModelConfig(precision=Precision.bf16)
            load_model(folder(name, **WIDE[name]), cfg, QuantizationConfig()).save_pretrained(made[name])
        return made[name]

    return saved


def prepared(bench: Bench, precision: Precision) -> Any:
    """A model ready to train as a run has it."""
    torch.manual_seed(1)
    bench.method = method_for(bench.method.cfg)
    base = load_model(bench.folder, ModelConfig(precision=precision), bench.quantization)
    model = bench.method.apply(base, bench.start())
    hold_in_fp32(model)
    compute_in(model, torch.bfloat16 if precision is Precision.bf16 else torch.float32, on_gpu=False)
    return model


@pytest.mark.parametrize(
    ("model", "kind"), [("qwen2", kind_of(cls)) for cls in METHODS] + [pair for pair in FURTHER if pair[0] != "qwen2"]
)
def test_every_method_trains_in_bf16_as_in_fp32(
    model: str, kind: str, rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    bases = method_for(config(kind)).bases
    bench = Bench(kind, rounded(model), Quantization.none if Quantization.none in bases else Quantization.nf4)
    expected = prepared(bench, Precision.fp32)
    start = bench.state(expected)
    losses = bench.train(expected, STEPS)
    found = prepared(bench, Precision.bf16)
    alike = all(torch.allclose(start[name], tensor, atol=1e-2) for name, tensor in bench.state(found).items())
    optimizer = bench.optimizer(found)
    assert bench.train(found, STEPS, optimizer) == pytest.approx(losses, abs=ROUNDING)

    assert {p.dtype for p in found.parameters() if p.requires_grad} == {torch.float32}
    assert sum(p.numel() for p in found.parameters() if p.requires_grad) == bench.method.count(bench.shape())
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert {t.dtype for t in states} == {torch.float32}
    assert next(p.dtype for p in found.parameters() if not p.requires_grad or kind == "full") in (
        (torch.float32,) if kind == "full" else (torch.bfloat16, torch.uint8)
    )
    if alike:  # a start by decomposition may have other signs, which rounding decides
        moved, expected_moves = (
            torch.cat([(after[name] - start[name]).flatten() for name in start])
            for after in (bench.state(found), bench.state(expected))
        )
        assert torch.nn.functional.cosine_similarity(moved, expected_moves, dim=0) > 0.9
    if kind != "full":  # saved in the base model's precision
        bench.method.save(found, bench.state(found), tmp_path)
        assert {t.dtype for t in saved(tmp_path).values() if t.is_floating_point()} == {torch.float32}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(folder / name for name in (PEFTS, OWN) if (folder / name).exists()))


def test_a_step_smaller_than_bf16_can_tell_is_not_lost(rounded: Callable[[str], Path]) -> None:
    """A thousand steps of 1e-5 on weights of about 0.1, of which bf16 knows no neighbour nearer than 4e-4."""
    bench = Bench("full", rounded("qwen2"))
    model = prepared(bench, Precision.bf16)
    before = bench.state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(1000):
        optimizer.step()
    for name, after in bench.state(model).items():
        torch.testing.assert_close(before[name] - after, torch.full_like(after, 1e-2), atol=1e-3, rtol=0)


def test_layers_of_lora_take_their_inputs_as_they_come(rounded: Callable[[str], Path]) -> None:
    """PEFT would cast each to fp32; DoRA needs that."""
    for kind, dtype in (("lora", torch.bfloat16), ("dora", torch.float32)):
        bench = Bench(kind, rounded("qwen2"))
        model = prepared(bench, Precision.bf16)
        layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
        met: list[torch.dtype] = []

        def note(module: Any, given: Any, output: Any, met: list[torch.dtype] = met) -> None:
            met.append(given[0].dtype)

        layer.lora_A["default"].register_forward_hook(note)
        bench.train(model, range(1, 2))
        assert met[-1] is dtype, kind


def test_the_residual_stream_of_a_quantized_model_is_in_its_precision(rounded: Callable[[str], Path]) -> None:
    bench = Bench("lora", rounded("qwen2"), Quantization.nf4)
    model = prepared(bench, Precision.bf16)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    assert frozen == {torch.bfloat16}
    met: set[torch.dtype] = set()
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda _m, _i, output: met.add(output.dtype))
    bench.train(model, range(1, 2))
    assert met == {torch.bfloat16}
    scoring_of(model).fit(model.eval(), bench.batch | {"labels": bench.batch["input_ids"]})
    assert scoring_of(model).fits
