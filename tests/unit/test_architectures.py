"""What is adapted of models that are more than attention and dense layers: experts, towers, other mixers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BartConfig, BigBirdConfig, TrOCRConfig

from raytune_lora.config import validate
from raytune_lora.config.compose import compose
from raytune_lora.config.methods import METHODS
from raytune_lora.config.schema import Quantization, kind_of
from raytune_lora.errors import UserError
from raytune_lora.models.methods import Start, fit, method_for
from raytune_lora.models.shape import shape_of
from raytune_lora.training.gradients import FirstGradients
from tests.unit import zoo
from tests.unit.method_bench import Bench, config
from tests.unit.test_method_contract import loaded_by_peft, resumed, same

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("gemma3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba", "lfm2")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
UNQUANTIZED = [kind_of(cls) for cls in METHODS if kind_of(cls) not in ("loftq", "ir_qlora")]
BATCH = {"input_ids": torch.arange(3, 51).reshape(2, 24), "attention_mask": torch.ones(2, 24).long()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models of the zoo, by name."""
    root = tmp_path_factory.mktemp("zoo")

    def made(name: str) -> Path:
        if not (root / name).exists():
            zoo.build(name).save_pretrained(root / name)
        return root / name

    return made


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


@pytest.mark.parametrize("model", ["gemma3", "mixtral", "qwen3_moe", "mamba"])
def test_an_adapter_that_leaves_parts_out_is_loaded_by_peft_alone(
    model: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    bench = Bench("lora", folder(model), Quantization.none)
    trained = bench.applied()
    bench.train(trained, range(1, 4), bench.optimizer(trained))
    bench.method.save(trained, bench.state(trained), tmp_path)
    same(loaded_by_peft(bench, tmp_path), bench.logits(trained))


def test_what_is_left_out_is_said_with_the_reason() -> None:
    def said(model: str, *overrides: str) -> str:
        cfg = compose(["model.path=here", "data=fake", *overrides])
        return "\n".join(fit.notes(cfg, shape_of(zoo.build(model))))

    assert said("llama") == said("gpt2") == said("qwen3", "quantization=nf4") == ""
    assert "model.vision_tower (text does not pass through" in said("gemma3")
    assert "parameters (text does not pass through" in said("gemma3", "method=full")
    experts = "layers.*.mlp.experts.gate_up_proj"
    assert f"{experts}, model.layers.*.mlp.experts.down_proj" in said("gpt_oss")
    assert "method.experts=true adapts them" in said("mixtral")
    assert "experts" not in said("mixtral", "method.experts=true", "method.dropout=0")
    assert "model.layers.*.mlp.gate_proj" in said("qwen3_moe")  # of the dense layer
    assert "unquantized: bitsandbytes" in said("mixtral", "quantization=nf4")
    assert "dt_proj" in said("mamba")
    assert "model.layers.*.shared_transformer.self_attn.linear_q_adapter_list.1, " in said("zamba2")
    assert "planned memory is approximate" in said("lfm2")


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
    assert method.left_out(shape) == ["bert.pooler (the loss does not depend on them)"]
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


def test_an_adapter_without_a_gradient_is_found_at_the_first_step() -> None:
    """PEFT alone puts one on Mamba's dt_proj, whose weight the model reads itself."""
    tuned = get_peft_model(zoo.build("mamba"), LoraConfig(target_modules=["in_proj", "dt_proj"]))
    heard = FirstGradients(tuned)
    backward(tuned)
    with pytest.raises(UserError, match=r"4 of 8 trainable parameters get no gradient .*dt_proj\.lora_A"):
        heard.check("lora")


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
