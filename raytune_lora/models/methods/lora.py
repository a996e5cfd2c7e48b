"""LoRA: low-rank adapters on linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, TaskType, get_peft_model

from raytune_lora.config.schema import LoraMethodConfig
from raytune_lora.errors import UserError
from raytune_lora.models.methods.base import Method

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head


class Lora(Method[LoraMethodConfig]):
    config_class = LoraMethodConfig

    def apply(self, model: Any) -> Any:
        modules = self.cfg.target_modules
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.cfg.r,
            lora_alpha=self.cfg.alpha,  # type: ignore[arg-type]  # only ever divided by r
            lora_dropout=self.cfg.dropout,
            target_modules=ALL_LINEAR if modules == [ALL_LINEAR] else list(modules),
            bias="none",
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            leaves = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "weight")})
            raise UserError(
                f"method.target_modules={list(modules)}: {error} Modules of this model: {', '.join(leaves)}"
            ) from error
