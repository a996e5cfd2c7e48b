"""The search space: what is refused, what is sampled, and how values reach the config."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import optuna
import pytest

from raytune_lora.config.compose import compose
from raytune_lora.config.data import FakeDataConfig
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import SweepConfig, TinyModelConfig
from raytune_lora.config.search import DimensionConfig, DimensionKind
from raytune_lora.tuning.preflight import _extremes
from raytune_lora.tuning.space import apply, configured_point, lookup, problems, sample

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
    assert _extremes(cfg) == []


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
    (found,) = _extremes(cfg)
    assert found.startswith(problem)


def test_what_is_wrong_anyway_is_not_told_of_each_dimension() -> None:
    cfg = config(**lora_space())
    cfg.training.epochs = 0
    assert _extremes(cfg) == []


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
    ("left_out", "key", "value"),
    [
        ("method.r", "method.r", 128),
        ("training.learning_rate", "training.learning_rate", 1.0),
        ("training.lr_scheduler", "training.lr_scheduler", "constant"),
        ("method.alpha / method.r", "method.alpha", 24.0),
    ],
)
def test_a_value_outside_the_space_is_left_to_the_sampler(left_out: str, key: str, value: Any) -> None:
    cfg = config(**lora_space())
    inside = configured_point(cfg.space, cfg)
    outside = configured_point(cfg.space, apply(cfg, {key: value}))
    assert left_out in inside
    assert left_out not in outside


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
