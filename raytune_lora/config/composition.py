"""Hydra's and OmegaConf's part of composing: overrides to a node, and a node to dataclasses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from raytune_lora.config import schema, search
from raytune_lora.config.data import TemplateConfig
from raytune_lora.config.groups import conf_dir, own_dir, own_files
from raytune_lora.config.lists import as_list, as_pattern, keys_of
from raytune_lora.config.yaml_text import see_to_bounds

# what Hydra, OmegaConf and YAML raise at a bad override or file; a file that names itself has no end
REFUSAL = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError, RecursionError)
_COLUMNS = re.compile(r"\+{0,2}(data(\.mix\.\w+)?\.columns(\.\w+=.*|=\{.*\}))", re.DOTALL)
NO_WORD = "YAML reads a number as a number, and yes, no, on and off as true and false: write it in quotes"
NUMBERS = ("dict[str, int]", "dict[str, float]")
_PLAIN_GROUPS = {
    "data/template": TemplateConfig,
    "quantization": schema.QuantizationConfig,
    "training": schema.TrainingConfig,
    "deepspeed": schema.DeepSpeedConfig,
    "evaluation": schema.EvaluationConfig,
    "search": search.SearchConfig,
    "scheduler": search.SchedulerConfig,
    "budget": search.BudgetConfig,
    "confirm": search.ConfirmConfig,
    "cluster": schema.ClusterConfig,
    "disk": schema.DiskConfig,
    "tracking": schema.TrackingConfig,
}


def register() -> None:
    """Tell Hydra of the schema."""
    store = ConfigStore.instance()
    store.store(name="base_sweep", node=schema.SweepConfig)
    for group, variants in schema.VARIANTS.items():
        for cls in variants:
            store.store(group=group, name=f"base_{schema.kind_of(cls)}", node=cls)
    for group, cls in _PLAIN_GROUPS.items():
        store.store(group=group, name=f"base_{group.rpartition('/')[2]}", node=cls)


def composed(overrides: Sequence[str]) -> DictConfig:
    """The groups that the overrides choose, with what else they say; ``REFUSAL`` where that is no config."""
    GlobalHydra.instance().clear()
    own = [f"hydra.searchpath=['file://{folder}']"] if (folder := own_dir()) else []
    for file in own_files():
        _see_to_bounds(file, file.stat().st_mtime_ns)
    patterns = {o: found for o in overrides if (found := as_pattern(o, typed_keys(*NUMBERS)))}
    others = [merged(as_list(o, typed_keys("list["))) for o in overrides if o not in patterns]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        node = hydra_compose("config", overrides=[*own, *others])
    for key, numbers in patterns.values():
        OmegaConf.update(node, key, numbers, merge=False)
    return node


@lru_cache
def _see_to_bounds(file: Path, _changed: int) -> None:
    """Raise for a file of the user's own that would keep Hydra busy for ever."""
    with contextlib.suppress(yaml.YAMLError):  # which Hydra tells
        see_to_bounds(file.read_bytes(), str(file))


@lru_cache
def typed_keys(*kinds: str) -> set[str]:
    """Keys whose types begin so."""
    variants = [(group, cls) for group, classes in schema.VARIANTS.items() for cls in classes]
    groups_of = [*_PLAIN_GROUPS.items(), *variants]
    return {key for group, cls in groups_of for key in keys_of(cls, group.replace("/", "."), kinds)}


def merged(override: str) -> str:
    """An override of what is in a dictionary, as Hydra and OmegaConf want it.

    ``data.columns.output=reply`` is ``++data.columns.output=reply``, as the key may be new. ``+space.x={…}`` is
    ``+space={x: {…}}``: OmegaConf adds no dictionary at a typed path, but merges one.
    """
    if columns := _COLUMNS.fullmatch(override):
        return f"++{columns[1]}"
    return re.sub(r"^\+{1,2}space\.(\w+)=(.*)$", r"+space={\1: \2}", override, flags=re.DOTALL)


def to_object(node: Any) -> schema.SweepConfig:
    """A node as dataclasses; ``REFUSAL`` where it does not fit them."""
    try:
        cfg = OmegaConf.to_object(node)
    except AssertionError as error:  # all that OmegaConf says of a key in a file that is no text
        raise ConfigKeyError(f"a key is a word; {NO_WORD}") from error
    if not isinstance(cfg, schema.SweepConfig):
        raise TypeError(f"composed a {type(cfg).__name__}")
    if unknown := list(_unknown(cfg)):
        raise ConfigKeyError(f"unknown keys: {', '.join(unknown)}")
    return cfg


def _unknown(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths that no schema has: Hydra's ``+`` adds them even to typed sections."""
    declared = {f.name for f in fields(value)} if is_dataclass(value) else None
    for name, item in (vars(value) if declared is not None else value).items():
        if declared is not None and name not in declared:
            yield prefix + name
        elif is_dataclass(item) or isinstance(item, dict):
            yield from _unknown(item, f"{prefix}{name}.")
