"""Tokenizers, apart from the models: a job's own process needs no more than this, and PEFT takes seconds to import."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from raytune_lora.config.schema import HubModelConfig, ModelConfig
from raytune_lora.errors import UserError


def load_tokenizer(folder: Path, cfg: ModelConfig) -> Any:
    """The tokenizer, with end-of-sequence standing in for a missing padding token.

    Raises:
        UserError: it has no end-of-sequence token, so that no answer could ever end.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted(cfg))
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer in {folder} has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_identity(folder: Path) -> str:
    """Stands for the tokenizer of a model folder: a digest of its files."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def trusted(cfg: ModelConfig) -> bool:
    """Whether code that comes with the model may run."""
    return isinstance(cfg, HubModelConfig) and cfg.trust_remote_code
