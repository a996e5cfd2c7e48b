"""The shape of a base model: what counts of trainable parameters are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_lora.config.methods import ALL_LINEAR
from raytune_lora.config.schema import ModelConfig
from raytune_lora.models.tokenizer import trusted


@dataclass(frozen=True)
class Linear:
    """A linear layer, or GPT-2's transposed one."""

    name: str  # dotted path in the model
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Shape:
    """Numbers of a base model, without its weights."""

    hidden: int  # width of the residual stream
    layers: int  # decoder layers
    kv_width: int  # of one layer's keys: heads for keys and values times their size
    head: str | None  # name of the linear layer that gives the logits
    linears: tuple[Linear, ...]
    norms: int  # parameters of all normalization layers
    biases: int  # parameters called bias
    parameters: int  # all, shared ones once

    def targets(self, names: list[str]) -> list[Linear]:
        """The linear layers that PEFT takes for these ``target_modules``."""
        if names == [ALL_LINEAR]:
            return [linear for linear in self.linears if linear.name != self.head]
        return [
            linear
            for linear in self.linears
            if any(linear.name == name or linear.name.endswith(f".{name}") for name in names)
        ]


def shape_of_folder(folder: Path, cfg: ModelConfig) -> Shape:
    """The shape of the model in a folder; no weight is read or made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted(cfg))
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted(cfg)))


def shape_of(model: Any) -> Shape:
    """The shape of a base model without adapters."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears.append(Linear(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            linears.append(Linear(name, *module.weight.shape))
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        kv_width=kv_heads * head_size,
        head=names.get(id(head)),
        linears=tuple(linears),
        norms=sum(p.numel() for _, norm in norms(model) for p in norm.parameters()),
        biases=sum(p.numel() for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def norms(model: Any) -> list[tuple[str, Any]]:
    """Normalization layers by name."""
    return [(name, m) for name, m in model.named_modules() if "norm" in type(m).__name__.lower()]
