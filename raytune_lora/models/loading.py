"""Base models and tokenizers from their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_lora.config.schema import HubModelConfig, ModelConfig, Precision
from raytune_lora.errors import UserError


def load_tokenizer(folder: Path, cfg: ModelConfig) -> Any:
    """The tokenizer, with end-of-sequence standing in for a missing padding token.

    Raises:
        UserError: it has no end-of-sequence token, so that no answer could ever end.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=_trusted(cfg))
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer in {folder} has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, cfg: ModelConfig) -> Any:
    """The base model in evaluation mode, all its weights frozen, in the precision asked for."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=precision(cfg.precision), trust_remote_code=_trusted(cfg)
    )
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def load_adapter(model: Any, adapter: Path) -> Any:
    """The base model with a saved adapter on it, frozen.

    In fp32 the adapter is merged, which answers faster and differs by rounding alone; in 16 bits merging would round
    the update away, so it stays apart.
    """
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    return adapted.merge_and_unload() if model.dtype is torch.float32 else adapted


def precision(asked: Precision) -> torch.dtype:
    """The dtype of weights and arithmetic on this machine."""
    if asked is Precision.auto:
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[asked]


def _trusted(cfg: ModelConfig) -> bool:
    return isinstance(cfg, HubModelConfig) and cfg.trust_remote_code
