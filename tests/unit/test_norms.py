"""``method=layernorm`` on norms of all kinds: gated, without weights, of single heads, within sublayers called norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel

from raytune_lora.config.compose import compose
from raytune_lora.models.methods import Start, fit, method_for
from raytune_lora.models.shape import shape_of
from tests.unit import zoo
from tests.unit.method_bench import config
from tests.unit.test_prompts import MODELS as OTHERS

_GROUPED: dict[str, Any] = {
    "vocab_size": zoo.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SCAN = {"chunk_size": 4, "n_groups": 2}
MODELS: dict[str, Any] = {
    **{name: zoo.ZOO[name] for name in ("llama", "gpt2", "bamba", "zamba2", "minimax")},
    "dbrx": OTHERS["dbrx"],
    "mamba2": lambda: T.Mamba2Config(
        vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, **_SCAN
    ),
    "nemotron_h": lambda: T.NemotronHConfig(
        layers_block_type=["mamba", "attention", "mlp"], head_dim=8, ssm_state_size=8, mamba_num_heads=8,
        mamba_head_dim=8, use_mamba_kernels=False,
        **_SCAN, **{k: v for k, v in _GROUPED.items() if k != "num_hidden_layers"},
    ),
    "llama4_text": lambda: T.Llama4TextConfig(
        head_dim=8, intermediate_size_mlp=64, num_local_experts=2, use_qk_norm=True, **_GROUPED
    ),
    "stablelm": lambda: T.StableLmConfig(qk_layernorm=True, **_GROUPED),
    "diffllama": lambda: T.DiffLlamaConfig(**_GROUPED),
    "cohere": lambda: T.CohereConfig(use_qk_norm=True, **_GROUPED),
    "olmo": lambda: T.OlmoConfig(**_GROUPED),
    "nanochat": lambda: T.NanoChatConfig(**_GROUPED),
}  # fmt: skip
WITHOUT = ("olmo", "nanochat")
GATED = ("mamba2", "bamba", "zamba2", "nemotron_h")


def build(name: str) -> Any:
    torch.manual_seed(0)
    return zoo.spread(T.AutoModelForCausalLM.from_config(MODELS[name]()).eval(), 0.15)


@pytest.mark.parametrize("name", MODELS)
def test_all_norms_with_weights_train_and_nothing_else(name: str, tmp_path: Path) -> None:
    model, method = build(name), method_for(config("layernorm"))
    shape = shape_of(model)
    if name in WITHOUT:
        (problem,) = method.problems(shape)
        assert problem.startswith("method=layernorm trains the weights")
        return
    assert method.problems(shape) == []
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12), "attention_mask": torch.ones(2, 12).long()}
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
    tuned = method.apply(model, Start(4, Path(), lambda _: iter([])))
    with torch.no_grad():
        torch.testing.assert_close(tuned(**batch, use_cache=False).logits, before)
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == method.count(shape)
    tuned.train()(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    idle = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not idle
    named = [name for name, _ in build(name).named_parameters(remove_duplicate=False) if ".attn." not in name]
    plain = [name for name in named if "norm" in name or "ln_" in name]
    assert len(trained) + len(shape.norms_apart) == len(plain)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn_like(p))
        tuned.eval()
        learned = tuned(**batch, use_cache=False).logits
        method.save(tuned, trained, tmp_path)
        found = PeftModel.from_pretrained(build(name), tmp_path).eval()(**batch, use_cache=False).logits
    torch.testing.assert_close(found, learned, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(learned, before, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", *GATED])
def test_norms_whose_weights_a_kernel_reads_are_left_out_and_said(name: str) -> None:
    shape = shape_of(build(name))
    notes = fit.notes(compose(["model.path=here", "data=fake", "method=layernorm"]), shape)
    said = [note for note in notes if "leaves out" in note and "norm (their weights are read past" in note]
    assert len(said) == bool(shape.norms_apart)
