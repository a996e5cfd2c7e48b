"""The search space: what is refused, what is sampled, and how values reach the config."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import optuna
import pytest

from raytune_lora.config import validate
from raytune_lora.config.compose import compose
from raytune_lora.config.data import FakeDataConfig
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import Optimizer, Quantization, SweepConfig, TinyModelConfig
from raytune_lora.config.search import DimensionConfig, DimensionKind
from raytune_lora.models.shape import shape_of
from raytune_lora.tuning import preflight
from raytune_lora.tuning.space import apply, configured_point, extremes, fitting, lookup, points, problems, sample
from tests.unit import zoo

INT, FLOAT, CATEGORICAL = DimensionKind.int, DimensionKind.float, DimensionKind.categorical


def dimension(key: str, kind: DimensionKind = FLOAT, **settings: Any) -> DimensionConfig:
    return DimensionConfig(key=key, kind=kind, **settings)


def config(**space: DimensionConfig) -> SweepConfig:
    return SweepConfig(model=TinyModelConfig(), data=FakeDataConfig(), method=LoraMethodConfig(), space=space)


def lora_space() -> dict[str, DimensionConfig]:
    """As conf/space/lora.yaml has it, and a categorical of names."""
    return {
        "rank": dimension("method.r", INT, low=8, high=64, log=True),
        "alpha": dimension("method.alpha", CATEGORICAL, choices=[1, 2, 4], multiple_of="method.r"),
        "learning_rate": dimension("training.learning_rate", low=1e-4, high=3e-4, log=True),
        "dropout": dimension("method.dropout", low=0.0, high=0.1, step=0.05),
        "schedule": dimension("training.lr_scheduler", CATEGORICAL, choices=["cosine", "linear"]),
    }


def samples(cfg: SweepConfig, count: int = 60) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [sample(study.ask(), cfg.space, cfg) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("overrides", [["experiment=tiny"], ["experiment=quickstart"]])
def test_the_shipped_spaces_are_well(overrides: list[str]) -> None:
    cfg = compose(overrides)
    assert problems(cfg.space, cfg) == []
    assert preflight.extremes(cfg) == []


def test_a_good_space_has_no_problem() -> None:
    cfg = config(**lora_space(), steps=dimension("training.max_steps", INT, low=1, high=4, step=1))
    assert problems(cfg.space, cfg) == []


@pytest.mark.parametrize(
    ("wrong", "where", "reason"),
    [
        (dimension("method.r", INT, low=1), "space.x", "needs low and high (got low=1, high=None)"),
        (dimension("method.r", INT, low=64, high=8), "space.x.high", "must be >= low (got low=64, high=8)"),
        (dimension("training.learning_rate", low=0, high=1, log=True), "space.x.low", "> 0 on a log scale (got 0)"),
        (dimension("method.dropout", low=0.1, high=0.2, log=True, step=0.1), "space.x", "log and step exclude"),
        (dimension("method.dropout", low=0.1, high=0.2, step=0), "space.x.step", "must be > 0 (got 0)"),
        (dimension("method.r", INT, low=1.5, high=8), "space.x", "an int dimension has whole bounds"),
        (dimension("method.r", INT, low=1, high=8, step=0.5), "space.x.step", "must be whole"),
        (dimension("method.r", INT, low=math.nan, high=8), "space.x", "must be finite"),
        (dimension("method.dropout", low=0, high=math.inf), "space.x", "must be finite"),
        (dimension("method.r", CATEGORICAL), "space.x.choices", "needs at least one choice"),
        (dimension("method.rank", INT, low=1, high=8), "space.x.key", "there is no config key 'method.rank'"),
        (dimension("method", INT, low=1, high=8), "space.x.key", "method is a section"),
        (dimension("workers", INT, low=1, high=2), "space.x.key", "cannot be searched"),
        (dimension("data.max_length", INT, low=8, high=16), "space.x.key", "cannot be searched"),
        (dimension("search.trials", INT, low=8, high=16), "space.x.key", "cannot be searched"),
        (dimension("budget.patience", INT, low=8, high=16), "space.x.key", "cannot be searched"),
        (dimension("tracking.project", CATEGORICAL, choices=["a"]), "space.x.key", "cannot be searched"),
        (dimension("training.patience", CATEGORICAL, choices=[1, "x"]), "space.x", "cannot be 'x'"),
        (dimension("method.r", CATEGORICAL, choices=[8, None]), "space.x", "cannot be None (int expected)"),
        (dimension("training.optimizer", CATEGORICAL, choices=["adam"]), "space.x", "(one of adamw, adamw_8bit"),
        (dimension("method.r", low=1, high=8), "space.x.kind", "use kind: int"),
        (dimension("method.r", CATEGORICAL, choices=[8, "many"]), "space.x", "cannot be 'many' (int expected)"),
        (dimension("method.alpha", low=1, high=2, multiple_of="method.q"), "space.x.multiple_of", "no config key"),
        (
            dimension("method.alpha", low=1, high=2, multiple_of="training.lr_scheduler"),
            "space.x.multiple_of",
            "not a number",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_dimension_that_cannot_work_is_refused(wrong: DimensionConfig, where: str, reason: str) -> None:
    cfg = config(x=wrong)
    problem = problems(cfg.space, cfg)[0]
    assert problem.startswith((f"{where} ", f"{where}: "))
    assert reason in problem


def test_two_dimensions_do_not_search_one_key() -> None:
    cfg = config(a=dimension("method.r", INT, low=1, high=2), b=dimension("method.r", INT, low=4, high=8))
    assert problems(cfg.space, cfg) == ["space.b.key: method.r is searched by space.a already"]


def test_a_space_has_a_dimension() -> None:
    (problem,) = problems({}, config())
    assert "space=lora" in problem


def test_all_problems_of_a_space_are_told() -> None:
    cfg = config(a=dimension("method.r", INT, low=3, high=2), b=dimension("nothing", low=1), c=dimension("workers"))
    assert len(problems(cfg.space, cfg)) == 5


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (dimension("method.r", INT, low=0, high=8), "space.x: method.r must be >= 1 (got 0)"),
        (dimension("method.dropout", low=0.0, high=1.0), "space.x: method.dropout must be >= 0 and < 1 (got 1)"),
        (
            dimension("training.lr_scheduler", CATEGORICAL, choices=["cosine", "cosin"]),
            "space.x: training.lr_scheduler: there is no 'cosin'",
        ),
        (
            dimension("training.micro_batch", CATEGORICAL, choices=[4, 5]),
            "space.x: training.global_batch must be a multiple of training.micro_batch * workers (got 32, and 5 * 1",
        ),
        (
            dimension("method.alpha", CATEGORICAL, choices=[-1, 1], multiple_of="method.r"),
            "space.x: method.alpha must be > 0 (got -16)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_bounds_of_a_dimension_are_checked_in_the_config(wrong: DimensionConfig, problem: str) -> None:
    cfg = config(x=wrong)
    assert problems(cfg.space, cfg) == []
    (found,) = preflight.extremes(cfg)
    assert found.startswith(problem)


def test_what_is_wrong_anyway_is_not_told_of_each_dimension() -> None:
    cfg = config(**lora_space())
    cfg.training.epochs = 0
    assert preflight.extremes(cfg) == []


# ---------------------------------------------------------------------------------------------- conditional dimensions


def conditional_space() -> dict[str, DimensionConfig]:
    """Weight decay, and a dropout below it, only where there is a schedule; named before what they depend on."""
    return {
        "dropout": dimension("method.dropout", low=0.0, high=0.1, when={"training.weight_decay": [0.1]}),
        "decay": dimension(
            "training.weight_decay", low=0.0, high=0.1, step=0.05, when={"training.lr_scheduler": ["cosine"]}
        ),
        "schedule": dimension("training.lr_scheduler", CATEGORICAL, choices=["constant", "cosine"]),
    }


def test_a_conditional_dimension_is_drawn_where_it_exists_and_absent_elsewhere() -> None:
    cfg = config(**conditional_space())
    assert problems(cfg.space, cfg) == []
    drawn = samples(cfg, 80)
    for values in drawn:
        assert ("training.weight_decay" in values) == (values["training.lr_scheduler"] == "cosine")
        assert ("method.dropout" in values) == (values.get("training.weight_decay") == 0.1)
    assert {tuple(values) for values in drawn} == {
        ("training.lr_scheduler",),
        ("training.weight_decay", "training.lr_scheduler"),
        ("method.dropout", "training.weight_decay", "training.lr_scheduler"),
    }


def test_what_does_not_exist_stays_as_the_config_has_it() -> None:
    cfg = config(**conditional_space())
    without = next(values for values in samples(cfg) if len(values) == 1)
    changed = apply(cfg, without)
    assert changed.training.lr_scheduler == "constant"
    assert (changed.training.weight_decay, changed.method.dropout) == (0.01, 0.05)


def test_a_condition_may_be_on_what_is_the_same_for_all_trials() -> None:
    cfg = config(
        rank=dimension("method.r", INT, low=8, high=16, when={"quantization.kind": ["nf4", "fp4"]}),
        decay=dimension("training.weight_decay", low=0.0, high=0.1),
    )
    assert problems(cfg.space, cfg) == []
    assert list(samples(cfg, 1)[0]) == ["training.weight_decay"]
    cfg.quantization.kind = Quantization.nf4
    assert list(samples(cfg, 1)[0]) == ["method.r", "training.weight_decay"]


def test_a_parameter_of_another_method_may_be_named_under_its_condition() -> None:
    other = dimension("method.target_r", INT, low=4, high=8, when={"method.kind": ["adalora"]})
    cfg = config(other=other, rank=dimension("method.r", INT, low=8, high=16))
    assert problems(cfg.space, cfg) == []
    assert list(samples(cfg, 1)[0]) == ["method.r"]
    other.when = {"method.kind": ["lora"]}
    assert "no config key 'method.target_r'" in problems(cfg.space, cfg)[0]


def test_a_multiple_of_what_does_not_exist_is_a_multiple_of_the_configs() -> None:
    cfg = config(
        alpha=dimension("method.alpha", CATEGORICAL, choices=[3], multiple_of="method.r"),
        rank=dimension("method.r", INT, low=4, high=8, when={"training.lr_scheduler": ["cosine"]}),
        schedule=dimension("training.lr_scheduler", CATEGORICAL, choices=["constant", "cosine"]),
    )
    for values in samples(cfg, 10):
        assert values["method.alpha"] == 3 * values.get("method.r", 16)


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ({"training.lr": [1]}, "there is no config key 'training.lr'"),
        ({"training": [1]}, "training is a section"),
        ({"training.lr_scheduler": []}, "training.lr_scheduler has no value listed"),
        ({"training.lr_scheduler": ["linear"]}, "is never 'linear' (space.schedule is of ['constant', 'cosine'])"),
        ({"training.lr_scheduler": [3]}, "training.lr_scheduler cannot be 3 (str expected)"),
        ({"method.r": [9]}, "method.r is never 9 (space.rank is from 8.0 to 16.0)"),
        ({"training.warmup": [0.05]}, "space.warmup is continuous and takes no value exactly"),
        ({"training.optimizer": ["sgd"]}, "cannot be 'sgd' (one of adamw, adamw_8bit, paged_adamw_8bit expected)"),
        ({"method.kind": ["lroa"]}, "method.kind cannot be 'lroa' (one of full, adapter"),
        ({"method.alpha": [32.0]}, "space.alpha is a multiple of method.r, and nothing can depend on it"),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(when: dict[str, list[Any]], reason: str) -> None:
    cfg = config(
        schedule=dimension("training.lr_scheduler", CATEGORICAL, choices=["constant", "cosine"]),
        rank=dimension("method.r", INT, low=8.0, high=16.0, step=8),
        alpha=dimension("method.alpha", CATEGORICAL, choices=[2], multiple_of="method.r"),
        warmup=dimension("training.warmup", low=0.0, high=0.1),
        x=dimension("training.weight_decay", low=0.0, high=0.1, when=when),
    )
    (problem,) = problems(cfg.space, cfg)
    assert problem.startswith("space.x.when: ")
    assert reason in problem


def test_the_configs_own_value_is_one_that_a_conditional_key_has() -> None:
    cfg = config(**conditional_space())
    cfg.space["dropout"].when = {"training.weight_decay": [0.01]}
    assert problems(cfg.space, cfg) == []
    assert all(("method.dropout" in v) == (v["training.lr_scheduler"] == "constant") for v in samples(cfg))


def test_dimensions_do_not_depend_on_each_other_in_a_circle() -> None:
    cfg = config(
        a=dimension("training.lr_scheduler", CATEGORICAL, choices=["cosine"], when={"training.packing": [True]}),
        b=dimension("training.packing", CATEGORICAL, choices=[True], when={"training.lr_scheduler": ["cosine"]}),
    )
    (problem,) = problems(cfg.space, cfg)
    assert problem.endswith("depend on each other in a circle, by when or multiple_of; break it")
    assert "space.a" in problem
    assert "space.b" in problem


def test_a_space_whose_dimensions_never_exist_is_refused() -> None:
    cfg = config(rank=dimension("method.r", INT, low=8, high=16, when={"quantization.kind": ["nf4"]}))
    (problem,) = problems(cfg.space, cfg)
    assert problem.startswith("space: no dimension exists with this config")


def test_the_first_trial_is_the_config_also_with_conditions() -> None:
    cfg = config(**conditional_space())
    cfg.training.weight_decay = 0.05
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(configured_point(cfg.space, cfg))
    first = sample(study.ask(), cfg.space, cfg)
    assert first == {"training.weight_decay": 0.05, "training.lr_scheduler": "cosine"}
    assert apply(cfg, first) == cfg


def test_bounds_are_looked_at_under_their_conditions() -> None:
    cfg = config(**conditional_space())
    found = list(extremes(cfg.space, cfg))
    assert ("dropout", {"training.weight_decay": 0.1, "method.dropout": 0.0}) in found
    assert ("decay", {"training.weight_decay": 0.1}) in found  # the config's schedule is the one it needs
    assert ("schedule", {"training.lr_scheduler": "constant"}) in found
    assert len(found) == 6


def test_the_points_of_a_space_are_counted_with_its_conditions() -> None:
    space = conditional_space()
    space["dropout"].step = 0.05
    cfg = config(**space)
    found = list(points(cfg.space, cfg))
    assert len(found) == 1 + 2 + 3  # constant; cosine with a decay of 0 or 0.05; cosine with 0.1 and three dropouts
    assert {"training.lr_scheduler": "cosine", "training.weight_decay": 0.1, "method.dropout": 0.05} in found


def test_a_point_fits_where_its_keys_are_the_spaces_and_its_values_within() -> None:
    cfg = config(**conditional_space())
    cosine = {"training.lr_scheduler": "cosine", "training.weight_decay": 0.05}
    assert set(fitting(cfg.space, cfg, cosine)) == set(cosine)
    assert set(fitting(cfg.space, cfg, {"training.lr_scheduler": "constant"})) == {"training.lr_scheduler"}
    for wrong in (
        {},
        {"training.lr_scheduler": "cosine"},
        {"training.lr_scheduler": "linear"},
        cosine | {"training.weight_decay": 0.15},
        cosine | {"training.weight_decay": "0.05"},
        cosine | {"method.r": 8},
        {"training.lr_scheduler": "constant", "training.weight_decay": 0.05},
    ):
        assert fitting(cfg.space, cfg, wrong) == {}


# -------------------------------------------------------------------------------------------------------------- presets


def preset(name: str, *overrides: str) -> SweepConfig:
    return compose(["model=tiny", "data=fake", f"space={name}", *overrides])


@pytest.mark.parametrize(
    ("name", "low", "high"), [("simple", 4, 8), ("medium", 16, 32), ("complex", 64, 128), ("qlora", 32, 64)]
)
def test_the_presets_have_the_guides_ranks(name: str, low: int, high: int) -> None:
    cfg = preset(name)
    assert problems(cfg.space, cfg) == []
    assert preflight.extremes(cfg) == []
    first = configured_point(cfg.space, cfg)
    assert first["method.r"] == min(max(16, low), high)
    assert first["method.alpha / method.r"] == 2
    assert all(low <= values["method.r"] <= high for values in samples(cfg, 20))


def test_the_wide_preset_has_the_guides_bounds() -> None:
    cfg = preset("wide")
    assert problems(cfg.space, cfg) == []
    assert preflight.extremes(cfg) == []
    bounds = {d.key: (d.low, d.high) for d in cfg.space.values() if d.low is not None}
    assert bounds == {
        "method.r": (8, 64),
        "training.learning_rate": (1e-4, 3e-4),
        "training.global_batch": (32, 128),
        "training.warmup": (0.03, 0.1),
        "training.weight_decay": (0.01, 0.1),
        "training.max_grad_norm": (0.3, 1.0),
        "method.dropout": (0.05, 0.1),
    }
    first = samples(cfg, 1)[0] | configured_point(cfg.space, cfg)
    assert first["training.global_batch"] == 32
    assert "training.max_steps=null" in validate.problems(preset("wide", "training.max_steps=8"))[0]


# ------------------------------------------------------------------------------------------------------------- sampling


def test_samples_keep_to_bounds_steps_and_choices() -> None:
    drawn = samples(config(**lora_space()))
    assert all(type(values["method.r"]) is int and 8 <= values["method.r"] <= 64 for values in drawn)
    assert all(1e-4 <= values["training.learning_rate"] <= 3e-4 for values in drawn)
    assert {round(values["method.dropout"], 9) for values in drawn} == {0.0, 0.05, 0.1}
    assert {values["training.lr_scheduler"] for values in drawn} == {"cosine", "linear"}
    assert {values["method.alpha"] / values["method.r"] for values in drawn} == {1, 2, 4}
    assert list(drawn[0]) == [d.key for d in lora_space().values()]


def test_a_log_scale_draws_each_magnitude_alike() -> None:
    drawn = samples(config(x=dimension("training.learning_rate", low=1e-6, high=1e-2, log=True)), 200)
    below_the_middle = sum(values["training.learning_rate"] < 1e-4 for values in drawn)
    assert 70 <= below_the_middle <= 130


def test_a_whole_dimension_keeps_its_step() -> None:
    drawn = samples(config(x=dimension("method.r", INT, low=4, high=16, step=4)))
    assert {values["method.r"] for values in drawn} == {4, 8, 12, 16}


def test_a_multiple_of_a_key_that_is_not_searched_takes_the_configs() -> None:
    drawn = samples(config(x=dimension("method.alpha", CATEGORICAL, choices=[1, 2], multiple_of="method.r")))
    assert {values["method.alpha"] for values in drawn} == {16, 32}


# ---------------------------------------------------------------------------------------------- the config as it stands


def test_the_first_trial_is_the_config_itself() -> None:
    cfg = config(**lora_space())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(configured_point(cfg.space, cfg))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (sample(study.ask(), cfg.space, cfg) for _ in range(2))
    assert first == {d.key: lookup(cfg, d.key) for d in cfg.space.values()}
    assert apply(cfg, first) == cfg
    assert second != first


@pytest.mark.parametrize(
    ("name", "nearest", "key", "value"),
    [
        ("method.r", 64, "method.r", 128),
        ("method.r", 8, "method.r", 4),
        ("training.learning_rate", 3e-4, "training.learning_rate", 1.0),
        ("method.dropout", 0.05, "method.dropout", 0.06),
        ("method.alpha / method.r", 4, "method.alpha", 1000.0),
    ],
)
def test_a_number_outside_the_space_begins_at_the_nearest(name: str, nearest: float, key: str, value: Any) -> None:
    cfg = config(**lora_space())
    assert configured_point(cfg.space, apply(cfg, {key: value}))[name] == nearest


def test_alpha_follows_a_rank_that_was_moved() -> None:
    cfg = config(**lora_space() | {"rank": dimension("method.r", INT, low=4, high=8)})
    point = configured_point(cfg.space, cfg)
    assert (point["method.r"], point["method.alpha / method.r"]) == (8, 2)


def test_a_name_outside_the_space_is_left_to_the_sampler() -> None:
    cfg = config(**lora_space())
    assert "training.lr_scheduler" in configured_point(cfg.space, cfg)
    cfg.training.lr_scheduler = "constant"
    assert "training.lr_scheduler" not in configured_point(cfg.space, cfg)


def test_a_key_without_a_value_is_left_to_the_sampler() -> None:
    cfg = config(x=dimension("training.max_steps", INT, low=1, high=4))
    assert cfg.training.max_steps is None
    assert configured_point(cfg.space, cfg) == {}
    assert samples(cfg, 1)[0]["training.max_steps"] in range(1, 5)


def test_a_multiple_of_zero_is_left_to_the_sampler() -> None:
    cfg = config(x=dimension("method.alpha", CATEGORICAL, choices=[1, 2], multiple_of="training.weight_decay"))
    cfg.training.weight_decay = 0.0
    assert configured_point(cfg.space, cfg) == {}


# ----------------------------------------------------------------------------------------------------- apply and lookup


def test_apply_sets_a_copy() -> None:
    cfg = config(**lora_space())
    before = copy.deepcopy(cfg)
    changed = apply(cfg, {"method.r": 8, "training.learning_rate": 1e-3, "method.target_modules": ["q_proj"]})
    assert (changed.method.r, changed.training.learning_rate) == (8, 1e-3)
    assert changed.method.target_modules == ["q_proj"]
    assert cfg == before


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [
        ("method.alpha", 64, 64.0),
        ("method.r", 8.0, 8),
        ("training.gradient_checkpointing", True, True),
        ("training.lr_scheduler", "linear", "linear"),
        ("training.max_steps", 4, 4),
        ("training.patience", None, None),
        ("training.optimizer", "adamw_8bit", Optimizer.adamw_8bit),
        ("quantization.kind", "nf4", Quantization.nf4),
    ],
)
def test_apply_keeps_the_type_of_the_key(key: str, given: Any, kept: Any) -> None:
    value = lookup(apply(config(), {key: given}), key)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize("key", ["nothing", "method.nothing", "method.r.x", "", "training..seed"])
def test_there_is_no_value_at_a_wrong_path(key: str) -> None:
    with pytest.raises(KeyError):
        lookup(config(), key)


def test_choices_that_the_model_does_not_have_are_refused() -> None:
    shape = shape_of(zoo.build("llama"))
    dimension = "+space.targets={key: method.target_modules, kind: categorical, choices: [q_proj, c_attn]}"
    cfg = compose(["experiment=tiny", "method=lora", dimension])
    (problem,) = preflight.model_problems(cfg, shape, searching=True)
    assert problem.startswith("space.targets: method.target_modules: ")
    assert "c_attn" in problem
    assert preflight.model_problems(cfg, shape, searching=False) == []
