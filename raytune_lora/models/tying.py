"""Weights that several modules share, as where the embedding is also the head: changed for one module, not for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


def untie(model: Any, layers: Iterable[Any]) -> None:
    """Give layers that are about to be changed weights of their own, where other modules use the same ones.

    Where this parts the head from the embedding, the model's config says so, so that it is saved and loaded as two.

    Args:
        model: that holds the layers; PEFT's or transformers'.
        layers: modules whose own parameters will be changed in place.
    """
    from torch import nn

    users = Counter(p.data_ptr() for module in model.modules() for p in _own(module).values())
    for layer in layers:
        for name, p in _own(layer).items():
            if users[p.data_ptr()] > 1:
                users[p.data_ptr()] -= 1
                setattr(layer, name, nn.Parameter(p.detach().clone(), p.requires_grad))
    _say_if_untied(model)


def untie_adapted(model: Any) -> None:
    """The same for all layers that an adapter of PEFT lies upon, as before a merge.

    A layer that other modules use as it is, without its adapter, is copied for the adapter.
    """
    from copy import deepcopy

    from peft.tuners.tuners_utils import BaseTunerLayer

    holders = Counter(id(child) for module in model.modules() for child in module.children())
    adapters: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for adapter in adapters:
        if holders[id(adapter.base_layer)] > 1:
            adapter.base_layer = deepcopy(adapter.base_layer)
    untie(model, [adapter.get_base_layer() for adapter in adapters])


def _own(module: Any) -> dict[str, Any]:
    return {name: p for name, p in module._parameters.items() if p is not None and p.numel()}


def _say_if_untied(model: Any) -> None:
    from transformers.trainer_utils import unwrap_peft_model

    base = unwrap_peft_model(model)
    try:
        first, last = base.get_input_embeddings(), base.get_output_embeddings()
    except NotImplementedError:
        return
    weights: list[Any] = [getattr(getattr(m, "base_layer", m), "weight", None) for m in (first, last)]
    if any(weight is None for weight in weights) or weights[0].data_ptr() == weights[1].data_ptr():
        return
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    if hasattr(base, "get_expanded_tied_weights_keys"):  # what a later tie_weights() goes by
        base.all_tied_weights_keys = base.get_expanded_tied_weights_keys(all_submodels=True)
