"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247)."""

from __future__ import annotations

from typing import Any

from raytune_lora.config.methods import AdapterMethodConfig, Placement
from raytune_lora.errors import UserError
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.own import OwnMethod
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")  # what decoder layers call their sublayers
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class Adapter(OwnMethod[AdapterMethodConfig]):
    """x + U gelu(D x) behind each decoder layer's feed-forward network; behind attention too as Houlsby placed them."""

    config_class = AdapterMethodConfig
    mergeable = False

    def apply(self, model: Any, start: Start) -> Any:
        from raytune_lora.models.layers.bottleneck import insert

        model.requires_grad_(False)
        kinds = [_FEED_FORWARD] if self.cfg.placement is Placement.pfeiffer else [_ATTENTION, _FEED_FORWARD]
        width = model.config.get_text_config().hidden_size
        for layer in decoder_layers(model):
            for names in kinds:
                name = next((name for name in names if hasattr(layer, name)), None)
                if name is None:
                    raise UserError(
                        f"method=adapter does not know the layers of this model: none of {', '.join(names)} "
                        f"in {type(layer).__name__}; method=lora works on any"
                    )
                insert(getattr(layer, name), width, self.cfg.width, self.cfg.dropout)
        return model

    def count(self, shape: Shape) -> int:
        one = 2 * shape.hidden * self.cfg.width + self.cfg.width + shape.hidden
        return shape.layers * one * (1 if self.cfg.placement is Placement.pfeiffer else 2)

    def added(self, shape: Shape) -> Added:
        behind_both = self.cfg.placement is Placement.houlsby
        places = shape.layers * (2 if behind_both else 1)
        return Added(
            trained=self.count(shape),
            per_token=places * (shape.hidden + 2 * self.cfg.width),
            untouched=0 if behind_both else 1,
        )


def decoder_layers(model: Any) -> list[Any]:
    """The model's decoder layers: its list of as many like modules as its config has layers.

    Raises:
        UserError: there is none.
    """
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError("method=adapter finds no list of decoder layers in this model; method=lora works on any")
