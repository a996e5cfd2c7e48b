"""The typed configuration of a search: what is varied, by whom it is proposed, who goes on, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from raytune_lora.config.lists import text_of
from raytune_lora.config.plain import MISSING


class Sampler(Enum):
    """Who proposes the trials' parameters; ``auto`` is one of the others, by the space and the number of trials."""

    auto = "auto"
    tpe = "tpe"
    gp = "gp"
    cmaes = "cmaes"
    random = "random"
    qmc = "qmc"
    grid = "grid"
    nsga2 = "nsga2"


class Scheduler(Enum):
    """Who stops trials early, at equal samples seen; ``pbt`` also lets trials take up others' weights."""

    asha = "asha"
    hyperband = "hyperband"
    median = "median"
    pbt = "pbt"
    none = "none"


class DimensionKind(Enum):
    float = "float"
    int = "int"
    categorical = "categorical"


class Objective(Enum):
    """What a search makes small."""

    eval_loss = "eval_loss"
    trainable_parameters = "trainable_parameters"
    training_seconds = "training_seconds"


@dataclass
class DimensionConfig:
    """One dimension of the search space."""

    key: str = MISSING  # dotted path of the config key it sets
    kind: DimensionKind = DimensionKind.float
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: list[Any] = field(default_factory=list)  # of a categorical
    multiple_of: str | None = None  # dotted path: the value set is the one sampled times that key's
    when: dict[str, list[Any]] = field(default_factory=dict)  # only where another dimension's key has one of the values

    def __post_init__(self) -> None:
        """A choice that is a list, as of target modules, is its text: samplers know no lists."""
        self.choices = [text_of(choice) if isinstance(choice, list) else choice for choice in self.choices]


@dataclass
class ConstraintsConfig:
    """What a proposed point must fulfil; one that does not is never trained, and the sampler is told."""

    memory_gb: float | None = None  # a worker's planned memory, 10^9 bytes; null: the smallest GPU's; 0: no limit
    relations: list[str] = field(default_factory=list)  # between config keys: `method.alpha <= 4 * method.r`


@dataclass
class SearchConfig:
    trials: int = 16
    concurrent: int = 1  # trials at a time
    stalled: float | None = 900.0  # seconds without a sign of life after which a trial is tried again; null: never
    sampler: Sampler = Sampler.auto
    objectives: list[Objective] = field(default_factory=lambda: [Objective.eval_loss])  # several: a Pareto front
    startup_trials: int = 8  # random ones before the sampler learns
    random_share: float | None = None  # of the later ones, those that are random too; null: TPE's 0.33, GP's 0.1
    seed: int = 0
    storage: str | None = None  # URL of the study's database, no password in it; null: study.db in the sweep's folder
    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)
    warm_start: list[str] = field(default_factory=list)  # folders of earlier sweeps to learn from


# What population based training may change in the middle of a training: it says how the weights go on to change. All
# other keys are inherited: a rank, target modules or a batch would not fit the checkpoint or the plan, a seed or a
# warm-up says how a training began, and alpha scales what is learned already, so that the losses would jump.
CHANGEABLE = (
    "training.learning_rate",
    "training.weight_decay",
    "training.max_grad_norm",
    "method.dropout",
    "method.ratio",
    "method.orthogonality",
    "method.l0_weight",
)


@dataclass
class SchedulerConfig:
    kind: Scheduler = Scheduler.asha
    grace: int | None = None  # samples every trial sees before it may be stopped; null: a fifth of a run
    reduction: float = 3.0  # asha, hyperband: of the trials at a rung, one in this many goes on
    resume_stopped: bool = False  # asha, hyperband: a stopped trial that later counts among the best goes on
    population: int = 8  # pbt: trials that are trained side by side, and compared every ``grace`` samples

    @property
    def goes_on(self) -> bool:
        """Whether a trial that was stopped may go on."""
        return self.resume_stopped or self.kind is Scheduler.pbt


@dataclass
class BudgetConfig:
    """When a search ends before its last trial; running trials end in order."""

    hours: float | None = None  # at work: the time between an end and a resume aside
    wall_hours: float | None = None  # since the sweep began, that time among them
    gpu_hours: float | None = None  # of all trials together
    target: float | None = None  # validation loss that is good enough
    patience: int | None = None  # trials ended without a lower loss


@dataclass
class ConfirmConfig:
    """The best configurations are trained again with other seeds, so that luck does not win."""

    top: int = 0  # configurations; 0: none is
    seeds: int = 3  # runs of each, the first one included
