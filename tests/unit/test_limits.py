"""Positions and token ids beyond what a model has room for: refused before the start, exactly where it would fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from raytune_lora.cache import Cache
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import ModelConfig
from raytune_lora.data.prepare import prepare
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError
from raytune_lora.models.shape import shape_of, shape_of_folder
from raytune_lora.models.sources import byte_tokenizer
from raytune_lora.planning.shape import Shape
from raytune_lora.tuning import limits
from tests.unit import zoo

ROOM = 24
_OWN: dict[str, Any] = {"vocab_size": zoo.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = _OWN | {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": ROOM}
_BERT = _OWN | {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": ROOM,
}
_WITH_POSITIONS = ("opt", "llama", "gpt_neox", "qwen3", "gemma2", "phi3")
MODELS: dict[str, Callable[[], Any]] = {
    **{name: partial(zoo.ZOO[name], max_position_embeddings=ROOM) for name in _WITH_POSITIONS},
    **{name: zoo.ZOO[name] for name in ("bloom", "mamba", "gemma3")},
    "gpt2": lambda: T.GPT2Config(**_GPT),
    "gptj": lambda: T.GPTJConfig(**_GPT, rotary_dim=4),
    "gpt_bigcode": lambda: T.GPTBigCodeConfig(**_GPT),
    "ctrl": lambda: T.CTRLConfig(**_GPT, dff=64),
    "gpt_neo": lambda: T.GPTNeoConfig(
        **_OWN,
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        attention_types=[[["global"], 1]],
        max_position_embeddings=ROOM,
    ),
    "bert": lambda: T.BertConfig(**_BERT, is_decoder=True),
    "roberta": lambda: T.RobertaConfig(**_BERT | {"pad_token_id": 1, "bos_token_id": 0}, is_decoder=True),
    "biogpt": lambda: T.BioGptConfig(**_BERT),
    "xglm": lambda: T.XGLMConfig(
        **_OWN, d_model=32, num_layers=1, attention_heads=4, ffn_dim=64, max_position_embeddings=ROOM
    ),
    "mpt": lambda: T.MptConfig(**_OWN, d_model=32, n_layers=1, n_heads=4, max_seq_len=ROOM),
}


def works(model: Any, length: int) -> bool:
    ids = torch.full((1, length), 5)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", MODELS)
def test_the_positions_are_those_beyond_which_the_model_fails(name: str) -> None:
    """``shape_of`` sees no weights; the model that it is compared with is run."""
    config = MODELS[name]()
    with torch.device("meta"):
        positions = shape_of(T.AutoModelForCausalLM.from_config(config)).positions
    model = T.AutoModelForCausalLM.from_config(config).eval()
    if positions is None:
        assert works(model, 4 * ROOM)
    else:
        assert works(model, positions)
        assert not works(model, positions + 1)


# --------------------------------------------------------------------------------------------------- what is refused

ROWS = [{"instruction": f"{number:03}" + "x" * (number % 7), "output": f"{number:03}"} for number in range(100)]
SPACE = "+space.v={key: method.virtual_tokens, kind: int, low: 1, high: 5}"
BASE = ("model=tiny", "data.test=0.3", "data.template.without_input='{text}>'", "data.max_length=24")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> TokenStore:
    """Rows of up to 14 tokens: prompts of up to 10, then three and the end."""
    folder = tmp_path_factory.mktemp("limits")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cfg = configured(folder / "rows.jsonl").data
    return prepare(cfg, lambda: tokenizer, "bytes", Cache(folder / "cache"))


def configured(path: Path = Path("rows.jsonl"), *overrides: str) -> Any:
    return compose([f"data.path={path}", *BASE, *overrides])


def shape(name: str = "gpt2", **changes: Any) -> Shape:
    with torch.device("meta"):
        return shape_of(T.AutoModelForCausalLM.from_config(zoo.ZOO[name](**changes)))


def test_what_fits_just_so_is_not_refused(store: TokenStore) -> None:
    longest, prompt = longest_of(store)
    cfg = configured(Path("rows.jsonl"), f"evaluation.max_new_tokens={longest - prompt}")
    assert (longest, prompt) == (14, 10)
    assert limits.problems(cfg, shape(n_positions=longest), store) == []
    assert limits.problems(cfg, shape("llama", max_position_embeddings=4), store) == []
    assert limits.config_problems(cfg, shape(n_positions=24)) == []
    assert limits.config_problems(cfg, shape("llama", max_position_embeddings=4)) == []


def longest_of(store: TokenStore) -> tuple[int, int]:
    rows = max(int(store.lengths(split).max()) for split in ("train", "validation"))
    return rows, max(store.split("test")["prompt_length"])


def test_a_length_beyond_the_positions_is_refused_before_the_data_is_prepared() -> None:
    (problem,) = limits.config_problems(configured(), shape(n_positions=23))
    assert "data.max_length must be <= the 23 positions" in problem
    assert "set data.max_length=23" in problem
    (problem,) = limits.config_problems(configured(), shape("opt", max_position_embeddings=20))
    assert "20 positions" in problem, "two of its table's rows are no positions"


@pytest.mark.parametrize(
    ("overrides", "positions", "words"),
    [
        (["evaluation.max_new_tokens=5"], 14, ["10 tokens", "need 15 positions", "set evaluation.max_new_tokens=4"]),
        (["evaluation.max_new_tokens=1"], 13, ["longest row's 14 tokens", "set data.max_length=13"]),
        (
            ["evaluation.max_new_tokens=1", "method=prompt_tuning", "method.virtual_tokens=3"],
            16,
            ["14 tokens and the 3 of method=prompt_tuning", "need 17 positions", "set data.max_length=13"],
        ),
        (
            ["evaluation.max_new_tokens=4", "method=prefix_tuning", "method.virtual_tokens=3"],
            16,
            ["longest row's 14 tokens", "longest prompt's 10 tokens", "set evaluation.max_new_tokens=3"],
        ),
        (
            ["evaluation.max_new_tokens=1", "method=p_tuning", "method.virtual_tokens=2", SPACE],
            16,
            ["the 5 of method=p_tuning", "set data.max_length=11"],
        ),
    ],
)
def test_more_than_the_positions_is_refused(
    overrides: list[str], positions: int, words: list[str], store: TokenStore
) -> None:
    cfg = configured(Path("rows.jsonl"), *overrides)
    found = "\n".join(limits.problems(cfg, shape(n_positions=positions), store))
    assert [word for word in words if word not in found] == []
    assert limits.problems(cfg, shape(n_positions=64), store) == []


def test_nothing_is_asked_of_prompts_where_none_is_answered(store: TokenStore) -> None:
    cfg = configured(Path("rows.jsonl"), "evaluation.generate_rows=0")
    assert limits.problems(cfg, shape(n_positions=14), store) == []


def test_token_ids_beyond_the_embedding_are_refused(store: TokenStore, tokenizer: Any) -> None:
    largest = max(max(row["input_ids"]) for split in store.rows for row in store.split(split))
    assert limits.problems(configured(), shape("llama", vocab_size=largest + 1), store) == []
    (problem,) = limits.problems(configured(), shape("llama", vocab_size=largest), store)
    assert repr(tokenizer.convert_ids_to_tokens(largest)) in problem
    assert f"resize_token_embeddings({largest + 1})" in problem


# ------------------------------------------------------------------------------------------------------- what is said


def test_rows_beyond_what_a_model_was_made_for_are_said(store: TokenStore) -> None:
    cfg = configured(Path("rows.jsonl"), "evaluation.max_new_tokens=4")
    assert limits.notes(cfg, shape("llama", max_position_embeddings=14), store) == []
    (note,) = limits.notes(cfg, shape("llama", max_position_embeddings=13), store)
    assert "made for 13 tokens" in note
    assert "up to 14" in note


def test_answers_that_can_never_be_given_are_said(store: TokenStore) -> None:
    cfg = configured(Path("rows.jsonl"), "evaluation.max_new_tokens=2", "evaluation.generate_rows=8")
    (note,) = limits.notes(cfg, shape("llama"), store)
    assert "8 of 8 expected answers" in note
    assert "set evaluation.max_new_tokens=4" in note


def test_rows_without_an_answer_to_compare_are_said(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"instruction": "ask", "output": f"{number:0{2 + number % 9}}"} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = configured(
        tmp_path / "rows.jsonl", "data.max_length=9", "data.truncation=right", "evaluation.max_new_tokens=9"
    )
    store = prepare(cfg.data, lambda: tokenizer, "bytes", Cache(tmp_path / "cache"))
    whole = [len(row["input_ids"]) < 9 or row["input_ids"][-1] == tokenizer.eos_token_id for row in store.split("test")]
    assert 0 < sum(whole) < len(whole)
    assert len(store.answered(1000)) == sum(whole)
    (note,) = limits.notes(cfg, shape("llama"), store)
    assert f"{len(whole) - sum(whole)} of {len(whole)} test rows are not answered" in note


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (T.BertConfig, "is_decoder"),
        (T.RobertaConfig, "is_decoder"),
        (T.ElectraConfig, "is_decoder"),
        (T.XLNetConfig, "xlnet"),
        (T.ProphetNetConfig, "prophetnet"),
        (partial(zoo.gemma3_text, use_bidirectional_attention=True), "use_bidirectional_attention"),
        (T.PaliGemmaConfig, "use_bidirectional_attention"),
    ],
)
def test_a_model_that_sees_what_it_is_to_predict_is_refused(config: Any, word: str, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=word):
        shape_of_folder(tmp_path, ModelConfig())


@pytest.mark.parametrize("config", [partial(T.BertConfig, is_decoder=True), zoo.gpt_neox, T.BartConfig, zoo.gemma3])
def test_a_decoder_is_not(config: Any, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    assert shape_of_folder(tmp_path, ModelConfig()).parameters


def test_a_text_to_start_from_that_the_embedding_has_no_row_for_is_refused() -> None:
    shape = shape_of(zoo.build("llama"))
    cfg = compose(["experiment=tiny", "method=prompt_tuning", "method.text='ab~'", "method.virtual_tokens=2"])
    tokenizer = byte_tokenizer
    largest = {count: max(tokenizer()("ab~")["input_ids"][:count]) for count in (2, 3)}
    for count in (2, 3):
        cfg.method.virtual_tokens = count  # type: ignore[attr-defined]
        for rows in (largest[count], largest[count] + 1):
            found = limits.text_problems(cfg, replace(shape, embeddings=rows), tokenizer)
            assert bool(found) is (rows == largest[count])
            assert all(f"a token of id {largest[count]}" in problem for problem in found)
    assert limits.text_problems(compose(["experiment=tiny"]), shape, tokenizer) == []
