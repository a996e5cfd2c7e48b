"""Diff pruning's layer: a difference to a linear layer's weights, kept sparse by hard concrete gates, then by a mask.

The gates are those of Louizos et al. 2018 (arXiv:1712.01312): z = min(1, max(0, s (R - L) + L)), s a binary concrete
variable with the logits ``gate``; L < 0 and R > 1, so that z is exactly 0 or 1 with some probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from raytune_lora.models.tying import untie
from raytune_lora.models.weights import is_transposed

_LEFT, _RIGHT, _TEMPERATURE = -1.5, 1.5, 0.5  # the paper's
_EDGE = 1e-6  # of the uniform draw, away from an infinite logit
_SHIFT = _TEMPERATURE * math.log(-_LEFT / _RIGHT)
DIFF, GATE = "diff", "gate"
_HALF = 16  # bits


class Budget:
    """How many weights may differ, over all layers of a model together."""

    def __init__(self, sparsity: float | None) -> None:
        self.sparsity = sparsity  # share of zeros; None: as many as the gates leave
        self.layers: list[SparseDiff] = []
        self._least: float | None = None  # score of the last weight that is kept; None: not known since the last step

    def forget(self) -> None:
        """The differences are about to change."""
        self._least = None

    def least(self) -> float:
        if self._least is None:
            self._least = threshold(lambda: ((layer.diff, layer.gate) for layer in self.layers), self.sparsity)
        return self._least


class SparseDiff(nn.Module):
    """Adds x D' to a layer's output; D starts at zero.

    While training, D is z * ``diff``; in evaluation mode, what is left of it after the cut to the budget's sparsity,
    which is also what is saved. Once there is a mask, D is ``diff`` where that is true, and zero elsewhere, in both.
    """

    mask: torch.Tensor | None

    def __init__(self, layer: Any, budget: Budget) -> None:
        super().__init__()
        shape = (layer.out_features, layer.in_features) if hasattr(layer, "out_features") else layer.weight.T.shape
        device = layer.weight.device
        self.diff = nn.Parameter(torch.zeros(shape, device=device))
        self.gate = nn.Parameter(torch.full(shape, 2.0, device=device))
        self.register_buffer("mask", None, persistent=False)
        self._budget = budget
        budget.layers.append(self)

    def train(self, mode: bool = True) -> SparseDiff:
        self._budget.forget()
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        difference = self.difference()
        return nn.functional.linear(x.to(difference.dtype), difference)

    def difference(self) -> torch.Tensor:
        """D, d_out x d_in."""
        if self.mask is not None:
            kept = torch.where(self.mask, self.diff, 0.0)
            # data parallel workers wait for a gradient of every parameter
            return kept + 0.0 * self.gate.mean() if self.training else kept
        if self.training:
            return self._draw() * self.diff
        sparsity = self._budget.sparsity
        return projected(self.diff, self.gate, None if sparsity is None else self._budget.least())

    def expected(self) -> torch.Tensor:
        """How many weights differ, in expectation: the sum of P(z > 0)."""
        return _likelihood(self.gate).sum()

    def _draw(self) -> torch.Tensor:
        u = torch.empty_like(self.gate).uniform_(_EDGE, 1 - _EDGE)
        return _stretch(torch.sigmoid((u.log() - (1 - u).log() + self.gate) / _TEMPERATURE))


def insert(layer: Any, budget: Budget) -> None:
    """Hang a difference on a linear layer, quantized or not."""
    layer.sparse = SparseDiff(layer, budget)
    layer.sparse.hook = layer.register_forward_hook(_with_difference)


# ------------------------------------------------------------------------------------------------------------- the cut


def projected(diff: torch.Tensor, gate: torch.Tensor, least: float | None) -> torch.Tensor:
    """What is left of a difference: ``diff`` where its score is high enough; with z at its most likely where None."""
    if least is None:
        return _stretch(torch.sigmoid(gate)) * diff
    return torch.where(_kept(diff, gate, least), diff, 0.0)


def threshold(layers: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]], sparsity: float | None) -> float:
    """The score from which on weights are kept, so that over all layers that share of them is zero.

    A weight's score is |diff| P(z > 0): the paper's magnitude |z * diff|, in expectation. By the most likely z, as
    there, nothing at all would be left once the penalty has driven the logits of all gates below zero.

    Args:
        layers: gives ``diff`` and ``gate`` of each layer.
        sparsity: share of zeros; None keeps all.
    """
    if sparsity is None:
        return 0.0
    total = sum(diff.numel() for diff, _ in layers())
    kept = total - math.ceil(sparsity * total)
    return _largest(lambda: (_score(diff, gate) for diff, gate in layers()), kept) if kept else math.inf


def fix(budget: Budget) -> None:
    """From now on the weights that are kept are those that would be kept now; their differences go on training."""
    if budget.sparsity is None:
        return
    least = budget.least()
    with torch.no_grad():
        for layer in budget.layers:
            layer.mask = _kept(layer.diff, layer.gate, least)


def _kept(diff: torch.Tensor, gate: torch.Tensor, least: float) -> torch.Tensor:
    return (_score(diff, gate) >= least) & (diff != 0)


def _score(diff: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return diff.detach().float().abs() * _likelihood(gate.detach().float())


def _likelihood(gate: torch.Tensor) -> torch.Tensor:
    """P(z > 0)."""
    return torch.sigmoid(gate - _SHIFT)


def _largest(values: Callable[[], Iterator[torch.Tensor]], rank: int) -> float:
    """The value of that rank, from the largest down, of non-negative fp32 tensors together.

    Such numbers are in the order of their bits: first the bin of their upper half that holds it is found, then the
    lower half, without a copy of all of them.
    """
    counts = sum(_histogram(bits >> _HALF) for bits in map(_bits, values()))
    upper, before = _bin(counts, rank)
    counts = sum(_histogram(bits[bits >> _HALF == upper] & (2**_HALF - 1)) for bits in map(_bits, values()))
    lower, _ = _bin(counts, rank - before)
    return float(torch.tensor((upper << _HALF) + lower, dtype=torch.int32).view(torch.float32))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32) & (2**31 - 1)


def _histogram(bits: torch.Tensor) -> torch.Tensor:
    return torch.bincount(bits.flatten(), minlength=2**_HALF).cpu()


def _bin(counts: Any, rank: int) -> tuple[int, int]:
    """The bin that holds the value of that rank from the top, and how many lie in bins above it."""
    down = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(down, rank))
    return len(counts) - 1 - place, int(down[place - 1]) if place else 0


# ------------------------------------------------------------------------------------------------------ saved and taken


def learned(model: Any, state: dict[str, Any], sparsity: float | None) -> dict[str, Any]:
    """The difference of each layer as evaluation sees it, by its name.

    Args:
        model: holds the masks, if there are any.
        state: ``diff`` and ``gate`` of each layer by their names in the model.
        sparsity: of the budget.
    """
    stems = sorted(name.removesuffix(f".{DIFF}") for name in state if name.endswith(f".{DIFF}"))
    fixed = {name: module.mask.cpu() for name, module in _layers(model) if module.mask is not None}
    if fixed:
        return {f"{stem}.{DIFF}": torch.where(fixed[stem], state[f"{stem}.{DIFF}"].cpu(), 0.0) for stem in stems}
    pairs = {stem: (state[f"{stem}.{DIFF}"], state[f"{stem}.{GATE}"]) for stem in stems}
    least = None if sparsity is None else threshold(pairs.values, sparsity)
    return {f"{stem}.{DIFF}": projected(*pair, least) for stem, pair in pairs.items()}


def packed(state: dict[str, Any]) -> dict[str, Any]:
    """Differences as their shapes, and the places and values of what is not zero."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        places = tensor.flatten().nonzero().squeeze(1)
        found |= {f"{name}.places": places, f"{name}.values": tensor.flatten()[places]}
        found[f"{name}.shape"] = torch.tensor(tensor.shape)
    return found


def unpack(model: Any, state: dict[str, Any]) -> None:
    """Set the differences of a model to packed ones, with masks of what is not zero."""
    with torch.no_grad():
        for name, module in _layers(model):
            places, values = (state[f"{name}.{DIFF}.{part}"] for part in ("places", "values"))
            module.diff.zero_().view(-1)[places.to(module.diff.device)] = values.to(module.diff)
            module.mask = module.diff != 0


def masks(model: Any) -> dict[str, Any]:
    """The places that each layer's mask keeps, by the layer's name; none before there are masks."""
    return {
        name: module.mask.flatten().nonzero().squeeze(1) for name, module in _layers(model) if module.mask is not None
    }


def put_masks(model: Any, known: dict[str, Any]) -> None:
    """Set what ``masks`` gave."""
    for name, module in _layers(model):
        if name in known:
            mask = torch.zeros(module.diff.shape, dtype=torch.bool, device=module.diff.device)
            mask.view(-1)[known[name].to(mask.device)] = True
            module.mask = mask


def merge(model: Any) -> Any:
    """Work saved differences into the layers' weights."""
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "sparse", None), SparseDiff)]
    untie(model, layers)
    with torch.no_grad():
        for layer in layers:
            difference = layer.sparse.difference().to(layer.weight.dtype)
            layer.weight += difference.T if is_transposed(layer) else difference
            layer.sparse.hook.remove()
            del layer.sparse
    return model


def _layers(model: Any) -> Iterator[tuple[str, SparseDiff]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseDiff))


def _stretch(s: torch.Tensor) -> torch.Tensor:
    return (s * (_RIGHT - _LEFT) + _LEFT).clamp(0, 1)


def _with_difference(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + layer.sparse(inputs[0]).to(output.dtype)
