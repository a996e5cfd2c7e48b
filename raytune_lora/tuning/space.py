"""The search space: which config keys a trial sets, and to what.

A dimension with ``when`` exists only where the keys it names have one of the values it lists: those of other dimensions
as drawn, all others as the config has them. So a point of the space is drawn key by key, each after those it depends
on. A dimension that does not exist in a trial leaves the config as it stands and is absent from the trial's parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar

import optuna
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytune_lora.config import lists
from raytune_lora.config.schema import VARIANTS, RunConfig, SweepConfig, kind_of
from raytune_lora.config.search import DimensionConfig, DimensionKind

Space = dict[str, DimensionConfig]
R = TypeVar("R", bound=RunConfig)

_FIXED = ("workers", "cpus_per_worker", "gpus_per_worker", "output", "cache", "resume")  # what a trial cannot choose
_FIXED_SECTIONS = (
    *("model", "data", "evaluation", "cluster", "tracking"),
    *("space", "search", "scheduler", "budget", "confirm"),
)


# --------------------------------------------------------------------------------------------------------------- points


def sample(trial: optuna.Trial, space: Space, cfg: RunConfig) -> dict[str, Any]:
    """A value for each key that the trial searches, by its dotted path."""
    return _walk(space, cfg, lambda d: trial._suggest(parameter(d), distribution(d)))


def configured_point(space: Space, cfg: RunConfig) -> dict[str, Any]:
    """The config as it stands, as the sampler's parameters: the first trial.

    A number outside its dimension is moved to the nearest value in it (``method.r=16`` to 8 in a space of 4 to 8). What
    has no nearest value, a name that is not among the choices or a key without a value, is left to the sampler.
    """
    point: dict[str, Any] = {}

    def choose(d: DimensionConfig) -> Any:
        value, factor = plain(lookup(cfg, d.key)), lookup(cfg, d.multiple_of) if d.multiple_of else 1
        if d.multiple_of and not (value is not None and factor):
            return None
        if nearest := _nearest(d, value / factor if d.multiple_of else value):
            point[parameter(d)] = nearest[0]
        return nearest[0] if nearest else None

    _walk(space, cfg, choose)
    return point


def settings(space: Space, cfg: RunConfig, point: dict[str, Any]) -> dict[str, Any]:
    """What a point, given as the sampler's parameters, sets the config's keys to, as ``apply`` takes it."""
    return _walk(space, cfg, lambda d: point.get(parameter(d)))


def fitting(space: Space, cfg: RunConfig, params: dict[str, Any]) -> dict[str, optuna.distributions.BaseDistribution]:
    """The distributions of a point, given as the sampler's parameters; empty where the space has no such point."""
    names: list[str] = []
    found: dict[str, optuna.distributions.BaseDistribution] = {}

    def choose(d: DimensionConfig) -> Any:
        name = parameter(d)
        names.append(name)
        if name in params and contains(d, params[name]):
            found[name] = distribution(d)
        return params[name] if name in found else None

    _walk(space, cfg, choose)
    return found if set(names) == found.keys() == params.keys() else {}


def points(space: Space, cfg: RunConfig) -> Iterator[dict[str, Any]]:
    """Every point of a space whose dimensions all have ``values``, as the sampler's parameters."""

    def rest(
        dimensions: list[DimensionConfig], drawn: dict[str, Any], point: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        if not dimensions:
            yield point
            return
        d, *later = dimensions
        if not _exists(d, drawn, cfg):
            yield from rest(later, drawn, point)
            return
        for value in values(d) or []:
            yield from rest(later, drawn | {d.key: _derived(d, value, drawn, cfg)}, point | {parameter(d): value})

    return rest(_ordered(space), {}, {})


def extremes(space: Space, cfg: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each dimension's name with its bounds or choices in turn, as ``apply`` takes them, and what it exists under."""
    owners = {d.key: d for d in space.values()}

    def conditions(d: DimensionConfig) -> dict[str, Any]:
        met: dict[str, Any] = {}
        for key, wanted in d.when.items():
            if key in owners and not any(_same(plain(lookup(cfg, key)), value) for value in wanted):
                met |= {**conditions(owners[key]), key: wanted[0]}
        return met

    for name, d in space.items():
        if _possible(d, space, cfg):
            under = conditions(d)
            for value in d.choices if d.kind is DimensionKind.categorical else [d.low, d.high]:
                yield name, {**under, d.key: _derived(d, value, under, cfg)}


def at_bounds(cfg: SweepConfig) -> list[SweepConfig]:
    """The config as it stands, and at each bound and choice of its dimensions."""
    return [cfg, *(apply(cfg, params) for _, params in extremes(cfg.space, cfg))]


def apply(cfg: R, params: dict[str, Any]) -> R:
    """A copy of the config with the parameters set."""
    changed = copy.deepcopy(cfg)
    for key, value in params.items():
        *path, leaf = key.split(".")
        section: Any = changed
        for name in path:
            section = getattr(section, name)
        current = getattr(section, leaf)
        typed = isinstance(current, (int, float, Enum)) and value is not None
        setattr(section, leaf, type(current)(value) if typed else lists.from_text(current, value))
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


def plain(value: Any) -> Any:
    """A config value as the sampler and the journal have it."""
    if isinstance(value, list):
        return lists.text_of(value)
    return value.value if isinstance(value, Enum) else value


# ------------------------------------------------------------------------------------------------------- one dimension


def parameter(d: DimensionConfig) -> str:
    """The sampler's own name of a dimension."""
    return f"{d.key} / {d.multiple_of}" if d.multiple_of else d.key


def distribution(d: DimensionConfig) -> optuna.distributions.BaseDistribution:
    """The dimension as Optuna has it.

    Raises:
        ValueError: it has no range.
    """
    if d.kind is DimensionKind.categorical:
        return optuna.distributions.CategoricalDistribution(tuple(d.choices))
    if d.low is None or d.high is None:
        raise ValueError(f"{d.key} has no range")
    if d.kind is DimensionKind.int:
        return optuna.distributions.IntDistribution(int(d.low), int(d.high), d.log, int(d.step or 1))
    return optuna.distributions.FloatDistribution(d.low, d.high, d.log, d.step)


def contains(d: DimensionConfig, value: Any) -> bool:
    """Whether the dimension takes the value."""
    if d.kind is DimensionKind.categorical:
        return any(_same(choice, value) for choice in d.choices)
    own = distribution(d)
    return _is_number(value) and own._contains(own.to_internal_repr(value))


def values(d: DimensionConfig) -> list[Any] | None:
    """All values of a dimension, or None where it is continuous."""
    if d.kind is DimensionKind.categorical:
        return list(d.choices)
    if d.low is None or d.high is None:
        return None
    if d.kind is DimensionKind.int:
        return list(range(int(d.low), int(d.high) + 1, int(d.step or 1)))
    if d.low == d.high:
        return [d.low]
    if d.step is None:
        return None
    low, step = Decimal(str(d.low)), Decimal(str(d.step))  # 0.15, not 0.15000000000000002
    return [float(low + n * step) for n in range(int((Decimal(str(d.high)) - low) / step) + 1)]


def _nearest(d: DimensionConfig, value: Any) -> list[Any]:
    """The dimension's value that is the same or, of numbers, the nearest; empty where there is none."""
    if d.kind is DimensionKind.categorical:
        same = [choice for choice in d.choices if _same(choice, value)]
        numbers = [choice for choice in d.choices if _is_number(choice)] if _is_number(value) else []
        return same[:1] or sorted(numbers, key=lambda choice: abs(choice - value))[:1]
    if not _is_number(value) or d.low is None or d.high is None:
        return []
    if contains(d, value):
        return [value]
    if all_values := values(d):
        return [min(all_values, key=lambda own: abs(own - value))]
    return [min(max(value, d.low), d.high)]


def _same(one: Any, other: Any) -> bool:
    if _is_number(one) and _is_number(other):
        return math.isclose(one, other, rel_tol=1e-9)
    return type(one) is type(other) and bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -------------------------------------------------------------------------------------------------- define by run


def _walk(space: Space, cfg: RunConfig, choose: Callable[[DimensionConfig], Any]) -> dict[str, Any]:
    """The values of the dimensions that exist, by key in the space's order; None for one leaves it to the config."""
    drawn: dict[str, Any] = {}
    for d in _ordered(space):
        if _exists(d, drawn, cfg):
            value = choose(d)
            if value is not None or (d.kind is DimensionKind.categorical and None in d.choices):
                drawn[d.key] = _derived(d, value, drawn, cfg)
    return {d.key: drawn[d.key] for d in space.values() if d.key in drawn}


def _derived(d: DimensionConfig, value: Any, drawn: dict[str, Any], cfg: RunConfig) -> Any:
    """What the key is set to: the value drawn, or that multiple of another key."""
    return value if d.multiple_of is None else value * _current(d.multiple_of, drawn, cfg)


def _exists(d: DimensionConfig, drawn: dict[str, Any], cfg: RunConfig) -> bool:
    return all(any(_same(_current(key, drawn, cfg), value) for value in wanted) for key, wanted in d.when.items())


def _current(key: str, drawn: dict[str, Any], cfg: RunConfig) -> Any:
    return drawn[key] if key in drawn else plain(lookup(cfg, key))


def _ordered(space: Space) -> list[DimensionConfig]:
    """The dimensions, each after those it depends on.

    Raises:
        CycleError: two depend on each other.
    """
    names = {d.key: name for name, d in space.items()}
    graph = {name: [names[key] for key in (*d.when, d.multiple_of or "") if key in names] for name, d in space.items()}
    return [space[name] for name in TopologicalSorter(graph).static_order()]


def _possible(d: DimensionConfig, space: Space, cfg: RunConfig) -> bool:
    """Whether the keys that are the same for all trials let the dimension exist."""
    searched = {other.key for other in space.values()}
    fixed = {key: wanted for key, wanted in d.when.items() if key not in searched}
    try:
        return all(any(_same(plain(lookup(cfg, key)), value) for value in wanted) for key, wanted in fixed.items())
    except KeyError:
        return True


# ------------------------------------------------------------------------------------------------------------- problems


def problems(space: Space, cfg: RunConfig) -> list[str]:
    """What is wrong with the space, each with the key as the user typed it.

    A dimension that cannot exist, as the keys it depends on are fixed otherwise (``when: {method.kind: [dora]}`` with
    another method), may name a key that the config does not have.
    """
    found: list[str] = []
    owners: dict[str, str] = {}
    possible = {name: _possible(dimension, space, cfg) for name, dimension in space.items()}
    for name, dimension in space.items():
        where = f"space.{name}"
        found += _range_problems(where, dimension) + _when_problems(where, dimension, space, cfg)
        found += _key_problems(where, dimension, cfg) if possible[name] else []
        if dimension.key in owners:
            found.append(f"{where}.key: {dimension.key} is searched by space.{owners[dimension.key]} already")
        owners[dimension.key] = name
    try:
        _ordered(space)
    except CycleError as error:
        circle = ", ".join(dict.fromkeys(f"space.{name}" for name in error.args[1]))
        found.append(f"space: {circle} depend on each other in a circle, by when or multiple_of; break it")
    if not space:
        found.append("space: it has no dimension; choose a group (space=lora) or add one (+space.x='{key: …}')")
    elif not found and not any(possible.values()):
        found.append("space: no dimension exists with this config: none has its when fulfilled; add one without")
    return found


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


def _when_problems(where: str, d: DimensionConfig, space: Space, cfg: RunConfig) -> list[str]:
    found: list[str] = []
    for key, wanted in d.when.items():
        at = f"{where}.when"
        if not wanted:
            found.append(f"{at}: {key} has no value listed, so that the dimension never exists; list those it needs")
        try:
            current = lookup(cfg, key)
        except KeyError:
            found.append(f"{at}: there is no config key {key!r} (for the method and model chosen)")
            continue
        if is_dataclass(current):
            found.append(f"{at}: {key} is a section; name one of its keys")
            continue
        wrong = [value for value in wanted if not _is_typed(cfg, key, value)]
        found += [f"{at}: {key} cannot be {value!r} ({_expected(key, current)} expected)" for value in wrong]
        for name, other in space.items():
            if other.key == key and not wrong and not _range_problems("", other):
                found += _never(at, f"space.{name}", other, wanted, current)
    return found


def _never(at: str, name: str, other: DimensionConfig, wanted: list[Any], current: Any) -> list[str]:
    """Which values another dimension never takes."""
    if other.multiple_of is not None:
        return [f"{at}: {name} is a multiple of {other.multiple_of}, and nothing can depend on it; name that key"]
    if values(other) is None:
        return [f"{at}: {name} is continuous and takes no value exactly; give it a step, or choices"]
    # where the other dimension does not exist, the key is as the config has it
    own = [plain(current)] if other.when else []
    never = [v for v in wanted if not contains(other, v) and not any(_same(v, value) for value in own)]
    takes = f"of {other.choices}" if other.choices else f"from {other.low} to {other.high}"
    return [f"{at}: {other.key} is never {value!r} ({name} is {takes})" for value in never]


def _is_typed(cfg: RunConfig, key: str, value: Any) -> bool:
    """Whether the schema's type of a key takes the value, and as it is."""
    section_path, _, leaf = key.rpartition(".")
    if section_path in VARIANTS and leaf == "kind":
        return value in map(kind_of, VARIANTS[section_path])
    section = OmegaConf.structured(lookup(cfg, section_path) if section_path else cfg)
    try:
        section[leaf] = lists.from_text(lookup(cfg, key), value)
    except (OmegaConfBaseException, ValueError, TypeError):
        return False
    kept = section[leaf]
    return _same(plain(list(kept) if OmegaConf.is_list(kept) else kept), value)


def _expected(key: str, current: Any) -> str:
    section, _, leaf = key.rpartition(".")
    if section in VARIANTS and leaf == "kind":
        return "one of " + ", ".join(map(kind_of, VARIANTS[section]))
    return (
        "one of " + ", ".join(e.value for e in type(current)) if isinstance(current, Enum) else type(current).__name__
    )


def _key_problems(where: str, d: DimensionConfig, cfg: RunConfig) -> list[str]:
    try:
        current = lookup(cfg, d.key)
    except KeyError:
        return [f"{where}.key: there is no config key {d.key!r} (for the method and model chosen)"]
    if is_dataclass(current):
        return [f"{where}.key: {d.key} is a section; name one of its keys"]
    section, _, leaf = d.key.partition(".")
    if d.key in _FIXED or section in _FIXED_SECTIONS or (section in VARIANTS and leaf == "kind"):
        return [f"{where}.key: {d.key} is the same for all trials and cannot be searched"]
    if d.multiple_of is not None:
        try:
            if not _is_number(lookup(cfg, d.multiple_of)):
                return [f"{where}.multiple_of: {d.multiple_of} is not a number"]
        except KeyError:
            return [f"{where}.multiple_of: there is no config key {d.multiple_of!r}"]
    return _type_problems(where, d, cfg)


def _type_problems(where: str, d: DimensionConfig, cfg: RunConfig) -> list[str]:
    """Whether the bounds or choices fit the key's type, as the schema has it."""
    section_path, _, leaf = d.key.rpartition(".")
    section = OmegaConf.structured(lookup(cfg, section_path) if section_path else cfg)
    current = lookup(cfg, d.key)
    bounds = [value for value in (d.low, d.high) if value is not None]
    for value in d.choices if d.kind is DimensionKind.categorical else bounds:
        whole = d.kind is DimensionKind.int or isinstance(current, int)
        try:
            whole = whole and value is not None and value == int(value)
            section[leaf] = int(value) if whole else lists.from_text(current, value)
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
            return [f"{where}: {d.key} cannot be {value!r} ({_expected(d.key, current)} expected)"]
    if d.kind is DimensionKind.float and isinstance(current, int) and not isinstance(current, bool):
        return [f"{where}.kind: {d.key} is a whole number; use kind: int"]
    return []
