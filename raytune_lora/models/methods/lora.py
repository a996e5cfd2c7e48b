"""LoRA (Hu et al. 2021, arXiv:2106.09685) and what differs from it in one setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from raytune_lora.config.methods import (
    Bias,
    DoraMethodConfig,
    LoraMethodConfig,
    LoraPlusMethodConfig,
    RsloraMethodConfig,
)
from raytune_lora.config.schema import Quantization
from raytune_lora.models.methods import lora_options as options
from raytune_lora.models.methods.base import ANY, FOUR_BITS, Start
from raytune_lora.models.methods.peft_method import BASE, TargetedMethod, anywhere, experts_apart, few, layers_apart
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Experts, Linear, Shape

L = TypeVar("L", bound=LoraMethodConfig)
_ADAPTER = "default"  # PEFT's name of a model's only adapter


class LoraFamily(TargetedMethod[L]):
    """Trains B, d_out x r, and A, r x d_in, beside each layer's W, d_out x d_in: W + alpha / r * B A.

    Where experts lie in one parameter, each has such a pair of its own. PEFT gives the names of layers that experts
    once were to their parameters, so that other layers of those names (a shared expert's) are out of its reach; so are
    layers whose matrices it would not find again in the file.
    """

    adapts_experts: ClassVar[bool] = False

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import LoraConfig, TaskType

        settings: dict[str, Any] = {
            "task_type": TaskType.CAUSAL_LM,
            "r": self.cfg.r,
            "lora_alpha": self.cfg.alpha,  # PEFT only ever divides it
            "lora_dropout": self.cfg.dropout,
            "target_modules": self.target_modules,
            "bias": self.cfg.bias.value,
            "rank_pattern": dict(self.cfg.rank_pattern),
            "alpha_pattern": dict(self.cfg.alpha_pattern),
        }
        return LoraConfig(**(settings | self.variant()))

    def apply(self, model: Any, start: Start) -> Any:
        from raytune_lora.models.shape_parts import biases as biases_of

        met = {name for name, _ in biases_of(model)}  # before PEFT renames them
        adapted = super().apply(model, start)
        if self.cfg.bias is Bias.all:  # PEFT lets a vision tower's train as well
            for name, p in adapted.named_parameters():
                plain = name.removeprefix(BASE).replace(".base_layer.", ".")
                if plain.endswith(".bias") and plain not in met and ".modules_to_save." not in plain:
                    p.requires_grad_(False)
        return adapted

    def variant(self) -> dict[str, Any]:
        """What sets it apart, in PEFT's config."""
        return {}

    def reach(self, shape: Shape) -> list[Linear]:
        found = [linear for linear in super().reach(shape) if linear.name.rpartition(".")[2] not in shape.claimed]
        return [linear for linear in found if linear.saved_as is not None]

    def targets(self, shape: Shape) -> list[Linear]:
        """Within ``layers_to_transform``; what is trained whole gets no adapter."""
        whole = options.saved(self.cfg, shape)
        inside = [linear for linear in self.reach(shape) if options.in_layers(self.cfg, linear.name)]
        return [linear for linear in inside if not options.within(linear.name, whole)]

    def ranks(self, shape: Shape) -> list[tuple[Linear, int]]:
        """The layers it works on, each with its r."""
        pattern = dict(self.cfg.rank_pattern)
        return [(linear, options.value_of(pattern, linear.name, self.cfg.r)) for linear in self.targets(shape)]

    def experts(self, shape: Shape) -> tuple[Experts, ...]:
        """The experts' parameters it works on; likewise."""
        whole = options.saved(self.cfg, shape)
        inside = [e for e in shape.experts if self.cfg.experts and options.in_layers(self.cfg, e.name)]
        return tuple(e for e in inside if not options.within(e.name, whole))

    def left_out(self, shape: Shape) -> list[str]:
        names = list(self.cfg.target_modules)
        reach = {linear.name for linear in self.reach(shape)}
        beyond = [linear for linear in shape.targets(names) if linear.name not in reach]
        found = layers_apart(names, shape)
        for lost, why in ((False, "PEFT takes these names for the experts'"), (True, "PEFT would not load it again")):
            if where := few(dict.fromkeys(anywhere(x.name) for x in beyond if (x.saved_as is None) is lost)):
                found.append(f"{where} ({why})")
        remedy = (
            "method.experts=true method.dropout=0 adapts them" if self.adapts_experts else "method=lora can adapt them"
        )
        if any(experts.below for experts in shape.experts):
            remedy = "PEFT has no adapter for each of them"
        whole = options.saved(self.cfg, shape)
        idle = tuple(e for e in shape.experts if not self.cfg.experts and not options.within(e.name, whole))
        return found + experts_apart(replace(shape, experts=idle), remedy)

    def narrowed(self, config: Any, model: Any) -> Any:
        from raytune_lora.models.shape import shape_of

        shape = shape_of(model)
        config = super().narrowed(config, model)
        if shape.claimed or any(
            linear.saved_as is None for linear in shape.linears
        ):  # left to itself, PEFT would add experts and router to all-linear
            config.target_modules = {linear.name for linear in self.targets(shape)}
        if named := [experts.name for experts in self.experts(shape)]:
            config.target_parameters = named
        if whole := list(options.saved(self.cfg, shape)):  # by whole names: PEFT would take parts of words as well
            config.modules_to_save = whole
            if shape.tied and shape.head in whole:  # PEFT would part them unless told, and knows the usual names alone
                config.modules_to_save = [name for name in whole if name != shape.head]
                config.ensure_weight_tying, config.modules_to_tie = True, [shape.head]
        return config

    def problems(self, shape: Shape) -> list[str]:
        found = [*super().problems(shape), *options.problems(self.cfg, shape, self.targets(shape))]
        if not found and not self.targets(shape) and not self.experts(shape):
            found.append(
                f"method={self.cfg.kind}: no layer is left for an adapter; target_modules, layers_to_transform and "
                "modules_to_save (which trains a layer whole) exclude each other: widen method.layers_to_transform, or "
                "name fewer method.modules_to_save"
            )
        if self.cfg.experts and not shape.experts:
            found.append(
                "method.experts=true: the model has no experts whose weights lie in one parameter; leave it out"
            )
        elif self.cfg.experts and shape.experts[0].below:
            found.append(
                f"method.experts=true: in {shape.experts[0].name} the experts' weights lie one below another, and PEFT "
                "would give them all one adapter in common; leave it out"
            )
        elif self.cfg.experts and not self.adapts_experts:
            found.append(
                f"method.experts=true does not work with method={self.cfg.kind}: PEFT has it for linear layers alone; "
                "take method=lora, rslora or lora_plus, or leave it out"
            )
        return found

    def count(self, shape: Shape) -> int:
        low_rank = sum(r * (linear.d_in + linear.d_out) for linear, r in self.ranks(shape))
        low_rank += sum(self.cfg.r * e.count * (e.d_in + e.d_out) for e in self.experts(shape))
        return low_rank + options.trained_beside(self.cfg, shape, self.targets(shape))

    def added(self, shape: Shape) -> Added:
        """PEFT adds each expert's product to its weight, so that the sum is there as long as its input."""
        whole = options.saved(self.cfg, shape)
        ranks, summed = sum(r for _, r in self.ranks(shape)), sum(experts.numel for experts in self.experts(shape))
        common = Added.low_rank(
            tuple(self.targets(shape)), ranks, self.cfg.dropout, trained=self.count(shape), weights=summed
        )
        linears = tuple(linear for linear in shape.linears if linear.name in whole)
        return replace(common, inputs=common.inputs + linears, from_start=shape.embedding in whole)

    def too_many_ranks(self, shape: Shape) -> list[str]:
        """Of a start by decomposition: a matrix has no more singular vectors than the smaller of its sides."""
        sides = [(min(linear.d_in, linear.d_out), r, linear.name) for linear, r in self.ranks(shape)]
        over = min(((side, r, name) for side, r, name in sides if r > side), default=None)
        if over is None:
            return []
        side, r, name = over
        return [
            f"method.r must be <= {side} for method={self.cfg.kind}, the smaller side of the model's smallest target "
            f"layer {name} (got {r})"
        ]


class Lora(LoraFamily[LoraMethodConfig]):
    config_class = LoraMethodConfig
    adapts_experts = True


class Rslora(LoraFamily[RsloraMethodConfig]):
    """Rank-stabilized: scaled by alpha / sqrt(r) (arXiv:2312.03732)."""

    config_class = RsloraMethodConfig
    adapts_experts = True

    def variant(self) -> dict[str, Any]:
        return {"use_rslora": True}


class Dora(LoraFamily[DoraMethodConfig]):
    """Weight-decomposed: a magnitude for each output beside the direction (arXiv:2402.09353)."""

    config_class = DoraMethodConfig
    bases = ANY - {Quantization.int8}
    because = "PEFT's DoRA reads the weights of bitsandbytes' int8 layers in a way that loses their scales: use nf4"
    apart = (FOUR_BITS, "PEFT's DoRA copies 4-bit layers to read their weights, and ZeRO-3 knows nothing of the copies")

    def apply(self, model: Any, start: Start) -> Any:
        """An output whose weights are all 0 (a padding token's in a head) would have no direction: 0 / 0.

        It gets that of B A, at a magnitude of 0, so that it starts as in the base model and can grow.
        """
        import torch

        adapted = super().apply(model, start)
        layers = [m for m in adapted.modules() if _ADAPTER in getattr(m, "lora_magnitude_vector", {})]
        with torch.no_grad():
            for layer in layers:
                b = layer.lora_B[_ADAPTER].weight
                b[layer.lora_magnitude_vector[_ADAPTER].weight == 0] = b.shape[1] ** -0.5
        return adapted

    def variant(self) -> dict[str, Any]:
        return {"use_dora": True}

    def count(self, shape: Shape) -> int:
        return super().count(shape) + sum(linear.d_out for linear in self.targets(shape))

    def added(self, shape: Shape) -> Added:
        """The outputs of W and of B A are kept, as the magnitude multiplies both."""
        common = super().added(shape)
        return replace(common, per_token=common.per_token + 2 * sum(linear.d_out for linear in self.targets(shape)))


class LoraPlus(LoraFamily[LoraPlusMethodConfig]):
    """B learns ``ratio`` times as fast as A (arXiv:2402.12354)."""

    config_class = LoraPlusMethodConfig
    adapts_experts = True

    def parameter_groups(self, model: Any, learning_rate: float) -> list[dict[str, Any]]:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        slow = [p for name, p in trained if "lora_B" not in name]
        fast = [p for name, p in trained if "lora_B" in name]
        return [{"params": slow, "lr": learning_rate}, {"params": fast, "lr": learning_rate * self.cfg.ratio}]
