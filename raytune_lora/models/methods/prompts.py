"""Methods that put learned vectors in front of the input or of each layer's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from raytune_lora.config.methods import (
    MethodConfig,
    PrefixTuningMethodConfig,
    PromptTuningMethodConfig,
    PTuningMethodConfig,
)
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.peft_method import PeftMethod, write_adapter
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

C = TypeVar("C", bound=MethodConfig)
_ENCODER = "prompt_encoder.default."  # what PEFT puts before the names of the network's parameters


class PromptMethod(PeftMethod[C]):
    """Its network is computed once when saving: what is left are the vectors."""

    mergeable = False
    packable = False
    starts_as_base = False

    def problems(self, shape: Shape) -> list[str]:
        if not shape.block.heads:
            return [
                f"method={self.cfg.kind} needs a model whose layers attend, and this one has none; take method=lora"
            ]
        why = self.refused(shape)
        return [f"method={self.cfg.kind} {why}; take method=lora"] if why else []

    def refused(self, shape: Shape) -> str:
        """Why the model cannot have its vectors; empty where it can."""
        if not shape.unprompted:
            return ""
        return f"puts learned vectors before each row's, and PEFT cannot do so with this model ({shape.unprompted})"

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


def _sizes(model: Any, tokens: int, keys: Callable[[Shape], tuple[int, int, int]]) -> dict[str, Any]:
    from raytune_lora.models.shape import shape_of
    from raytune_lora.models.skeleton import prompt_sizes

    return prompt_sizes(tokens, keys(shape_of(model)))


class PrefixTuning(PromptMethod[PrefixTuningMethodConfig]):
    """Keys and values (arXiv:2101.00190)."""

    config_class = PrefixTuningMethodConfig

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            **_sizes(model, self.cfg.virtual_tokens, _keys),
            prefix_projection=self.cfg.projection is not None,
            encoder_hidden_size=self.cfg.projection,  # type: ignore[arg-type]  # unused without projection
        )

    def count(self, shape: Shape) -> int:
        layers, heads, size = _keys(shape)
        tokens, keys, width = self.cfg.virtual_tokens, heads * size, self.cfg.projection
        if width is None:
            return tokens * 2 * layers * keys
        return tokens * keys + keys * width + width + (width + 1) * 2 * layers * keys

    def added(self, shape: Shape) -> Added:
        return Added(trained=self.count(shape), keys=self.cfg.virtual_tokens)

    def refused(self, shape: Shape) -> str:
        what = "puts learned keys and values before those of every layer, and"
        if shape.unprefixed:
            return f"{what} PEFT cannot do so with this model ({shape.unprefixed})"
        if shape.keys is None:
            return (
                f"{what} not every layer of this model keeps both, of one width (some convolve, scan, or keep others)"
            )
        return ""


def _keys(shape: Shape) -> tuple[int, int, int]:
    """Layers, and heads and width of their keys and values, of a model that has them."""
    assert shape.keys is not None, "problems() has refused the model"
    return shape.keys


def _embedded(shape: Shape) -> int:
    """The width of the model's input vectors, in some models less than that of its layers."""
    return shape.embedded or shape.hidden


class PromptTuning(PromptMethod[PromptTuningMethodConfig]):
    """Input embeddings (arXiv:2104.08691)."""

    config_class = PromptTuningMethodConfig

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import PromptTuningConfig, PromptTuningInit

        settings: dict[str, Any] = {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}
        if self.cfg.text is not None:
            settings = {
                "prompt_tuning_init": PromptTuningInit.TEXT,
                "prompt_tuning_init_text": self.cfg.text,
                "tokenizer_name_or_path": str(start.weights),
            }
        sizes = _sizes(model, self.cfg.virtual_tokens, lambda shape: (1, 1, _embedded(shape)))
        return PromptTuningConfig(**sizes, **settings)

    def count(self, shape: Shape) -> int:
        return self.cfg.virtual_tokens * _embedded(shape)

    def added(self, shape: Shape) -> Added:
        return Added(trained=self.count(shape), prefix=self.cfg.virtual_tokens, from_start=True)


class PTuning(PromptMethod[PTuningMethodConfig]):
    """Input embeddings out of a three-layer network (arXiv:2103.10385)."""

    config_class = PTuningMethodConfig

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import PromptEncoderConfig

        sizes = _sizes(model, self.cfg.virtual_tokens, lambda shape: (1, 1, _embedded(shape)))
        return PromptEncoderConfig(**sizes, encoder_hidden_size=self.cfg.width)

    def count(self, shape: Shape) -> int:
        each, width = _embedded(shape), self.cfg.width
        network = each * width + width + width * width + width + width * each + each
        return self.cfg.virtual_tokens * each + network

    def added(self, shape: Shape) -> Added:
        return Added(trained=self.count(shape), prefix=self.cfg.virtual_tokens, from_start=True)
