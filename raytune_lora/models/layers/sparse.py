"""Diff pruning's layer: a difference to a linear layer's weights, kept sparse by hard concrete gates.

The gates are those of Louizos et al. 2018 (arXiv:1712.01312): z = min(1, max(0, s (R - L) + L)), s a binary concrete
variable with the logits ``gate``; L < 0 and R > 1, so that z is exactly 0 or 1 with some probability.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from raytune_lora.models.weights import is_transposed

_LEFT, _RIGHT, _TEMPERATURE = -1.5, 1.5, 0.5  # the paper's
_EDGE = 1e-6  # of the uniform draw, away from an infinite logit
_SHIFT = _TEMPERATURE * math.log(-_LEFT / _RIGHT)
DIFF, GATE = "diff", "gate"


class SparseDiff(nn.Module):
    """Adds x (z * D)' to a layer's output; D starts at zero."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        shape = (layer.out_features, layer.in_features) if hasattr(layer, "out_features") else layer.weight.T.shape
        device = layer.weight.device
        self.diff = nn.Parameter(torch.zeros(shape, device=device))
        self.gate = nn.Parameter(torch.full(shape, 2.0, device=device))
        self.learned = False  # a saved difference: the gates are in it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        difference = self.diff if self.learned else self._draw() * self.diff
        return nn.functional.linear(x.to(difference.dtype), difference)

    def expected(self) -> torch.Tensor:
        """How many weights differ, in expectation: the sum of P(z > 0)."""
        return torch.sigmoid(self.gate - _SHIFT).sum()

    def _draw(self) -> torch.Tensor:
        if not self.training:
            return likely(self.gate)
        u = torch.empty_like(self.gate).uniform_(_EDGE, 1 - _EDGE)
        return _stretch(torch.sigmoid((u.log() - (1 - u).log() + self.gate) / _TEMPERATURE))


def insert(layer: Any) -> None:
    """Hang a difference on a linear layer, quantized or not."""
    layer.sparse = SparseDiff(layer)
    layer.sparse.hook = layer.register_forward_hook(_with_difference)


def likely(gate: torch.Tensor) -> torch.Tensor:
    """z without the draw."""
    return _stretch(torch.sigmoid(gate))


def project(state: dict[str, Any], sparsity: float | None) -> dict[str, Any]:
    """The difference alone, z worked in, all but the largest cut to zero.

    Args:
        state: ``diff`` and ``gate`` of each layer.
        sparsity: share of zeros over all layers together; None cuts nothing.
    """
    stem = {name.removesuffix(f".{DIFF}") for name in state if name.endswith(f".{DIFF}")}
    found = {f"{name}.{DIFF}": likely(state[f"{name}.{GATE}"]) * state[f"{name}.{DIFF}"] for name in sorted(stem)}
    if sparsity is not None:
        sizes = torch.cat([tensor.abs().flatten() for tensor in found.values()])
        kept = len(sizes) - math.ceil(sparsity * len(sizes))
        least = sizes.topk(kept).values[-1] if kept else math.inf
        found = {name: torch.where(tensor.abs() >= least, tensor, 0.0) for name, tensor in found.items()}
    return found


def packed(state: dict[str, Any]) -> dict[str, Any]:
    """Differences as the places and values of what is not zero."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        places = tensor.flatten().nonzero().squeeze(1)
        found |= {f"{name}.places": places, f"{name}.values": tensor.flatten()[places]}
    return found


def unpack(model: Any, state: dict[str, Any]) -> None:
    """Set the differences of a model to packed ones, and leave the gates out from then on."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, SparseDiff):
                places, values = (state[f"{name}.{DIFF}.{part}"] for part in ("places", "values"))
                module.diff.zero_().view(-1)[places.to(module.diff.device)] = values.to(module.diff)
                module.learned = True


def merge(model: Any) -> Any:
    """Work saved differences into the layers' weights."""
    with torch.no_grad():
        for layer in list(model.modules()):
            if isinstance(getattr(layer, "sparse", None), SparseDiff):
                diff = layer.sparse.diff.to(layer.weight.dtype)
                layer.weight += diff.T if is_transposed(layer) else diff
                layer.sparse.hook.remove()
                del layer.sparse
    return model


def _stretch(s: torch.Tensor) -> torch.Tensor:
    return (s * (_RIGHT - _LEFT) + _LEFT).clamp(0, 1)


def _with_difference(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + layer.sparse(inputs[0]).to(output.dtype)
