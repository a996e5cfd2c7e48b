"""Learned prompts on models that have them in other widths, heads and places than their configs say, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel

from raytune_lora.models.methods import Start, method_for
from raytune_lora.models.shape import shape_of
from raytune_lora.training.gradients import FirstGradients
from tests.unit import zoo
from tests.unit.method_bench import config
from tests.unit.zoo import VOCAB

_SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
_XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}
MODELS: dict[str, Any] = {
    "opt": lambda: T.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=16, **_SPECIAL
    ),
    "rembert": lambda: T.RemBertConfig(
        input_embedding_size=16, output_embedding_size=24, is_decoder=True, **_BERT, **_SPECIAL
    ),
    "electra": lambda: T.ElectraConfig(embedding_size=16, is_decoder=True, **_BERT, **_SPECIAL),
    "falcon": lambda: T.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True, alibi=False, **_SPECIAL
    ),
    "gpt_bigcode": lambda: T.GPTBigCodeConfig(multi_query=True, **_GPT, **_SPECIAL),
    "mpt": lambda: T.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=256, **_SPECIAL),
    "xglm": lambda: T.XGLMConfig(**_XGLM, **_SPECIAL),
    "trocr": lambda: T.TrOCRConfig(**_BART, **_SPECIAL),
    "dbrx": lambda: T.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        **_SPECIAL,
    ),
    "openai-gpt": lambda: T.OpenAIGPTConfig(**_GPT, **_SPECIAL),
    "jetmoe": lambda: T.JetMoeConfig(
        hidden_size=32, num_hidden_layers=2, num_key_value_heads=4, kv_channels=8, intermediate_size=64,
        num_local_experts=4, **_SPECIAL,
    ),
    "jamba": lambda: T.JambaConfig(
        num_key_value_heads=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
        use_mamba_kernels=False, **_BERT, **_SPECIAL,
    ),
    "deepseek_v3": lambda: T.DeepseekV3Config(
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        **_BERT, **_SPECIAL,
    ),
}  # fmt: skip
REFUSED = {  # a word of the reason
    ("dbrx", "prefix_tuning"): "does not run without values",
    ("jetmoe", "prefix_tuning"): "does not run without values",
    ("openai-gpt", "prefix_tuning"): "not every layer",
    ("jamba", "prefix_tuning"): "not every layer",
    ("deepseek_v3", "prefix_tuning"): "not every layer",
}


def build(name: str) -> Any:
    """With weights that answers depend on."""
    torch.manual_seed(0)
    return zoo.spread(T.AutoModelForCausalLM.from_config(MODELS[name]()).eval(), 0.15)


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_learned_or_refused_before_the_start(name: str, kind: str, tmp_path: Path) -> None:
    """It has the count, gets gradients, is loaded by PEFT alone and changes what the model computes."""
    model, method = build(name), method_for(config(kind))
    shape = shape_of(model)
    if reason := REFUSED.get((name, kind)):
        (problem,) = method.problems(shape)
        assert problem.startswith(f"method={kind} puts learned ")
        assert reason in problem
        return
    assert method.problems(shape) == []
    tuned = method.apply(model, Start(4, Path(), lambda _: iter([])))
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == method.count(shape)
    ids = torch.arange(3, 27).reshape(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    heard = FirstGradients(tuned)
    tuned.train()(**batch, labels=ids, use_cache=False).loss.backward()
    heard.check(kind)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tuned.eval()
    method.save(tuned, {n: p for n, p in tuned.named_parameters() if p.requires_grad}, tmp_path)
    found = PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        learned, loaded = (one(**batch, use_cache=False).logits for one in (tuned, found))
        plain = build(name)(**batch, use_cache=False).logits
    assert not torch.allclose(learned[:, -12:], plain, atol=1e-3)
    torch.testing.assert_close(loaded, learned, atol=1e-5, rtol=1e-4)
