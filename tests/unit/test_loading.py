"""Base models as they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_lora.config.schema import Quantization, QuantizationConfig, TinyModelConfig
from raytune_lora.models.loading import load_model


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
