"""What of a model is quantized: the plan, the notes and the refusals against the model that transformers then loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import HubModelConfig, Quantization, SweepConfig
from raytune_lora.models.loading import load_model
from raytune_lora.models.methods import fit, method_for
from raytune_lora.models.planned import planned_memory
from raytune_lora.models.shape import shape_of, shape_of_folder
from raytune_lora.models.stored import as_stored
from raytune_lora.planning.shape import Shape
from tests.unit import zoo
from tests.unit.method_bench import Bench, config
from tests.unit.test_memory import stored_bytes


def run(path: Path, *overrides: str) -> SweepConfig:
    return compose([f"model.path={path}", "data=fake", "deepspeed=off", *overrides])


def packed(model: Any) -> set[str]:
    """Layers that bitsandbytes has taken over."""
    return {name for name, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


def said(shape: Shape) -> set[str]:
    return {linear.name for linear in shape.linears if linear.quantized}


@pytest.mark.parametrize(
    ("model", "kind"),
    [(model, "nf4") for model in zoo.ZOO] + [(model, "int8") for model in ("falcon", "gemma3", "mamba", "zamba2")],
)
def test_the_plan_counts_what_is_loaded(model: str, kind: str, folder: Callable[[str], Path]) -> None:
    """To the byte, whatever of it the quantizer leaves out.

    But for the few parameters that transformers keeps in fp32 in some architectures, which count as those beside them.
    """
    cfg = run(folder(model), f"quantization={kind}", "model.precision=bf16")
    shape = shape_of_folder(folder(model), cfg.model)
    loaded = load_model(folder(model), cfg.model, cfg.quantization)
    plan = planned_memory(cfg, shape, 8)
    assert said(shape) == packed(loaded)
    in_fp32 = sum(p.numel() for p in loaded.parameters() if p.dtype is torch.float32)
    assert plan.weights + plan.embeddings == stored_bytes(loaded) - 2 * in_fp32


def test_a_quantization_that_quantizes_nothing_is_refused(folder: Callable[[str], Path]) -> None:
    """Falcon's linear layers are a subclass, and stay as they are."""
    shape = shape_of(zoo.build("falcon"))
    for kind in ("nf4", "int8"):
        (problem,) = fit.model_problems(run(folder("falcon"), f"quantization={kind}"), shape)
        assert problem.startswith(f"quantization={kind} would quantize nothing")
        assert problem.endswith("set quantization=none")
    assert fit.model_problems(run(folder("falcon")), shape) == []
    found = fit.model_problems(run(folder("falcon"), "quantization=nf4", "method=loftq"), shape)
    assert any("method=loftq" in problem and "none of them is quantized" in problem for problem in found)


def test_what_stays_unquantized_is_said(folder: Callable[[str], Path]) -> None:
    shape = shape_of(zoo.build("zamba2"))
    note = next(n for n in fit.notes(run(folder("zamba2"), "quantization=nf4"), shape) if "quantization" in n)
    left = {name: x for name, x in zoo.build("zamba2").named_modules() if "shared_transformer" in name}
    shared = {x.weight for x in left.values() if isinstance(x, torch.nn.Linear)}
    assert f"{sum(weight.numel() for weight in shared):,} of {shape.parameters:,} parameters" in note
    assert "shared_transformer" in note
    mixture = fit.notes(
        run(folder("mixtral"), "quantization=nf4", "model.precision=bf16"), shape_of(zoo.build("mixtral"))
    )
    sizes = [float(part.split()[-1]) for part in mixture[-1].split(" GB")[:2]]
    assert sizes[0] <= sizes[1]  # the experts stay in bf16
    dense = fit.notes(run(folder("llama"), "quantization=nf4"), shape_of(zoo.build("llama")))
    assert dense == []


@pytest.mark.parametrize("kind", [Quantization.nf4, Quantization.int8])
@pytest.mark.parametrize("model", ["gemma3n_text", "mamba"])
def test_weights_that_the_model_s_code_reads_are_unpacked(
    model: str, kind: Quantization, folder: Callable[[str], Path]
) -> None:
    """They are what transformers' own quantization stands for, and the model trains."""
    bench = Bench("lora", folder(model), kind)
    base = bench.base()
    names = {"gemma3n_text": "model.layers.0.altup.correction_coefs", "mamba": "backbone.layers.1.mixer.dt_proj"}
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how = how if kind is Quantization.nf4 else BitsAndBytesConfig(load_in_8bit=True)
    plain = AutoModelForCausalLM.from_pretrained(folder(model), quantization_config=how, dtype=torch.float32)
    layer: Any = plain.train().get_submodule(names[model])
    x = torch.eye(layer.in_features)
    theirs = layer(x) - (0 if layer.bias is None else layer.bias)
    own = base.get_submodule(names[model]).weight.T
    torch.testing.assert_close(own, theirs, atol=1e-2, rtol=2e-2)
    before = bench.loss(base)
    trained = bench.applied()
    bench.train(trained)
    assert bench.loss(trained) < before


@pytest.mark.parametrize("model", ["llava", "gemma3", "nemotron_h", "rwkv", "laguna", "hrm_text"])
def test_loftq_finds_weights_that_the_checkpoint_names_otherwise(model: str, folder: Callable[[str], Path]) -> None:
    """It starts nearer to the unquantized model than plain quantization does."""
    plain = Bench("lora", folder(model), Quantization.nf4)
    exact = Bench("lora", folder(model)).logits(Bench("lora", folder(model)).base())
    loftq = Bench("loftq", folder(model), Quantization.nf4, r=4)
    assert loftq.method.problems(loftq.shape()) == []
    lost, left = (float((b.logits(m) - exact).norm()) for b, m in ((plain, plain.base()), (loftq, loftq.applied())))
    assert left < 0.95 * lost


def test_layers_that_lost_nothing_start_as_in_lora(folder: Callable[[str], Path]) -> None:
    """LoftQ's other layers start from what quantizing them lost."""
    bench = Bench("loftq", folder("zamba2"), Quantization.nf4, r=4)
    assert bench.method.problems(bench.shape()) == []
    adapted = bench.applied()
    zero = {n.split(".lora_B")[0]: not p.any() for n, p in adapted.named_parameters() if "lora_B" in n}
    assert {name.removeprefix("base_model.model.") for name, is_zero in zero.items() if not is_zero} <= said(
        bench.shape()
    )
    assert set(zero.values()) == {True, False}


@pytest.fixture(scope="module")
def stored(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in 4 bits whose own settings name what is left out: the first layer's network, and not the head."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how.llm_int8_skip_modules = ["model.layers.0.mlp"]
    path = tmp_path_factory.mktemp("stored")
    AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=how).save_pretrained(path)
    return path


def test_a_checkpoint_says_what_of_it_is_quantized(stored: Path) -> None:
    cfg = as_stored(run(stored, "method.modules_to_save=[lm_head]"))
    shape = shape_of_folder(stored, cfg.model)
    loaded = load_model(stored, HubModelConfig(path=str(stored)), cfg.quantization)
    assert said(shape) == packed(loaded)
    assert "lm_head" in said(shape)
    assert not any("layers.0.mlp" in name for name in said(shape))
    plan = planned_memory(cfg, shape, 8)
    assert plan.weights + plan.embeddings == stored_bytes(loaded)
    (problem,) = fit.model_problems(cfg, shape)
    assert "method.modules_to_save: lm_head is quantized" in problem
    assert any("layers.*.mlp" in note for note in fit.notes(cfg, shape))
    assert method_for(config("lora")).problems(shape) == []
