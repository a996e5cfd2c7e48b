"""Tiny models of many architectures, each from its config: a test builds the ones it needs in memory.

A config has its architecture's own structure (fused projections, experts, a vision tower, no attention) and nothing of
its size; ``build`` makes the model, with weights that come from a seed. The vocabulary has room for ``byte_tokenizer``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

VOCAB = 272  # the tokenizer of bytes has 260
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_HEADS_OF_16 = _GROUPED | {"head_dim": 16}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} | _SPECIAL
_ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}


def llama(**changes: Any) -> Any:
    return T.LlamaConfig(**_GROUPED | changes)


def tied_llama(**changes: Any) -> Any:
    """Its head is its embedding."""
    return llama(**{"tie_word_embeddings": True} | changes)


def gpt2(**changes: Any) -> Any:
    """Conv1D, learned positions, a tied head."""
    return T.GPT2Config(**_GPT | changes)


def gpt_neox(**changes: Any) -> Any:
    return T.GPTNeoXConfig(**_PLAIN | changes)


def qwen2(**changes: Any) -> Any:
    """Biases on queries, keys and values."""
    return T.Qwen2Config(**_GROUPED | changes)


def qwen3(**changes: Any) -> Any:
    return T.Qwen3Config(**_HEADS_OF_16 | changes)


def gemma2(**changes: Any) -> Any:
    """Capped logits, sliding windows, a tied head."""
    return T.Gemma2Config(**_HEADS_OF_16 | {"sliding_window": 32, "tie_word_embeddings": True} | changes)


def gemma3_text(**changes: Any) -> Any:
    return T.Gemma3TextConfig(**_HEADS_OF_16 | {"sliding_window": 32, "tie_word_embeddings": True} | changes)


def gemma3(**changes: Any) -> Any:
    """With a vision tower; its ids of image tokens are the last of the vocabulary."""
    return T.Gemma3Config(
        text_config=gemma3_text(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 3,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 1,
        **changes,
    )


def gemma3n_text(**changes: Any) -> Any:
    """A width of its own for each layer's network, low-rank layers beside them, weights that are read directly."""
    own = {"intermediate_size": [64, 96], "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
    own |= {"num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
    return T.Gemma3nTextConfig(**_HEADS_OF_16 | {"tie_word_embeddings": True} | own | kinds | changes)


def gemma4_text(**changes: Any) -> Any:
    """Heads of another size in the layers that attend to everything."""
    own = {"global_head_dim": 32, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
    return T.Gemma4TextConfig(**_HEADS_OF_16 | {"tie_word_embeddings": True} | own | kinds | changes)


def phi3(**changes: Any) -> Any:
    """One layer gives queries, keys and values; one, gate and up."""
    return T.Phi3Config(**_GROUPED | changes)


def opt(**changes: Any) -> Any:
    """Learned positions, biases everywhere, a tied head."""
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True}
    return T.OPTConfig(**{k: v for k, v in _PLAIN.items() if k != "intermediate_size"} | sizes | changes)


def falcon(**changes: Any) -> Any:
    """Linear layers of a class of its own."""
    return T.FalconConfig(**{k: v for k, v in _PLAIN.items() if k != "intermediate_size"} | changes)


def bert(**changes: Any) -> Any:
    """A decoder whose head has layers within."""
    return T.BertConfig(**_PLAIN | {"is_decoder": True} | changes)


def tied_bert(**changes: Any) -> Any:
    """The layer within its head that gives logits has the embedding's weight, under names of its own."""
    return bert(**{"tie_word_embeddings": True} | changes)


def roberta(**changes: Any) -> Any:
    """A decoder whose positions begin behind the number of its padding token."""
    return T.RobertaConfig(**_PLAIN | {"is_decoder": True} | changes)


def bloom(**changes: Any) -> Any:
    """ALiBi, one layer for queries, keys and values, a tied head."""
    return T.BloomConfig(**{"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4} | _SPECIAL | changes)


def mixtral(**changes: Any) -> Any:
    """A mixture of experts, whose weights are parameters of three dimensions."""
    return T.MixtralConfig(**_GROUPED | _ROUTED | changes)


def qwen3_moe(**changes: Any) -> Any:
    """A mixture in one layer of two; the other is dense."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    return T.Qwen3MoeConfig(**_HEADS_OF_16 | sizes | changes)


def gpt_oss(**changes: Any) -> Any:
    """Experts with biases, stored transposed; attention with sinks."""
    return T.GptOssConfig(**_HEADS_OF_16 | _ROUTED | {"intermediate_size": 32, "sliding_window": 32} | changes)


def deepseek_v3(**changes: Any) -> Any:
    """Latent attention, shared experts beside the routed ones, a first layer that is dense."""
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    routing = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    return T.DeepseekV3Config(**_PLAIN | {"num_key_value_heads": 4} | experts | routing | latent | changes)


def deepseek_v32(**changes: Any) -> Any:
    """Indexers pick the tokens that are attended to: no gradient comes back through them."""
    plain = deepseek_v3().to_dict()
    kept = {key: plain[key] for key in plain.keys() & set(T.DeepseekV32Config.__annotations__)}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    indexer = {"index_topk": 512, "index_head_dim": 16, "index_n_heads": 2, "head_dim": 8}
    return T.DeepseekV32Config(**kept | rope | indexer | _SPECIAL | changes)


def deepseek_v4(**changes: Any) -> Any:
    """The outputs of attention are projected group by group, in one layer of a class of its own."""
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    kinds = {"layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"]}
    kinds |= {"mlp_layer_types": ["hash_moe", "moe"], "sliding_window": 32}
    latent = {"q_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8, "head_dim": 16, "num_key_value_heads": 1}
    indexer = {"index_topk": 512, "index_head_dim": 16, "index_n_heads": 2}
    plain = {key: value for key, value in _PLAIN.items() if key != "intermediate_size"}
    return T.DeepseekV4Config(**plain | experts | kinds | latent | indexer | changes)


def qwen4_exp_text(**changes: Any) -> Any:
    """Indexers, whose code looks at values; an embedding of several tokens together."""
    indexer = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    indexer |= {"indexer_budget": 512, "indexer_compress_ratio": 4, "hc_lowrank": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}
    scan = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    scan |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    grams = {"ngram_vocab_size_base": 100, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1}
    plain = {key: value for key, value in _HEADS_OF_16.items() if key != "intermediate_size"}
    return T.Qwen4ExpTextConfig(**plain | indexer | experts | scan | grams | {"ple_layer_ids": [1]} | changes)


def hrm_text(**changes: Any) -> Any:
    """Its checkpoint has in one weight what are several here; norms without weights."""
    return T.HrmTextConfig(**_PLAIN | {"head_dim": 8} | changes)


def dbrx(**changes: Any) -> Any:
    """Experts beneath each other in weights of two dimensions, with a config of their own."""
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    experts = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}
    return T.DbrxConfig(**sizes | {"attn_config": attention, "ffn_config": experts} | _SPECIAL | changes)


def mamba(**changes: Any) -> Any:
    """A state-space model without attention, whose head is tied."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    return T.MambaConfig(**sizes | _SPECIAL | changes)


def nemotron_h(**changes: Any) -> Any:
    """State-space, attention, dense and mixture layers, one of each, under names that its checkpoint does not have."""
    mixers = {"layers_block_type": ["mamba", "attention", "mlp", "moe"]}
    scan = {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
    plain = {k: v for k, v in _HEADS_OF_16.items() if k != "num_hidden_layers"}
    return T.NemotronHConfig(**plain | mixers | scan | experts | {"num_experts_per_tok": 2} | changes)


def rwkv(**changes: Any) -> Any:
    """A recurrence, whose code rescales weights for inference."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2}
    return T.RwkvConfig(**sizes | {"attention_hidden_size": 32, "intermediate_size": 64} | _SPECIAL | changes)


def laguna(**changes: Any) -> Any:
    """Shared experts, which its checkpoint names otherwise, beside routed ones; a gate on attention."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16, "layer_types": ["full_attention", "full_attention"]}
    return T.LagunaConfig(**_HEADS_OF_16 | experts | changes)


def bamba(**changes: Any) -> Any:
    """One layer scans, with a gated norm, the other attends."""
    scan = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}
    return T.BambaConfig(**_GROUPED | scan | {"attn_layer_indices": [1]} | changes)


def zamba2(**changes: Any) -> Any:
    """State-space layers, and two places of one block whose weights they share, but for adapters of their own."""
    scan = {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 4, "use_mamba_kernels": False}
    mixers = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4}
    shared = {"use_shared_attention_adapter": True, "adapter_rank": 4, "tie_word_embeddings": True}
    return T.Zamba2Config(**_PLAIN | scan | mixers | shared | changes)


def minimax(**changes: Any) -> Any:
    """One layer attends linearly, the other as usual; experts."""
    kinds = {"layer_types": ["linear_attention", "full_attention"], "block_size": 4}
    return T.MiniMaxConfig(**_HEADS_OF_16 | _ROUTED | kinds | changes)


def lfm2(**changes: Any) -> Any:
    """One layer convolves, the other attends."""
    return T.Lfm2Config(**_GROUPED | {"layer_types": ["conv", "full_attention"]} | changes)


def idefics(**changes: Any) -> Any:
    """It wants an image beside each row."""
    vision = {"embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return T.IdeficsConfig(**_PLAIN | {"vision_config": vision} | changes)


def mllama(**changes: Any) -> Any:
    """A language model, of one that sees, whose embedding has more rows than its vocabulary tokens."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    return T.MllamaConfig(text_config=_GROUPED | {"cross_attention_layers": [1]} | changes, vision_config=vision)


def llava(**changes: Any) -> Any:
    """A language model beside a vision tower, under names that its checkpoint does not have."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tower = T.CLIPVisionConfig(**vision)
    return T.LlavaConfig(text_config=llama(), vision_config=tower, image_token_id=VOCAB - 1, **changes)


ZOO: dict[str, Callable[..., Any]] = {
    made.__name__: made
    for made in (
        llama,
        tied_llama,
        gpt2,
        gpt_neox,
        qwen2,
        qwen3,
        gemma2,
        gemma3_text,
        gemma3,
        gemma3n_text,
        gemma4_text,
        phi3,
        opt,
        falcon,
        bert,
        tied_bert,
        roberta,
        bloom,
        mixtral,
        qwen3_moe,
        gpt_oss,
        deepseek_v3,
        deepseek_v32,
        deepseek_v4,
        qwen4_exp_text,
        hrm_text,
        dbrx,
        mamba,
        rwkv,
        bamba,
        nemotron_h,
        laguna,
        zamba2,
        minimax,
        lfm2,
        llava,
        mllama,
    )
}


def spread(model: Any, std: float) -> Any:
    """A model whose matrices are drawn so wide that what it is given matters for what it computes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    return model


def build(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of the zoo in evaluation mode, in fp32; ``changes`` are to its config."""
    torch.manual_seed(seed)
    config = ZOO[name](**changes)
    text = type(config) in T.AutoModelForCausalLM._model_mapping
    cls = T.AutoModelForCausalLM if text else T.AutoModelForImageTextToText
    return cls.from_config(config).eval()
