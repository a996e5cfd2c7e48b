"""Tokenizers, apart from the models: a job's own process needs no more than this, and PEFT takes seconds to import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
        UserError: it has no end-of-sequence token, so that no answer could ever end, or as for ``own_code``.
    """
    from transformers import AutoTokenizer

    with own_code(folder, cfg):
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


@contextlib.contextmanager
def own_code(folder: Path, cfg: ModelConfig) -> Iterator[None]:
    """In which transformers reads a model's folder, and may meet code that comes with the model.

    Raises:
        UserError: that code is needed and may not run, or it fails.
    """
    try:
        yield
    except Exception as error:  # whatever that code raises
        first = str(error).strip().partition("\n")[0]
        if not _comes_with_code(folder):
            raise
        if trusted(cfg):
            raise UserError(
                f"model: the code that comes with {folder} does not work here ({type(error).__name__}: {first}); see "
                "which packages, and which release of transformers, it is written for"
            ) from error
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"model: {folder} is of no kind that transformers knows, and comes with code of its own, which would run "
            "on every machine; read it, and where you trust it, set model.trust_remote_code=true and model.revision to "
            "the commit that you have read"
        ) from error


def _comes_with_code(folder: Path) -> bool:
    """Whether a folder names classes of its own; their code may be in another repository."""
    files = (folder / name for name in ("config.json", "tokenizer_config.json"))
    return any("auto_map" in file.read_text(errors="replace") for file in files if file.is_file())


def trusted(cfg: ModelConfig) -> bool:
    """Whether code that comes with the model may run."""
    return isinstance(cfg, HubModelConfig) and cfg.trust_remote_code
