"""LoRA that starts from a decomposition of each weight and leaves the rest to the base: PiSSA and OLoRA.

Both change the base model's weights before training: W becomes W - alpha / r * B0 A0. The adapter is saved against the
untouched base, as a LoRA of twice the rank: alpha / r * (B A - B0 A0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from raytune_lora.config.methods import LoraMethodConfig, OloraMethodConfig, PissaMethodConfig
from raytune_lora.models.methods.base import UNQUANTIZED, Start
from raytune_lora.models.methods.lora import LoraFamily
from raytune_lora.models.methods.peft_method import adapter_weights, write_adapter
from raytune_lora.models.shape import shape_of
from raytune_lora.models.tying import untie
from raytune_lora.models.weights import is_transposed
from raytune_lora.planning.shape import Shape

L = TypeVar("L", bound=LoraMethodConfig)
_FIRST = "_first"  # attribute of the model: B0 and A0 of each layer


class PrincipalLora(LoraFamily[L]):
    """LoRA with a start of its own and a base without it."""

    bases = UNQUANTIZED
    stages = frozenset({0, 1, 2})
    because = "it decomposes and changes the base model's weights, which have to be there whole and unquantized"

    _resumes = False

    def start_word(self) -> str | bool:
        """PEFT's word for the start; True where it is made here."""
        return True

    def factors(self, model: Any) -> dict[str, Any]:
        """B0 and A0 by their names in the model; none where PEFT has taken them out of the base already."""
        return {}

    def variant(self) -> dict[str, Any]:
        return {"init_lora_weights": True if self._resumes else self.start_word()}

    def apply(self, model: Any, start: Start) -> Any:
        untie(model, [model.get_submodule(linear.name) for linear in self.targets(shape_of(model))])
        self._resumes = bool(start.earlier)
        adapted = super().apply(model, start)
        if factors := start.earlier or self.factors(adapted):
            _begin_with(adapted, factors)
        first = {n: p.detach().cpu().clone() for n, p in adapted.named_parameters() if "lora_A" in n or "lora_B" in n}
        setattr(adapted, _FIRST, first)
        return adapted

    def extra_state(self, model: Any) -> dict[str, Any]:
        return dict(getattr(model, _FIRST))

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        import torch

        both = dict(state)
        for name, first in self.extra_state(model).items():
            is_A = "lora_A" in name
            both[name] = torch.cat([state[name].cpu(), first if is_A else -first], dim=0 if is_A else 1)
        twice = {
            "r": 2 * self.cfg.r,
            "lora_alpha": 2 * self.cfg.alpha,
            "rank_pattern": {key: 2 * r for key, r in self.cfg.rank_pattern.items()},
            "alpha_pattern": {key: 2 * alpha for key, alpha in self.cfg.alpha_pattern.items()},
        }
        write_adapter(model, adapter_weights(model, both), folder, init_lora_weights=True, **twice)

    def problems(self, shape: Shape) -> list[str]:
        return [*super().problems(shape), *self.too_many_ranks(shape)]


class Pissa(PrincipalLora[PissaMethodConfig]):
    """Principal singular values and vectors (arXiv:2404.02948)."""

    config_class = PissaMethodConfig

    def start_word(self) -> str:
        return "pissa" if self.cfg.iterations is None else f"pissa_niter_{self.cfg.iterations}"


class Olora(PrincipalLora[OloraMethodConfig]):
    """Orthonormal: the first columns of a QR decomposition (arXiv:2406.01775).

    Not PEFT's: it decomposes the weight of a Conv1D, which is stored transposed, as if it were not.
    """

    config_class = OloraMethodConfig

    def factors(self, model: Any) -> dict[str, Any]:
        import torch

        found: dict[str, Any] = {}
        for name, layer in _lora_layers(model):
            base, r = layer.get_base_layer(), layer.r["default"]
            weight = base.weight.T if is_transposed(base) else base.weight
            q, upper = torch.linalg.qr(weight.detach().float())
            found |= {f"{name}.lora_B.default.weight": q[:, :r], f"{name}.lora_A.default.weight": upper[:r]}
        return found


def _lora_layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _begin_with(model: Any, factors: dict[str, Any]) -> None:
    """Set A and B, and take their product out of the base."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in factors:
                parameter.copy_(factors[name])
        for _, layer in _lora_layers(model):
            weight, scaling = layer.get_base_layer().weight, layer.scaling["default"]
            product = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            weight.copy_(weight - (product.T if is_transposed(layer.get_base_layer()) else product))
