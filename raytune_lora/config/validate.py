"""Whether a config makes sense: each section by itself, then across sections. Types have been checked by composing."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

from raytune_lora.config.data import Action, FileDataConfig
from raytune_lora.config.method_rules import problems as method_problems
from raytune_lora.config.method_rules import target_problems
from raytune_lora.config.schema import (
    Attention,
    Offload,
    Optimizer,
    Quantization,
    RunConfig,
    SweepConfig,
    TinyModelConfig,
    TrackingConfig,
)
from raytune_lora.config.search import CHANGEABLE, Sampler, Scheduler

# the schedules of transformers that need no further arguments
LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "inverse_sqrt", "linear")
# Findings whose rows cannot be trained on.
UNUSABLE = ("unreadable", "missing_fields", "wrong_types", "empty_fields", "nothing_trained")
TRACKERS = ("tensorboard", "wandb", "mlflow", "ray")

_Rule = tuple[Callable[[float], bool], str]  # whether a value holds, and the rule in words
_POSITIVE: _Rule = (lambda v: v > 0, "> 0")
_COUNT: _Rule = (lambda v: v >= 1, ">= 1")
_SHARE: _Rule = (lambda v: 0 <= v < 1, ">= 0 and < 1")
_NOT_NEGATIVE: _Rule = (lambda v: v >= 0, ">= 0")

_RANGES: dict[str, _Rule] = {
    "workers": _COUNT,
    "cpus_per_worker": _COUNT,
    "gpus_per_worker": (lambda v: v in (0, 1), "0 or 1: a worker trains on one GPU (workers=<GPUs>)"),
    "training.learning_rate": _POSITIVE,
    "training.global_batch": _COUNT,
    "training.micro_batch": _COUNT,
    "training.epochs": _POSITIVE,
    "training.max_steps": _COUNT,
    "training.warmup": _SHARE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.max_grad_norm": _POSITIVE,
    "training.seed": _NOT_NEGATIVE,
    "training.patience": _COUNT,
    "training.keep_checkpoints": _COUNT,
    "deepspeed.persistent": _NOT_NEGATIVE,
    "deepspeed.stage": (lambda v: v in (0, 1, 2, 3), "0, 1, 2 or 3"),
    "deepspeed.hpz": _COUNT,
    "evaluation.every": _COUNT,
    "evaluation.loss_rows": _NOT_NEGATIVE,
    "evaluation.final_rows": _NOT_NEGATIVE,
    "evaluation.generate_rows": _NOT_NEGATIVE,
    "evaluation.generate_batch": _COUNT,
    "evaluation.max_new_tokens": _COUNT,
    "evaluation.examples": _NOT_NEGATIVE,
    "cluster.object_store_mb": (lambda v: v >= 80, ">= 80"),
    "cluster.retries": _NOT_NEGATIVE,
    "cluster.lease": _COUNT,
    "disk.trial_gb": _POSITIVE,
    "disk.sweep_gb": _POSITIVE,
    "disk.keep_best": _COUNT,
    "data.max_length": (lambda v: v >= 8, ">= 8"),
    "data.validation": (lambda v: 0 < v < 1, "> 0 and < 1"),
    "data.test": _SHARE,
    "data.rows": _COUNT,
    "data.processes": _COUNT,
    "data.quality.similarity": (lambda v: 0 < v <= 1, "> 0 and <= 1"),
    "data.quality.max_dropped": (lambda v: 0 <= v <= 1, ">= 0 and <= 1"),
    "data.korean": (lambda v: 0 <= v <= 1, ">= 0 and <= 1"),
    "model.layers": _COUNT,
    "model.hidden": _COUNT,
    "model.heads": _COUNT,
    "method.r": _COUNT,
    "method.alpha": _POSITIVE,
    "method.dropout": _SHARE,
    "method.iterations": _COUNT,
    "method.rho": (lambda v: v >= 1, ">= 1"),
    "method.samples": _COUNT,
    "method.ratio": _POSITIVE,
    "method.tau_range": _POSITIVE,
    "method.tau_steps": (lambda v: 1 <= v <= 127, ">= 1 and <= 127"),
    "method.target_r": _COUNT,
    "method.start": _SHARE,
    "method.settle": _SHARE,
    "method.orthogonality": _NOT_NEGATIVE,
    "method.initial": _POSITIVE,
    "method.seed": _NOT_NEGATIVE,
    "method.width": _COUNT,
    "method.virtual_tokens": _COUNT,
    "method.projection": _COUNT,
    "method.l0_weight": _NOT_NEGATIVE,
    "method.sparsity": _SHARE,
    "method.factor": (lambda v: v == -1 or v >= 1, "-1 or >= 1"),
    "quantization.int8_threshold": _NOT_NEGATIVE,
    "search.trials": _COUNT,
    "search.concurrent": _COUNT,
    "search.startup_trials": _NOT_NEGATIVE,
    "search.random_share": (lambda v: v is None or 0 <= v <= 1, "null, or >= 0 and <= 1"),
    "search.seed": _NOT_NEGATIVE,
    "search.stalled": _POSITIVE,
    "search.constraints.memory_gb": _NOT_NEGATIVE,
    "scheduler.grace": _COUNT,
    "scheduler.reduction": (lambda v: v > 1, "> 1"),
    "scheduler.population": (lambda v: v >= 2, ">= 2"),
    "budget.hours": _POSITIVE,
    "budget.wall_hours": _POSITIVE,
    "budget.gpu_hours": _POSITIVE,
    "budget.target": _POSITIVE,
    "budget.patience": _COUNT,
    "confirm.top": _NOT_NEGATIVE,
    "confirm.seeds": (lambda v: v >= 2, ">= 2"),
}


def problems(cfg: RunConfig, *, here: bool = True) -> list[str]:
    """All that is wrong, each naming the key as the user types it; empty where nothing is.

    Args:
        cfg: composed.
        here: whether it is to run on this machine, with what is installed here.
    """
    found = [*_range_problems(cfg), *_choice_problems(cfg, here), *target_problems(cfg.method)]
    if not found:
        found += [*_model_problems(cfg), *method_problems(cfg.method), *_batch_problems(cfg), *_data_problems(cfg)]
        found += _deepspeed_problems(cfg)
        if isinstance(cfg, SweepConfig):
            found += _sweep_problems(cfg)
    return found


def _range_problems(cfg: RunConfig) -> list[str]:
    found = []
    for key, (holds, rule) in _RANGES.items():
        value: Any = cfg
        for name in key.split("."):
            value = getattr(value, name, None)
        if value is not None and not (math.isfinite(value) and holds(value)):
            found.append(f"{key} must be {rule} (got {value:g})")
    return found


def _choice_problems(cfg: RunConfig, here: bool) -> list[str]:
    found = []
    if cfg.training.lr_scheduler not in LR_SCHEDULERS:
        known = ", ".join(LR_SCHEDULERS)
        found.append(f"training.lr_scheduler: there is no {cfg.training.lr_scheduler!r}; known: {known}")
    if cfg.training.optimizer is not Optimizer.adamw and not cfg.gpus_per_worker:
        found.append(
            f"training.optimizer={cfg.training.optimizer.value} needs a GPU (gpus_per_worker >= 1); "
            "on the CPU take training.optimizer=adamw"
        )
    needed = {
        "model.attention=flash_attention_2": (cfg.model.attention is Attention.flash_attention_2, "flash_attn"),
        "training.liger=true": (cfg.training.liger, "liger_kernel"),
    }
    for setting, (asked, package) in needed.items():
        if asked and not cfg.gpus_per_worker:
            found.append(f"{setting} needs a GPU (gpus_per_worker >= 1)")
        elif asked and here and importlib.util.find_spec(package) is None:
            found.append(f"{setting} needs the package {package}: pip install {package.replace('_', '-')}")
    return found + _tracking_problems(cfg.tracking)


def _deepspeed_problems(cfg: RunConfig) -> list[str]:
    deepspeed, stage = cfg.deepspeed, cfg.deepspeed.stage if cfg.deepspeed.enabled else 0
    offloads = {"offload_optimizer": deepspeed.offload_optimizer, "offload_weights": deepspeed.offload_weights}
    found = []
    for name, lowest in (("offload_optimizer", 1), ("offload_weights", 3)):
        if offloads[name] is not Offload.none and stage < lowest:
            asked = f"stage {stage}" if deepspeed.enabled else "DeepSpeed off"
            found.append(f"deepspeed.{name}={offloads[name].value} needs ZeRO stage {lowest} or higher (got {asked})")
    if deepspeed.hpz > 1 and stage < 3:
        found.append(f"deepspeed.hpz={deepspeed.hpz} needs deepspeed=zero3: other stages divide no weights")
    elif deepspeed.hpz > 1 and cfg.workers % deepspeed.hpz:
        found.append(
            f"deepspeed.hpz must divide workers: it is the workers of each node (got {deepspeed.hpz} of {cfg.workers})"
        )
    on_disk = [name for name, where in offloads.items() if where is Offload.nvme]
    if on_disk and stage < 3:
        found.append(f"deepspeed.{on_disk[0]}=nvme needs ZeRO stage 3; below it, take cpu")
    if on_disk and deepspeed.nvme_path is None:
        found.append(f"deepspeed.{on_disk[0]}=nvme needs deepspeed.nvme_path=<folder on a fast local disk>")
    if stage == 3 and cfg.quantization.kind is Quantization.int8:
        found.append(
            "quantization=int8 does not work with ZeRO stage 3: bitsandbytes keeps its 8-bit weights whole on every "
            "worker beside the parts that ZeRO makes of them; take quantization=nf4, or deepspeed=zero2"
        )
    if stage >= 1 and cfg.training.optimizer is not Optimizer.adamw:
        found.append(
            f"training.optimizer={cfg.training.optimizer.value} does not work with ZeRO stage {stage}: its blocks of "
            "8-bit states cannot be divided among workers and put together again; take training.optimizer=adamw, "
            "whose states ZeRO divides, or deepspeed=off"
        )
    return found


def _tracking_problems(cfg: TrackingConfig) -> list[str]:
    known = ", ".join(TRACKERS)
    unknown = [name for name in cfg.trackers if name not in TRACKERS]
    found = [f"tracking.trackers: there is no {name!r}; known: {known}" for name in unknown]
    if len(set(cfg.trackers)) < len(cfg.trackers):
        found.append(f"tracking.trackers names one twice (got {', '.join(cfg.trackers)})")
    if not cfg.project:
        found.append("tracking.project is empty; name the W&B project or MLflow experiment")
    return found


def _model_problems(cfg: RunConfig) -> list[str]:
    model = cfg.model
    if isinstance(model, TinyModelConfig) and model.hidden % (2 * model.heads):
        return [
            f"model.hidden must be a multiple of 2 * model.heads, as rotary positions need it "
            f"(got {model.hidden} and {model.heads})"
        ]
    return []


def _batch_problems(cfg: RunConfig) -> list[str]:
    training = cfg.training
    forward = training.micro_batch * cfg.workers
    if training.global_batch % forward:
        return [
            f"training.global_batch must be a multiple of training.micro_batch * workers "
            f"(got {training.global_batch}, and {training.micro_batch} * {cfg.workers} = {forward})"
        ]
    return []


def _data_problems(cfg: RunConfig) -> list[str]:
    data, quality = cfg.data, cfg.data.quality
    found = []
    if data.validation + data.test >= 1:
        found.append(
            f"data.validation + data.test must be < 1, or no row is left to train on "
            f"(got {data.validation:g} + {data.test:g})"
        )
    given = isinstance(data, FileDataConfig) and data.test_path is not None
    if cfg.evaluation.generate_rows and not data.test and not given:
        found.append("evaluation.generate_rows needs a test split: set data.test > 0, or evaluation.generate_rows=0")
    for name, action in vars(quality).items():
        if name in UNUSABLE and action not in (Action.drop, Action.stop):
            found.append(
                f"data.quality.{name} must be drop or stop: no such row can be trained on (got {action.value})"
            )
        elif action is Action.mask:
            found.append(f"data.quality.{name}=mask: only personal data can be masked (data.pii); take report or drop")
    if sum(mix.share for mix in data.mix.values()) >= 1:
        found.append("data.mix: the shares together must be < 1, or no row of one's own is left")
    found += [
        f"data.mix.{name}.share must be > 0 and < 1 (got {mix.share:g})"
        for name, mix in data.mix.items()
        if not 0 < mix.share < 1
    ]
    return found


def _sweep_problems(cfg: SweepConfig) -> list[str]:
    found = []
    grace, every = cfg.scheduler.grace, cfg.evaluation.every
    if grace is not None and every is not None and grace % every:
        found.append(
            f"scheduler.grace must be a multiple of evaluation.every, where trials are measured "
            f"(got {grace} and {every})"
        )
    searched = {dimension.key for dimension in cfg.space.values()}
    if "training.global_batch" in searched and cfg.training.max_steps is not None:
        found.append(
            "space: with training.global_batch searched, training.max_steps gives each trial another number of "
            "samples; set training.max_steps=null and training.epochs"
        )
    found += [
        f"space: {key} cannot be searched: trials are compared at equal samples seen, and each sees as many in all"
        for key in ("training.max_steps", "training.epochs")
        if key in searched
    ]
    objectives = [objective.value for objective in cfg.search.objectives]
    if len(set(objectives)) < len(objectives):
        found.append(f"search.objectives names one twice (got {', '.join(objectives)})")
    if "eval_loss" not in objectives:
        found.append(
            f"search.objectives must contain eval_loss, by which the best trial is chosen (got {objectives or 'none'})"
        )
    if len(objectives) > 1 and cfg.scheduler.kind is not Scheduler.none:
        found.append(
            f"search.objectives: with several ({', '.join(objectives)}) no trial can be stopped early, as a higher "
            f"loss may be the price of another objective; set scheduler=none (got {cfg.scheduler.kind.value})"
        )
    return found + _scheduler_problems(cfg)


def _scheduler_problems(cfg: SweepConfig) -> list[str]:
    kind, found = cfg.scheduler.kind, []
    if cfg.scheduler.resume_stopped and kind not in (Scheduler.asha, Scheduler.hyperband):
        found.append(
            f"scheduler.resume_stopped needs rungs at which a stopped trial can rise; scheduler={kind.value} has none: "
            "take scheduler=asha or hyperband"
        )
    if kind is not Scheduler.pbt:
        return found
    if cfg.scheduler.population > cfg.search.trials:
        found.append(
            f"scheduler.population must be <= search.trials, which counts the population and its children (got "
            f"{cfg.scheduler.population} and {cfg.search.trials})"
        )
    if cfg.search.sampler not in (Sampler.auto, Sampler.random, Sampler.qmc, Sampler.tpe):
        found.append(
            f"scheduler=pbt: only the first population comes from the sampler, so that search.sampler="
            f"{cfg.search.sampler.value} would never learn or finish; take random, qmc or tpe"
        )
    if not any(dimension.key in CHANGEABLE for dimension in cfg.space.values()):
        found.append(
            "scheduler=pbt: the space has no dimension that may change in the middle of a training "
            f"({', '.join(CHANGEABLE)}); add one, or take scheduler=asha"
        )
    if cfg.confirm.top:
        found.append(
            "confirm.top: a confirmation trains one configuration from its beginning with other seeds, and a winner of "
            "scheduler=pbt had several in turn; set confirm.top=0"
        )
    return found
