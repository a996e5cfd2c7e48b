"""What LoRA and its variants train beside their matrices, and where: PEFT's ``bias``, ``modules_to_save`` and patterns.

Counted and checked on the model's shape before anything starts, by the rules by which PEFT applies them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from raytune_lora.config.methods import Bias, LoraMethodConfig
from raytune_lora.planning.shape import Linear, Shape, matches


def in_layers(cfg: LoraMethodConfig, name: str) -> bool:
    """Whether a module lies in one of ``layers_to_transform``."""
    return not cfg.layers_to_transform or layer_number(cfg, name) in set(cfg.layers_to_transform)


def layer_number(cfg: LoraMethodConfig, name: str) -> int | None:
    """The number of the decoder layer that a module lies in; None outside of all of them."""
    pattern = r".*?\.[^.]*" if cfg.layers_pattern is None else rf"(?:.*?\.)?{cfg.layers_pattern}"
    found = re.match(rf"{pattern}\.(\d+)\.", name)
    return int(found[1]) if found else None


def value_of(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """A layer's own value in ``rank_pattern`` or ``alpha_pattern``: that of the first key that matches."""
    return next((value for key, value in pattern.items() if _fits(key, name)), default)


def saved(cfg: LoraMethodConfig, shape: Shape) -> dict[str, int]:
    """The modules that ``modules_to_save`` means and their parameters.

    One inside another belongs to that. Where embedding and head share their weight, both are trained, and it counts
    once.
    """
    sizes = dict(shape.modules) if cfg.modules_to_save else {}
    found = [name for name in sizes if any(matches(word, name) for word in cfg.modules_to_save)]
    if shape.tied and {shape.embedding, shape.head} & set(found):
        found = list(dict.fromkeys([*found, shape.embedding or "", shape.head or ""]))
        sizes[shape.head or ""] = 0
    return {name: sizes[name] for name in found if not within(name.rpartition(".")[0], found)}


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def trained_beside(cfg: LoraMethodConfig, shape: Shape, targets: list[Linear]) -> int:
    """How many parameters train beside the adapters."""
    return biases(cfg, shape, targets) + sum(saved(cfg, shape).values())


def biases(cfg: LoraMethodConfig, shape: Shape, targets: list[Linear]) -> int:
    """How many biases of the base model train."""
    if cfg.bias is Bias.lora_only:
        return sum(linear.d_out for linear in targets if linear.bias)
    if cfg.bias is Bias.none:
        return 0
    whole = saved(cfg, shape)
    return sum(size for name, size in shape.biases if not within(name, whole))  # PEFT trains a copy of the others


def problems(cfg: LoraMethodConfig, shape: Shape, targets: list[Linear]) -> list[str]:
    """What ``bias``, the layers, the patterns and the modules ask for that the model does not have."""
    found = _layer_problems(cfg, shape)
    for key, pattern in (("rank_pattern", cfg.rank_pattern), ("alpha_pattern", cfg.alpha_pattern)):
        idle = [rule for rule in pattern if not any(_fits(rule, linear.name) for linear in targets)]
        if idle:
            found.append(
                f"method.{key}: {', '.join(idle)} matches none of the target layers; name the last parts of one "
                f"({', '.join(sorted({linear.name.rpartition('.')[2] for linear in targets})) or 'there is none'}), or "
                "write a regular expression for the end of its name"
            )
        found += _contradictions(key, pattern, targets)
    unknown = [w for w in cfg.modules_to_save if not any(matches(w, name) for name, _ in shape.modules)]
    if unknown:
        usual = ", ".join(name for name in (shape.embedding, shape.head) if name)
        found.append(
            f"method.modules_to_save: the model has no module called {', '.join(unknown)} with parameters that could "
            f"all train; its embedding and head are {usual}"
        )
    named = shape.head is not None and any(matches(word, shape.head) for word in cfg.target_modules)
    if shape.tied and named and shape.embedding in saved(cfg, shape):
        found.append(
            f"method.target_modules: {shape.head} shares its weight with {shape.embedding}, which "
            "method.modules_to_save trains whole; take it out of one of them"
        )
    if shape.tied and shape.head in saved(cfg, shape) and any(x.bias and x.name == shape.head for x in shape.linears):
        found.append(
            f"method.modules_to_save: {shape.head} shares its weight with {shape.embedding} and has a bias beside it, "
            "and PEFT would not load the two as they were trained; name a module around the head, or leave it out"
        )
    if cfg.bias is not Bias.none and not biases(cfg, shape, targets):
        where = "the model has" if cfg.bias is Bias.all else "the target layers have"
        found.append(f"method.bias={cfg.bias.value} trains biases, and {where} none; set method.bias=none")
    return found


def quantized_problems(cfg: LoraMethodConfig, shape: Shape) -> list[str]:
    """Linear layers that ``modules_to_save`` means, on a quantized base: those that are have no weights to train."""
    linears = [linear.name for linear in shape.linears if linear.quantized]
    whole = saved(cfg, shape)
    stray = [name for name in linears if within(name, whole)]
    if not stray:
        return []
    return [
        f"method.modules_to_save: {stray[0]} is quantized, and quantized weights cannot train; name modules that are "
        "not (the embedding, the head, normalization layers), or set quantization=none"
    ]


def _layer_problems(cfg: LoraMethodConfig, shape: Shape) -> list[str]:
    asked = list(cfg.layers_to_transform)
    there = {layer_number(cfg, linear.name) for linear in shape.linears} - {None}
    if not asked or set(asked) <= there:
        return []
    if not there:
        return [
            f"method.layers_pattern={cfg.layers_pattern}: no layer of the model has a number behind that name; leave "
            "it null, or name the list of layers (layers in most models, h in GPT-2)"
        ]
    numbers = [n for n in there if n is not None]
    return [
        f"method.layers_to_transform: the model has layers {min(numbers)} to {max(numbers)} "
        f"(got {', '.join(str(n) for n in asked if n not in there)})"
    ]


def _contradictions(key: str, pattern: dict[str, Any], targets: list[Linear]) -> list[str]:
    """Layers that keys give different values: PEFT takes the first key, and writes them in another order."""
    for linear in targets:
        values = {rule: value for rule, value in pattern.items() if _fits(rule, linear.name)}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{rule}: {value:g}" for rule, value in values.items())
            return [
                f"method.{key} gives {linear.name} several values ({said}); PEFT would take another one of them when "
                "the adapter is loaded; write keys that do not share layers, such as regular expressions with the "
                "numbers of the layers (layers[.](1|2|3)[.].*q_proj)"
            ]
    return []


def _fits(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None
