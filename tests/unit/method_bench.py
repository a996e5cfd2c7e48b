"""A fine-tuning method on a small base model: applied, trained, saved, loaded and resumed as a run does it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raytune_lora.config.methods import METHODS, MethodConfig
from raytune_lora.config.schema import ModelConfig, Quantization, QuantizationConfig, kind_of
from raytune_lora.models.loading import load_model
from raytune_lora.models.methods import Method, Start, method_for
from raytune_lora.models.shape import shape_of_folder
from raytune_lora.planning.shape import Shape

STEPS = 6
LENGTH = 12  # tokens of a row
_BASES: dict[Path, Any] = {}  # unquantized models as loaded, by folder
SMALL: dict[str, dict[str, Any]] = {
    "vera": {"r": 32, "dropout": 0.0},
    "prefix_tuning": {"virtual_tokens": 4},
    "prompt_tuning": {"virtual_tokens": 4},
    "p_tuning": {"virtual_tokens": 4, "width": 16},
    "adapter": {"width": 8},
    "diff_pruning": {"sparsity": 0.5},
    "ir_qlora": {"r": 8, "dropout": 0.0, "tau_steps": 5},
}


def config(kind: str, **changes: Any) -> MethodConfig:
    (cls,) = [cls for cls in METHODS if kind_of(cls) == kind]
    cfg = cls(**SMALL.get(kind, {}) | changes)
    if hasattr(cfg, "dropout"):
        cfg.dropout = 0.0
    return cfg


class Bench:
    """A method on the model of a folder."""

    def __init__(
        self, kind: str, folder: Path, quantization: Quantization = Quantization.none, vocab: int = 250, **changes: Any
    ) -> None:
        self.folder = folder
        self.quantization = QuantizationConfig(quantization)
        self.method: Method[Any] = method_for(config(kind, **changes))
        torch.manual_seed(0)
        ids = torch.randint(2, vocab, (4, LENGTH))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def shape(self) -> Shape:
        return shape_of_folder(self.folder, ModelConfig())

    def base(self) -> Any:
        if self.quantization.kind is not Quantization.none:
            return load_model(self.folder, ModelConfig(), self.quantization)
        if self.folder not in _BASES:
            _BASES[self.folder] = load_model(self.folder, ModelConfig(), self.quantization)
        return copy.deepcopy(_BASES[self.folder])

    def start(self, earlier: dict[str, Any] | None = None) -> Start:
        def samples(count: int) -> Iterator[dict[str, Any]]:
            yield self.batch | {"labels": self.batch["input_ids"]}

        return Start(STEPS, self.folder, samples, earlier)

    def applied(self) -> Any:
        torch.manual_seed(1)
        return self.method.apply(self.base(), self.start())

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model.eval()(**self.batch).logits[:, -LENGTH:].float()  # a prompt's own places are left out

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        return float(model.eval()(**self.batch, labels=self.batch["input_ids"]).loss)

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        groups = self.method.parameter_groups(model, 3e-3) or [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0)

    def train(self, model: Any, steps: range = range(1, STEPS + 1), optimizer: Any = None) -> list[float]:
        """The losses of the steps; each draws its random numbers by its own number."""
        model.train()
        optimizer = optimizer or self.optimizer(model)
        losses = []
        for step in steps:
            torch.manual_seed(step)
            loss = model(**self.batch, labels=self.batch["input_ids"]).loss
            losses.append(loss.item())
            penalty = self.method.penalty(model)
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            self.method.after_step(model, step)
            optimizer.zero_grad()
        return losses

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
