"""From Hydra's groups and the user's overrides to one typed ``SweepConfig``, and back to a file.

Hydra only composes here: it never changes the working directory, makes folders or sets up logging.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from raytune_lora.config import schema, search
from raytune_lora.config.data import TemplateConfig
from raytune_lora.config.groups import conf_dir, groups, own_dir, own_files
from raytune_lora.config.lists import as_list, as_pattern, keys_of
from raytune_lora.config.typed import typed
from raytune_lora.config.yaml_text import read_yaml
from raytune_lora.errors import UserError

T = TypeVar("T")

_Refusal = (HydraException, OmegaConfBaseException, ValueError)  # what Hydra and OmegaConf raise at a bad override
_NUMBERS = ("dict[str, int]", "dict[str, float]")
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


def compose(overrides: Sequence[str]) -> schema.SweepConfig:
    """Compose the config of a sweep.

    Args:
        overrides: as typed on the command line, such as ``experiment=quickstart`` or ``method.r=8``.

    Raises:
        UserError: an override has no such key, no such choice or the wrong type; all of them at once.
    """
    _register()
    if own := [o for o in overrides if re.match(r"[+~]*hydra[./=@]", o)]:
        raise UserError(f"{own[0]}: Hydra only composes the config here; it has no keys of its own to set")
    try:
        return _to_object(_compose(overrides))
    except _Refusal as error:
        raise UserError(_explain(overrides, error)) from error


def dump(cfg: schema.RunConfig) -> str:
    """The config as YAML that ``load`` reads back."""
    return yaml.safe_dump(to_plain(cfg), sort_keys=False, allow_unicode=True)


def load(path: Path) -> schema.SweepConfig:
    """Read a config that ``dump`` wrote.

    Raises:
        UserError: the file is missing or does not fit this version's schema.
    """
    try:
        return parse(path.read_text(), str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error


def parse(text: str, path: str) -> schema.SweepConfig:
    """The config in a text that ``dump`` wrote.

    Args:
        text: of the file.
        path: of the file, for what is said of it.

    Raises:
        UserError: it does not fit this version's schema.
    """
    try:
        raw = _as_text(read_yaml(text, path))
        node = OmegaConf.structured(schema.SweepConfig)
        for group in schema.VARIANTS:
            node[group] = OmegaConf.structured(schema.variant(group, raw[group]["kind"]))
        return _to_object(OmegaConf.merge(node, raw))
    except (OmegaConfBaseException, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a config of this version of raytune-lora: {error}") from error


def _as_text(value: Any) -> Any:
    """What was read, with each ``${`` meant as it stands: ``dump`` has resolved all, and a folder may be another's."""
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def to_plain(value: Any) -> Any:
    """Dataclasses and enums as dicts and strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def from_plain(cls: type[T], plain: dict[str, Any]) -> T:
    """A dataclass of the schema from what ``to_plain`` made of it.

    Raises:
        OmegaConfBaseException: it does not fit this version's schema.
    """
    made: T = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain))  # type: ignore[assignment]
    return made


def keys(cfg: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted path of a config's leaves and sections."""
    plain = to_plain(cfg) if prefix == "" else cfg
    for name, value in plain.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="base_sweep", node=schema.SweepConfig)
    for group, variants in schema.VARIANTS.items():
        for cls in variants:
            store.store(group=group, name=f"base_{schema.kind_of(cls)}", node=cls)
    for group, cls in _PLAIN_GROUPS.items():
        store.store(group=group, name=f"base_{group.rpartition('/')[2]}", node=cls)


def _compose(overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    own = [f"hydra.searchpath=['file://{folder}']"] if (folder := own_dir()) else []
    for file in own_files():
        _see_to_bounds(file, file.stat().st_mtime_ns)
    patterns = {o: found for o in overrides if (found := as_pattern(o, _keys(*_NUMBERS)))}
    others = [_merged(as_list(o, _keys("list["))) for o in overrides if o not in patterns]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = hydra_compose("config", overrides=[*own, *others])
    for key, numbers in patterns.values():
        OmegaConf.update(composed, key, numbers, merge=False)
    return composed


@lru_cache
def _see_to_bounds(file: Path, _changed: int) -> None:
    """Raise for a file of the user's own that would keep Hydra busy for ever."""
    with contextlib.suppress(yaml.YAMLError):  # which Hydra tells
        read_yaml(file.read_bytes(), str(file))


@lru_cache
def _keys(*kinds: str) -> set[str]:
    """Keys whose types begin so."""
    variants = [(group, cls) for group, classes in schema.VARIANTS.items() for cls in classes]
    groups_of = [*_PLAIN_GROUPS.items(), *variants]
    return {key for group, cls in groups_of for key in keys_of(cls, group.replace("/", "."), kinds)}


def _merged(override: str) -> str:
    """``+space.x={…}`` as ``+space={x: {…}}``: OmegaConf adds no dictionary at a typed path, but merges one."""
    return re.sub(r"^\+{1,2}space\.(\w+)=(.*)$", r"+space={\1: \2}", override, flags=re.DOTALL)


def _to_object(node: Any) -> schema.SweepConfig:
    cfg = OmegaConf.to_object(node)
    if not isinstance(cfg, schema.SweepConfig):
        raise TypeError(f"composed a {type(cfg).__name__}")
    if unknown := list(_unknown(cfg)):
        raise OmegaConfBaseException(f"unknown keys: {', '.join(unknown)}")
    return cfg


def _unknown(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths that no schema has: Hydra's ``+`` adds them even to typed sections."""
    declared = {f.name for f in fields(value)} if is_dataclass(value) else None
    for name, item in (vars(value) if declared is not None else value).items():
        if declared is not None and name not in declared:
            yield prefix + name
        elif is_dataclass(item) or isinstance(item, dict):
            yield from _unknown(item, f"{prefix}{name}.")


# ------------------------------------------------------------------------------------------------ errors, made readable


def _explain(overrides: Sequence[str], error: Exception) -> list[str]:
    """Each faulty override's own problem; the error as it came where none is at fault alone."""
    choices = [o for o in overrides if o.partition("=")[0].lstrip("+~") in groups()]
    problems = []
    for override in choices:
        if problem := _problem([], override):
            problems.append(problem)
    if not problems:
        for override in [o for o in overrides if o not in choices]:
            if problem := _problem(choices, override):
                problems.append(problem)
    return problems or [_first_line(error)]


def _problem(choices: Sequence[str], override: str) -> str | None:
    try:
        pattern = as_pattern(override, _keys(*_NUMBERS))
        listed = as_list(override, _keys("list["))
        where = pattern[0] if pattern else OverridesParser.create().parse_override(listed).key_or_group
    except HydraException:
        key, _, value = override.partition("=")
        quoted = typed(key or "key", value or "value")
        return f"{override!r} is not an override: write key=value, and a value with unusual signs in quotes: {quoted}"
    try:
        _to_object(_compose([*choices, override]))
        return None
    except _Refusal as error:
        return _explain_one(choices, override, where, error)


def _explain_one(choices: Sequence[str], override: str, key: str, error: Exception) -> str:
    if key in groups():
        name = override.partition("=")[2]
        if name in groups()[key]:
            return f"{override}: a choice is written {key}={name}"
        near = difflib.get_close_matches(name, groups()[key], n=1)
        hint = f" Did you mean {key}={near[0]}?" if near else ""
        return f"{key}: there is no {name!r}.{hint} Known: {', '.join(groups()[key])}."
    if (group := key.replace(".", "/")) in groups():
        name = override.partition("=")[2]
        return f"{key} is a group: choose one with {group}=<name> (got {name!r}; known: {', '.join(groups()[group])})"
    known = sorted({*keys(_to_plain_defaults(tuple(choices))), *groups()})
    if key not in known and _merged(override) == override:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        by_leaf = difflib.get_close_matches(key.split(".")[-1], {k.split(".")[-1] for k in known}, n=1, cutoff=0.6)
        near += [k for k in known if by_leaf and k.split(".")[-1] == by_leaf[0] and k not in near][:2]
        hint = f" Did you mean {' or '.join(near[:3])}?" if near else ""
        return f"{key}: unknown key.{hint} `--cfg job` prints all keys."
    value = override.partition("=")[2]
    if "Ambiguous value" in str(error):
        return f"{key}: a value with a comma in it is written in quotes: {typed(key, value)} (got {value!r})"
    if isinstance(_cause(error), InterpolationKeyError):
        return f"{key}: {_first_line(_cause(error))} (got {value!r}; as text it is written {typed(key, value)})"
    return f"{key}: {_first_line(_cause(error))} (got {value!r})"


@lru_cache
def _to_plain_defaults(choices: tuple[str, ...]) -> dict[str, Any]:
    plain = OmegaConf.to_container(_compose(choices), resolve=False)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^Error merging override \S+: ?", "", line)
