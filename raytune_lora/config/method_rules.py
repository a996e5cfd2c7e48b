"""Whether the config of a method makes sense by itself, whatever the model; ranges are in ``validate``."""

from __future__ import annotations

import re
from math import inf

from raytune_lora.config.methods import (
    ALL_LINEAR,
    AdaloraMethodConfig,
    EvaMethodConfig,
    LoraMethodConfig,
    MethodConfig,
    TargetedMethodConfig,
)


def problems(method: MethodConfig) -> list[str]:
    """What of several fields does not go together, each naming the key as the user types it."""
    found: list[str] = []
    if isinstance(method, LoraMethodConfig):
        found += _lora_problems(method)
    if isinstance(method, AdaloraMethodConfig):
        found += _adalora_problems(method)
    return found


def target_problems(method: MethodConfig) -> list[str]:
    """What is wrong with ``target_modules``, where the method has them."""
    if not isinstance(method, TargetedMethodConfig):
        return []
    words = list(method.target_modules)
    if not words:
        return ["method.target_modules is empty; name modules (q_proj,v_proj), or all-linear"]
    if ALL_LINEAR in words and len(words) > 1:
        return [
            f"method.target_modules: {ALL_LINEAR} stands alone, as it takes every linear layer but the head "
            f"(got {', '.join(words)}); leave out the others, or {ALL_LINEAR}"
        ]
    return _unreadable("target_modules", words)


def _lora_problems(method: LoraMethodConfig) -> list[str]:
    found = [
        *_unreadable("rank_pattern", method.rank_pattern),
        *_unreadable("alpha_pattern", method.alpha_pattern),
        *_unreadable("modules_to_save", method.modules_to_save),
        *_unreadable("layers_pattern", [method.layers_pattern] if method.layers_pattern else []),
    ]
    found += [f"method.rank_pattern.{key} must be >= 1 (got {r})" for key, r in method.rank_pattern.items() if r < 1]
    alphas = method.alpha_pattern.items()
    found += [f"method.alpha_pattern.{key} must be > 0 and finite (got {a:g})" for key, a in alphas if not 0 < a < inf]
    if ALL_LINEAR in method.modules_to_save:
        found.append(
            f"method.modules_to_save={ALL_LINEAR}: to train every weight, take method=full; here, name single modules, "
            "such as embed_tokens,lm_head"
        )
    if negative := [number for number in method.layers_to_transform if number < 0]:
        found.append(f"method.layers_to_transform counts the decoder layers from 0 (got {negative[0]})")
    if method.layers_pattern and not method.layers_to_transform:
        found.append(
            f"method.layers_pattern={method.layers_pattern} says where method.layers_to_transform counts, and that is "
            "empty; set it, or leave the pattern null"
        )
    if method.experts and method.dropout:
        found.append(
            f"method.experts=true needs method.dropout=0 (got {method.dropout:g}): PEFT adds an adapter to the weights "
            "of experts, where there is no input to leave something out of"
        )
    if isinstance(method, EvaMethodConfig) and method.rank_pattern:
        found.append(
            "method.rank_pattern: method=eva finds each layer's rank itself, up to method.rho * method.r; leave it "
            "empty"
        )
    return found


def _adalora_problems(method: AdaloraMethodConfig) -> list[str]:
    found = []
    if method.target_r > method.r:
        found.append(f"method.target_r must be <= method.r (got {method.target_r} and {method.r})")
    if method.start + method.settle >= 1:
        found.append(
            f"method.start + method.settle must be < 1, or the budget never falls (got {method.start:g} + "
            f"{method.settle:g})"
        )
    return found


def _unreadable(key: str, words: list[str] | dict[str, int] | dict[str, float]) -> list[str]:
    """Words that are neither names nor regular expressions."""
    found = []
    for word in words:
        try:
            re.compile(word)
        except re.error as error:
            found.append(f"method.{key}: {word!r} is not a regular expression ({error})")
    return found
