"""Adapters to take away: the method's own files, PEFT's where PEFT knows the method, and all that goes with them.

Beside the adapter lie the base model's tokenizer, the template that the rows were written with, the tokens that end an
answer, ``record.json`` and a card with code that loads just this adapter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from raytune_lora.artifacts import write_json
from raytune_lora.errors import UserError
from raytune_lora.models.card import CARD, card
from raytune_lora.models.record import RECORD, read_record

ADAPTER = "adapter"  # folder in a checkpoint: what was learned
TEMPLATE = "chat_template.jinja"  # transformers' name
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
_GENERATION = "generation_config.json"


def export_adapter(
    checkpoint: Path, target: Path, *, model_folder: Path, record: dict[str, Any], template: Path
) -> None:
    """Copy what a checkpoint learned into a folder, and what is needed to use it.

    Args:
        checkpoint: holds what was learned.
        target: made; an older export in it is replaced.
        model_folder: of the base model.
        record: of the adapter.
        template: file of the chat template that its rows were written with.

    Raises:
        FileNotFoundError: the checkpoint holds nothing learned.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint / ADAPTER, target)
    patterns = [*_TOKENIZER_FILES, *(["*.py"] if record["base"]["trust_remote_code"] else [])]
    for file in (file for pattern in patterns for file in model_folder.glob(pattern)):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    shutil.copyfile(template, target / TEMPLATE)
    _change(target / "tokenizer_config.json", chat_template=None)  # the file's counts
    name, revision = record["base"]["name"], record["base"]["revision"]
    _change(target / "adapter_config.json", base_model_name_or_path=name, revision=revision)
    if record["method"]["kind"] == "prompt_tuning" and record["method"]["text"] is not None:
        _change(target / "adapter_config.json", tokenizer_name_or_path=name)
    if record["stop_ids"]:
        if (model_folder / _GENERATION).is_file():
            shutil.copyfile(model_folder / _GENERATION, target / _GENERATION)
        else:
            write_json(target / _GENERATION, {})
        _change(target / _GENERATION, eos_token_id=record["stop_ids"])
    write_json(target / RECORD, record)
    (target / CARD).write_text(card(record), encoding="utf-8")


def load(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The base model of an exported adapter with that adapter, frozen, in evaluation mode, for any method.

    Args:
        folder: that ``export_adapter`` made.
        trust_remote_code: whether code that comes with the base model may run here.

    Raises:
        UserError: the base model comes with code of its own, and that was not said.
    """
    import torch

    from raytune_lora.cache import Cache
    from raytune_lora.config.compose import from_plain
    from raytune_lora.config.schema import (
        ClusterConfig,
        HubModelConfig,
        Precision,
        QuantizationConfig,
        RunConfig,
        variant,
    )
    from raytune_lora.models.loading import load_model
    from raytune_lora.models.methods import method_for
    from raytune_lora.models.sources import materialize

    record = read_record(Path(folder))
    base, method = record["base"], record["method"]
    if base["trust_remote_code"] and not trust_remote_code:
        raise UserError(
            f"{folder}: its base model {base['name']} comes with code of its own, which would run here; read it, and "
            "where you trust it, load(…, trust_remote_code=True)"
        )
    cfg = HubModelConfig(
        precision={"float32": Precision.fp32, "bfloat16": Precision.bf16}[record["dtype"]],
        path=base["name"],
        revision=base["revision"],
        trust_remote_code=base["trust_remote_code"],
    )
    weights = materialize(cfg, Cache.of(RunConfig().cache, ClusterConfig().node_cache))
    stored = from_plain(QuantizationConfig, record["quantization"])
    model = load_model(weights, cfg, stored, on_gpu=torch.cuda.is_available())
    return method_for(from_plain(variant("method", method["kind"]), method)).load(model, Path(folder), weights)


def _change(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file, if there is one; None takes a key away."""
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8")) | changes
        write_json(file, {key: value for key, value in found.items() if key not in changes or value is not None})
