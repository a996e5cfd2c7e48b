"""The base model that a worker keeps: whatever a method and a trainer make of it, the next task has it as loaded."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_lora.config.compose import compose
from raytune_lora.config.methods import METHODS
from raytune_lora.config.schema import Quantization, RunConfig, kind_of
from raytune_lora.models.loading import load_model
from raytune_lora.training import resident
from raytune_lora.training.resident import base_model, checksums, kept_bytes, let_go, put_back
from raytune_lora.tuning.job import plain_run
from tests.unit.method_bench import Bench
from tests.unit.test_method_contract import MODELS, REFUSED, bench_of

CHANGING = {"full", "bitfit", "pissa", "olora"}  # train weights of the base model, or change them
KINDS = [kind_of(cls) for cls in METHODS]


@pytest.fixture(scope="module")
def folder(folder: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda name: folder(name, **MODELS.get(name, {}))


@pytest.fixture(scope="module")
def composed() -> RunConfig:
    return plain_run(compose(["model.path=x", "data=fake"]))


@pytest.fixture(autouse=True)
def _none_kept() -> Iterator[None]:
    let_go()
    yield
    let_go()


def run_of(composed: RunConfig, bench: Bench) -> RunConfig:
    cfg = copy.deepcopy(composed)
    cfg.model.path = str(bench.folder)
    cfg.method, cfg.quantization = bench.method.cfg, bench.quantization
    return cfg


def fresh(cfg: RunConfig, bench: Bench) -> Any:
    return load_model(bench.folder, cfg.model, cfg.quantization)


def trained(bench: Bench, base: Any) -> list[float]:
    """Losses of a short run, with what the trainer does to a model beside it."""
    torch.manual_seed(1)
    model = bench.method.apply(base, bench.start())
    model.config.use_cache = False
    base.generation_config.max_length = 7
    if bench.method.cfg.kind != "prefix_tuning":  # which it is refused with
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    whole = type(base).forward
    base.forward = types.MethodType(lambda self, *args, **kwargs: whole(self, *args, **kwargs), base)
    losses = bench.train(model, range(1, 4))
    model.eval()
    return losses


def seen(model: Any) -> dict[str, Any]:
    """All that tells one model from another, but for the names of objects."""
    found: dict[str, Any] = {"config": model.config.to_dict(), "generation": model.generation_config.to_dict()}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        found[name] = (type(module), sorted(vars(module)), list(module._modules), hooks, plain)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        found[f"{name}:"] = (tensor.dtype, tensor.requires_grad, tensor.grad, sorted(vars(tensor)))
        found[f"{name}="] = tensor.detach().view(torch.uint8).tolist() if tensor.dim() else tensor.item()
    owners: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(tensor), []).append(name)
    return found | {"tied": sorted(owners.values())}


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *itertools.product(("llama", "gpt2"), KINDS),
        *itertools.product(("tied_llama", "gemma2", "mixtral", "opt"), ("lora", "pissa", "prompt_tuning", "adapter")),
    ],
)
def test_the_next_task_has_the_base_model_as_it_was_loaded(
    kind: str, model: str, folder: Callable[[str], Path], composed: RunConfig
) -> None:
    if (kind, model) in REFUSED:
        return
    bench = bench_of(kind, model, folder)
    cfg = run_of(composed, bench)
    base = base_model(cfg, bench.folder)
    expected = trained(bench, fresh(cfg, bench))
    assert trained(bench, base) == expected
    put_back()
    assert (kept_bytes() == 0) is (kind in CHANGING)
    again = base_model(cfg, bench.folder)
    assert (again is base) is (kind not in CHANGING)
    if again is base:
        assert seen(again) == seen(fresh(cfg, bench))
    assert trained(bench, again) == expected


@pytest.mark.parametrize("kind", [Quantization.nf4, Quantization.int8])
def test_it_stays_quantized(kind: Quantization, folder: Callable[[str], Path], composed: RunConfig) -> None:
    bench = Bench("lora", folder("llama"), kind)
    cfg = run_of(composed, bench)
    base = base_model(cfg, bench.folder)
    losses = trained(bench, base)
    for _ in range(2):
        assert base_model(cfg, bench.folder) is base
        assert seen(base) == seen(fresh(cfg, bench))
        assert trained(bench, base) == losses


def test_it_is_let_go_where_another_one_is_asked_for(
    folder: Callable[[str], Path], composed: RunConfig, tmp_path: Path
) -> None:
    bench = bench_of("lora", "llama", folder)
    cfg = run_of(composed, bench)
    base = base_model(cfg, bench.folder)
    for key, value in (("precision", "bf16"), ("attention", "eager")):
        other = copy.deepcopy(cfg)
        setattr(other.model, key, type(getattr(cfg.model, key))(value))
        assert base_model(other, bench.folder) is not base
        assert len(resident._kept) == 1
        base = base_model(cfg, bench.folder)
    file = bench.folder / "config.json"
    before = file.stat().st_mtime
    file.touch()
    assert file.stat().st_mtime != before
    assert base_model(cfg, bench.folder) is not base


def test_a_changed_bit_is_found(folder: Callable[[str], Path], composed: RunConfig) -> None:
    bench = bench_of("lora", "llama", folder)
    cfg = run_of(composed, bench)
    base = base_model(cfg, bench.folder)
    weight = base.model.layers[1].mlp.down_proj.weight
    weight.data.view(torch.int32)[3, 5] ^= 1
    put_back()
    assert kept_bytes() == 0
    assert torch.equal(base_model(cfg, bench.folder).state_dict()["lm_head.weight"], base.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_checksum_is_that_of_all_bits(dtype: torch.dtype) -> None:
    for count in (0, 1, 7, 8, 1001):
        tensor = torch.randint(0, 2, (count,)).to(dtype)
        (whole,) = checksums([tensor])
        assert checksums([tensor.clone()]) == [whole]
        for at in {0, count - 1} if count else ():
            other = tensor.clone()
            other.view(torch.uint8)[at * other.element_size()] ^= 1
            assert checksums([other]) != [whole]
