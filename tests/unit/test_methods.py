"""What every fine-tuning method promises, tested over the registry itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_lora.cache import Cache
from raytune_lora.config.compose import compose
from raytune_lora.config.methods import METHODS, Placement
from raytune_lora.config.schema import Quantization, TinyModelConfig, kind_of
from raytune_lora.models import shape as shapes
from raytune_lora.models.methods import Method, Start, fit, method_for, registered
from raytune_lora.models.shape import known_shape, shape_of, shape_of_folder
from raytune_lora.models.sources import materialize
from tests.unit.method_bench import STEPS, Bench, config

KINDS = [kind_of(cls) for cls in METHODS]
NEEDS = {"bitfit": {"bias": True}}  # of the tiny model


@pytest.fixture(scope="module")
def folders(cache: Path) -> dict[bool, Path]:
    return {bias: materialize(TinyModelConfig(bias=bias), Cache(cache)) for bias in (False, True)}


def tiny(kind: str, folders: dict[bool, Path], quantization: Quantization, **changes: Any) -> Bench:
    """A method on the tiny model."""
    return Bench(kind, folders[NEEDS.get(kind, {}).get("bias", False)], quantization, **changes)


def combinations() -> list[Any]:
    return [
        pytest.param(kind_of(cls.config_class), base, id=f"{kind_of(cls.config_class)}-{base.value}")
        for cls in registered().values()
        for base in Quantization
        if base in cls.bases and base is not Quantization.none
    ]


def test_every_config_has_one_method_and_every_method_a_config() -> None:
    assert set(registered()) == set(METHODS)
    assert len(set(KINDS)) == len(KINDS) == 23


def test_a_second_method_of_a_config_is_refused() -> None:
    with pytest.raises(TypeError, match="has two methods"):
        type("Again", (Method,), {"config_class": METHODS[0]})


@pytest.mark.parametrize(("kind", "base"), combinations())
def test_a_method_keeps_its_promises_on_a_quantized_base(
    kind: str, base: Quantization, folders: dict[bool, Path], tmp_path: Path
) -> None:
    """On a quantized base: starts as it, trains what it counts, learns, and is the same after saving and loading."""
    bench = tiny(kind, folders, base)
    before = bench.logits(bench.base())
    shape = bench.shape()
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
    torch.testing.assert_close(bench.logits(loaded), learned, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- counts and refusals


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("full", "bitfit")])
def test_the_count_is_that_of_a_model_with_grouped_heads_and_tied_embeddings(kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config_of_model = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config_of_model)
    shape = shape_of(model)
    if kind in ("loftq", "ir_qlora", "pissa", "olora", "eva"):  # they read weights or data: LoRA's layers all the same
        assert method_for(config(kind)).count(shape) >= method_for(config("lora", r=config(kind).r)).count(shape)  # type: ignore[attr-defined]
        return
    method = method_for(config(kind))
    applied = method.apply(model, Start(STEPS, Path(), lambda count: iter(())))
    assert sum(p.numel() for p in applied.parameters() if p.requires_grad) == method.count(shape)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("adapter", {"placement": Placement.houlsby}),
        ("prefix_tuning", {"projection": 12}),
        ("lokr", {"r": 2, "factor": 4}),
        ("lora", {"target_modules": ["q_proj", "v_proj"]}),
        ("dora", {"target_modules": ["down_proj"]}),
        ("vera", {"target_modules": ["q_proj", "o_proj"]}),
    ],
)
def test_the_count_follows_the_settings(kind: str, changes: dict[str, Any], folders: dict[bool, Path]) -> None:
    bench = tiny(kind, folders, Quantization.none, **changes)
    trained = sum(p.numel() for p in bench.applied().parameters() if p.requires_grad)
    assert trained == bench.method.count(shape_of(bench.base()))


def test_the_shape_of_a_model_is_made_out_once(
    folders: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But again where the model's config is another one, and where the cache cannot be written."""
    asked: list[Path] = []
    monkeypatch.setattr(
        shapes, "shape_of_folder", lambda folder, cfg: asked.append(folder) or shape_of_folder(folder, cfg)
    )
    cfg, cache, folder = TinyModelConfig(), Cache(tmp_path / "cache"), folders[False]
    first, again, other = (known_shape(one, cfg, cache) for one in (folder, folder, folders[True]))
    assert first == again == shape_of_folder(folder, cfg)
    assert other == shape_of_folder(folders[True], cfg) != first
    (tmp_path / "file").touch()
    assert known_shape(folder, cfg, Cache(tmp_path / "file")) == first
    assert asked == [folder, folders[True], folder]


def test_bitfit_on_a_model_without_biases_names_models_that_have_some(folders: dict[bool, Path]) -> None:
    (problem,) = method_for(config("bitfit")).problems(shape_of_folder(folders[False], TinyModelConfig()))
    assert "GPT-2" in problem


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(folders: dict[bool, Path]) -> None:
    shape = shape_of_folder(folders[False], TinyModelConfig())
    (problem,) = method_for(config("lora", target_modules=["q_proj", "query"])).problems(shape)
    assert "called query" in problem
    assert "q_proj" in problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=full", "quantization=nf4"], ["method=full", "quantization=nf4", "cannot train"]),
        (["method=pissa", "deepspeed=zero3"], ["method=pissa", "deepspeed=zero3", "zero0, zero1, zero2, off"]),
        (["method=adalora", "deepspeed=zero2"], ["method=adalora", "deepspeed=off"]),
        (["method=diff_pruning", "deepspeed=zero3"], ["method=diff_pruning", "zero0, zero1, zero2, off"]),
        (["method=dora", "deepspeed=zero3", "quantization=nf4"], ["quantization=nf4", "deepspeed=zero2"]),
        (["method=p_tuning", "training.packing=true"], ["method=p_tuning", "training.packing=true"]),
        (["method=layernorm", "deepspeed=zero3"], ["method=layernorm", "zero0, zero1, zero2, off"]),
        (["method=loftq", "quantization=none"], ["method=loftq", "nf4"]),
        (["method=prefix_tuning", "training.gradient_checkpointing=true"], ["method=prefix_tuning"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(overrides: list[str], words: list[str]) -> None:
    (problem,) = fit.problems(compose(["model=tiny", "data=fake", *overrides]))
    assert all(word in problem for word in words), problem


def test_every_method_works_as_it_is_configured() -> None:
    for kind in KINDS:
        assert fit.problems(compose(["model=tiny", "data=fake", f"method={kind}"])) == []


def test_diff_pruning_keeps_as_much_as_it_is_told_to(folders: dict[bool, Path], tmp_path: Path) -> None:
    """Also where the penalty has driven all gates to zero, as in long runs; and what is kept stays and learns."""
    bench = tiny("diff_pruning", folders, Quantization.none, sparsity=0.9, settle=0.5)
    model = bench.applied()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += {"gate": -5.0, "diff": 1e-3}.get(name.rpartition(".")[2], 0.0) * torch.rand_like(p)
    bench.train(model)
    learned = bench.logits(model)
    masks = {name: module.mask for name, module in model.named_modules() if hasattr(module, "mask")}
    state = bench.state(model)
    for name, mask in masks.items():
        assert not torch.equal(state[f"{name}.diff"][~mask], torch.zeros_like(state[f"{name}.diff"][~mask]))
    bench.method.save(model, state, tmp_path)
    loaded = bench.method.load(bench.base(), tmp_path, bench.folder)
    assert torch.equal(bench.logits(loaded), learned)
    kept = {name.removesuffix(".diff"): p != 0 for name, p in loaded.named_parameters() if name.endswith("sparse.diff")}
    assert all(torch.equal(kept[name], masks[name]) for name in masks)
    assert sum(int(p.sum()) for p in kept.values()) == pytest.approx(0.1 * sum(p.numel() for p in kept.values()), abs=2)
    again = bench.method.apply(bench.base(), bench.start(earlier=bench.method.extra_state(model)))
    again.load_state_dict(state, strict=False)
    assert torch.equal(bench.logits(again), learned), "taken up again, the mask is the same"


def test_the_threshold_is_the_value_of_that_rank() -> None:
    from raytune_lora.models.layers.sparse import _largest

    torch.manual_seed(0)
    values = [torch.rand(500), torch.rand(300) * 1e-6, torch.zeros(7), torch.ones(9)]
    together = torch.cat(values).sort(descending=True).values
    for rank in (1, 9, 10, 500, 509, 510, 806, 809, 810, 816):
        assert _largest(lambda: iter(values), rank) == together[rank - 1]


def test_loftq_starts_nearer_to_the_unquantized_model_than_lora(folders: dict[bool, Path]) -> None:
    whole = tiny("lora", folders, Quantization.none)
    target = whole.logits(whole.base())
    lost = {}
    for kind in ("lora", "loftq"):
        bench = tiny(kind, folders, Quantization.nf4)
        lost[kind] = float((bench.logits(bench.applied()) - target).norm())
    assert lost["loftq"] < 0.9 * lost["lora"]


def test_calibration_raises_the_entropy_of_the_codes(folders: dict[bool, Path]) -> None:
    from raytune_lora.models.layers.elastic import _entropy

    bench = tiny("ir_qlora", folders, Quantization.nf4)
    name = "model.layers.0.self_attn.q_proj"
    plain = _entropy(bench.base().get_submodule(name).weight).mean()
    calibrated = _entropy(bench.applied().get_submodule(f"base_model.model.{name}").base_layer.weight).mean()
    assert calibrated > plain


def test_lora_plus_gives_b_its_own_learning_rate(folders: dict[bool, Path]) -> None:
    bench = tiny("lora_plus", folders, Quantization.none)
    slow, fast = bench.method.parameter_groups(bench.applied(), 1e-3) or []
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    assert len(slow["params"]) == len(fast["params"]) == 14


def test_a_principal_start_is_taken_up_again_to_the_bit(folders: dict[bool, Path]) -> None:
    bench = tiny("pissa", folders, Quantization.none)
    model = bench.applied()
    torch.manual_seed(2)
    again = bench.method.apply(bench.base(), bench.start(earlier=bench.method.extra_state(model)))
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
