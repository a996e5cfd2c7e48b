"""Base models as they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from raytune_lora.config.compose import compose
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import (
    HubModelConfig,
    Quantization,
    QuantizationConfig,
    SweepConfig,
    TinyModelConfig,
)
from raytune_lora.errors import UserError
from raytune_lora.models.loading import load_model
from raytune_lora.models.methods import Start, fit, method_for
from raytune_lora.models.stored import as_stored, problems


@pytest.mark.parametrize("kind", [Quantization.nf4, Quantization.fp4])
def test_a_validation_leaves_a_4_bit_model_as_it_was(kind: Quantization, tiny_folder: Path) -> None:
    """The same weights, the same answers in training, and a gradient that reaches the first layer."""
    model = load_model(tiny_folder, TinyModelConfig(), QuantizationConfig(kind=kind))
    ids = torch.arange(12)[None]

    def trained() -> tuple[torch.Tensor, torch.Tensor]:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model.train()(inputs_embeds=embedded).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embedded)[0]

    def stored() -> list[torch.Tensor]:
        return [p.detach().clone().view(torch.uint8) for p in model.parameters()]

    weights = stored()
    logits, gradient = trained()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(evaluated, logits)
    assert all(map(torch.equal, stored(), weights))
    again, same = trained()
    assert torch.equal(again, logits)
    assert torch.equal(same, gradient)
    assert gradient.abs().min() > 0


# ------------------------------------------------------------------------------- checkpoints that are quantized already


def stored(kind: Quantization, tiny_folder: Path, folder: Path, **more: Any) -> Path:
    """The tiny model as transformers and bitsandbytes write it in a format, to be computed in fp16 as on a GPU."""
    if kind is Quantization.int8:
        said = BitsAndBytesConfig(load_in_8bit=True)
    else:
        said = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind.value, **more)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=said, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def curve(folder: Path, quantization: QuantizationConfig) -> list[float]:
    """Losses of steps with LoRA, with a validation before the first and after each."""
    model = load_model(folder, HubModelConfig(path=str(folder)), quantization)
    torch.manual_seed(0)
    model = method_for(LoraMethodConfig(r=4, dropout=0.0)).apply(model, Start(4, folder, lambda _: iter(())))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.arange(2, 42).reshape(2, 20), []
    for _ in range(4):
        with torch.no_grad():
            losses.append(model.eval()(input_ids=ids, labels=ids).loss.item())
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("kind", [Quantization.nf4, Quantization.fp4, Quantization.int8])
def test_a_checkpoint_that_is_quantized_trains_as_the_same_weights_quantized_when_loaded(
    kind: Quantization, tiny_folder: Path, tmp_path: Path
) -> None:
    asked = QuantizationConfig(kind)
    more = {} if kind is Quantization.int8 else {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16"}
    folder = stored(kind, tiny_folder, tmp_path, **more)
    expected = curve(tiny_folder, asked)
    assert expected[-1] < expected[0] - 0.05
    assert curve(folder, asked) == expected
    assert curve(folder, QuantizationConfig()) == expected  # as the checkpoint is


def test_a_quantized_checkpoint_is_the_quantization_of_the_whole_run(tiny_folder: Path, tmp_path: Path) -> None:
    """Its guards and refusals are those of ``quantization=``, and a contradiction is refused with the way out."""
    folder = stored(Quantization.nf4, tiny_folder, tmp_path, bnb_4bit_use_double_quant=False)

    def run(*overrides: str) -> SweepConfig:
        return as_stored(compose([f"model.path={folder}", "data=fake", *overrides]))

    cfg = run()
    assert (cfg.quantization.kind, cfg.quantization.double) == (Quantization.nf4, False)
    assert problems(cfg) == problems(run("quantization=nf4_single")) == []
    assert "quantization=nf4 " in fit.problems(run("method=full"))[0]
    for overrides, remedy in {
        ("quantization=int8",): "quantization=nf4_single",
        ("quantization=nf4",): "quantization=nf4_single",
        ("method=loftq",): "unquantized model",
        ("deepspeed=zero3",): "deepspeed=zero2",
    }.items():
        (problem,) = problems(run(*overrides))
        assert remedy in problem, overrides
    with pytest.raises(UserError, match="contradicts the checkpoint"):
        load_model(folder, cfg.model, QuantizationConfig(Quantization.int8))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "hqq", "compressed-tensors", "mxfp4", "torchao"])
def test_other_formats_are_refused_by_name(method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    (problem,) = problems(compose([f"model.path={tmp_path}", "data=fake"]))
    assert problem.startswith(f"model.path: the weights are stored as {method}, which is not supported")
    assert "quantization=nf4" in problem
