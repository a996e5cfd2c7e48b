"""What every fine-tuning method promises, on models of many architectures: it holds, or is refused before the start."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_lora.config.compose import compose
from raytune_lora.config.methods import METHODS, Bias
from raytune_lora.config.schema import Quantization, kind_of
from raytune_lora.models.methods import fit, method_for
from raytune_lora.models.methods.peft_method import CONFIG
from tests.unit import zoo
from tests.unit.method_bench import STEPS, Bench, config

_WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # 64: a block of 4-bit weights
MODELS: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "tied_llama": _WIDE,
    "gpt2": {"n_embd": 64, "initializer_range": 0.1},
    "qwen3": _WIDE,
    "gemma2": _WIDE,
    "phi3": _WIDE,
    "qwen2": _WIDE,
    "mixtral": _WIDE,
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "init_std": 0.1},
}
IA3 = {  # its layers are called otherwise
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"]},
    "phi3": {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "mixtral": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "opt": {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
}
REFUSED = {  # what cannot work, and a word of the reason
    **{(kind, "gpt2"): "Conv1D" for kind in ("loha", "lokr", "shira")},
    **{("bitfit", model): "trains biases" for model in ("llama", "tied_llama", "qwen3", "gemma2", "phi3", "mixtral")},
}


@pytest.fixture(scope="module")
def folder(folder: Callable[..., Path]) -> Callable[[str], Path]:
    """Folders of models of the zoo, by name, with what this module changes."""
    return lambda name: folder(name, **MODELS.get(name, {}))


def bench_of(kind: str, model: str, folder: Callable[[str], Path], **changes: Any) -> Bench:
    bases = method_for(config(kind)).bases
    own = IA3.get(model, {}) if kind == "ia3" else {}
    base = Quantization.none if Quantization.none in bases else Quantization.nf4
    return Bench(kind, folder(model), base, **own | changes)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "qwen2"])
@pytest.mark.parametrize("kind", [kind_of(cls) for cls in METHODS])
def test_a_method_keeps_its_promises(kind: str, model: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Starts as the base, trains what it counts, learns; the same when resumed, loaded, loaded by PEFT and merged."""
    bench = bench_of(kind, model, folder)
    problems = bench.method.problems(bench.shape())
    if reason := REFUSED.get((kind, model)):
        assert len(problems) == 1
        assert reason in problems[0]
        assert f"method={kind}" in problems[0]
        return
    keeps_its_promises(bench, tmp_path)


def keeps_its_promises(bench: Bench, folder: Path) -> None:
    """
    Args:
        bench: of a method and a model that it fits.
        folder: for what is saved.
    """
    shape, method = bench.shape(), bench.method
    assert method.problems(shape) == []
    untouched = bench.logits(bench.base())
    trained = bench.applied()
    if method.starts_as_base:
        same(bench.logits(trained), untouched)
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == method.count(shape)

    before, optimizer = bench.loss(trained), bench.optimizer(trained)
    bench.train(trained, range(1, 4), optimizer)
    saved = copy.deepcopy((bench.state(trained), method.extra_state(trained), optimizer.state_dict()))
    bench.train(trained, range(4, STEPS + 1), optimizer)
    assert bench.loss(trained) < before - 1e-3
    learned = bench.logits(trained)
    same(resumed(bench, *saved), learned)

    method.save(trained, bench.state(trained), folder)
    loaded = method.load(bench.base(), folder, bench.folder)
    assert not any(p.requires_grad for p in loaded.parameters())
    apart = bench.logits(loaded)
    same(apart, learned)
    if (folder / CONFIG).exists():
        same(loaded_by_peft(bench, folder), apart)
    if method.mergeable and bench.quantization.kind is Quantization.none:
        merged = method.merge(loaded)
        same(bench.logits(merged), apart)
        assert set(merged.state_dict()) == set(bench.base().state_dict())


def resumed(bench: Bench, weights: dict[str, Any], extra: dict[str, Any], state: dict[str, Any]) -> torch.Tensor:
    """The logits at the end of a run that goes on from its third step in another process."""
    torch.manual_seed(99)
    method = method_for(bench.method.cfg)
    model = method.apply(bench.base(), bench.start(earlier=extra))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(weights[name])
    optimizer = bench.optimizer(model)
    optimizer.load_state_dict(state)
    bench.train(model, range(4, STEPS + 1), optimizer)
    return bench.logits(model)


def loaded_by_peft(bench: Bench, folder: Path) -> torch.Tensor:
    """The logits of an adapter as a stranger loads it, on the base that it was trained on."""
    from peft import PeftModel

    return bench.logits(PeftModel.from_pretrained(bench.base(), folder))


# ------------------------------------------------------------------------------------ layers that are stored transposed


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "olora", "eva", "adalora", "vera", "ia3"])
def test_a_saved_adapter_says_that_its_layers_are_transposed(
    kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for model in ("gpt2", "llama"):
        bench = bench_of(kind, model, folder)
        adapted = bench.applied()
        (tmp_path / model).mkdir()
        bench.method.save(adapted, bench.state(adapted), tmp_path / model)
        assert json.loads((tmp_path / model / CONFIG).read_text())["fan_in_fan_out"] is (model == "gpt2")


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_what_is_left_of_the_base_is_the_weight_without_the_start(model: str, folder: Callable[[str], Path]) -> None:
    """The start is that of a matrix d_out x d_in, however it is stored."""
    name = {"gpt2": "transformer.h.0.attn.c_attn", "llama": "model.layers.0.self_attn.q_proj"}[model]
    for kind in ("pissa", "olora"):
        bench = bench_of(kind, model, folder, **({"iterations": None} if kind == "pissa" else {}))
        layer = bench.applied().get_submodule(f"base_model.model.{name}")
        stored, left = bench.base().get_submodule(name).weight, layer.get_base_layer().weight
        whole, left = (stored.T, left.T) if model == "gpt2" else (stored, left)
        r = bench.method.cfg.r
        if kind == "pissa":
            u, s, vh = torch.linalg.svd(whole.double())
            start = u[:, :r] * s[:r] @ vh[:r]
        else:
            q, upper = torch.linalg.qr(whole.double())
            start = bench.method.cfg.alpha / r * q[:, :r] @ upper[:r]
        torch.testing.assert_close(left.double(), whole.double() - start, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_quantized_starts_know_how_the_weights_are_stored(model: str, folder: Callable[[str], Path]) -> None:
    """LoftQ and calibration come nearer to the unquantized model than plain quantization does."""
    target = bench_of("lora", model, folder)
    exact = target.logits(target.base())
    plain = Bench("lora", target.folder, Quantization.nf4)
    lost = float((plain.logits(plain.base()) - exact).norm())
    for kind, share in (("loftq", 0.9), ("ir_qlora", 1.05)):
        bench = bench_of(kind, model, folder)
        assert float((bench.logits(bench.applied()) - exact).norm()) < share * lost, kind


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_gradient_of_a_difference_is_that_of_the_weight(model: str, folder: Callable[[str], Path]) -> None:
    bench = bench_of("diff_pruning", model, folder, sparsity=None)
    adapted, whole = bench.applied().eval(), bench.base().requires_grad_(True)  # in evaluation all gates are 1 at first
    for one in (adapted, whole):
        one(**bench.batch, labels=bench.batch["input_ids"]).loss.backward()
    for target in bench.shape().targets(["all-linear"]):
        expected = whole.get_submodule(target.name).weight.grad
        found = adapted.get_submodule(target.name).sparse.diff.grad
        torch.testing.assert_close(found, expected.T if target.transposed else expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("model", "name"), [("tied_llama", "lm_head"), ("gpt2", "transformer.h.0.attn.c_attn")])
def test_dora_on_a_layer_with_a_row_of_zeros(model: str, name: str, tmp_path: Path) -> None:
    """As a head has one that is tied to an embedding with a padding token."""
    base = zoo.build(model, **MODELS[model])
    weight = base.get_submodule(name).weight
    with torch.no_grad():
        (weight.T if model == "gpt2" else weight)[0] = 0.0
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    modules = [name.rpartition(".")[2]]
    keeps_its_promises(
        Bench("dora", tmp_path / "base", Quantization.none, target_modules=modules), tmp_path / "adapter"
    )


# ------------------------------------------------------------------------------------------- what trains beside A and B

OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"bias": Bias.all},
    "own_bias": {"bias": Bias.lora_only},
    "layers": {"layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"q_proj": 4, r"layers\.1\..*v_proj": 8}, "alpha_pattern": {"k_proj": 3.0}},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "words": {"modules_to_save": ["word_embeddings"]},
    "decoder": {"modules_to_save": ["decoder"]},
    "predictions": {"modules_to_save": ["predictions"], "target_modules": ["query", "value"]},
    "norm": {"modules_to_save": ["norm"], "target_modules": [r".*layers\.\d+\..*(q|v)_proj"]},
    "experts": {"experts": True, "modules_to_save": ["layers.0.mlp.experts"]},
    "bias_beside_norm": {"bias": Bias.all, "modules_to_save": ["final_layer_norm"]},
    "conv": {"layers_to_transform": [0], "layers_pattern": "h", "bias": Bias.all, "modules_to_save": ["wte"]},
}
USED = [  # the options that each model has something for
    ("qwen2", "bias"), ("qwen2", "own_bias"), ("opt", "own_bias"), ("opt", "bias"), ("llama", "layers"),
    ("llama", "patterns"), ("llama", "embedding"), ("llama", "head"), ("llama", "norm"), ("tied_llama", "embedding"),
    ("tied_llama", "head"), ("gemma2", "embedding"), ("gpt2", "conv"), ("opt", "embedding"), ("bert", "words"),
    ("bert", "decoder"), ("tied_bert", "predictions"), ("mixtral", "experts"), ("opt", "bias_beside_norm"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "model", "option"),
    [("lora", *used) for used in USED]
    + [(kind, *used) for kind in ("dora", "pissa") for used in (("llama", "patterns"), ("gpt2", "conv"))]
    + [("pissa", "qwen2", "bias"), ("rslora", "llama", "patterns"), ("lora_plus", "tied_llama", "head")],
)
def test_an_option_of_lora_keeps_its_promises(
    kind: str, model: str, option: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    keeps_its_promises(bench_of(kind, model, folder, r=8, **OPTIONS[option]), tmp_path)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("llama", {"layers_to_transform": [1, 7]}, ["method.layers_to_transform", "layers 0 to 1", "got 7"]),
        (
            "gpt2",
            {"layers_to_transform": [0], "layers_pattern": "layers"},
            ["method.layers_pattern=layers", "h in GPT-2"],
        ),
        ("llama", {"rank_pattern": {"c_attn": 4}}, ["method.rank_pattern", "c_attn", "q_proj"]),
        ("llama", {"layers_to_transform": [0], "alpha_pattern": {r"layers\.1\..*": 4}}, ["method.alpha_pattern"]),
        (
            "llama",
            {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 2, "k_proj": 4, "layers.0.*k_proj": 4}},
            [
                "method.rank_pattern",
                "layers.0.self_attn.q_proj several values",
                "q_proj: 4, layers.0.self_attn.q_proj: 2",
            ],
        ),
        ("gpt2", {"modules_to_save": ["embed_tokens"]}, ["method.modules_to_save", "embed_tokens", "transformer.wte"]),
        ("tied_bert", {"modules_to_save": ["decoder"]}, ["method.modules_to_save: cls.predictions.decoder", "bias"]),
        ("llama", {"bias": Bias.all}, ["method.bias=all", "none"]),
        ("qwen2", {"bias": Bias.lora_only, "target_modules": ["o_proj"]}, ["method.bias=lora_only", "target layers"]),
        ("llama", {"target_modules": [r"layers\.0\..*"]}, ["method.target_modules", "whole name matches"]),
        (
            "tied_llama",
            {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
            ["lm_head", "model.embed_tokens"],
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    model: str, changes: dict[str, Any], words: list[str], folder: Callable[[str], Path]
) -> None:
    bench = bench_of("lora", model, folder, **changes)
    (problem,) = bench.method.problems(bench.shape())
    assert all(word in problem for word in words), problem


def test_quantized_layers_cannot_be_trained_whole(folder: Callable[[str], Path]) -> None:
    shape = bench_of("lora", "llama", folder).shape()
    for names, refused in ((["embed_tokens", "lm_head", "norm"], False), (["q_proj"], True), (["mlp"], True)):
        cfg = compose(["model.path=x", "data=fake", "quantization=nf4", f"method.modules_to_save={','.join(names)}"])
        found = fit.model_problems(cfg, shape)
        assert bool(found) is refused
        assert all("method.modules_to_save" in problem and "quantized" in problem for problem in found)


def test_what_trains_whole_is_in_the_memory_plan(folder: Callable[[str], Path]) -> None:
    bench = bench_of("lora", "llama", folder, modules_to_save=["embed_tokens", "lm_head"])
    shape, plain = bench.shape(), bench_of("lora", "llama", folder)
    more = bench.method.added(shape), plain.method.added(shape)
    assert more[0].trained - more[1].trained == 2 * zoo.VOCAB * 64
    assert more[0].from_start
    assert {linear.name for linear in more[0].inputs} - {linear.name for linear in more[1].inputs} == {"lm_head"}
