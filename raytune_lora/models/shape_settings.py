"""What the config of a language model says, by whichever of several names, and of each layer where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

_FEED_FORWARD = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERTS = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k"),
    "num_selected_experts",
)
_HEADS = ("num_attention_heads_per_layer", "num_attention_heads")


def each(config: Any, *names: str) -> list[Any]:
    """What a config, or one within it, says by the first of these names: once, or for each decoder layer."""
    said = [_first(of_layer, names) for of_layer in _of_layers(config)]
    if len(said) == 1 and isinstance(said[0], list | tuple):
        said = list(said[0])
    return [value for value in said if value is not None]


def _of_layers(config: Any) -> list[Any]:
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def _first(config: Any, names: tuple[str, ...]) -> Any:
    within = (getattr(config, key, None) for key in getattr(config, "sub_configs", ()))
    values = (getattr(part, name, None) for part in (config, *within) for name in names)
    return next((value for value in values if value is not None), None)


def heads(config: Any) -> Iterator[tuple[int, int, int]]:
    """Heads of queries, heads of keys and values, and their size: once, or for each decoder layer; 0 for no heads."""
    queries = each(config, *_HEADS) or [0]  # none: no layer attends
    keys = each(config, "num_key_value_heads") or queries
    sizes = each(config, "head_dim") or [config.hidden_size // max(1, count) for count in queries]
    count = max(map(len, (queries, keys, sizes)))
    yield from zip(*(values * (count // len(values)) for values in (queries, keys, sizes)), strict=False)


def experts_per_token(config: Any) -> int:
    """The experts that a token sees, in the mean of the layers; 0 without experts."""
    return mean([count for count in each(config, *_EXPERTS) if isinstance(count, int)])


def feed_forward(config: Any) -> int:
    """The width inside the feed-forward network, in the mean of the layers; of a mixture, what a token sees of it."""
    dense = mean(each(config, *_FEED_FORWARD)) or 4 * config.hidden_size
    experts = experts_per_token(config)
    if not experts:
        return dense
    one = mean(each(config, "moe_intermediate_size")) or dense
    return experts * one + mean(each(config, "shared_expert_intermediate_size"))


def mean(values: list[int]) -> int:
    return round(fmean(values)) if values else 0
