"""The loss by chunks of the trained tokens' logits is the plain loss of all logits, and so are its gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from transformers.loss.loss_utils import ForCausalLMLoss

from raytune_lora.config.schema import Quantization
from raytune_lora.training import scoring
from raytune_lora.training.scoring import scoring_of
from tests.unit import zoo
from tests.unit.method_bench import Bench
from tests.unit.test_batch_loss import bart, qwen3_vl

COUNT = torch.tensor(50.0)  # trained tokens of a global batch, of which this is a part
CHUNK = 5  # tokens, of 17 that are trained
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"vocab_size": zoo.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FURTHER: dict[str, Callable[[], Any]] = {
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**_SIZES, logit_scale=0.3)),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**_SIZES, logits_scaling=4.0)),
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**_SIZES)),  # its head has a bias
    "gptj": lambda: T.GPTJForCausalLM(T.GPTJConfig(vocab_size=zoo.VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
    "qwen3_vl": qwen3_vl,
    "bart": bart,
    "balanced": lambda: zoo.build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5),
}
AT_ONCE = {"mllama"}  # whose code counts on a backbone that gives all tokens


def batch(vocab: int = 250) -> dict[str, torch.Tensor]:
    """Three rows of up to 14 tokens, (3, 14); the first five of each are not trained."""
    torch.manual_seed(1)
    ids = torch.randint(4, vocab, (3, 14))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def plain_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """By transformers' own function, of all logits; those of learned vectors come before a row's own."""
    logits = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits
    logits = logits[:, -inputs["labels"].shape[1] :].contiguous()
    loss: torch.Tensor = ForCausalLMLoss(logits, inputs["labels"], logits.shape[-1], num_items_in_batch=COUNT)
    return loss


def compare(model: Any, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scoring of a model, once its loss and gradients were found equal to the plain ones."""
    model.train()
    torch.manual_seed(2)  # of dropout
    expected = plain_loss(model, inputs)
    expected_gradients = gradients(expected, model)
    monkeypatch.setattr(scoring, "LOGITS", CHUNK * model.config.get_text_config().vocab_size)
    found = scoring_of(model)
    found.fit(model.eval(), inputs, takes_common_loss=True)
    own, found.own_loss = found.own_loss, False
    torch.manual_seed(2)
    loss = model.train()(**inputs, num_items_in_batch=COUNT)["loss"]
    torch.testing.assert_close(loss, expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(loss, model), expected_gradients, atol=1e-7, rtol=1e-4)
    with torch.no_grad():
        expected, rows = plain_loss(model.eval(), inputs), model(**inputs)["rows"]
    assert rows[:, 1].tolist() == (inputs["labels"][:, 1:] != -100).sum(1).tolist()
    assert float(rows[:, 0].sum() / COUNT) == pytest.approx(float(expected), abs=2e-6)
    found.own_loss = own
    return found


@pytest.mark.parametrize("name", [*zoo.ZOO, *FURTHER])
def test_of_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = zoo.spread(zoo.build(name) if name in zoo.ZOO else FURTHER[name](), 0.1)
    found = compare(model, batch(), monkeypatch)
    assert found.fits is (name not in AT_ONCE)
    assert found.own_loss is (name in ("balanced", "bart")), "theirs is another: of the balance, of the token itself"


@pytest.mark.parametrize(
    ("model", "kind", "changes"),
    [
        ("llama", "lora", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", "lora", {"modules_to_save": ["lm_head"]}),
        ("tied_llama", "lora", {"modules_to_save": ["embed_tokens"]}),
        ("gemma2", "full", {}),
        ("gpt2", "prompt_tuning", {}),
        ("llama", "p_tuning", {}),
        ("llama", "prefix_tuning", {}),
        ("llama", "adapter", {}),
        ("bert", "lora", {"modules_to_save": ["predictions"], "target_modules": ["query", "value"]}),
    ],
)
def test_of_methods_that_reach_the_head_or_put_vectors_before_a_row(
    model: str, kind: str, changes: dict[str, Any], folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = Bench(kind, folder(model), Quantization.none, **changes).applied()
    assert compare(zoo.spread(adapted, 0.1), batch(), monkeypatch).fits


def test_a_small_balance_is_seen_in_16_bits_too() -> None:
    for name, changes in (("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.001}), ("mixtral", {})):
        model = zoo.spread(zoo.build(name, **changes).to(torch.bfloat16), 0.1)
        scoring_of(model).fit(model, batch(), takes_common_loss=True)
        assert scoring_of(model).own_loss is bool(changes)
        assert scoring_of(model).fits


def test_a_batch_without_a_trained_token_has_gradients_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the rows have that fill the last step: data parallel workers wait for the gradient of every parameter."""
    model, inputs = zoo.build("llama"), batch()
    found = compare(model, inputs, monkeypatch)
    loss = model(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}, num_items_in_batch=COUNT)["loss"]
    assert float(loss.detach()) == 0
    grads = gradients(loss, model)
    assert len(grads) == len(list(model.parameters()))
    assert not any(g.any() for g in grads.values())
    assert found.fits


def test_packed_rows_are_scored_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch()
    row = {"input_ids": inputs["input_ids"].reshape(1, -1), "labels": inputs["labels"].reshape(1, -1)}
    assert compare(zoo.build("qwen3"), row, monkeypatch).fits


def test_the_model_itself_is_as_it_was_without_labels() -> None:
    model, inputs = zoo.build("llama"), batch()
    ids, expected = inputs["input_ids"], model(input_ids=inputs["input_ids"]).logits
    scoring_of(model).fit(model, inputs)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert scoring_of(model) is scoring_of(model)
    written = model.generate(input_ids=ids[:1], max_new_tokens=2, do_sample=False)
    assert written[0, -2] == expected[0, -1].argmax()


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.largest = 0
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def test_no_more_than_a_chunk_of_logits_is_ever_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in training nor in validation."""
    vocab = 20_000
    model = zoo.build("llama", vocab_size=vocab, tie_word_embeddings=True)
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    monkeypatch.setattr(scoring, "LOGITS", 8 * vocab)
    scoring_of(model).fit(model, batch())
    ids = torch.randint(4, vocab, (2, 64))
    with Live(model) as training:
        model(input_ids=ids, labels=ids)["loss"].backward()
    with Live(model) as validation, torch.no_grad():
        model(input_ids=ids, labels=ids)
    assert validation.largest <= training.largest <= 8 * vocab
