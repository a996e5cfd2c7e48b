"""The number format that a checkpoint's weights are stored in: what the base model is, whatever was configured."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytune_lora.config.schema import (
    HubModelConfig,
    ModelConfig,
    Quantization,
    QuantizationConfig,
    RunConfig,
    SweepConfig,
)
from raytune_lora.errors import UserError
from raytune_lora.network import SECONDS, hub_unreachable

_CONFIG = "config.json"
_UNQUANTIZED_COPY = (
    "fine-tuning starts from weights in bf16 or fp32, or from 4 or 8 bits by bitsandbytes: name the unquantized model "
    "(with quantization=nf4 it takes as little memory)"
)
_READ_WEIGHTS = ("loftq", "ir_qlora")  # methods that compare with the weights before they were quantized


def stored_as(config: dict[str, Any]) -> QuantizationConfig | None:
    """The bitsandbytes format of a checkpoint; None where its weights are not quantized.

    Args:
        config: what ``config.json`` says.

    Raises:
        UserError: it is a format that cannot be fine-tuned here.
    """
    said = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    said = said or config.get("compression_config")  # as compressed-tensors once called it
    if not said:
        return None
    method = said.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(said) else "unknown")
    if method != "bitsandbytes":
        raise UserError(f"model.path: the weights are stored as {method}, which is not supported; {_UNQUANTIZED_COPY}")
    if said.get("load_in_8bit") or said.get("_load_in_8bit"):
        return QuantizationConfig(Quantization.int8, int8_threshold=float(said.get("llm_int8_threshold", 6.0)))
    kind = str(said.get("bnb_4bit_quant_type", "fp4"))
    return QuantizationConfig(Quantization(kind), double=bool(said.get("bnb_4bit_use_double_quant", False)))


def resolved(own: QuantizationConfig | None, asked: QuantizationConfig) -> QuantizationConfig:
    """The format that a base model has in a run.

    Args:
        own: of the checkpoint; None where it is not quantized.
        asked: in the config; none takes the checkpoint as it is.

    Raises:
        UserError: they contradict each other.
    """
    if own is None:
        return asked
    if asked.kind is Quantization.none:
        return replace(own, compute=asked.compute)
    if asked.kind is not own.kind or (asked.kind is not Quantization.int8 and asked.double != own.double):
        raise UserError(
            f"quantization={named(asked)} contradicts the checkpoint of model.path, whose weights are stored as "
            f"{named(own)}: leave it out, or set quantization={named(own)}; for another format name the unquantized "
            "model"
        )
    return asked


def as_stored(cfg: SweepConfig) -> SweepConfig:
    """The config with the quantization that the checkpoint has; as it was where that cannot be read or contradicts."""
    with contextlib.suppress(UserError):  # ``problems`` says so
        cfg.quantization = resolved(_own(cfg.model), cfg.quantization)
    return cfg


def problems(cfg: RunConfig) -> list[str]:
    """Why the checkpoint's own format does not go with the rest of a run; empty where it does."""
    try:
        own = _own(cfg.model)
        resolved(own, cfg.quantization)
    except UserError as error:
        return error.problems
    if own is None:
        return []
    found = []
    if cfg.method.kind in _READ_WEIGHTS:
        found.append(
            f"method={cfg.method.kind} reads the weights as they were before quantization, and the checkpoint of "
            f"model.path stores them as {named(own)} alone: name the unquantized model with quantization={named(own)}"
        )
    if cfg.deepspeed.enabled and cfg.deepspeed.stage == 3:
        found.append(
            f"deepspeed=zero3 does not divide weights that are stored as {named(own)} already: take deepspeed=zero2, "
            f"or name the unquantized model with quantization={named(own)}"
        )
    searched = [d.key for d in cfg.space.values()] if isinstance(cfg, SweepConfig) else []
    if fixed := [key for key in searched if key in ("quantization.kind", "quantization.double")]:
        found.append(
            f"space: {', '.join(fixed)} cannot be searched, as the checkpoint of model.path stores its weights as "
            f"{named(own)}; name the unquantized model, or leave the dimension out"
        )
    return found


def named(quantization: QuantizationConfig) -> str:
    """A format as one types it."""
    single = quantization.kind is Quantization.nf4 and not quantization.double
    if quantization.kind is Quantization.fp4 and not quantization.double:
        return "fp4 quantization.double=false"
    return "nf4_single" if single else quantization.kind.value


def read_config(folder: Path) -> dict[str, Any]:
    """What a model folder's ``config.json`` says; nothing where there is none."""
    try:
        said = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _own(cfg: ModelConfig) -> QuantizationConfig | None:
    """The checkpoint's format; models of other sources than a folder or the hub are made here, and unquantized."""
    if not isinstance(cfg, HubModelConfig) or cfg.path is None:
        return None
    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        return stored_as(read_config(folder))
    if cfg.path.startswith((".", "/", "~")) or cfg.path.count("/") > 1:  # no name on the hub
        return None
    from huggingface_hub import hf_hub_download

    try:
        offline = hub_unreachable() is not None
        file = hf_hub_download(cfg.path, _CONFIG, revision=cfg.revision, etag_timeout=SECONDS, local_files_only=offline)
    except Exception:  # ``sources.problems`` says why
        return None
    return stored_as(read_config(Path(file).parent))
