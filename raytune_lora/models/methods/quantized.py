"""LoRA that makes up for what quantizing the base has lost: LoftQ and IR-QLoRA. Both read the weights as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_lora.config.methods import IrQloraMethodConfig, LoftqMethodConfig
from raytune_lora.models.methods.base import FOUR_BITS, Start
from raytune_lora.models.methods.lora import LoraFamily
from raytune_lora.models.methods.own import load_state, save_state, untouched
from raytune_lora.models.methods.peft_method import BASE
from raytune_lora.models.shape import shape_of
from raytune_lora.models.weights import Weights
from raytune_lora.planning.shape import Shape

_WHOLE = "it quantizes the model's weights or measures what that lost, layer by layer and whole: set quantization=nf4"


class Loftq(LoraFamily[LoftqMethodConfig]):
    """B A starts as the best approximation of W - quantized(W) of rank r (arXiv:2310.08659, one iteration).

    More iterations would quantize the base anew, for this adapter alone; with one, the base is that of every other
    method and the adapter an ordinary LoRA.
    """

    config_class = LoftqMethodConfig
    bases = FOUR_BITS
    stages = frozenset({0, 1, 2})
    because = _WHOLE
    starts_as_base = False  # it starts nearer to the unquantized model

    def apply(self, model: Any, start: Start) -> Any:
        stored = Weights(start.weights, model) if start.earlier is None else None
        adapted = super().apply(model, start)
        if stored is not None:
            _fit(adapted, stored)
        return adapted

    def problems(self, shape: Shape) -> list[str]:
        return [*super().problems(shape), *_unquantized(self, shape), *self.too_many_ranks(shape)]


class IrQlora(LoraFamily[IrQloraMethodConfig]):
    """Calibrated quantization and elastic connections (IR-QLoRA, arXiv:2402.05445).

    Calibration shifts each block of 64 weights by the offset that gives its 4-bit codes most entropy; the connections
    add averages of the input to A's output and copies of A's output to B's, each times a learned scalar.
    """

    config_class = IrQloraMethodConfig
    bases = FOUR_BITS
    stages = frozenset({0, 1, 2})
    because = _WHOLE
    starts_as_base = False  # the calibrated base is nearer to the unquantized model
    mergeable = False

    def apply(self, model: Any, start: Start) -> Any:
        return self._build(model, start.weights, start.earlier or None, start)

    def _build(self, model: Any, weights: Path, offsets: dict[str, Any] | None, start: Start) -> Any:
        from raytune_lora.models.layers.elastic import calibrate, connect

        names = [linear.name for linear in self.targets(shape_of(model)) if linear.quantized]
        calibrate(model, Weights(weights, model), names, self.cfg.tau_range, self.cfg.tau_steps, offsets)
        adapted = super().apply(model, start)
        connect(adapted)
        return adapted

    def extra_state(self, model: Any) -> dict[str, Any]:
        """The offset chosen for each block, as a number of steps."""
        from raytune_lora.models.layers.elastic import offsets

        return offsets(model, BASE)

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        save_state(self.cfg, state | self.extra_state(model), folder)

    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        state = load_state(folder)
        offsets = {name: state.pop(name) for name in list(state) if name.endswith(".offsets")}
        adapted = self._build(model, weights, offsets, untouched(weights))
        adapted.load_state_dict(state, strict=False)
        return adapted.requires_grad_(False).eval()

    def count(self, shape: Shape) -> int:
        return super().count(shape) + 2 * len(self.targets(shape))

    def problems(self, shape: Shape) -> list[str]:
        from raytune_lora.models.layers import BLOCK

        found = [*super().problems(shape), *_unquantized(self, shape)]
        for linear, r in self.ranks(shape):
            if linear.d_in % r or linear.d_out % r:
                found.append(
                    f"method.r must divide the width of every target layer for method=ir_qlora (got {r}; "
                    f"{linear.name} is {linear.d_in} x {linear.d_out})"
                )
                break
        for linear in self.targets(shape):
            if linear.d_in % BLOCK:
                found.append(f"method=ir_qlora needs layers of a width that is a multiple of {BLOCK} ({linear.name})")
                break
        return found


def _unquantized(method: LoraFamily[Any], shape: Shape) -> list[str]:
    targets = method.targets(shape)
    if not targets or any(linear.quantized for linear in targets):
        return []
    return [
        f"method={method.cfg.kind} makes up for what quantizing the target layers lost, and none of them is quantized "
        f"({targets[0].name} is one): name others in method.target_modules, or take method=lora"
    ]


def _fit(model: Any, weights: Weights) -> None:
    """Start the adapter of a quantized layer as what that lost: s B A near W - quantized(W)."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    named: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        for name, layer in named:
            base = layer.get_base_layer()
            quantized = base.weight
            if not hasattr(quantized, "quant_state"):
                continue
            whole = weights.linear(name.removeprefix(BASE), base).to(quantized.device, torch.float32)
            lost = whole - dequantize_4bit(quantized.data, quantized.quant_state).float()
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            r = layer.r["default"]
            root = (s[:r] / layer.scaling["default"]).sqrt()
            layer.lora_B["default"].weight.copy_(u[:, :r] * root)
            layer.lora_A["default"].weight.copy_(root[:, None] * v[:r])
