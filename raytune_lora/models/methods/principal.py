"""LoRA that starts from a decomposition of each weight and leaves the rest to the base: PiSSA and OLoRA.

Both change the base model's weights before training: W becomes W - alpha / r * B0 A0. The adapter is saved against the
untouched base, as a LoRA of twice the rank: alpha / r * (B A - B0 A0).
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, TypeVar

from raytune_lora.config.methods import LoraMethodConfig, OloraMethodConfig, PissaMethodConfig
from raytune_lora.models.methods.base import UNQUANTIZED, Start
from raytune_lora.models.methods.lora import LoraFamily
from raytune_lora.models.methods.peft_method import write_adapter
from raytune_lora.models.shape import shape_of
from raytune_lora.models.tying import untie
from raytune_lora.planning.shape import Shape

L = TypeVar("L", bound=LoraMethodConfig)
_FIRST = "_first"  # attribute of the model: B0 and A0 of each layer


class PrincipalLora(LoraFamily[L]):
    """LoRA with a start of its own and a base without it."""

    bases = UNQUANTIZED
    stages = frozenset({0, 1, 2})
    because = "it decomposes and changes the base model's weights, which have to be there whole and unquantized"
    _goes_on = False

    @abstractmethod
    def start_word(self) -> str:
        """PEFT's word for the start."""

    def variant(self) -> dict[str, Any]:
        return {"init_lora_weights": True if self._goes_on else self.start_word()}

    def apply(self, model: Any, start: Start) -> Any:
        untie(model, [model.get_submodule(linear.name) for linear in self.targets(shape_of(model))])
        self._goes_on = bool(start.earlier)
        adapted = super().apply(model, start)
        if start.earlier:
            _begin_with(adapted, start.earlier)
        trained = {name: p.detach().cpu().clone() for name, p in adapted.named_parameters() if p.requires_grad}
        setattr(adapted, _FIRST, trained)
        return adapted

    def extra_state(self, model: Any) -> dict[str, Any]:
        return dict(getattr(model, _FIRST))

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        import torch

        weights = {}
        for name, first in self.extra_state(model).items():
            is_A = "lora_A" in name
            both = [state[name].cpu(), first if is_A else -first]
            weights[name.replace(".default", "")] = torch.cat(both, dim=0 if is_A else 1)
        write_adapter(model, weights, folder, r=2 * self.cfg.r, lora_alpha=2 * self.cfg.alpha, init_lora_weights=True)

    def problems(self, shape: Shape) -> list[str]:
        found = super().problems(shape)
        smallest = min((min(linear.d_in, linear.d_out) for linear in self.targets(shape)), default=self.cfg.r)
        if self.cfg.r > smallest:
            found.append(
                f"method.r must be <= {smallest} for method={self.cfg.kind}, the smaller side of the model's smallest "
                f"target layer (got {self.cfg.r})"
            )
        return found


class Pissa(PrincipalLora[PissaMethodConfig]):
    """Principal singular values and vectors (arXiv:2404.02948)."""

    config_class = PissaMethodConfig

    def start_word(self) -> str:
        return "pissa" if self.cfg.iterations is None else f"pissa_niter_{self.cfg.iterations}"


class Olora(PrincipalLora[OloraMethodConfig]):
    """Orthonormal: the first columns of a QR decomposition (arXiv:2406.01775)."""

    config_class = OloraMethodConfig

    def start_word(self) -> str:
        return "olora"


def _begin_with(model: Any, factors: dict[str, Any]) -> None:
    """Take the start of an earlier run: set A and B, and take their product out of the base."""
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in factors:
                parameter.copy_(factors[name])
        layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            weight, scaling = layer.get_base_layer().weight, layer.scaling["default"]
            weight.copy_(weight - scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
