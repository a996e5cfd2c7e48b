"""Which configs make sense: each rule, and all that is wrong at once."""

from __future__ import annotations

import operator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from raytune_lora.config import validate
from raytune_lora.config.compose import keys
from raytune_lora.config.data import Action, ExtractionDataConfig, FakeDataConfig, MixConfig
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import (
    VARIANTS,
    Attention,
    DeepSpeedConfig,
    Offload,
    Optimizer,
    Quantization,
    QuantizationConfig,
    RunConfig,
    SweepConfig,
    TinyModelConfig,
)
from raytune_lora.config.search import DimensionConfig

# key: a value that breaks its rule, and the nearest that does not
EDGES: dict[str, tuple[float, float]] = {
    "workers": (0, 1),
    "cpus_per_worker": (0, 1),
    "gpus_per_worker": (2, 1),
    "training.learning_rate": (0.0, 1e-9),
    "training.global_batch": (0, 1),
    "training.micro_batch": (0, 1),
    "training.epochs": (0.0, 0.01),
    "training.max_steps": (0, 1),
    "training.warmup": (1.0, 0.0),
    "training.weight_decay": (-0.1, 0.0),
    "training.max_grad_norm": (0.0, 0.1),
    "training.seed": (-1, 0),
    "training.patience": (0, 1),
    "training.keep_checkpoints": (0, 1),
    "deepspeed.persistent": (-1, 0),
    "deepspeed.stage": (4, 3),
    "deepspeed.hpz": (0, 1),
    "evaluation.every": (0, 1),
    "evaluation.loss_rows": (-1, 0),
    "evaluation.final_rows": (-1, 0),
    "evaluation.generate_rows": (-1, 0),
    "evaluation.generate_batch": (0, 1),
    "evaluation.max_new_tokens": (0, 1),
    "evaluation.examples": (-1, 0),
    "cluster.object_store_mb": (79, 80),
    "cluster.retries": (-1, 0),
    "cluster.lease": (0.5, 1.0),
    "disk.trial_gb": (0.0, 0.001),
    "disk.sweep_gb": (0.0, 0.001),
    "disk.keep_best": (0, 1),
    "data.max_length": (7, 8),
    "data.validation": (0.0, 0.01),
    "data.test": (1.0, 0.0),
    "data.rows": (0, 1),
    "data.korean": (1.1, 1.0),
    "data.processes": (0, 1),
    "data.quality.similarity": (0.0, 1.0),
    "data.quality.max_dropped": (1.1, 1.0),
    "model.layers": (0, 1),
    "model.hidden": (0, 1),
    "model.heads": (0, 1),
    "method.r": (0, 1),
    "method.alpha": (0.0, 0.1),
    "method.dropout": (1.0, 0.0),
    "method.iterations": (0, 1),
    "method.rho": (0.9, 1.0),
    "method.samples": (0, 1),
    "method.ratio": (0.0, 0.1),
    "method.tau_range": (0.0, 0.1),
    "method.tau_steps": (128, 127),
    "method.target_r": (0, 1),
    "method.start": (1.0, 0.0),
    "method.settle": (1.0, 0.0),
    "method.orthogonality": (-0.1, 0.0),
    "method.initial": (0.0, 0.1),
    "method.seed": (-1, 0),
    "method.width": (0, 1),
    "method.virtual_tokens": (0, 1),
    "method.projection": (0, 1),
    "method.l0_weight": (-1e-9, 0.0),
    "method.sparsity": (1.0, 0.0),
    "method.factor": (0, -1),
    "quantization.int8_threshold": (-1.0, 0.0),
    "search.trials": (0, 1),
    "search.concurrent": (0, 1),
    "search.startup_trials": (-1, 0),
    "search.random_share": (1.1, 1.0),
    "search.seed": (-1, 0),
    "search.stalled": (0.0, 1.0),
    "search.constraints.memory_gb": (-0.1, 0.0),
    "scheduler.grace": (0, 1),
    "scheduler.reduction": (1.0, 1.1),
    "scheduler.population": (1, 2),
    "budget.hours": (0.0, 0.1),
    "budget.wall_hours": (0.0, 0.1),
    "budget.gpu_hours": (0.0, 0.1),
    "budget.target": (0.0, 0.1),
    "budget.patience": (0, 1),
    "confirm.top": (-1, 0),
    "confirm.seeds": (1, 2),
}
ANY_NUMBER = {"model.seed", "data.seed"}  # what a random generator takes


def good(**changes: Any) -> SweepConfig:
    return SweepConfig(
        **{"model": TinyModelConfig(), "data": FakeDataConfig(), "method": LoraMethodConfig(), **changes}
    )


def classes(section: str) -> list[type]:
    """The config classes that can stand in a section; of the whole config where it is empty."""
    if not section:
        return [RunConfig]
    return list(VARIANTS.get(section) or [type(operator.attrgetter(section)(good()))])


def with_value(key: str, value: float) -> SweepConfig:
    section, _, leaf = key.rpartition(".")
    cfg = good()
    if section in VARIANTS:
        setattr(cfg, section, next(cls for cls in classes(section) if leaf in cls.__dataclass_fields__)())
    setattr(operator.attrgetter(section)(cfg) if section else cfg, leaf, value)
    return cfg


def test_a_good_config_has_no_problem() -> None:
    assert validate.problems(good()) == []
    assert validate.problems(RunConfig(TinyModelConfig(), ExtractionDataConfig(), LoraMethodConfig())) == []


# --------------------------------------------------------------------------------------------------------------- ranges


def test_every_rule_is_for_a_key_that_exists_and_is_tested() -> None:
    for key in validate._RANGES:
        section, _, leaf = key.rpartition(".")
        assert any(leaf in cls.__dataclass_fields__ for cls in classes(section)), f"no config has {key}"
    assert set(EDGES) == set(validate._RANGES)


def test_every_number_has_a_rule() -> None:
    sections = ["", *(key for key in keys(good()) if is_dataclass(operator.attrgetter(key)(good())))]
    numbers = {
        f"{section}.{f.name}".lstrip(".")
        for section in sections
        for cls in classes(section)
        for f in fields(cls)
        if str(f.type).split(" ")[0] in ("int", "float")
    }
    assert "data.quality.similarity" in numbers
    assert numbers - ANY_NUMBER == set(validate._RANGES)


@pytest.mark.parametrize("key", EDGES)
def test_a_value_out_of_range_is_refused(key: str) -> None:
    bad, edge = EDGES[key]
    rule = f"{key} must be {validate._RANGES[key][1]}"
    assert f"{rule} (got {bad:g})" in validate.problems(with_value(key, bad))
    assert not any(problem.startswith(rule) for problem in validate.problems(with_value(key, edge)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["training.learning_rate", "training.epochs", "scheduler.reduction"])
def test_a_number_is_finite(key: str, value: float) -> None:
    (problem,) = validate.problems(with_value(key, value))
    assert problem.startswith(f"{key} must be ")
    assert problem.endswith(f"(got {value:g})")


# -------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("section", "leaf", "value", "remedy"),
    [
        ("training", "lr_scheduler", "cosin", "known: constant, constant_with_warmup, cosine"),
        ("method", "target_modules", [], "name modules (q_proj,v_proj), or all-linear"),
        ("tracking", "trackers", ["tensorbord"], "known: tensorboard, wandb, mlflow, ray"),
        ("tracking", "trackers", ["wandb", "ray", "wandb"], "names one twice (got wandb, ray, wandb)"),
        ("tracking", "project", "", "name the W&B project or MLflow experiment"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known(section: str, leaf: str, value: Any, remedy: str) -> None:
    cfg = good()
    setattr(getattr(cfg, section), leaf, value)
    (problem,) = validate.problems(cfg)
    assert problem.startswith(f"{section}.{leaf}")
    assert remedy in problem


# ----------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("quality.unreadable", Action.report, "data.quality.unreadable must be drop or stop"),
        ("quality.empty_fields", Action.off, "data.quality.empty_fields must be drop or stop"),
        ("quality.leftovers", Action.mask, "data.quality.leftovers=mask: only personal data can be masked"),
        ("mix", {"a": MixConfig(share=0.0)}, "data.mix.a.share must be > 0 and < 1 (got 0)"),
        ("mix", {"a": MixConfig(share=0.5), "b": MixConfig(share=0.5)}, "data.mix: the shares together must be < 1"),
    ],
)
def test_what_cannot_be_done_about_rows(key: str, value: Any, problem: str) -> None:
    cfg = good()
    section, _, leaf = f"data.{key}".rpartition(".")
    setattr(operator.attrgetter(section)(cfg), leaf, value)
    (found,) = validate.problems(cfg)
    assert found.startswith(problem)


# ------------------------------------------------------------------------------------------------------ across sections


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "workers", "fits"),
    [(32, 4, 1, True), (32, 4, 8, True), (4, 4, 1, True), (32, 4, 3, False), (2, 4, 1, False), (30, 4, 1, False)],
)
def test_a_step_divides_into_micro_batches(global_batch: int, micro_batch: int, workers: int, fits: bool) -> None:
    cfg = good(workers=workers)
    cfg.training.global_batch, cfg.training.micro_batch = global_batch, micro_batch
    found = validate.problems(cfg)
    rule = "training.global_batch must be a multiple of training.micro_batch * workers"
    values = f"(got {global_batch}, and {micro_batch} * {workers} = {micro_batch * workers})"
    assert found == ([] if fits else [f"{rule} {values}"])


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (0.9, 0.2)])
def test_the_splits_leave_something_to_train_on(validation: float, test: float) -> None:
    (problem,) = validate.problems(good(data=FakeDataConfig(validation=validation, test=test)))
    assert problem.startswith("data.validation + data.test must be < 1")
    assert problem.endswith(f"(got {validation:g} + {test:g})")


def test_answers_need_a_test_split() -> None:
    cfg = good(data=FakeDataConfig(test=0.0))
    assert validate.problems(cfg) == [
        "evaluation.generate_rows needs a test split: set data.test > 0, or evaluation.generate_rows=0"
    ]
    cfg.evaluation.generate_rows = 0
    assert validate.problems(cfg) == []


@pytest.mark.parametrize(("hidden", "heads", "fits"), [(64, 4, True), (64, 3, False), (12, 4, False)])
def test_the_tiny_models_width_divides_into_heads(hidden: int, heads: int, fits: bool) -> None:
    found = validate.problems(good(model=TinyModelConfig(hidden=hidden, heads=heads)))
    assert [problem.partition(" ")[0] for problem in found] == ([] if fits else ["model.hidden"])


@pytest.mark.parametrize(
    ("grace", "every", "fits"),
    [(32, 16, True), (16, 16, True), (24, 16, False), (8, 16, False), (None, 16, True), (24, None, True)],
)
def test_trials_are_compared_where_they_are_measured(grace: int | None, every: int | None, fits: bool) -> None:
    cfg = good()
    cfg.scheduler.grace, cfg.evaluation.every = grace, every
    found = validate.problems(cfg)
    assert [problem.partition(",")[0] for problem in found] == (
        [] if fits else ["scheduler.grace must be a multiple of evaluation.every"]
    )


def test_a_searched_global_batch_needs_epochs() -> None:
    cfg = good(space={"batch": DimensionConfig(key="training.global_batch", low=8, high=32)})
    assert validate.problems(cfg) == []
    cfg.training.max_steps = 10
    (problem,) = validate.problems(cfg)
    assert "set training.max_steps=null and training.epochs" in problem


def test_all_problems_are_told_at_once() -> None:
    cfg = good(workers=0)
    cfg.training.learning_rate = -1
    cfg.training.lr_scheduler = "none"
    cfg.method.target_modules = []  # type: ignore[attr-defined]  # it is LoRA
    assert [problem.split()[0].rstrip(":") for problem in validate.problems(cfg)] == [
        "workers",
        "training.learning_rate",
        "training.lr_scheduler",
        "method.target_modules",
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stage": 2, "offload_weights": Offload.cpu}, "deepspeed.offload_weights=cpu needs ZeRO stage 3"),
        ({"stage": 0, "offload_optimizer": Offload.cpu}, "deepspeed.offload_optimizer=cpu needs ZeRO stage 1"),
        ({"enabled": False, "offload_optimizer": Offload.cpu}, "(got DeepSpeed off)"),
        ({"stage": 2, "offload_optimizer": Offload.nvme, "nvme_path": "/fast"}, "take cpu"),
        ({"stage": 3, "offload_weights": Offload.nvme}, "needs deepspeed.nvme_path=<folder"),
        ({"stage": 3, "offload_weights": Offload.cpu, "offload_optimizer": Offload.nvme, "nvme_path": "/fast"}, None),
    ],
)
def test_offloading_needs_a_stage_and_a_place(settings: dict[str, Any], told: str | None) -> None:
    found = validate.problems(good(deepspeed=DeepSpeedConfig(**settings)))
    assert [told in problem for problem in found] == ([] if told is None else [True])


def test_a_second_copy_of_weights_is_that_of_whole_nodes() -> None:
    def said(workers: int, **settings: Any) -> list[str]:
        cfg = good(deepspeed=DeepSpeedConfig(**settings))
        cfg.workers, cfg.training.global_batch = workers, 4 * cfg.training.micro_batch * workers
        return validate.problems(cfg)

    assert said(4, stage=3, hpz=2) == said(4, stage=2, hpz=1) == []
    assert "deepspeed=zero3" in said(4, stage=2, hpz=2)[0]
    assert "(got 3 of 4)" in said(4, stage=3, hpz=3)[0]


def test_zero_does_not_divide_states_in_eight_bits() -> None:
    cfg = good(gpus_per_worker=1)
    cfg.training.optimizer = Optimizer.paged_adamw_8bit
    (problem,) = validate.problems(cfg)
    assert "deepspeed=off" in problem
    cfg.deepspeed.enabled = False
    assert validate.problems(cfg) == []


@pytest.mark.parametrize(
    ("section", "leaf", "value"),
    [("model", "attention", Attention.flash_attention_2), ("training", "liger", True)],
)
def test_what_needs_a_gpu_and_a_package_says_so(section: str, leaf: str, value: Any) -> None:
    cfg = good()
    setattr(getattr(cfg, section), leaf, value)
    (problem,) = validate.problems(cfg)
    assert problem.startswith(f"{section}.{leaf}=")
    assert "needs a GPU" in problem
    cfg.gpus_per_worker = 1
    (problem,) = validate.problems(cfg)
    assert "pip install" in problem


def test_int8_is_not_divided_by_zero_3() -> None:
    cfg = good(quantization=QuantizationConfig(kind=Quantization.int8), deepspeed=DeepSpeedConfig(stage=3))
    (problem,) = validate.problems(cfg)
    assert "take quantization=nf4, or deepspeed=zero2" in problem
    cfg.deepspeed.stage = 2
    assert validate.problems(cfg) == []
