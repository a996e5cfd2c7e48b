"""Methods that put learned vectors in front of the input or of each layer's keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

from raytune_lora.config.methods import (
    PrefixTuningMethodConfig,
    PromptTuningMethodConfig,
    PTuningMethodConfig,
)
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.peft_method import PeftMethod, write_adapter
from raytune_lora.models.shape import shape_of
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

C = TypeVar("C", PrefixTuningMethodConfig, PromptTuningMethodConfig, PTuningMethodConfig)
_ENCODER = "prompt_encoder.default."  # what PEFT puts before the names of the network's parameters


class PromptMethod(PeftMethod[C]):
    """Its network is computed once when saving: what is left are the vectors."""

    mergeable = False
    packable = False
    starts_as_base = False
    among_tokens: ClassVar[bool] = True  # whether the vectors are those of the input

    def settings(self, model: Any) -> dict[str, Any]:
        """What PEFT asks the model's config for, by names that not every config has."""
        shape = shape_of(model)
        return {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.cfg.virtual_tokens,
            "num_layers": shape.layers,
            "num_attention_heads": shape.block.heads,
            "token_dim": shape.hidden,
        }

    def problems(self, shape: Shape) -> list[str]:
        if not shape.promptable and self.among_tokens:
            return [
                f"method={self.cfg.kind} puts vectors among those of the tokens, and this model looks up more than one "
                "for each token, in each of its layers; take method=lora"
            ]
        if shape.block.heads:
            return []
        return [f"method={self.cfg.kind} needs a model whose layers attend, and this one has none; take method=lora"]

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        """A network is built anew from the state: the model's own may lie in parts on other workers."""
        import torch

        weights = {name.removeprefix(_ENCODER): tensor for name, tensor in state.items()}
        if list(weights) == ["embedding.weight"]:  # learned directly
            vectors = weights["embedding.weight"]
        else:
            config = model.peft_config["default"]
            network = type(model.prompt_encoder["default"])(config)
            network.load_state_dict(weights)
            with torch.no_grad():
                vectors = network(torch.arange(config.num_virtual_tokens))
            vectors = vectors.reshape(config.num_virtual_tokens, -1)
        write_adapter(model, {"prompt_embeddings": vectors}, folder)


class PrefixTuning(PromptMethod[PrefixTuningMethodConfig]):
    """Keys and values (arXiv:2101.00190)."""

    config_class = PrefixTuningMethodConfig
    among_tokens = False

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import PrefixTuningConfig

        block = shape_of(model).block
        heads = block.kv_width * block.heads // block.query_width
        return PrefixTuningConfig(
            **self.settings(model) | {"num_attention_heads": heads, "token_dim": block.kv_width},
            prefix_projection=self.cfg.projection is not None,
            encoder_hidden_size=self.cfg.projection,  # type: ignore[arg-type]  # unused without projection
        )

    def count(self, shape: Shape) -> int:
        tokens, width, out = self.cfg.virtual_tokens, self.cfg.projection, 2 * shape.layers * shape.kv_width
        if width is None:
            return tokens * out
        return tokens * shape.kv_width + shape.kv_width * width + width + width * out + out

    def added(self, shape: Shape) -> Added:
        return Added(trained=self.count(shape), keys=self.cfg.virtual_tokens)

    def problems(self, shape: Shape) -> list[str]:
        if shape.prefixable or not shape.block.heads:
            return super().problems(shape)
        return [
            "method=prefix_tuning puts keys and values before those of every layer, and not every layer of this model "
            "has both, of one width (some convolve, scan, or attend to latent vectors); take method=prompt_tuning"
        ]


class PromptTuning(PromptMethod[PromptTuningMethodConfig]):
    """Input embeddings (arXiv:2104.08691)."""

    config_class = PromptTuningMethodConfig

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import PromptTuningConfig, PromptTuningInit

        start_from: dict[str, Any] = {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}
        if self.cfg.text is not None:
            start_from = {
                "prompt_tuning_init": PromptTuningInit.TEXT,
                "prompt_tuning_init_text": self.cfg.text,
                "tokenizer_name_or_path": str(start.weights),
            }
        return PromptTuningConfig(**self.settings(model), **start_from)

    def count(self, shape: Shape) -> int:
        return self.cfg.virtual_tokens * shape.hidden

    def added(self, shape: Shape) -> Added:
        return Added(trained=self.count(shape), prefix=self.cfg.virtual_tokens, from_start=True)


class PTuning(PromptMethod[PTuningMethodConfig]):
    """Input embeddings out of a three-layer network (arXiv:2103.10385)."""

    config_class = PTuningMethodConfig

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(**self.settings(model), encoder_hidden_size=self.cfg.width)

    def count(self, shape: Shape) -> int:
        hidden, width = shape.hidden, self.cfg.width
        network = hidden * width + width + width * width + width + width * hidden + hidden
        return self.cfg.virtual_tokens * hidden + network

    def added(self, shape: Shape) -> Added:
        return Added(trained=self.count(shape), prefix=self.cfg.virtual_tokens, from_start=True)
