"""What a model lets a token see: what the probes find, against the losses of rows alone and against encoders."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CpmAntConfig,
    GPTNeoConfig,
    RemBertConfig,
    RobertaConfig,
    XGLMConfig,
    XLMConfig,
)

from raytune_lora.errors import UserError
from raytune_lora.models.loading import keep_cache
from raytune_lora.models.packed import PackedAttention
from raytune_lora.training.batches import pack
from raytune_lora.training.leaks import check_causal, packed_leak, sees_ahead
from tests.unit import zoo
from tests.unit.zoo import VOCAB, ZOO

JOIN = {  # of the zoo, those whose packed rows see each other
    *("bloom", "falcon", "mamba", "rwkv", "bamba", "zamba2", "nemotron_h", "minimax", "lfm2", "roberta"),
    "deepseek_v4",
}
CANNOT = {"deepseek_v32", "qwen4_exp_text"}  # of those that want a mask, or a package that is not here
TOKENS = range(3, VOCAB - 3)


def build(name: str, **changes: Any) -> Any:
    """As ``load_model`` leaves it: with a cache, no model would look at the positions."""
    model = zoo.build(name, **changes)
    keep_cache(model, False)
    return model


def losses(model: torch.nn.Module, rows: list[torch.Tensor]) -> tuple[float, float]:
    """The mean loss of rows one at a time, and of the same rows end to end; both a row's own tokens alone."""
    inputs, apart = pack([{"input_ids": row, "labels": row} for row in rows])
    inputs.pop("labels")
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
        with PackedAttention(model).of(apart) as given:
            packed = model(**inputs, **given).logits[0].split(list(apart.lengths))

    def mean(logits: list[torch.Tensor]) -> float:
        pairs = zip(logits, rows, strict=True)
        return float(torch.cat([-each.log_softmax(-1)[:-1].gather(1, row[1:, None]) for each, row in pairs]).mean())

    return mean(alone), mean(list(packed))


@pytest.mark.parametrize("name", ZOO)
def test_a_model_that_lets_packed_rows_see_each_other_is_told(name: str) -> None:
    model = build(name)
    assert (packed_leak(model, TOKENS, 0) is not None) == (name in JOIN | CANNOT)
    zoo.spread(model, 0.25)
    rows = [torch.randint(3, VOCAB - 3, (length,)) for length in (40, 25, 33)]
    if name in CANNOT:
        with pytest.raises((TypeError, ValueError)):
            losses(model, rows)
        return
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
    assert (packed_leak(model, TOKENS, 0) is not None) == (name in JOIN)


class Around(torch.nn.Module):
    """A wrapper of a model of the zoo."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = build(name)
        self.config, self.dtype = self.inner.config, self.inner.dtype


def test_positions_that_do_not_begin_anew_are_told() -> None:
    """Rows may be kept apart and still stand elsewhere than alone."""

    class GoingOn(Around):
        def forward(self, position_ids: torch.Tensor | None = None, **inputs: torch.Tensor) -> object:
            if position_ids is not None:
                inputs["position_ids"] = torch.arange(position_ids.shape[1])[None]
            return self.inner(**inputs)

    found = packed_leak(GoingOn("gpt2").eval(), TOKENS, 0)
    assert found is not None
    assert found.startswith("a row's logits differ by ")


def test_a_model_that_counts_positions_itself_is_told() -> None:
    config = XGLMConfig(vocab_size=VOCAB, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64)
    torch.manual_seed(0)
    assert packed_leak(AutoModelForCausalLM.from_config(config).eval(), TOKENS, 1) is not None


def test_a_model_that_takes_no_positions_is_told() -> None:
    class Without(Around):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    found = packed_leak(Without("llama").eval(), TOKENS, 0)
    assert found is not None
    assert found.startswith("it cannot take them: TypeError: ")
    assert "position_ids" in found


def test_attention_that_transformers_registry_does_not_reach_is_told() -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "window_size": 32}
    layers = [[["global", "local"], 1]]
    config = GPTNeoConfig(vocab_size=VOCAB, max_position_embeddings=64, attention_types=layers, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    assert "other words in one row" in (packed_leak(model, TOKENS, 0) or "")


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoders_do_not_see_ahead(name: str, dtype: torch.dtype) -> None:
    assert sees_ahead(build(name).to(dtype), TOKENS, 0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, RemBertConfig, XLMConfig, CpmAntConfig])
def test_models_that_see_ahead_are_told(config: Any, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=VOCAB, **sizes)).eval().to(dtype)
    assert (sees_ahead(model, TOKENS, 0) or 0) > 1e-4


def test_a_baseline_of_a_model_that_sees_ahead_is_refused() -> None:
    class Store:
        rows: ClassVar = {"train": 2}

        def split(self, name: str) -> Any:
            return Dataset.from_dict({"input_ids": [list(range(3, 40)), list(range(50, 90))]})

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder, encoder = (
        AutoModelForCausalLM.from_config(BertConfig(is_decoder=d, **sizes)).eval() for d in (True, False)
    )
    check_causal(decoder, Store(), 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="its tokens see those after them"):
        check_causal(encoder, Store(), 0)  # type: ignore[arg-type]
