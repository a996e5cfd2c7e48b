"""Whether a model keeps packed rows apart: what the probe finds, against the losses of rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, XGLMConfig

from raytune_lora.training.packing import leak
from tests.unit import zoo
from tests.unit.zoo import VOCAB, ZOO

# of the zoo, those whose packed rows see each other
JOIN = {"opt", "bloom", "mamba", "rwkv", "bamba", "zamba2", "minimax", "lfm2", "gpt_oss"}
TOKENS = range(3, VOCAB - 3)


def build(name: str, **changes: Any) -> Any:
    """As ``load_model`` leaves it: with a cache, no model would look at the positions."""
    model = zoo.build(name, **changes)
    model.config.use_cache = False
    return model


def losses(model: torch.nn.Module, rows: list[torch.Tensor]) -> tuple[float, float]:
    """The mean loss of rows one at a time, and of the same rows end to end; both a row's own tokens alone."""
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
        ids, positions = torch.cat(rows), torch.cat([torch.arange(len(row)) for row in rows])
        packed = model(input_ids=ids[None], position_ids=positions[None]).logits[0].split([len(row) for row in rows])

    def mean(logits: list[torch.Tensor]) -> float:
        pairs = zip(logits, rows, strict=True)
        return float(torch.cat([-each.log_softmax(-1)[:-1].gather(1, row[1:, None]) for each, row in pairs]).mean())

    return mean(alone), mean(list(packed))


@pytest.mark.parametrize("name", ZOO)
def test_a_model_that_lets_packed_rows_see_each_other_is_told(name: str) -> None:
    model = build(name)
    assert (leak(model, TOKENS, 0) is not None) == (name in JOIN)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)  # so that what a row sees matters for its loss
    rows = [torch.randint(3, VOCAB - 3, (length,)) for length in (40, 25, 33)]
    alone, packed = losses(model, rows)
    assert (abs(alone - packed) > 1e-4) == (name in JOIN)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("gemma2", "eager"),
        ("mixtral", "sdpa"),
        ("opt", "sdpa"),
        ("lfm2", "sdpa"),
    ],
)
def test_in_bf16_and_by_each_attention(name: str, attention: str) -> None:
    model = build(name, attn_implementation=attention).to(torch.bfloat16)
    assert (leak(model, TOKENS, 0) is not None) == (name in JOIN)


def test_positions_that_do_not_begin_anew_are_told() -> None:
    """Rows may be kept apart and still stand elsewhere than alone."""

    class GoingOn(torch.nn.Module):
        """A Llama-like wrapper that sees the right mask, and positions as if all rows were one."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = build("gpt2")
            self.config, self.dtype = self.inner.config, self.inner.dtype

        def forward(self, position_ids: torch.Tensor | None = None, **inputs: torch.Tensor) -> object:
            if position_ids is not None:
                row = (position_ids == 0).cumsum(-1)
                apart = (row[:, :, None] == row[:, None, :]) & torch.ones(row.shape[1], row.shape[1]).tril().bool()
                inputs["attention_mask"] = torch.where(apart, 0.0, torch.finfo(torch.float32).min)[:, None]
                inputs["position_ids"] = torch.arange(row.shape[1])[None]
            return self.inner(**inputs)

    found = leak(GoingOn().eval(), TOKENS, 0)
    assert found is not None
    assert found.startswith("a row's logits differ by ")


def test_a_model_that_counts_positions_itself_is_told() -> None:
    config = XGLMConfig(vocab_size=VOCAB, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64)
    torch.manual_seed(0)
    assert leak(AutoModelForCausalLM.from_config(config).eval(), TOKENS, 1) is not None


def test_a_model_that_takes_no_positions_is_told() -> None:
    class Without(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama")
            self.config, self.dtype = self.inner.config, self.inner.dtype

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    found = leak(Without().eval(), TOKENS, 0)
    assert found is not None
    assert found.startswith("it cannot take them: TypeError: ")
    assert "position_ids" in found
