"""What every fine-tuning method promises, tested over the registry itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_lora.config.methods import METHODS, MethodConfig
from raytune_lora.config.schema import Quantization, QuantizationConfig, TinyModelConfig, kind_of
from raytune_lora.models.loading import load_model
from raytune_lora.models.methods import Method, Start, method_for, registered
from raytune_lora.models.shape import shape_of_folder
from raytune_lora.models.sources import materialize

STEPS = 6
KINDS = [kind_of(cls) for cls in METHODS]
NEEDS = {"bitfit": {"bias": True}}  # of the tiny model
SMALL: dict[str, dict[str, Any]] = {
    "vera": {"r": 32, "dropout": 0.0},
    "prefix_tuning": {"virtual_tokens": 4},
    "prompt_tuning": {"virtual_tokens": 4},
    "p_tuning": {"virtual_tokens": 4, "width": 16},
    "adapter": {"width": 8},
    "diff_pruning": {"sparsity": 0.5},
    "ir_qlora": {"r": 8, "dropout": 0.0},
}


def config(kind: str, **changes: Any) -> MethodConfig:
    (cls,) = [cls for cls in METHODS if kind_of(cls) == kind]
    cfg = cls(**SMALL.get(kind, {}) | changes)
    if hasattr(cfg, "dropout"):
        cfg.dropout = 0.0
    return cfg


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(cache: Path) -> dict[bool, Path]:
    return {bias: materialize(TinyModelConfig(bias=bias), cache) for bias in (False, True)}


class Bench:
    """A method on the tiny model."""

    def __init__(self, kind: str, folders: dict[bool, Path], quantization: Quantization, **changes: Any) -> None:
        self.bias = NEEDS.get(kind, {}).get("bias", False)
        self.folder = folders[self.bias]
        self.quantization = QuantizationConfig(quantization)
        self.method: Method[Any] = method_for(config(kind, **changes))
        torch.manual_seed(0)
        self.batch = {"input_ids": torch.randint(2, 250, (4, 12)), "attention_mask": torch.ones(4, 12).long()}

    def base(self) -> Any:
        return load_model(self.folder, TinyModelConfig(bias=self.bias), self.quantization)

    def start(self, earlier: dict[str, Any] | None = None) -> Start:
        def samples(count: int) -> Iterator[dict[str, Any]]:
            yield self.batch | {"labels": self.batch["input_ids"]}

        return Start(STEPS, self.folder, samples, earlier)

    def applied(self) -> Any:
        torch.manual_seed(1)
        return self.method.apply(self.base(), self.start())

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model.eval()(**self.batch).logits[:, -12:].float()  # a prompt's own places are left out

    def train(self, model: Any) -> list[float]:
        model.train()
        groups = self.method.parameter_groups(model, 3e-3) or [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0)
        losses = []
        for step in range(1, STEPS + 1):
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


def combinations() -> list[Any]:
    return [
        pytest.param(kind_of(cls.config_class), base, id=f"{kind_of(cls.config_class)}-{base.value}")
        for cls in registered().values()
        for base in Quantization
        if base in cls.bases
    ]


def test_every_config_has_one_method_and_every_method_a_config() -> None:
    assert set(registered()) == set(METHODS)
    assert len(set(KINDS)) == len(KINDS) == 23


def test_a_second_method_of_a_config_is_refused() -> None:
    with pytest.raises(TypeError, match="has two methods"):
        type("Again", (Method,), {"config_class": METHODS[0]})


@pytest.mark.parametrize(("kind", "base"), combinations())
def test_a_method_keeps_its_promises(kind: str, base: Quantization, folders: dict[bool, Path], tmp_path: Path) -> None:
    """Starts as the base, trains what it counts, learns, and is the same after saving, loading and merging."""
    bench = Bench(kind, folders, base)
    before = bench.logits(bench.base())
    shape = shape_of_folder(bench.folder, TinyModelConfig(bias=bench.bias))
    assert bench.method.problems(shape) == []
    model = bench.applied()
    if bench.method.starts_as_base:
        torch.testing.assert_close(bench.logits(model), before, atol=2e-5, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == bench.method.count(shape)
    losses = bench.train(model)
    assert losses[-1] < losses[0] - 1e-3, losses
    learned = bench.logits(model)
    assert not torch.allclose(learned, before, atol=1e-3)
    bench.method.save(model, bench.state(model), tmp_path)
    loaded = bench.method.load(bench.base(), tmp_path, bench.folder)
    assert not any(p.requires_grad for p in loaded.parameters())
    if kind != "diff_pruning":  # what is saved is cut
        torch.testing.assert_close(bench.logits(loaded), learned, atol=2e-5, rtol=1e-4)
    apart = bench.logits(loaded)
    if bench.method.mergeable and base is Quantization.none:
        merged = bench.method.merge(loaded)
        torch.testing.assert_close(bench.logits(merged), apart, atol=2e-5, rtol=1e-4)
        assert set(merged.state_dict()) == set(bench.base().state_dict())
    elif not bench.method.mergeable:
        with pytest.raises(NotImplementedError):
            bench.method.merge(loaded)
