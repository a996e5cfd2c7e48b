"""Diff pruning: a learned sparse difference to the weights (Guo et al. 2021, arXiv:2012.07463)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_lora.config.methods import DiffPruningMethodConfig
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.own import OwnMethod, load_state, save_state, untouched
from raytune_lora.models.methods.peft_method import experts_apart, layers_apart, target_problems
from raytune_lora.models.shape import shape_of
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Linear, Shape

_KEPT = 4  # tensors of a layer's size that a forward pass keeps: the draws, the gates, their product with D


class DiffPruning(OwnMethod[DiffPruningMethodConfig]):
    """W + z * D, elementwise; z is between 0 and 1, drawn from a hard concrete distribution while training.

    As in the paper, the difference is then cut to the target sparsity by size, and what is left trains on: here for the
    last ``settle`` of the steps. Until then it is validated, and saved, as the cut would leave it at that time, which
    need not become better from one validation to the next.
    """

    config_class = DiffPruningMethodConfig
    stages = frozenset({0, 1, 2})
    because = "its penalty reads the gates of all layers at once, and ZeRO-3 has divided them among the workers"

    def apply(self, model: Any, start: Start) -> Any:
        from raytune_lora.models.layers.sparse import Budget, insert, put_masks

        model.requires_grad_(False)
        self._budget = Budget(self.cfg.sparsity)
        self.settled_from = max(1, start.steps - round(self.cfg.settle * start.steps))
        found = [model.get_submodule(linear.name) for linear in self._targets(shape_of(model))]
        for layer in dict.fromkeys(found):  # one that the model uses twice has two names
            insert(layer, self._budget)
        put_masks(model, start.earlier or {})
        return model

    def penalty(self, model: Any) -> Any | None:
        """The expected number of differing weights, times ``l0_weight`` (equation 4); none once that is settled."""
        layers = self._budget.layers
        if any(layer.mask is not None for layer in layers):
            return None
        return self.cfg.l0_weight * sum(layer.expected() for layer in layers)

    def after_step(self, model: Any, step: int) -> None:
        from raytune_lora.models.layers.sparse import fix

        if step == self.settled_from:
            fix(self._budget)

    def extra_state(self, model: Any) -> dict[str, Any]:
        """Where each layer's mask is true, once there are masks."""
        from raytune_lora.models.layers.sparse import masks

        return masks(model)

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        from raytune_lora.models.layers.sparse import learned, packed

        save_state(self.cfg, packed(learned(model, state, self.cfg.sparsity)), folder)

    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        from raytune_lora.models.layers.sparse import unpack

        adapted = self.apply(model, untouched(weights))
        unpack(adapted, load_state(folder))
        return adapted.requires_grad_(False).eval()

    def merge(self, model: Any) -> Any:
        from raytune_lora.models.layers.sparse import merge

        return merge(model)

    def count(self, shape: Shape) -> int:
        """The difference and the logits of z: two a weight."""
        return 2 * sum(linear.d_in * linear.d_out for linear in self._targets(shape))

    def added(self, shape: Shape) -> Added:
        targets = tuple(self._targets(shape))
        whole = sum(linear.d_in * linear.d_out for linear in targets)
        return Added(trained=self.count(shape), inputs=targets, weights=_KEPT * whole)

    def problems(self, shape: Shape) -> list[str]:
        return target_problems(list(self.cfg.target_modules), self._targets(shape), shape)

    def left_out(self, shape: Shape) -> list[str]:
        return layers_apart(list(self.cfg.target_modules), shape) + experts_apart(shape)

    def _targets(self, shape: Shape) -> list[Linear]:
        return shape.targets(list(self.cfg.target_modules))
