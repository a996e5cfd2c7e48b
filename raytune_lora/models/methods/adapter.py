"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247)."""

from __future__ import annotations

from typing import Any

from raytune_lora.config.methods import AdapterMethodConfig, Placement
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.own import OwnMethod
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")  # what decoder layers call their sublayers
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")  # the last: OPT's has no module of its own


class Adapter(OwnMethod[AdapterMethodConfig]):
    """x + U gelu(D x) behind each decoder layer's feed-forward network; behind attention too as Houlsby placed them."""

    config_class = AdapterMethodConfig
    mergeable = False

    def apply(self, model: Any, start: Start) -> Any:
        from raytune_lora.models.layers.bottleneck import insert
        from raytune_lora.models.shape import decoder_layers

        model.requires_grad_(False)
        width = model.config.get_text_config().hidden_size
        for layer in decoder_layers(model):
            for names in self._kinds():
                name = next(name for name in names if hasattr(layer, name))
                insert(getattr(layer, name), width, self.cfg.width, self.cfg.dropout)
        return model

    def problems(self, shape: Shape) -> list[str]:
        missing = [names for names in self._kinds() if not set(names) & set(shape.sublayers)]
        return [
            f"method=adapter finds no place in this model's decoder layers: nothing is called {', '.join(names)}; each "
            f"has {', '.join(shape.sublayers) or 'nothing in common'}; method=lora works on any"
            for names in missing
        ]

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

    def _kinds(self) -> list[tuple[str, ...]]:
        """The names that each sublayer with an adapter behind it may have."""
        return [_FEED_FORWARD] if self.cfg.placement is Placement.pfeiffer else [_ATTENTION, _FEED_FORWARD]
