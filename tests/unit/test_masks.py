"""What the store and the batches tell the model to learn, where the padding token is the end-of-sequence token too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_lora.cache import Cache
from raytune_lora.config.data import FakeDataConfig
from raytune_lora.config.schema import QuantizationConfig, TinyModelConfig
from raytune_lora.data.encode import IGNORED
from raytune_lora.data.prepare import prepare
from raytune_lora.data.store import TokenStore
from raytune_lora.models.loading import load_model
from raytune_lora.models.packed import PackedAttention
from raytune_lora.models.sources import byte_tokenizer
from raytune_lora.training.batches import collate, pack


@pytest.fixture(scope="module")
def padless() -> Any:
    """A tokenizer that pads with its end-of-sequence token, as those of many base models do."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    return tokenizer


@pytest.fixture(scope="module")
def padless_store(padless: Any, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return prepare(
        FakeDataConfig(rows=100, max_length=128), lambda: padless, "padless", Cache(tmp_path_factory.mktemp("cache"))
    )


def uneven(store: TokenStore) -> list[dict[str, Any]]:
    """Four rows of different lengths."""
    by_length = {len(row["input_ids"]): row for row in store.split("train")}
    assert len(by_length) >= 4
    return [by_length[length] for length in sorted(by_length)[:4]]


def test_the_answer_and_its_end_are_trained_and_the_prompt_is_not(padless: Any, padless_store: TokenStore) -> None:
    for row in padless_store.split("train"):
        trained = [label for label in row["labels"] if label != IGNORED]
        assert padless.decode(trained[:-1]) == row["answer"]
        assert trained[-1] == padless.eos_token_id
        assert row["labels"] == [IGNORED] * (len(row["labels"]) - len(trained)) + trained
        assert row["input_ids"][-len(trained) :] == trained


def test_a_batch_trains_the_end_of_each_row_and_no_padding(padless: Any, padless_store: TokenStore) -> None:
    rows = uneven(padless_store)
    batch = collate(rows, padless.pad_token_id)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["labels"][number, length - 1] == padless.eos_token_id
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert (batch["labels"][number, length:] == IGNORED).all()
        assert (batch["input_ids"][number, length:] == padless.eos_token_id).all()


def test_the_loss_of_a_padded_batch_is_that_of_its_rows_alone(
    padless: Any, padless_store: TokenStore, tiny_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    rows = uneven(padless_store)
    total, tokens = torch.zeros(()), 0
    for row in rows:
        logprobs_TV = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if label != IGNORED:
                total, tokens = total - logprobs_TV[position - 1, label], tokens + 1
    assert model(**collate(rows, padless.pad_token_id)).loss.item() == pytest.approx(total.item() / tokens, rel=1e-6)


def test_packed_rows_do_not_see_each_other(padless_store: TokenStore, tiny_folder: Path) -> None:
    """Trained on prompts too: what a row's first token would be taken to follow from is not trained."""
    model = load_model(tiny_folder, TinyModelConfig(), QuantizationConfig())
    rows = [row | {"labels": row["input_ids"]} for row in uneven(padless_store)]
    batch, apart = pack(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(lengths))
    with torch.no_grad():
        with PackedAttention(model).of(apart) as given:
            together = model(**batch, **given)
        alone = [
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])) for row in rows
        ]
    torch.testing.assert_close(together.logits[0], torch.cat([out.logits[0] for out in alone]), atol=1e-5, rtol=0)
    total = sum(out.loss.item() * (length - 1) for out, length in zip(alone, lengths, strict=True))
    assert together.loss.item() == pytest.approx(total / sum(length - 1 for length in lengths), rel=1e-6)
