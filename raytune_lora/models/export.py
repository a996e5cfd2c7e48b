"""Adapters to take away: PEFT's own format with the tokenizer beside it, so that plain PEFT loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
)


def export_adapter(checkpoint: Path, target: Path, *, model_folder: Path, base_name: str) -> None:
    """Copy a checkpoint's adapter and the base model's tokenizer into a folder.

    Args:
        checkpoint: holds the adapter.
        target: made; an older export in it is replaced.
        model_folder: of the base model.
        base_name: written into the adapter as the name of its base model.

    Raises:
        FileNotFoundError: the checkpoint holds no adapter.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(checkpoint / name, target / name)
    for pattern in _TOKENIZER_FILES:
        for file in model_folder.glob(pattern):
            shutil.copyfile(file, target / file.name)
    config_file = target / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = base_name
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
