"""Methods of few parameters on linear layers: VeRA, LoHa, LoKr, (IA)^3 and SHiRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytune_lora.config.methods import (
    Ia3MethodConfig,
    LohaMethodConfig,
    LokrMethodConfig,
    ShiraMethodConfig,
    VeraMethodConfig,
)
from raytune_lora.models.methods.base import UNQUANTIZED, Start
from raytune_lora.models.methods.peft_method import TargetedMethod
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

_NO_QUANTIZED_LAYER = "PEFT has no quantized layer for it: set quantization=none"


class Vera(TargetedMethod[VeraMethodConfig]):
    """Fixed random A and B for all layers, a learned scale for each rank and each output (arXiv:2310.11454)."""

    config_class = VeraMethodConfig
    bases = UNQUANTIZED
    because = _NO_QUANTIZED_LAYER

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import TaskType, VeraConfig

        return VeraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.cfg.r,
            vera_dropout=self.cfg.dropout,
            d_initial=self.cfg.initial,
            projection_prng_key=self.cfg.seed,
            save_projection=True,  # another machine's random numbers may differ
            target_modules=self.target_modules,
        )

    def count(self, shape: Shape) -> int:
        return sum(self.cfg.r + linear.d_out for linear in self.targets(shape))

    def added(self, shape: Shape) -> Added:
        """What each scale multiplies is kept."""
        targets = self.targets(shape)
        widest = max(linear.d_in for linear in targets) + max(linear.d_out for linear in targets)
        masks = sum(linear.d_in for linear in targets) if self.cfg.dropout else 0
        kept = sum(self.cfg.r + linear.d_out for linear in targets)
        return Added(trained=self.count(shape), fixed=self.cfg.r * widest, per_token=kept + masks)


class Loha(TargetedMethod[LohaMethodConfig]):
    """W + alpha / r * (B1 A1) * (B2 A2), elementwise (arXiv:2108.06098)."""

    config_class = LohaMethodConfig
    on_transposed = False
    bases = UNQUANTIZED
    stages = frozenset({0, 1, 2})
    because = f"{_NO_QUANTIZED_LAYER}; its backward pass reads factors that ZeRO-3 has divided by then"

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import LoHaConfig, TaskType

        return LoHaConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.cfg.r,
            alpha=self.cfg.alpha,  # type: ignore[arg-type]  # only ever divided
            rank_dropout=self.cfg.dropout,
            target_modules=self.target_modules,
        )

    def count(self, shape: Shape) -> int:
        return sum(2 * self.cfg.r * (linear.d_in + linear.d_out) for linear in self.targets(shape))

    def added(self, shape: Shape) -> Added:
        return _whole_update(self, shape)


class Lokr(TargetedMethod[LokrMethodConfig]):
    """W + alpha / r * C kron (B A) (LyCORIS, arXiv:2309.14859)."""

    config_class = LokrMethodConfig
    on_transposed = False
    bases = UNQUANTIZED
    because = _NO_QUANTIZED_LAYER

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import LoKrConfig, TaskType

        return LoKrConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.cfg.r,
            alpha=self.cfg.alpha,  # type: ignore[arg-type]  # only ever divided
            rank_dropout=self.cfg.dropout,
            decompose_factor=self.cfg.factor,
            target_modules=self.target_modules,
        )

    def count(self, shape: Shape) -> int:
        total = 0
        for linear in self.targets(shape):
            (in_small, in_large), (out_small, out_large) = (
                _factors(width, self.cfg.factor) for width in (linear.d_in, linear.d_out)
            )
            whole = out_large * in_large
            low_rank = self.cfg.r * (out_large + in_large)
            total += out_small * in_small + (low_rank if 2 * self.cfg.r < max(out_large, in_large) else whole)
        return total

    def added(self, shape: Shape) -> Added:
        return _whole_update(self, shape)


class Ia3(TargetedMethod[Ia3MethodConfig]):
    """A learned scale for each output, or for each input of feed-forward layers (arXiv:2205.05638)."""

    config_class = Ia3MethodConfig

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import IA3Config, TaskType

        return IA3Config(
            task_type=TaskType.CAUSAL_LM,
            target_modules=self.target_modules,
            feedforward_modules=[],
        )

    def narrowed(self, config: Any, model: Any) -> Any:
        """PEFT reads the config only if the feed-forward modules are among the targets, word for word."""
        from raytune_lora.models.shape import shape_of

        shape = shape_of(model)
        config = super().narrowed(config, model)
        inputs = list(self.cfg.feedforward_modules)
        if inputs and not set(inputs) <= set(config.target_modules):
            targets = self.targets(shape)
            config.target_modules = {linear.name for linear in targets}
            inputs = [linear.name for linear in shape.targets(inputs) if linear in targets]
        config.feedforward_modules = set(inputs)
        return config

    def count(self, shape: Shape) -> int:
        inputs = set(shape.targets(list(self.cfg.feedforward_modules)))
        return sum(linear.d_in if linear in inputs else linear.d_out for linear in self.targets(shape))

    def added(self, shape: Shape) -> Added:
        """What each scale multiplies is kept."""
        inputs = shape.targets(list(self.cfg.feedforward_modules))
        outputs = [linear for linear in self.targets(shape) if linear not in inputs]
        return Added(trained=self.count(shape), inputs=tuple(inputs), per_token=sum(linear.d_out for linear in outputs))

    def problems(self, shape: Shape) -> list[str]:
        found = super().problems(shape)
        targets = set(self.targets(shape))
        stray = [word for word in self.cfg.feedforward_modules if not set(shape.targets([word])) & targets]
        if stray:
            found.append(f"method.feedforward_modules must be among method.target_modules ({', '.join(stray)} is not)")
        return found


class Shira(TargetedMethod[ShiraMethodConfig]):
    """r * (d_in + d_out) weights of each layer, chosen at random, train (arXiv:2406.13175)."""

    config_class = ShiraMethodConfig
    on_transposed = False
    bases = UNQUANTIZED
    stages = frozenset({0, 1, 2})
    because = "it adds to single weights of each layer, which have to be there whole and unquantized"

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import ShiraConfig, TaskType

        return ShiraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.cfg.r,
            random_seed=self.cfg.seed,
            target_modules=self.target_modules,
        )

    def count(self, shape: Shape) -> int:
        return sum(self.cfg.r * (linear.d_in + linear.d_out) for linear in self.targets(shape))

    def added(self, shape: Shape) -> Added:
        """The places of its weights, two numbers of 64 bits each, are made anew at each step."""
        whole, places = _whole_update(self, shape), 4 * self.count(shape)
        return replace(whole, fixed=places, weights=whole.weights + places)

    def problems(self, shape: Shape) -> list[str]:
        found = super().problems(shape)
        for linear in self.targets(shape):
            if self.cfg.r * (linear.d_in + linear.d_out) > linear.d_in * linear.d_out:
                found.append(
                    f"method.r={self.cfg.r} asks for more weights than {linear.name} has "
                    f"({linear.d_in} x {linear.d_out}); lower it"
                )
                break
        return found


def _whole_update(method: TargetedMethod[Any], shape: Shape) -> Added:
    """Of a method that makes an update, or a weight, as large as each layer's own and multiplies the input with it."""
    targets = tuple(method.targets(shape))
    whole = sum(linear.d_in * linear.d_out for linear in targets)
    return Added(trained=method.count(shape), inputs=targets, weights=whole)


def _factors(width: int, factor: int) -> tuple[int, int]:
    """Two factors of a width, the smaller first, as LyCORIS chooses them: the smaller at most ``factor``, -1 for any.

    Of all such pairs it takes the one with the smallest sum.
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    limit = width if factor < 0 else factor
    pairs = [(d, width // d) for d in range(1, width + 1) if width % d == 0 and d <= limit and d <= width // d]
    return min(pairs, key=sum)
