"""AdaLoRA: low rank by singular values, with the budget moved between layers (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from typing import Any

from raytune_lora.config.methods import AdaloraMethodConfig
from raytune_lora.models.methods.base import Start
from raytune_lora.models.methods.peft_method import TargetedMethod
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

_PATTERN = "rank_pattern"


class Adalora(TargetedMethod[AdaloraMethodConfig]):
    """Trains P, d_out x r, r singular values, and Q, r x d_in; PEFT's allocator sets the least important to zero."""

    config_class = AdaloraMethodConfig
    needs_deepspeed_off = True
    because = "its allocator reads every gradient after each step, and DeepSpeed has thrown them away by then"

    def apply(self, model: Any, start: Start) -> Any:
        adapted = super().apply(model, start)
        for name, p in adapted.named_parameters():
            if "ranknum" in name:  # how many are left, by which PEFT divides; it trains where the base is in 16 bits
                p.requires_grad_(False)
        for key, value in (start.earlier or {}).items():
            kind, _, name = key.partition("/")
            _measured(adapted)[kind][name] = value.tolist() if kind == _PATTERN else value
        return adapted

    def extra_state(self, model: Any) -> dict[str, Any]:
        """The allocator's importance and uncertainty of each weight, and which singular values it has left."""
        import torch

        found = _measured(model)
        return {f"{kind}/{name}": torch.as_tensor(value) for kind in found for name, value in found[kind].items()}

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import AdaLoraConfig, TaskType

        steps = max(2, start.steps)
        final = min(round(self.cfg.settle * steps), steps - 1)
        return AdaLoraConfig(
            task_type=TaskType.CAUSAL_LM,
            init_r=self.cfg.r,
            target_r=self.cfg.target_r,
            lora_alpha=self.cfg.alpha,  # type: ignore[arg-type]  # only ever divided
            lora_dropout=self.cfg.dropout,
            target_modules=self.target_modules,
            total_step=steps,
            tinit=min(round(self.cfg.start * steps), steps - final - 1),
            tfinal=final,
            orth_reg_weight=0.0,  # PEFT would add the penalty to each forward pass's loss, validation's too
        )

    def penalty(self, model: Any) -> Any:
        """Mean distance of P'P and QQ' from the identity, in the Frobenius norm (equation 4)."""
        import torch

        terms = []
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                square = p @ p.T if "lora_A" in name else p.T @ p
                terms.append(torch.linalg.norm(square - torch.eye(len(square), device=p.device, dtype=p.dtype)))
        return self.cfg.orthogonality * torch.stack(terms).mean()

    def after_step(self, model: Any, step: int) -> None:
        import torch

        places = {name: p.device for name, p in model.base_model.model.named_parameters()}
        for measured in _measured(model).values():  # what an earlier run measured was taken up before the model moved
            for name, value in measured.items():
                if torch.is_tensor(value):
                    measured[name] = value.to(places[name])
        model.base_model.update_and_allocate(step)

    def count(self, shape: Shape) -> int:
        return sum(self.cfg.r * (linear.d_in + linear.d_out + 1) for linear in self.targets(shape))

    def added(self, shape: Shape) -> Added:
        targets = tuple(self.targets(shape))
        products = sum(self.cfg.r * linear.d_in for linear in targets)  # Q times the singular values
        ranks = self.cfg.r * len(targets)
        return Added.low_rank(targets, ranks, self.cfg.dropout, trained=self.count(shape), weights=products)


def _measured(model: Any) -> dict[str, dict[str, Any]]:
    """What PEFT's allocator keeps from one step to the next, by kind and name; to be changed in place."""
    allocator = model.base_model.rankallocator
    config = model.peft_config[model.active_adapter]
    if config.rank_pattern is None:
        config.rank_pattern = {}
    averages = {kind: getattr(allocator, kind) for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
    return averages | {_PATTERN: config.rank_pattern}
