"""What is adapted of models that are more than attention and dense layers: experts, towers, other mixers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BartConfig, BigBirdConfig, CTRLConfig, TrOCRConfig

from raytune_lora.config import validate
from raytune_lora.config.compose import compose
from raytune_lora.config.methods import METHODS
from raytune_lora.config.schema import Quantization, kind_of
from raytune_lora.errors import UserError
from raytune_lora.models import skeleton
from raytune_lora.models.methods import Start, fit, method_for
from raytune_lora.models.shape import shape_of
from raytune_lora.training.gradients import FirstGradients
from tests.unit import zoo
from tests.unit.method_bench import Bench, config
from tests.unit.test_method_contract import loaded_by_peft, resumed, same

MODELS = (
    *(
        "gemma3",
        "gemma3n_text",
        "gemma4_text",
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "qwen4_exp_text",
        "dbrx",
    ),
    *("mamba", "lfm2", "nemotron_h", "rwkv", "laguna"),
)
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
UNQUANTIZED = [kind_of(cls) for cls in METHODS if kind_of(cls) not in ("loftq", "ir_qlora")]
BATCH = {"input_ids": torch.arange(3, 51).reshape(2, 24), "attention_mask": torch.ones(2, 24).long()}


def adapted(model: Any, method: Any) -> Any:
    batch = BATCH | {"labels": BATCH["input_ids"]}
    return method.apply(model, Start(4, Path(), lambda _: iter([batch])))


def backward(model: Any) -> None:
    model.train()(**BATCH, labels=BATCH["input_ids"]).loss.backward()


@pytest.mark.parametrize("model", MODELS)
def test_what_trains_is_what_is_counted_and_gets_gradients(model: str) -> None:
    """Of every method that does not refuse the model, with nothing left that could never train."""
    refused = []
    for kind in UNQUANTIZED:
        base = zoo.build(model)
        shape, method = shape_of(base), method_for(config(kind))
        if problems := method.problems(shape):
            refused.append(kind)
            assert all(problem.startswith("method") for problem in problems)
            continue
        tuned = adapted(base, method)
        heard = FirstGradients(tuned)
        backward(tuned)
        heard.check(kind)
        assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == method.count(shape), kind
    assert "lora" not in refused
    assert "full" not in refused


@pytest.mark.parametrize("model", MIXTURES)
def test_experts_are_adapted_where_asked_and_the_router_never(
    model: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """What PEFT then trains is counted; it is the same resumed, loaded, loaded by PEFT alone, and merged."""
    without = method_for(config("lora"))
    bench = Bench("lora", folder(model), Quantization.none, experts=True)
    shape, method = bench.shape(), bench.method
    assert method.problems(shape) == []
    assert method.count(shape) - without.count(shape) == sum(
        method.cfg.r * p.shape[0] * (p.shape[1] + p.shape[2]) for p in bench.base().parameters() if p.dim() == 3
    )
    trained = bench.applied()
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == method.count(shape)
    changed = {name.split(".lora_")[0] for name, p in trained.named_parameters() if p.requires_grad}
    assert not any(name.endswith((".gate", ".router")) for name in changed)
    before, optimizer = bench.loss(trained), bench.optimizer(trained)
    bench.train(trained, range(1, 4), optimizer)
    saved = copy.deepcopy((bench.state(trained), method.extra_state(trained), optimizer.state_dict()))
    bench.train(trained, range(4, 7), optimizer)
    assert bench.loss(trained) < before
    learned = bench.logits(trained)
    method.save(trained, bench.state(trained), tmp_path)
    loaded = method.load(bench.base(), tmp_path, bench.folder)
    same(bench.logits(loaded), learned)
    same(loaded_by_peft(bench, tmp_path), learned)
    same(bench.logits(method.merge(loaded)), learned)
    same(resumed(bench, *saved), learned)


@pytest.mark.parametrize(
    ("model", "kind"),
    [(model, "lora") for model in ("gemma3", "mixtral", "qwen3_moe", "mamba", "laguna", "llava", "zamba2", "rwkv")]
    + [("laguna", "dora"), ("laguna", "pissa"), ("deepseek_v4", "lora"), ("deepseek_v4", "dora")],
)
def test_an_adapter_that_leaves_parts_out_is_loaded_by_peft_alone(
    model: str, kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also one of layers whose names PEFT would change: they are saved as the checkpoint calls them."""
    bench = Bench(kind, folder(model), Quantization.none, r=4)
    trained = bench.applied()
    bench.train(trained, range(1, 4), bench.optimizer(trained))
    bench.method.save(trained, bench.state(trained), tmp_path)
    same(loaded_by_peft(bench, tmp_path), bench.logits(trained))


def test_a_layer_that_peft_would_not_find_again_gets_no_adapter() -> None:
    """Whatever name it is saved under. A name of the checkpoint's is one that PEFT takes for today's."""
    base = zoo.build("laguna")
    shape = shape_of(base)
    saved = {linear.name: linear.saved_as for linear in shape.linears if linear.saved_as != ""}
    assert saved["model.layers.1.mlp.shared_experts.up_proj"] == "model.layers.1.mlp.shared_expert.up_proj"
    assert len(saved) == 3
    lost = tuple(replace(x, saved_as=None) if "shared" in x.name else x for x in shape.linears)
    method = method_for(config("lora"))
    left = set(method.targets(shape)) - set(method.targets(replace(shape, linears=lost)))
    assert {linear.name for linear in left} == set(saved)
    (_, said) = sorted(method.left_out(replace(shape, linears=lost)), key=lambda words: "PEFT" in words)
    assert "shared_experts.up_proj" in said
    assert "PEFT would not load it again" in said


def test_what_is_left_out_is_said_with_the_reason() -> None:
    def said(model: str, *overrides: str) -> str:
        cfg = compose(["model.path=here", "data=fake", *overrides])
        return "\n".join(fit.notes(cfg, shape_of(zoo.build(model))))

    assert said("llama") == said("gpt2") == said("qwen3", "quantization=nf4") == ""
    assert "model.vision_tower (text does not pass through" in said("gemma3")
    assert "parameters (text does not pass through" in said("gemma3", "method=full")
    experts = "layers.*.mlp.experts.gate_up_proj"
    assert f"{experts}, model.layers.*.mlp.experts.down_proj" in said("gpt_oss")
    assert "method.experts=true method.dropout=0 adapts them" in said("mixtral")
    assert "experts" not in said("mixtral", "method.experts=true", "method.dropout=0")
    assert "model.layers.*.mlp.gate_proj" in said("qwen3_moe")  # of the dense layer
    assert "unquantized: bitsandbytes" in said("mixtral", "quantization=nf4")
    assert "dt_proj" in said("mamba")
    assert "indexer.wk, model.layers.*.self_attn.indexer.weights_proj (no gradient comes back" in said("deepseek_v32")
    assert "indexer.index_qk_proj (no gradient comes back" in said("qwen4_exp_text")
    assert "self_attn.o_a_proj (they compute something else than" in said("deepseek_v4")
    assert "router.layer (they route tokens" in said("dbrx")
    assert "ffn.experts.mlp.w2" in said("dbrx")
    assert said("gemma4_text") == ""
    assert "model.layers.*.shared_transformer.self_attn.linear_q_adapter_list.1, " in said("zamba2")
    assert "planned memory is approximate" in said("lfm2")


@pytest.mark.parametrize("model", ["gemma4_text", "gemma2", "phi3", "bert", "falcon"])
def test_where_nothing_is_left_out_it_is_peft_s_own_choice(model: str) -> None:
    base = zoo.build(model)
    counted = method_for(config("lora")).count(shape_of(base))
    tuned = get_peft_model(base, LoraConfig(r=config("lora").r, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == counted


def test_experts_below_each_other_are_counted_and_left_alone() -> None:
    """PEFT would give them one adapter in common, as a matrix that they are."""
    base = zoo.build("dbrx")
    shape = shape_of(base)
    owned = {name: p.numel() for name, p in base.named_parameters() if ".experts." in name}
    assert {experts.name: experts.numel for experts in shape.experts} == owned
    assert {(e.count, e.d_in, e.d_out) for e in shape.experts} == {(4, 32, 48)}
    assert shape.block.experts == 2
    assert shape.block.feed_forward == 2 * 48
    (problem,) = method_for(config("lora", experts=True)).problems(shape)
    assert problem.startswith("method.experts=true: in transformer.blocks.0.ffn.experts.mlp.w1")


def test_prompts_need_a_model_that_takes_vectors_for_tokens() -> None:
    """Gemma 4 raises without the tokens, Gemma 3n goes on without their vectors in each layer."""
    vectors = torch.randn(1, 4, 32)
    for model, takes in (("gemma4_text", False), ("gemma3n_text", False), ("gemma2", True)):
        shape = shape_of(zoo.build(model))
        for kind in ("prompt_tuning", "p_tuning"):
            assert bool(method_for(config(kind)).problems(shape)) is not takes, (model, kind)
    with pytest.raises(RuntimeError, match="input_ids"):
        zoo.build("gemma4_text")(inputs_embeds=vectors)


def test_checkpointing_needs_a_model_whose_code_has_it() -> None:
    cfg = compose(["model.path=here", "data=fake", "training.gradient_checkpointing=true"])
    for name in ("ctrl", "llama"):
        sizes = {"vocab_size": 64, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 2}
        base = AutoModelForCausalLM.from_config(CTRLConfig(**sizes)) if name == "ctrl" else zoo.build(name)
        refused = any("training.gradient_checkpointing=true" in p for p in fit.model_problems(cfg, shape_of(base)))
        assert refused is (name == "ctrl")
        if refused:
            with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
                base.gradient_checkpointing_enable()


def test_a_decoder_whose_cross_attention_is_idle_is_not_said_to_be_left_out() -> None:
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 272}
    for cls in (BartConfig, TrOCRConfig):
        shape = shape_of(AutoModelForCausalLM.from_config(cls(**sizes)))
        (note,) = fit.notes(compose(["model.path=here", "data=fake"]), shape)
        assert "leaves out model.decoder.layers.*.encoder_attn (text does not pass" in note


def test_a_layer_that_the_loss_does_not_depend_on_gets_no_adapter() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    base = AutoModelForCausalLM.from_config(
        BigBirdConfig(is_decoder=True, attention_type="original_full", vocab_size=272, pad_token_id=0, **sizes)
    )
    shape, method = shape_of(base), method_for(config("lora"))
    assert method.left_out(shape) == ["bert.pooler (no gradient comes back through them)"]
    tuned = adapted(base, method)
    heard = FirstGradients(tuned)
    backward(tuned)
    heard.check("lora")


@pytest.mark.parametrize("kind", ["dora", "pissa", "olora", "eva", "loftq", "ir_qlora"])
def test_methods_that_cannot_adapt_experts_say_so(kind: str) -> None:
    shape = shape_of(zoo.build("mixtral"))
    assert any("method.experts=true does not work" in p for p in method_for(config(kind, experts=True)).problems(shape))
    dense = shape_of(zoo.build("llama"))
    assert any("has no experts" in p for p in method_for(config(kind, experts=True)).problems(dense))


def test_experts_need_their_weights_whole_and_no_dropout() -> None:
    run = ["model.path=here", "data=fake", "method.experts=true"]
    assert any("method.dropout=0" in problem for problem in validate.problems(compose(run)))
    assert not any("experts" in problem for problem in validate.problems(compose([*run, "method.dropout=0"])))
    (problem,) = fit.problems(compose([*run, "method.dropout=0", "deepspeed=zero3"]))
    assert problem.endswith("take deepspeed=zero2")


def test_a_layer_that_no_adapter_can_go_to_is_refused_with_the_reason() -> None:
    for model, name, reason in (
        ("mamba", "dt_proj", "read past"),
        ("gemma3", "fc1", "text does not pass"),
        ("mixtral", "w1", "method.experts=true"),
        ("deepseek_v3", "gate_proj", "method.experts=true"),
        ("gpt_oss", "gate_up_proj", "method.experts=true"),
    ):
        (problem,) = method_for(config("lora", target_modules=[name])).problems(shape_of(zoo.build(model)))
        assert problem.startswith("method.target_modules: ")
        assert reason in problem, model


@pytest.mark.parametrize(
    ("model", "targets", "without"),
    [("mamba", ["in_proj", "dt_proj"], "dt_proj"), ("deepseek_v32", ["o_proj", "wk"], "indexer.wk")],
)
def test_an_adapter_without_a_gradient_is_found_at_the_first_step(model: str, targets: list[str], without: str) -> None:
    """PEFT alone puts one on Mamba's dt_proj, whose weight the model reads itself, and on what picks tokens."""
    tuned = get_peft_model(zoo.build(model), LoraConfig(target_modules=targets))
    heard = FirstGradients(tuned)
    backward(tuned)
    with pytest.raises(UserError, match=rf"4 of 8 trainable parameters get no gradient .*{without}\.lora_A"):
        heard.check("lora")
    left = {linear.name for linear in shape_of(zoo.build(model)).linears if linear.apart}
    assert any(name.endswith(without) for name in left)


@pytest.mark.parametrize("model", ["gemma3", "deepseek_v3", "gpt_oss", "mamba"])
def test_full_saves_also_what_does_not_train(model: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    bench = Bench("full", folder(model), Quantization.none)
    trained = bench.applied()
    bench.train(trained)
    bench.method.save(trained, bench.state(trained), tmp_path)
    found, told = type(trained).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    own, theirs = trained.state_dict(), found.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert found.config.get_text_config().use_cache
    cfg = compose(["model=tiny", "method=full", "deepspeed=zero3"])
    refused = fit.model_problems(cfg, bench.shape())
    assert bool(refused) == (model == "gemma3")


def test_experts_that_train_whole_are_not_said_to_be_left_out() -> None:
    shape = shape_of(zoo.build("mixtral"))
    said = " ".join(method_for(config("lora")).left_out(shape))
    whole = " ".join(method_for(config("lora", modules_to_save=["experts"])).left_out(shape))
    assert "experts.gate_up_proj" in said
    assert "experts" not in whole
    assert whole == said.partition("model.layers.*.mlp.experts")[0].strip()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_trains_is_found_where_nothing_is_to_train(
    mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model is loaded to be measured: what is found then is kept."""
    base = zoo.build("qwen2")
    expected = skeleton.skeleton_of(base)
    monkeypatch.setattr(skeleton, "_KNOWN", {})
    with mode():
        found = skeleton.skeleton_of(base)
    assert (found.called, found.trains, found.read) == (expected.called, expected.trains, expected.read)
    assert (found.keys, found.unprompted, found.unprefixed) == (expected.keys, "", "")
