"""Adapters to take away: the method's own files, PEFT's where PEFT knows the method, with the tokenizer beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

ADAPTER = "adapter"  # folder in a checkpoint: what was learned
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
)


def export_adapter(checkpoint: Path, target: Path, *, model_folder: Path, base_name: str) -> None:
    """Copy what a checkpoint learned and the base model's tokenizer into a folder.

    Args:
        checkpoint: holds what was learned.
        target: made; an older export in it is replaced.
        model_folder: of the base model.
        base_name: written into PEFT's config as the name of its base model.

    Raises:
        FileNotFoundError: the checkpoint holds nothing learned.
    """
    shutil.copytree(checkpoint / ADAPTER, target, dirs_exist_ok=True)
    for pattern in _TOKENIZER_FILES:
        for file in model_folder.glob(pattern):
            shutil.copyfile(file, target / file.name)
    config_file = target / "adapter_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text())
        config["base_model_name_or_path"] = base_name
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
