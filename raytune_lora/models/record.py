"""``record.json`` beside an adapter: the base model and the settings that it was trained on, as far as loading needs.

Schema, version 1. Null stands for what is not known.

- ``format``, ``version`` (of raytune-lora)
- ``base``: ``name`` (on the hub, or an absolute path), ``revision`` (of the hub, a commit), ``trust_remote_code``,
  ``stored_quantized`` (whether its files are quantized already), ``loader`` (the class of transformers that loads it;
  null where ``raytune_lora.models.export.load`` alone does as it was trained)
- ``dtype`` of the base model's weights, as torch calls it; ``quantization`` and ``method``: their configs
- ``template``: ``kind`` (text: patterns; chat), ``file`` (of an own chat template), ``prompts`` and ``rows``: whether
  ``chat_template.jinja`` gives the same tokens as in training, of prompts and of whole rows; ``parts``: whether a
  message's content must be a list of parts for that
- ``stop_ids``: tokens that the rows train as the end of an answer
- ``measured``: ``eval_loss`` over ``eval_loss_rows`` of ``validation_rows``, ``exact_match`` over ``exact_match_rows``
  of ``test_rows``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raytune_lora import __version__
from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import HubModelConfig, RunConfig
from raytune_lora.models.stored import read_config, stored_as
from raytune_lora.models.tokenizer import trusted

RECORD = "record.json"
FORMAT = 1
_SNAPSHOTS = "snapshots"  # folder of the hub's cache: one folder a commit


def make_record(
    cfg: RunConfig,
    model_folder: Path,
    *,
    dtype: str,
    loader: str | None,
    template: dict[str, Any],
    stop_ids: list[int],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """The record of a run's adapter.

    Args:
        cfg: the run.
        model_folder: of its base model, on this node.
        dtype: of the base model's weights.
        loader: class of transformers that loads the base model; None where none does alone.
        template: ``prompts`` and ``rows``.
        stop_ids: of the token store.
        measured: the figures and their rows.
    """
    own = cfg.data.template.chat_template
    return {
        "format": FORMAT,
        "version": __version__,
        "base": base_of(cfg, model_folder) | {"loader": loader},
        "dtype": dtype,
        "quantization": to_plain(cfg.quantization),
        "method": to_plain(cfg.method),
        "template": {"kind": cfg.data.template.kind.value, "file": own and Path(own).name, **template},
        "stop_ids": stop_ids,
        "measured": measured,
    }


def base_of(cfg: RunConfig, model_folder: Path) -> dict[str, Any]:
    """Where anyone finds the base model: by its name on the hub and the commit, else by an absolute path."""
    model = cfg.model
    stored = stored_as(read_config(model_folder)) is not None
    base: dict[str, Any] = {"name": str(model_folder.absolute()), "revision": None}
    base |= {"trust_remote_code": trusted(model), "stored_quantized": stored}
    if isinstance(model, HubModelConfig) and model.path and not Path(model.path).expanduser().is_dir():
        commit = model_folder.name if model_folder.parent.name == _SNAPSHOTS else model.revision
        base |= {"name": model.path, "revision": commit}
    return base


def read_record(folder: Path) -> dict[str, Any]:
    """The record in an adapter's folder."""
    found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if found["format"] > FORMAT:
        raise ValueError(f"{folder / RECORD} is of format {found['format']}; this version knows up to {FORMAT}")
    return found
