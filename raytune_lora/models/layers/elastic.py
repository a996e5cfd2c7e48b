"""IR-QLoRA's two parts (arXiv:2402.05445): calibrated 4-bit layers, and elastic connections around LoRA's matrices."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from torch import nn

from raytune_lora.models.layers import BLOCK
from raytune_lora.models.weights import Weights

_CODES = 16
_SPREAD = 1 / 1.8481308  # a standard deviation of NF4's codes, the largest being 1: the 0.9677083 quantile


class ElasticDown(nn.Linear):
    """A's output plus the averages of r groups of the input, times a learned scalar."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.scale = nn.Parameter(linear.weight.new_zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (self.out_features, -1)).mean(-1)
        return super().forward(x) + self.scale * groups


class ElasticUp(nn.Linear):
    """B's output plus its input, each element repeated, times a learned scalar."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.scale = nn.Parameter(linear.weight.new_zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        repeated = x.repeat_interleave(self.out_features // self.in_features, dim=-1)
        return super().forward(x) + self.scale * repeated


def connect(model: Any) -> None:
    """Put the elastic connections around each layer's A and B."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.lora_A["default"] = ElasticDown(layer.lora_A["default"])
        layer.lora_B["default"] = ElasticUp(layer.lora_B["default"])


@torch.no_grad()
def calibrate(
    model: Any, weights: Weights, names: list[str], spread: float, steps: int, known: dict[str, Any] | None
) -> None:
    """Quantize layers anew, each block around an offset of its own, which is added back behind the layer.

    Args:
        model: with 4-bit layers.
        weights: unquantized.
        names: of the layers.
        spread: half-width of the search, in standard deviations of a block.
        steps: offsets tried on each side of the median.
        known: the offsets of an earlier calibration, by layer; they are searched where None.
    """
    for name in names:
        layer = model.get_submodule(name)
        blocks = weights.linear(name, layer).to(layer.weight.device, torch.float32).reshape(-1, BLOCK)
        median = blocks.median(dim=1, keepdim=True).values
        reach = (blocks - median).abs().amax(dim=1, keepdim=True)
        factors = torch.linspace(-spread * _SPREAD, spread * _SPREAD, 2 * steps + 1, device=blocks.device)
        chosen = known[f"{name}.offsets"] if known else _most_entropy(blocks, median, reach, factors, layer)
        tau = median + factors[chosen.long()].reshape(-1, 1) * reach
        layer.weight = _quantized(blocks - tau, layer)
        layer.register_buffer("offsets", chosen.to(torch.uint8).cpu(), persistent=False)
        layer.register_buffer("tau", tau.reshape(layer.out_features, -1).to(layer.compute_dtype), persistent=False)
        layer.register_forward_hook(_add_offsets)


def offsets(model: Any, prefix: str) -> dict[str, Any]:
    """The offsets chosen for each calibrated layer, by its name in the base model."""
    return {
        f"{name.removeprefix(prefix).removesuffix('.base_layer')}.offsets": layer.offsets
        for name, layer in model.named_modules()
        if isinstance(layer, Linear4bit) and hasattr(layer, "offsets")
    }


def _add_offsets(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """A block's offset is the same for its 64 weights: it meets the sum of their inputs."""
    sums = inputs[0].to(layer.tau.dtype).unflatten(-1, (-1, BLOCK)).sum(-1)
    return output + (sums @ layer.tau.T).to(output.dtype)


def _most_entropy(
    blocks: torch.Tensor, median: torch.Tensor, reach: torch.Tensor, factors: torch.Tensor, layer: Any
) -> torch.Tensor:
    best = torch.full((len(blocks),), -1.0, device=blocks.device)
    chosen = torch.zeros(len(blocks), dtype=torch.long, device=blocks.device)
    for number, factor in enumerate(factors):
        entropy = _entropy(_quantized(blocks - median - factor * reach, layer))
        better = entropy > best
        best, chosen = torch.where(better, entropy, best), torch.where(better, number, chosen)
    return chosen


def _quantized(blocks: torch.Tensor, layer: Any) -> Any:
    old = layer.weight
    fresh: Any = Params4bit(
        blocks.reshape(layer.out_features, layer.in_features).to(layer.compute_dtype or blocks.dtype),
        requires_grad=False,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    )
    return fresh.to(old.device)


def _entropy(weight: Any) -> torch.Tensor:
    """Of the codes in each block, in bits."""
    packed = weight.data.view(torch.uint8).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1, BLOCK).long()
    counts = torch.zeros(len(codes), _CODES, device=codes.device).scatter_add_(1, codes, torch.ones_like(codes).float())
    shares = counts / BLOCK
    return -(shares * shares.clamp_min(1e-12).log2()).sum(dim=1)


def dequantized(layer: Any) -> torch.Tensor:
    """The weights a calibrated layer stands for."""
    blocks = dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(-1, BLOCK)
    return (blocks + layer.tau.reshape(-1, 1)).reshape(layer.out_features, layer.in_features)
