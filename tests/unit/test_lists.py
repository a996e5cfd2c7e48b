"""Lists and patterns of a method as one types them."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from raytune_lora.config import validate
from raytune_lora.config.compose import compose, dump, parse
from raytune_lora.errors import UserError
from raytune_lora.tuning import space

TINY = ["model=tiny", "data=fake"]


def value_of(override: str, key: str) -> Any:
    cfg = compose([*TINY, override])
    assert parse(dump(cfg), "x") == cfg
    return space.lookup(cfg, key)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("all-linear", ["all-linear"]),
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("'q_proj,v_proj'", ["q_proj", "v_proj"]),
        ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("[]", []),
        (r".*\.layers\.\d+\..*(q|v)_proj", [r".*\.layers\.\d+\..*(q|v)_proj"]),
        (r"['.*(q|v)_proj']", [".*(q|v)_proj"]),
        (r"[.*(q|v)_proj,k_proj]", [".*(q|v)_proj", "k_proj"]),
        (r".*layers\.[0-9]{1,2}\.self_attn\..*", [r".*layers\.[0-9]{1,2}\.self_attn\..*"]),
    ],
)
@pytest.mark.parametrize("key", ["method.target_modules", "method.modules_to_save", "data.benchmarks"])
def test_a_list_is_typed_with_or_without_brackets(typed: str, meant: list[str], key: str) -> None:
    data = ["data=file", "data.path=x"] if key.startswith("data") else []
    cfg = compose([*TINY, *data, f"{key}={typed}"])
    assert space.lookup(cfg, key) == meant
    assert parse(dump(cfg), "x") == cfg


def test_numbers_in_a_list_are_numbers() -> None:
    assert value_of("method.layers_to_transform=0,1", "method.layers_to_transform") == [0, 1]
    assert value_of("method.layers_to_transform=3", "method.layers_to_transform") == [3]
    with pytest.raises(UserError, match=r"method.layers_to_transform: .* 'a'"):
        compose([*TINY, "method.layers_to_transform=a"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("method.rank_pattern={q_proj: 8, v_proj: 4}", {"q_proj": 8, "v_proj": 4}),
        ("method.rank_pattern={q_proj:8}", {"q_proj": 8}),
        ("+method.rank_pattern.q_proj=8", {"q_proj": 8}),
        (r"method.rank_pattern={layers\.(0|1)\..*[qv]_proj: 8}", {r"layers\.(0|1)\..*[qv]_proj": 8}),
        ("method.rank_pattern={'q_proj': 8}", {"q_proj": 8}),
        ("method.rank_pattern={}", {}),
    ],
)
def test_a_pattern_is_typed_as_a_dictionary(typed: str, meant: dict[str, int]) -> None:
    assert value_of(typed, "method.rank_pattern") == meant


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.rank_pattern={q_proj: many}", "method.rank_pattern"),
        ("method.bias=some", "none, all, lora_only"),
        ("method.target_modules={q_proj: 1}", "method.target_modules"),
    ],
)
def test_what_is_no_list_or_pattern_is_refused_by_its_key(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose([*TINY, override])


def test_a_pattern_of_a_method_without_one_is_an_unknown_key() -> None:
    with pytest.raises(UserError, match=r"method.rank_pattern: unknown key"):
        compose([*TINY, "method=ia3", "method.rank_pattern={q_proj: 8}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.target_modules=[]", "method.target_modules is empty"),
        ("method.target_modules=all-linear,q_proj", "all-linear stands alone"),
        ("method.target_modules=.*(q", "not a regular expression"),
        ("method.rank_pattern={q_proj: 0}", "method.rank_pattern.q_proj must be >= 1"),
        ("method.alpha_pattern={q_proj: 0}", "method.alpha_pattern.q_proj must be > 0"),
        ("method.alpha_pattern={q_proj: .nan}", "method.alpha_pattern.q_proj must be > 0 and finite"),
        ("method.alpha_pattern={q_proj: .inf}", "method.alpha_pattern.q_proj must be > 0 and finite"),
        ("method.layers_to_transform=[-1]", "from 0"),
        ("method.layers_pattern=h", "method.layers_to_transform"),
        ("method.modules_to_save=all-linear", "method=full"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, words: str) -> None:
    (problem,) = validate.problems(compose([*TINY, override]))
    assert words in problem


def test_lists_are_searched_as_texts_and_set_as_lists() -> None:
    choices = "[all-linear, 'q_proj,v_proj', [q_proj, k_proj]]"
    dimension = f"+space.targets={{key: method.target_modules, kind: categorical, choices: {choices}}}"
    cfg = compose([*TINY, "space=rate", dimension])
    assert space.problems(cfg.space, cfg) == []
    assert cfg.space["targets"].choices == ["all-linear", "q_proj,v_proj", "q_proj,k_proj"]
    assert space.configured_point(cfg.space, cfg)["method.target_modules"] == "all-linear"
    for text, meant in (("all-linear", ["all-linear"]), ("q_proj,k_proj", ["q_proj", "k_proj"])):
        trial = optuna.trial.FixedTrial({"method.target_modules": text, "training.learning_rate": 1e-4})
        assert space.apply(cfg, space.sample(trial, cfg.space, cfg)).method.target_modules == meant  # type: ignore[attr-defined, arg-type]


def test_a_choice_that_the_list_cannot_hold_is_refused() -> None:
    dimension = "+space.layers={key: method.layers_to_transform, kind: categorical, choices: ['0,1', x]}"
    cfg = compose([*TINY, "space=rate", dimension])
    (problem,) = space.problems(cfg.space, cfg)
    assert "method.layers_to_transform cannot be 'x'" in problem
