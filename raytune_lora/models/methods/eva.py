"""EVA: LoRA that starts along the directions of most variance of each layer's input (arXiv:2410.07170)."""

from __future__ import annotations

from typing import Any

from raytune_lora.config.methods import EvaMethodConfig
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.lora import LoraFamily
from raytune_lora.planning.shape import Shape


class Eva(LoraFamily[EvaMethodConfig]):
    """A starts as the right singular vectors of the inputs, B at zero. With ``rho`` > 1 the ranks differ by layer.

    ``count`` is exact for ``rho=1``; for more it is the budget that the ranks share.
    """

    config_class = EvaMethodConfig
    stages = frozenset({0, 1, 2})
    because = "it looks at the inputs of every layer before training, when ZeRO-3's weights lie in parts"

    def variant(self) -> dict[str, Any]:
        from peft import EvaConfig

        return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=self.cfg.rho)}

    def apply(self, model: Any, start: Start) -> Any:
        from peft import initialize_lora_eva_weights

        adapted = super().apply(model, start)
        if start.earlier is None or self.cfg.rho > 1:  # with more, ranks follow from the data: found again, the same
            initialize_lora_eva_weights(
                adapted,
                dataloader=list(start.samples(self.cfg.samples)),
                prepare_model_inputs_fn=_counted_tokens,
                prepare_layer_inputs_fn=_their_inputs,
                gather_distributed_inputs=False,  # all workers see the same samples here
                show_progress_bar=False,
            )
        return adapted

    def problems(self, shape: Shape) -> list[str]:
        return [*super().problems(shape), *self.too_many_ranks(shape)]


def _counted_tokens(batch: dict[str, Any], config: Any) -> Any:
    """Which tokens of a batch have a label, B x T."""
    mask = batch["attention_mask"].bool()
    return mask & (batch["labels"] != config.eva_config.label_mask_value) if config.eva_config.use_label_mask else mask


def _their_inputs(inputs: Any, mask: Any, name: str) -> Any:
    """The inputs of a layer for these tokens; some models give a layer all tokens in one row, as OPT does."""
    x = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
    return x.reshape(-1, x.shape[-1])[mask.flatten()]
