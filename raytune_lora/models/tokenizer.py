"""Tokenizers, apart from the models: a job's own process needs no more than this, and PEFT takes seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_lora.artifacts import MANIFEST, content_digest, fingerprint
from raytune_lora.config.schema import HubModelConfig, ModelConfig
from raytune_lora.errors import UserError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".index.json")
_PROSE = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".gitattributes", ".gitignore", ".lock")
_NOT_READ = (*_WEIGHTS, *_PROSE, "LICENSE", MANIFEST)  # by tokenizers


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


def tokenizer_identity(folder: Path, cfg: ModelConfig) -> str:
    """Digest of all that ``load_tokenizer`` and the tokenizer's templates are a function of, by content.

    Tokenizer classes name their files as they like (``spiece.model``, ``tekken.json``, ``qwen.tiktoken``, code of the
    model's own), so that every file of the folder counts which is neither weights nor prose.

    Args:
        folder: of the model.
        cfg: says whether the folder's code may run.
    """
    found = [*folder.iterdir(), *folder.glob("*template*/*")]
    files = sorted(file for file in found if file.is_file() and not file.name.endswith(_NOT_READ))
    names = [file.relative_to(folder).as_posix() for file in files]
    return fingerprint(trusted(cfg), names, content_digest(files))


def trusted(cfg: ModelConfig) -> bool:
    """Whether code that comes with the model may run."""
    return isinstance(cfg, HubModelConfig) and cfg.trust_remote_code
