"""What a point of the search space must fulfil before it is trained: relations between keys, and planned memory.

A proposal that breaks a constraint is no trial: the study is told at once that it is infeasible and by how much, which
TPE and GP learn from, and another one is asked for. The point of the config as it stands comes first, so it must be
feasible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raytune_lora.cluster.connect import smallest_gpu
from raytune_lora.config.schema import RunConfig, SweepConfig
from raytune_lora.config.search import Sampler
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError
from raytune_lora.models.methods.fit import model_problems
from raytune_lora.models.planned import measuring_memory, planned_memory, remedies, whole_in_four_bits
from raytune_lora.planning.memory import Memory
from raytune_lora.planning.shape import Shape
from raytune_lora.tuning import relations
from raytune_lora.tuning import space as spaces
from raytune_lora.tuning.relations import Unreadable

MEMORY = "memory_gb"  # the constraint's name; a relation's is its text
_KEY = "search.constraints"
_SHOWN = 200  # characters of a relation


@dataclass(frozen=True)
class MemoryLimit:
    """What the planned memory of a worker is held against."""

    gb: float
    shape: Shape  # of the base model
    length: int  # tokens of the longest row

    def plan(self, cfg: RunConfig) -> Memory:
        """The memory of each worker of a run on the sweep's data."""
        return planned_memory(cfg, self.shape, min(self.length, cfg.data.max_length))

    def measuring(self, cfg: RunConfig) -> Memory:
        """The same while the base model and the best one are measured."""
        return measuring_memory(cfg, self.shape, min(self.length, cfg.data.max_length))

    def holds(self, cfg: RunConfig) -> bool:
        """Whether a run fits, and its model too."""
        return self.plan(cfg).gb <= self.gb and not model_problems(cfg, self.shape)


class Constraints:
    """The constraints of a sweep; its config has none of ``problems``."""

    def __init__(self, cfg: SweepConfig, limit: MemoryLimit | None = None) -> None:
        """
        Args:
            cfg: of the sweep.
            limit: of memory; None for none.
        """
        self._cfg = cfg
        self._relations = [relations.parse(text) for text in cfg.search.constraints.relations]
        self._limit = limit

    def broken(self, params: dict[str, Any]) -> dict[str, float]:
        """The constraints that a point breaks, by name, and by how much; of memory, as a share of the limit.

        Args:
            params: of a trial, by dotted key.
        """
        if not self._relations and self._limit is None:
            return {}
        cfg = spaces.apply(self._cfg, params)
        found = {relation.text: relation.broken_by(cfg) for relation in self._relations}
        if self._limit is not None:
            found[MEMORY] = self._limit.plan(cfg).gb / self._limit.gb - 1
        return {name: amount for name, amount in found.items() if amount > 0}

    def broken_at(self, point: dict[str, Any]) -> dict[str, float]:
        """The same of a point given as the sampler's parameters."""
        return self.broken(spaces.settings(self._cfg.space, self._cfg, point))

    def check(self) -> None:
        """Refuse what can be known to be infeasible once the model and the data are there.

        Raises:
            UserError: the config as it stands does not fit, or a grid has fewer feasible points than trials.
        """
        found = [] if self._limit is None else _memory_problems(self._first(), self._limit)
        found = found or self._grid_problems()
        if found:
            raise UserError(found)

    def _first(self) -> SweepConfig:
        """The config of the first trial."""
        cfg = self._cfg
        return spaces.apply(cfg, spaces.settings(cfg.space, cfg, spaces.configured_point(cfg.space, cfg)))

    def relation_problems(self) -> list[str]:
        """Relations that the first trial breaks, and a grid that the relations leave too small."""
        cfg = self._first()
        found = [
            f"{_KEY}.relations: {relation.text!r} does not hold for the config as it stands, which is tried first "
            f"({relation.shown(cfg)}); change the keys, or the relation"
            for relation in self._relations
            if relation.broken_by(cfg)
        ]
        return found or self._grid_problems()

    def _grid_problems(self) -> list[str]:
        cfg = self._cfg
        if cfg.search.sampler is not Sampler.grid or not (self._relations or self._limit):
            return []
        count = sum(not self.broken_at(point) for point in spaces.points(cfg.space, cfg))
        if cfg.search.trials <= count:
            return []
        return [
            f"search.trials must be <= the {count} points of the grid that fulfil {_KEY} (got {cfg.search.trials}); "
            f"set search.trials={count}, give the space more steps or choices, or loosen the constraints"
        ]


def problems(cfg: SweepConfig) -> list[str]:
    """What is wrong with the relations: seen before the model and the data are there."""
    found = []
    for text in cfg.search.constraints.relations:
        try:
            own = relations.problems(relations.parse(text), cfg)
        except Unreadable as error:
            own = [str(error)]
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        found += [f"{_KEY}.relations: {shown!r} {problem}" for problem in own]
    return found or Constraints(cfg).relation_problems()


def memory_limit(cfg: SweepConfig, shape: Shape, store: TokenStore) -> MemoryLimit | None:
    """The limit of memory that a sweep or run has; None for none.

    Args:
        cfg: with the limit, or without: then it is that of the smallest GPU, if that is known, and none on the CPU.
        shape: of the base model.
        store: the data, for its longest row.
    """
    gb = cfg.search.constraints.memory_gb
    if gb is None and cfg.gpus_per_worker:
        gb = smallest_gpu(cfg.cluster)
    if not gb:
        return None
    length = max(int(store.lengths(split).max()) for split in ("train", "validation"))
    return MemoryLimit(gb, shape, length)


def _memory_problems(cfg: SweepConfig, limit: MemoryLimit) -> list[str]:
    plan = limit.plan(cfg)
    if plan.gb <= limit.gb:
        return _measuring_problems(cfg, limit)
    ways = remedies(cfg, limit.holds)
    able = "; or ".join(ways) or "nothing that is known here; take a smaller model"
    return [
        f"{_limit_named(cfg, limit)}: a worker's planned memory is {plan.gb:.3g} GB "
        f"(micro batch {cfg.training.micro_batch}, rows of up to {min(limit.length, cfg.data.max_length)} tokens)\n"
        f"{plan.table()}\n  what would fit: {able} ({_KEY}.memory_gb=0 sets no limit)"
    ]


def _limit_named(cfg: SweepConfig, limit: MemoryLimit) -> str:
    asked = cfg.search.constraints.memory_gb
    return f"{_KEY}.memory_gb={asked:g}" if asked else f"{_KEY}.memory_gb: the smallest GPU has {limit.gb:.1f} GB"


def _measuring_problems(cfg: SweepConfig, limit: MemoryLimit) -> list[str]:
    """What trains and cannot be measured."""
    plan, asked = limit.measuring(cfg), cfg.evaluation
    if plan.gb <= limit.gb or not asked.generate_rows:
        return []
    able = "evaluation.generate_rows=0"
    for batch in range(min(asked.generate_batch, asked.generate_rows) - 1, 0, -1):
        changed = replace(cfg, evaluation=replace(asked, generate_batch=batch))
        if limit.measuring(changed).gb <= limit.gb:
            able = f"evaluation.generate_batch={batch}"
            break
    return [
        f"{_limit_named(cfg, limit)}: while evaluation.generate_batch={asked.generate_batch} prompts are answered at "
        f"once, a worker's planned memory is {plan.gb:.3g} GB; set {able} ({_KEY}.memory_gb=0 sets no limit)"
    ]


def advice(cfg: SweepConfig, limit: MemoryLimit | None) -> list[str]:
    """What would be faster than the config, and fits as well."""
    if limit is None or (changed := whole_in_four_bits(cfg, limit.holds)) is None:
        return []
    return [
        f"quantization=nf4 deepspeed=zero2 would keep the whole model on each GPU ({limit.plan(changed).gb:.3g} of "
        f"{limit.gb:.3g} GB); under deepspeed=zero3 the workers send each other all weights in each forward and "
        "backward pass"
    ]
