"""Diff pruning: a learned sparse difference to the weights (Guo et al. 2021, arXiv:2012.07463)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_lora.config.methods import DiffPruningMethodConfig
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.own import OwnMethod, load_state, save_state, untouched
from raytune_lora.models.methods.peft_method import target_problems
from raytune_lora.models.shape import shape_of
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Linear, Shape

_KEPT = 4  # tensors of a layer's size that a forward pass keeps: the draws, the gates, their product with D


class DiffPruning(OwnMethod[DiffPruningMethodConfig]):
    """W + z * D, elementwise; z is between 0 and 1, drawn from a hard concrete distribution while training.

    Saved is z * D with z at its most likely, cut to the target sparsity by size, as the paper's projection does.
    """

    config_class = DiffPruningMethodConfig
    stages = frozenset({0, 1, 2})
    because = "its penalty reads the gates of all layers at once, and ZeRO-3 has divided them among the workers"

    def apply(self, model: Any, start: Start) -> Any:
        from raytune_lora.models.layers.sparse import insert

        model.requires_grad_(False)
        for linear in self._targets(shape_of(model)):
            insert(model.get_submodule(linear.name))
        return model

    def penalty(self, model: Any) -> Any:
        """The expected number of differing weights, times ``l0_weight`` (equation 4)."""
        from raytune_lora.models.layers.sparse import SparseDiff

        return self.cfg.l0_weight * sum(m.expected() for m in model.modules() if isinstance(m, SparseDiff))

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        from raytune_lora.models.layers.sparse import packed

        save_state(self.cfg, packed(self._projected(state)), folder)

    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        from raytune_lora.models.layers.sparse import unpack

        adapted = self.apply(model, untouched(weights))
        unpack(adapted, load_state(folder))
        return adapted.requires_grad_(False).eval()

    def merge(self, model: Any) -> Any:
        from raytune_lora.models.layers.sparse import merge

        return merge(model)

    def facts(self, state: dict[str, Any]) -> dict[str, float]:
        """The share of zeros in the difference that is saved."""
        projected = self._projected(state)
        zeros = sum(int((tensor == 0).sum()) for tensor in projected.values())
        return {"sparsity": zeros / max(1, sum(tensor.numel() for tensor in projected.values()))}

    def count(self, shape: Shape) -> int:
        """The difference and the logits of z: two a weight."""
        return 2 * sum(linear.d_in * linear.d_out for linear in self._targets(shape))

    def added(self, shape: Shape) -> Added:
        targets = tuple(self._targets(shape))
        whole = sum(linear.d_in * linear.d_out for linear in targets)
        return Added(trained=self.count(shape), inputs=targets, weights=_KEPT * whole)

    def problems(self, shape: Shape) -> list[str]:
        return target_problems(self.cfg, shape)

    def _targets(self, shape: Shape) -> list[Linear]:
        return shape.targets(list(self.cfg.target_modules))

    def _projected(self, state: dict[str, Any]) -> dict[str, Any]:
        from raytune_lora.models.layers.sparse import project

        return project(state, self.cfg.sparsity)
