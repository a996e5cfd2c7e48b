"""Base models from their folder, and adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_lora.config.schema import ModelConfig, Precision
from raytune_lora.models.tokenizer import trusted


def load_model(folder: Path, cfg: ModelConfig) -> Any:
    """The base model in evaluation mode, all its weights frozen, in the precision asked for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=precision(cfg.precision), trust_remote_code=trusted(cfg))
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
