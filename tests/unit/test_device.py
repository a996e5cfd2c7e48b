"""What a run computes on, and in which precision, follows from its config, whatever the machine has."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils

from raytune_lora.cache import Cache
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import Precision, RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError
from raytune_lora.evaluation.compare import measure
from raytune_lora.models.loading import load_model, precision
from raytune_lora.models.sources import materialize
from raytune_lora.training.checkpoint import latest
from raytune_lora.training.place import Place
from raytune_lora.training.resident import kept_bytes, let_go
from raytune_lora.training.sharding import without_warmup
from raytune_lora.training.worker import clean_up, held, train
from raytune_lora.tuning.job import plain_run, prepare_inputs
from tests.unit import zoo

SMALL = ("model=tiny", "data=fake", "deepspeed=off", "training.max_steps=2", "training.global_batch=4")
BASELINE = partial(measure, adapter=None)
SHORT = ("evaluation.every=8", "evaluation.loss_rows=4", "evaluation.generate_rows=2", "evaluation.max_new_tokens=4")


def composed(cache: Path, *overrides: str) -> tuple[RunConfig, TokenStore]:
    cfg = compose([*SMALL, *SHORT, f"cache={cache}", *overrides])
    return plain_run(cfg), prepare_inputs(cfg).store


def trained(cfg: RunConfig, store: TokenStore, folder: Path, do: Any = train) -> dict[str, Any]:
    folder.mkdir()
    reports: list[dict[str, Any]] = []

    def report(said: dict[str, Any]) -> bool:
        reports.append(said)
        return True

    do(cfg, store, Place(0, 1, folder, report, lambda: 0))
    clean_up()
    return reports[-1]


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose torch says that it has some."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


def test_the_precision_is_that_of_what_it_computes_on(with_gpus: None) -> None:
    assert precision(Precision.auto, on_gpu=False) is torch.float32
    assert precision(Precision.auto, on_gpu=True) is torch.bfloat16
    assert precision(Precision.bf16, on_gpu=False) is torch.bfloat16
    assert not held().on_gpu


def test_a_gpu_that_emulates_bf16_has_none(with_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a T4 does: torch counts that as supported unless asked not to."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert precision(Precision.auto, on_gpu=True) is torch.float32
    assert precision(Precision.bf16, on_gpu=False) is torch.bfloat16
    with pytest.raises(UserError, match=r"Tesla T4 has no bf16 .* set model.precision=fp32"):
        precision(Precision.bf16, on_gpu=True)


def test_a_run_without_gpus_is_the_same_beside_some(cache: Path, tmp_path: Path, request: Any) -> None:
    cfg, store = composed(cache)
    alone = [trained(cfg, store, tmp_path / name, do) for name, do in (("a", train), ("b", BASELINE))]
    request.getfixturevalue("with_gpus")
    beside = [trained(cfg, store, tmp_path / name, do) for name, do in (("c", train), ("d", BASELINE))]
    assert [r["eval_loss"] for r in beside] == [r["eval_loss"] for r in alone]
    assert beside[1]["dtype"] == beside[1]["arithmetic"] == "float32"


@pytest.mark.parametrize("method", ["full", "layernorm"])
def test_what_trains_without_deepspeed_is_not_rounded_away(method: str, cache: Path, tmp_path: Path) -> None:
    """In bf16 a weight of 0.02 does not move by 5e-5; AdamW's first step moves each by about the learning rate."""
    once = ("training.learning_rate=5e-5", "training.warmup=0", "training.max_steps=1", "evaluation.every=4")
    cfg, store = composed(cache, f"method={method}", "model.precision=bf16", *once)
    trained(cfg, store, tmp_path / "run")
    checkpoint = latest(tmp_path / "run")
    assert checkpoint is not None
    weights = checkpoint.weights.all()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    if method == "layernorm":
        moved = torch.cat([(weight - 1).abs() for weight in weights.values()])
    else:
        base = load_model(materialize(cfg.model, Cache.of(cfg.cache, None)), cfg.model, cfg.quantization).state_dict()
        moved = torch.cat([(weights[name] - base[name].float()).abs().flatten() for name in weights])
    assert (moved > 2e-5).float().mean() > 0.8, "all but embeddings of tokens that no row has"


def test_a_part_of_a_model_takes_no_room_for_the_whole(with_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers would, where it loads onto a GPU."""
    asked: list[int] = []

    def free(index: int) -> tuple[int, int]:
        asked.append(index)
        raise RuntimeError

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    model = AutoModelForCausalLM.from_config(zoo.llama())
    whole = dict.fromkeys(model.state_dict(), torch.device("cuda", 0))
    modeling_utils.caching_allocator_warmup(model, whole, None)
    assert asked == [0]
    with without_warmup():
        modeling_utils.caching_allocator_warmup(model, whole, None)
    assert asked == [0]
    modeling_utils.caching_allocator_warmup(model, whole, None)
    assert asked == [0, 0]


@pytest.mark.parametrize("more", [(), ("quantization=nf4", "training.gradient_checkpointing=true")])
def test_a_worker_that_keeps_the_base_model_trains_as_a_fresh_one(
    more: tuple[str, ...], cache: Path, tmp_path: Path
) -> None:
    """To the last bit, after tasks that change the model, or are of another method."""
    methods = ["lora", "ia3" if more else "pissa"]
    runs = {method: composed(cache, f"method={method}", *more) for method in methods}
    fresh = {}
    for method, (cfg, store) in runs.items():
        let_go()
        fresh[method] = trained(cfg, store, tmp_path / f"fresh-{method}")["eval_loss"]
        let_go()
        fresh[f"{method}, untouched"] = trained(cfg, store, tmp_path / f"base-{method}", BASELINE)["eval_loss"]
    let_go()
    for turn, method in enumerate([*methods, methods[0]]):
        for name, do in ((f"{method}, untouched", BASELINE), (method, train)):
            assert trained(*runs[method], tmp_path / f"{turn}-{name}", do)["eval_loss"] == fresh[name], name
            assert (kept_bytes() == 0) is (name == "pissa")
    let_go()
