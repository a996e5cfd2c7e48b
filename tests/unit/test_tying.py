"""Layers that share their weights with other modules: what one of them learns changes no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from raytune_lora.config.methods import METHODS
from raytune_lora.config.schema import kind_of
from raytune_lora.models.methods import Start, method_for
from tests.unit import zoo

ON_LAYERS = [cls for cls in METHODS if hasattr(cls(), "target_modules") and kind_of(cls) not in ("loftq", "ir_qlora")]
TIED = ("tied_llama", "gpt2", "gemma2")
NO_PAD: dict[str, Any] = {"pad_token_id": None}  # whose row of zeros has no direction, as DoRA needs
IDS = torch.arange(3, 27).reshape(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(kind: str, model: Any, targets: list[str]) -> tuple[Any, Any]:
    """A method on layers of a model, and that model after some steps at a high rate."""
    (cls,) = [cls for cls in METHODS if kind_of(cls) == kind]
    cfg = cls(target_modules=targets)  # type: ignore[call-arg]
    for name, value in {"r": 4, "target_r": 2, "dropout": 0.0, "sparsity": 0.5, "feedforward_modules": []}.items():
        if hasattr(cfg, name):
            setattr(cfg, name, value)
    method = method_for(cfg)
    torch.manual_seed(0)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    model = method.apply(model, Start(3, Path(), lambda count: iter([batch])))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for step in range(1, 4):
        model.train()(**batch).loss.backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    return method, model


def saved_and_loaded(method: Any, model: Any, name: str, folder: Path) -> Any:
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    method.save(model, state, folder)
    return method.load(zoo.build(name, **NO_PAD), folder, Path())


@pytest.mark.parametrize("kind", [kind_of(cls) for cls in ON_LAYERS])
def test_what_a_tied_head_learns_is_the_same_loaded_and_merged_and_saved(kind: str, tmp_path: Path) -> None:
    """And differs from the base: the embedding stays as it was in training, in the adapter and in the merged model."""
    method, model = adapted(kind, zoo.build("tied_llama", **NO_PAD), ["lm_head"])
    learned = logits(model)
    assert (learned - logits(zoo.build("tied_llama", **NO_PAD))).abs().max() > 1e-4
    (tmp_path / "adapter").mkdir()
    loaded = saved_and_loaded(method, model, "tied_llama", tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), learned, atol=2e-5, rtol=1e-4)
    merged = method.merge(loaded)
    torch.testing.assert_close(logits(merged), learned, atol=2e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), learned, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TIED)
def test_heads_of_other_architectures_are_untied_too(name: str, tmp_path: Path) -> None:
    method, model = adapted("lora", zoo.build(name), ["lm_head"])
    learned = logits(model)
    merged = method.merge(model)
    torch.testing.assert_close(logits(merged), learned, atol=2e-5, rtol=1e-4)
    embedding = merged.get_input_embeddings().weight
    assert torch.equal(embedding, zoo.build(name).get_input_embeddings().weight)
    merged.tie_weights()  # as transformers may at any time
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), learned, atol=2e-5, rtol=1e-4)


def test_what_does_not_touch_a_tied_head_leaves_it_tied() -> None:
    method, model = adapted("lora", zoo.build("tied_llama"), ["q_proj"])
    merged = method.merge(model)
    assert merged.config.tie_word_embeddings
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_an_adapted_embedding_leaves_the_head_as_it_was(tmp_path: Path) -> None:
    """Adapters of others have them: PEFT's own, on an embedding that is the head too."""
    from peft import LoraConfig, get_peft_model

    (cls,) = [cls for cls in METHODS if kind_of(cls) == "lora"]
    model: PeftModel = get_peft_model(zoo.build("gpt2"), LoraConfig(target_modules=["wte"], init_lora_weights=False))
    learned = logits(model)
    merged = method_for(cls()).merge(model)
    torch.testing.assert_close(logits(merged), learned, atol=2e-5, rtol=1e-4)
    assert torch.equal(merged.lm_head.weight, zoo.build("gpt2").lm_head.weight)


@pytest.mark.parametrize("shared", ["weight", "layer", "block"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "loha", "shira", "diff_pruning"])
def test_layers_that_are_used_twice_merge_into_what_was_trained(kind: str, shared: str) -> None:
    model = zoo.build("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    if shared == "weight":
        second.q_proj.weight = first.q_proj.weight
    elif shared == "layer":
        second.q_proj = first.q_proj
    else:
        model.model.layers[1] = model.model.layers[0]
    method, model = adapted(kind, model, ["q_proj"])
    learned = logits(model)
    if kind == "diff_pruning":
        for module in model.modules():
            if hasattr(module, "difference"):
                module.mask = module.diff != 0
    torch.testing.assert_close(logits(method.merge(model.eval())), learned, atol=2e-5, rtol=1e-4)
