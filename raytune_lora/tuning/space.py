"""The search space: which config keys a trial sets, and to what."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import optuna
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytune_lora.config.schema import RunConfig
from raytune_lora.config.search import DimensionConfig, DimensionKind

Space = dict[str, DimensionConfig]
R = TypeVar("R", bound=RunConfig)

_FIXED = ("workers", "cpus_per_worker", "gpus_per_worker", "output", "cache")  # what a trial cannot choose
_FIXED_SECTIONS = ("model", "data", "evaluation", "cluster")


def problems(space: Space, cfg: RunConfig) -> list[str]:
    """What is wrong with the space, each with the key as the user typed it."""
    found: list[str] = []
    owners: dict[str, str] = {}
    for name, dimension in space.items():
        where = f"space.{name}"
        found += _range_problems(where, dimension) + _key_problems(where, dimension, cfg)
        if dimension.key in owners:
            found.append(f"{where}.key: {dimension.key} is searched by space.{owners[dimension.key]} already")
        owners[dimension.key] = name
    if not space:
        found.append("space: it has no dimension; choose a group (space=lora) or add one (+space.x='{key: …}')")
    return found


def sample(trial: optuna.Trial, space: Space, cfg: RunConfig) -> dict[str, Any]:
    """A value for each key of the space, by its dotted path."""
    drawn = {d.key: _draw(trial, d) for d in space.values() if d.multiple_of is None}
    for dimension in space.values():
        if dimension.multiple_of is not None:
            base = drawn.get(dimension.multiple_of, lookup(cfg, dimension.multiple_of))
            drawn[dimension.key] = _draw(trial, dimension) * base
    return {d.key: drawn[d.key] for d in space.values()}


def configured_point(space: Space, cfg: RunConfig) -> dict[str, Any]:
    """The config as it stands, as the sampler's parameters: the first trial. Values outside the space are left out."""
    point = {}
    for dimension in space.values():
        value = lookup(cfg, dimension.key)
        factor = 1 if dimension.multiple_of is None else lookup(cfg, dimension.multiple_of)
        if value is None or not factor:
            continue
        if dimension.multiple_of is not None:
            value = value / factor
        distribution = _distribution(dimension)
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            matches = [choice for choice in distribution.choices if choice == value]
            if matches:
                point[_parameter(dimension)] = matches[0]
        elif distribution._contains(distribution.to_internal_repr(value)):
            point[_parameter(dimension)] = value
    return point


def apply(cfg: R, params: dict[str, Any]) -> R:
    """A copy of the config with the parameters set."""
    changed = copy.deepcopy(cfg)
    for key, value in params.items():
        *path, leaf = key.split(".")
        section: Any = changed
        for name in path:
            section = getattr(section, name)
        current = getattr(section, leaf)
        setattr(section, leaf, type(current)(value) if isinstance(current, (int, float)) else value)
    return changed


def lookup(cfg: RunConfig, key: str) -> Any:
    """The value at a dotted path.

    Raises:
        KeyError: there is none.
    """
    value: Any = cfg
    for name in key.split("."):
        if not is_dataclass(value) or name not in {f.name for f in fields(value)}:
            raise KeyError(key)
        value = getattr(value, name)
    return value


def _parameter(dimension: DimensionConfig) -> str:
    """The sampler's own name of a dimension."""
    return f"{dimension.key} / {dimension.multiple_of}" if dimension.multiple_of else dimension.key


def _distribution(d: DimensionConfig) -> optuna.distributions.BaseDistribution:
    if d.kind is DimensionKind.categorical:
        return optuna.distributions.CategoricalDistribution(tuple(d.choices))
    if d.low is None or d.high is None:
        raise ValueError(f"{d.key} has no range")
    if d.kind is DimensionKind.int:
        return optuna.distributions.IntDistribution(int(d.low), int(d.high), d.log, int(d.step or 1))
    return optuna.distributions.FloatDistribution(d.low, d.high, d.log, d.step)


def _draw(trial: optuna.Trial, dimension: DimensionConfig) -> Any:
    return trial._suggest(_parameter(dimension), _distribution(dimension))


def _range_problems(where: str, d: DimensionConfig) -> list[str]:
    if d.kind is DimensionKind.categorical:
        return [] if d.choices else [f"{where}.choices: a categorical dimension needs at least one choice"]
    if d.low is None or d.high is None:
        return [f"{where}: a {d.kind.value} dimension needs low and high (got low={d.low}, high={d.high})"]
    if not all(math.isfinite(value) for value in (d.low, d.high, d.step or 0)):
        return [f"{where}: low, high and step must be finite (got low={d.low}, high={d.high}, step={d.step})"]
    found = []
    if d.high < d.low:
        found.append(f"{where}.high must be >= low (got low={d.low:g}, high={d.high:g})")
    if d.log and d.low <= 0:
        found.append(f"{where}.low must be > 0 on a log scale (got {d.low:g})")
    if d.log and d.step is not None:
        found.append(f"{where}: log and step exclude each other (got step={d.step:g})")
    if d.step is not None and d.step <= 0:
        found.append(f"{where}.step must be > 0 (got {d.step:g})")
    if d.kind is DimensionKind.int and (d.low != int(d.low) or d.high != int(d.high)):
        found.append(f"{where}: an int dimension has whole bounds (got low={d.low:g}, high={d.high:g})")
    if d.kind is DimensionKind.int and d.step and d.step != int(d.step):
        found.append(f"{where}.step must be whole in an int dimension (got {d.step:g})")
    return found


def _key_problems(where: str, d: DimensionConfig, cfg: RunConfig) -> list[str]:
    try:
        current = lookup(cfg, d.key)
    except KeyError:
        return [f"{where}.key: there is no config key {d.key!r} (for the method and model chosen)"]
    if is_dataclass(current):
        return [f"{where}.key: {d.key} is a section; name one of its keys"]
    if (
        d.key in _FIXED
        or d.key.partition(".")[0] in _FIXED_SECTIONS
        or (hasattr(cfg, "space") and d.key.startswith(("space", "search", "scheduler", "resume")))
    ):
        return [f"{where}.key: {d.key} is the same for all trials and cannot be searched"]
    if d.multiple_of is not None:
        try:
            if not isinstance(lookup(cfg, d.multiple_of), (int, float)):
                return [f"{where}.multiple_of: {d.multiple_of} is not a number"]
        except KeyError:
            return [f"{where}.multiple_of: there is no config key {d.multiple_of!r}"]
    return _type_problems(where, d, cfg)


def _type_problems(where: str, d: DimensionConfig, cfg: RunConfig) -> list[str]:
    """Whether the bounds or choices fit the key's type, as the schema has it."""
    section_path, _, leaf = d.key.rpartition(".")
    section = OmegaConf.structured(lookup(cfg, section_path) if section_path else cfg)
    values = d.choices if d.kind is DimensionKind.categorical else [d.low, d.high]
    for value in values:
        if value is None:
            continue
        whole = d.kind is DimensionKind.int or isinstance(lookup(cfg, d.key), int)
        try:
            section[leaf] = int(value) if whole and value == int(value) else value
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
            return [f"{where}: {d.key} cannot be {value!r} ({type(lookup(cfg, d.key)).__name__} expected)"]
    if (
        d.kind is DimensionKind.float
        and isinstance(lookup(cfg, d.key), int)
        and not isinstance(lookup(cfg, d.key), bool)
    ):
        return [f"{where}.kind: {d.key} is a whole number; use kind: int"]
    return []
