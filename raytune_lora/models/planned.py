"""The planned memory of a run, and what would make it smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from raytune_lora.config import validate
from raytune_lora.config.schema import Offload, Quantization, RunConfig
from raytune_lora.models.methods import method_for
from raytune_lora.models.methods.fit import problems as method_problems
from raytune_lora.models.stored import problems as stored_problems
from raytune_lora.planning.memory import Memory, plan_measuring, plan_memory
from raytune_lora.planning.shape import Shape

_SHORTEST = 64  # tokens below which no shorter rows are proposed


def planned_memory(cfg: RunConfig, shape: Shape, length: int) -> Memory:
    """The memory of each worker of a run.

    Args:
        cfg: the run.
        shape: of its base model.
        length: tokens of the longest row.
    """
    return plan_memory(cfg, shape, method_for(cfg.method).added(shape), length)


def measuring_memory(cfg: RunConfig, shape: Shape, length: int) -> Memory:
    """The same while models are measured."""
    return plan_measuring(cfg, shape, method_for(cfg.method).added(shape), length)


def whole_in_four_bits(cfg: RunConfig, fits: Callable[[RunConfig], bool]) -> RunConfig | None:
    """A run under ZeRO-3 with its base model whole on each GPU in 4 bits instead; None where that is no way.

    Args:
        cfg: the run.
        fits: whether a changed run is small enough.
    """
    divided = cfg.deepspeed.enabled and cfg.deepspeed.stage == 3 and cfg.workers > 1
    if not divided or cfg.quantization.kind is not Quantization.none:
        return None
    changed = copy.deepcopy(cfg)
    changed.quantization.kind = Quantization.nf4
    changed.deepspeed.stage, changed.deepspeed.hpz, changed.deepspeed.offload_weights = 2, 1, Offload.none
    return changed if _works(changed) and fits(changed) else None


def remedies(cfg: RunConfig, fits: Callable[[RunConfig], bool]) -> list[str]:
    """Overrides that make a run fit, each enough by itself; where none is, one set of several.

    Args:
        cfg: the run, too large.
        fits: whether a changed run is small enough.
    """
    steps = [step for step in _STEPS if next(step(cfg), None)]
    alone = [next((words for words, changed in step(cfg) if _works(changed) and fits(changed)), "") for step in steps]
    if found := [words for words in alone if words]:
        return found
    together: list[str] = []
    for step in steps:
        able = [(words, changed) for words, changed in step(cfg) if _works(changed)]
        enough = next(((words, changed) for words, changed in able if fits(changed)), None)
        if enough is not None:
            return [" ".join([*together, enough[0]])]
        if able:
            together.append(able[-1][0])
            cfg = able[-1][1]
    return []


def _works(cfg: RunConfig) -> bool:
    return not (validate.problems(cfg) or method_problems(cfg) or stored_problems(cfg))


Step = Iterator[tuple[str, RunConfig]]


def _checkpointing(cfg: RunConfig) -> Step:
    if not cfg.training.gradient_checkpointing:
        changed = copy.deepcopy(cfg)
        changed.training.gradient_checkpointing = True
        yield "training.gradient_checkpointing=true", changed


def _micro_batch(cfg: RunConfig) -> Step:
    """From the largest down."""
    for size in range(cfg.training.micro_batch - 1, 0, -1):
        if cfg.training.global_batch % (size * cfg.workers) == 0:
            changed = copy.deepcopy(cfg)
            changed.training.micro_batch = size
            yield f"training.micro_batch={size}", changed


def _four_bits(cfg: RunConfig) -> Step:
    if cfg.quantization.kind in (Quantization.none, Quantization.int8):
        changed = copy.deepcopy(cfg)
        changed.quantization.kind = Quantization.nf4
        yield "quantization=nf4", changed


def _offload(cfg: RunConfig) -> Step:
    if cfg.gpus_per_worker and cfg.deepspeed.offload_optimizer is Offload.none:
        changed = copy.deepcopy(cfg)
        changed.deepspeed.enabled, changed.deepspeed.stage = True, 2
        changed.deepspeed.offload_optimizer = Offload.cpu
        yield "deepspeed=zero2_offload", changed


def _zero3(cfg: RunConfig) -> Step:
    if cfg.workers > 1 and not (cfg.deepspeed.enabled and cfg.deepspeed.stage == 3):
        changed = copy.deepcopy(cfg)
        changed.deepspeed.enabled, changed.deepspeed.stage = True, 3
        yield "deepspeed=zero3", changed


def _shorter(cfg: RunConfig) -> Step:
    length = cfg.data.max_length // 2
    while length >= _SHORTEST:
        changed = copy.deepcopy(cfg)
        changed.data.max_length = length
        yield f"data.max_length={length}", changed
        length //= 2


_STEPS: tuple[Callable[[RunConfig], Step], ...] = (
    _checkpointing,
    _micro_batch,
    _four_bits,
    _zero3,
    _offload,
    _shorter,
)
