"""Token ids and labels: exactly the answers and their ends are trained, token by token."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from raytune_lora.config.data import DataConfig, TemplateConfig, TrainOn, Truncation
from raytune_lora.data.encode import IGNORED, Encoded, encode, spell
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn
from raytune_lora.errors import UserError
from raytune_lora.models.sources import byte_tokenizer
from tests.unit.chat_templates import (
    CHAT,
    CHATML,
    CONVERSATIONS,
    FAMILIES,
    GOLDEN,
    byte_level_tokenizer,
    encode_one,
    sentencepiece_tokenizer,
    spelled,
    talk,
    tokens_of,
)

TEXT = DataConfig(kind="file", template=TemplateConfig(without_input="{text}>"), max_length=2000)
ROW = talk((USER, "q"), (ASSISTANT, "abc"))
TWO = talk((USER, "q"), (ASSISTANT, "ab"), (USER, "r"), (ASSISTANT, "cd"))
CASES = [(name, title) for name, family in FAMILIES.items() for title in family.conversations()]


def messages(row: Row) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in row.turns]


def trained_text(encoded: Encoded, tokenizer: Any) -> str:
    return b"".join(spelled(tokenizer, label) for label in encoded.labels if label != IGNORED).decode()


def ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# ------------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("name", FAMILIES)
def test_the_labels_are_those_of_the_golden_file(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    rows = family.conversations()
    assert golden == {title: tokens_of(encode_one(row, CHAT, tokenizer), tokenizer) for title, row in rows.items()}


@pytest.mark.parametrize(("name", "title"), CASES)
def test_what_is_trained_is_the_answers_and_their_ends(name: str, title: str) -> None:
    family = FAMILIES[name]
    row = family.conversations()[title]
    tokenizer = family.tokenizer()
    assert trained_text(encode_one(row, CHAT, tokenizer), tokenizer) == family.expected(row)


@pytest.mark.parametrize(("name", "title"), CASES)
def test_the_ids_are_those_that_the_tokenizers_own_method_gives(name: str, title: str) -> None:
    row = FAMILIES[name].conversations()[title]
    tokenizer = FAMILIES[name].tokenizer()
    encoded = encode_one(row, CHAT, tokenizer)
    if name == "gemma" and title == "system":
        assert row.turns[0].role == SYSTEM  # which the template refuses
        row = Row((Turn(USER, f"{row.turns[0].text}\n\n{row.turns[1].text}"), *row.turns[2:]))
    assert encoded.input_ids == tokenizer.apply_chat_template(messages(row), tokenize=True)["input_ids"]
    # Generation starts where training did: what comes before the last answer is the prompt, as the model will be asked.
    if title != "thoughts":
        prompt = tokenizer.apply_chat_template(messages(row)[:-1], tokenize=True, add_generation_prompt=True)
        assert encoded.input_ids[: encoded.prompt_length] == prompt["input_ids"]


def test_marks_train_what_the_tokenizers_own_mask_says() -> None:
    tokenizer = FAMILIES["marked"].tokenizer()
    for row in FAMILIES["marked"].conversations().values():
        own = tokenizer.apply_chat_template(messages(row), return_assistant_tokens_mask=True, return_dict=True)
        assert [int(label != IGNORED) for label in encode_one(row, CHAT, tokenizer).labels] == own["assistant_masks"]


@pytest.mark.slow  # importing TRL
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3"])
def test_the_labels_agree_with_trl_on_the_models_own_templates(name: str) -> None:
    """TRL rewrites known templates with marks by hand; it trains the newlines around an answer as well."""
    utils = pytest.importorskip("trl.chat_template_utils")
    template = getattr(utils, f"{name}_chat_template")
    special = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    special = (*special, "<bos>", "<start_of_turn>", "<end_of_turn>")
    eos = next(token for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if token in template)
    tokenizer = byte_level_tokenizer(special, bos_token="<bos>", eos_token=eos, chat_template=template)
    training = utils.get_training_chat_template(tokenizer)
    for title, row in CONVERSATIONS.items():
        if title == "system" and name == "gemma":
            continue  # refused by the template
        encoded = encode_one(row, CHAT, tokenizer)
        theirs = tokenizer.apply_chat_template(
            messages(row), chat_template=training, return_assistant_tokens_mask=True, return_dict=True
        )
        assert encoded.input_ids == theirs["input_ids"]
        edges = set(ids("\n", tokenizer))
        ours = [n for n, label in enumerate(encoded.labels) if label not in (IGNORED, *edges)]
        masks = zip(theirs["assistant_masks"], theirs["input_ids"], strict=True)
        assert ours == [n for n, (mask, token) in enumerate(masks) if mask and token not in edges]


def test_odd_texts_are_trained_exactly() -> None:
    """Spaces at the edges, markers, letters of several tokens: the trained text is what the template writes."""
    random.seed(0)
    pieces = [" ", "\n", "  ", "The", "한국", "수", "😀", "{", "}", "<", "{{ x }}", "\u00a0", "[INST]", "</s>", "\t"]
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer()
        strips = name in ("llama2", "llama3", "mistral", "gemma")
        for _ in range(25):
            texts = ["".join(random.choices([*pieces, *family.special], k=5)) + "x" for _ in range(4)]
            texts[1], texts[3] = texts[1] + random.choice(["", " ", "\n"]), random.choice(["", " ", "\n"]) + texts[3]
            row = talk((USER, texts[0]), (ASSISTANT, texts[1]), (USER, texts[2]), (ASSISTANT, texts[3]))
            encoded = encode_one(row, CHAT, tokenizer)
            assert encoded.input_ids == tokenizer.apply_chat_template(messages(row), tokenize=True)["input_ids"]
            if strips:
                row = talk(*((turn.role, turn.text.strip()) for turn in row.turns))
            assert trained_text(encoded, tokenizer) == family.expected(row)


def test_a_space_before_an_answer_does_not_keep_its_first_word_untrained() -> None:
    template = (
        "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else ' ASSISTANT: ' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT: {% endif %}"
    )
    tokenizer = byte_level_tokenizer(("<eos>",), eos_token="<eos>", chat_template=template)
    encoded = encode_one(talk((USER, "q"), (ASSISTANT, "The capital")), CHAT, tokenizer)
    assert trained_text(encoded, tokenizer) == " The capital<eos>"


def test_chat_templates_need_a_tokenizer_that_knows_its_characters() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(UserError, match="fast tokenizer"):
        encode([ROW], CHAT, slow)
    assert encode([ROW], TEXT, slow)[0] is not None


@pytest.mark.parametrize(("name", "title"), CASES)
def test_an_answer_is_what_is_trained_of_the_last_turn_without_its_end(name: str, title: str) -> None:
    family = FAMILIES[name]
    row = family.conversations()[title]
    tokenizer = family.tokenizer()
    encoded = encode_one(row, CHAT, tokenizer)
    last = family.expected(Row(row.turns[-2:]))
    assert encoded.answer is not None
    assert encoded.end is not None
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.end]) == family.end
    assert b"".join(spelled(tokenizer, token) for token in encoded.answer).decode() == last.removesuffix(family.end)


@pytest.mark.parametrize(
    ("written", "answer", "end"),
    [
        ("{{ m.content }}<|end|>\n", "ok", "<|end|>"),
        ("{{ m.content }}<|end|>\n\n  ", "ok", "<|end|>"),
        ("{{ m.content }}", "ok", "<eos>"),
        ("{{ m.content }} over", "ok over", "<eos>"),
        ("<|user|>{{ m.content }}<|end|><eos>", "<|user|>ok<|end|>", "<eos>"),
        ("{{ m.content }}<|user|><|end|>", "ok<|user|>", "<|end|>"),
    ],
)
def test_the_end_is_the_last_special_token_that_is_trained(written: str, answer: str, end: str) -> None:
    """A tool call, or a label that is a token of its own, ends with such tokens too, and belongs to the answer."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' %}{% generation %}WRITTEN{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    ).replace("WRITTEN", written)
    special = ("<|user|>", "<|assistant|>", "<|end|>", "<eos>")
    tokenizer = byte_level_tokenizer(special, eos_token="<eos>", chat_template=template)
    encoded = encode_one(talk((USER, "q"), (ASSISTANT, "ok")), CHAT, tokenizer)
    assert encoded.answer is not None
    assert encoded.end is not None
    assert spell([encoded.answer], tokenizer) == [answer]
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.end]) == end


# ------------------------------------------------------------------------------------------------------- text templates


def test_prompt_and_answer_are_tokenized_apart() -> None:
    """Together, the space and the word after it would be one token."""
    tokenizer = byte_level_tokenizer(("<eos>",), eos_token="<eos>")
    cfg = replace(TEXT, template=TemplateConfig(without_input="{text} "))
    encoded = encode_one(talk((USER, "What"), (ASSISTANT, "The")), cfg, tokenizer)
    assert tokens_of(encoded, tokenizer) == [["What", 0], [" ", 0], ["The", 1], ["<eos>", 1]]
    assert encoded.prompt_length == 2
    assert not encoded.cut


def test_only_a_rows_first_piece_gets_special_tokens() -> None:
    tokenizer = sentencepiece_tokenizer(("<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    encoded = encode_one(TWO, TEXT, tokenizer)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 2


def test_an_end_of_sequence_that_the_tokenizer_adds_to_the_prompt_is_taken_off() -> None:
    from tokenizers import processors

    tokenizer = byte_level_tokenizer(("<eos>",), eos_token="<eos>")
    before = encode_one(TWO, TEXT, tokenizer)
    eos = ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[eos])
    assert encode_one(TWO, TEXT, tokenizer) == before


def test_plain_text_has_an_empty_prompt() -> None:
    tokenizer = byte_tokenizer()
    for cfg in (TEXT, CHAT):
        tokenizer.chat_template = CHATML
        encoded = encode_one(talk((ASSISTANT, "text")), cfg, tokenizer)
        assert encoded.input_ids == encoded.labels == [*ids("text", tokenizer), tokenizer.eos_token_id]
        assert encoded.prompt_length == 0


def test_end_of_sequence_is_trained_also_where_padding_uses_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert encode_one(ROW, TEXT, tokenizer).labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_needs_no_padding_no_beginning_and_no_chat_template() -> None:
    tokenizer = byte_level_tokenizer((), eos_token="<eos>")
    tokenizer.pad_token = None
    assert tokenizer.bos_token is None
    assert encode_one(ROW, TEXT, tokenizer).labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_end_of_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode([ROW], TEXT, byte_level_tokenizer(()))


def test_many_rows_are_encoded_as_one_by_one_and_in_order() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    rows = [*CONVERSATIONS.values(), talk((ASSISTANT, "plain")), ROW]
    for cfg in (TEXT, CHAT):
        assert encode(rows, cfg, tokenizer) == [encode_one(row, cfg, tokenizer) for row in rows]
        assert encode([], cfg, tokenizer) == []


# ----------------------------------------------------------------------------------------- what is trained, what is cut


@pytest.mark.parametrize("cfg", [TEXT, CHAT], ids=["text", "chat"])
def test_train_on(cfg: DataConfig) -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    trained = {on: encode_one(TWO, replace(cfg, train_on=on), tokenizer) for on in TrainOn}
    assert trained_text(trained[TrainOn.answers], tokenizer) == "ab<|im_end|>cd<|im_end|>"
    assert trained_text(trained[TrainOn.last], tokenizer) == "cd<|im_end|>"
    assert trained[TrainOn.all].labels == trained[TrainOn.all].input_ids
    assert len({encoded.prompt_length for encoded in trained.values()}) == 1
    last = trained[TrainOn.last]
    assert [label != IGNORED for label in last.labels].index(True) == last.prompt_length


def cut(row: Row, length: int, truncation: Truncation, tokenizer: Any = None) -> Encoded | None:
    cfg = replace(TEXT, max_length=length, truncation=truncation)
    return encode([row], cfg, tokenizer or byte_tokenizer())[0]


def test_a_row_of_just_the_length_is_whole() -> None:
    for truncation in Truncation:
        encoded = cut(ROW, 6, truncation)  # q > a b c <eos>
        assert encoded is not None
        assert len(encoded.input_ids) == 6
        assert not encoded.cut


def test_a_longer_row_is_left_out_or_cut_at_either_end() -> None:
    tokenizer = byte_tokenizer()
    q, mark, a, b, c = ids("q>abc", tokenizer)
    assert cut(ROW, 4, Truncation.drop) is None
    assert cut(ROW, 4, Truncation.right) == Encoded([q, mark, a, b], [IGNORED, IGNORED, a, b], 2, True)
    eos = tokenizer.eos_token_id
    assert cut(ROW, 5, Truncation.left) == Encoded([mark, a, b, c, eos], [IGNORED, a, b, c, eos], 1, True, end=4)


def test_a_row_of_which_nothing_trained_remains_is_left_out() -> None:
    assert cut(ROW, 2, Truncation.right) is None
    assert cut(ROW, 1, Truncation.left) is None  # the first token is nobody's target
    assert cut(ROW, 2, Truncation.left) is not None


def test_the_prompt_is_the_whole_row_where_the_last_answer_is_cut_away() -> None:
    encoded = cut(TWO, 6, Truncation.right)
    assert encoded is not None
    assert encoded.prompt_length == len(encoded.input_ids) == 6


def test_a_cut_at_the_start_keeps_the_beginning_of_sequence() -> None:
    tokenizer = sentencepiece_tokenizer(("<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    encoded = cut(TWO, 5, Truncation.left, tokenizer)
    assert encoded is not None
    whole = encode_one(TWO, TEXT, tokenizer)
    assert encoded.input_ids == [tokenizer.bos_token_id, *whole.input_ids[-4:]]
    assert encoded.labels == [IGNORED, *whole.labels[-4:]]
    assert encoded.prompt_length == max(5 - (len(whole.input_ids) - whole.prompt_length), 1)


@pytest.mark.parametrize(
    ("row", "length", "truncation", "answer"),
    [
        (ROW, 6, Truncation.right, "abc"),
        (ROW, 5, Truncation.right, None),  # its end is cut
        (TWO, 6, Truncation.right, None),  # all of it is
        (ROW, 5, Truncation.left, "abc"),
        (ROW, 4, Truncation.left, None),  # the whole prompt is
        (ROW, 3, Truncation.left, None),
        (talk((ASSISTANT, "text")), 9, Truncation.drop, None),  # there is none
    ],
)
def test_an_answer_that_cannot_be_compared_is_none(
    row: Row, length: int, truncation: Truncation, answer: str | None
) -> None:
    tokenizer = byte_tokenizer()
    encoded = cut(row, length, truncation)
    assert encoded is not None
    assert encoded.answer == (None if answer is None else ids(answer, tokenizer))


def test_the_whole_prompt_is_cut_where_only_the_beginning_of_sequence_is_left() -> None:
    tokenizer = sentencepiece_tokenizer(("<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    whole = encode_one(ROW, TEXT, tokenizer)
    answered = len(whole.input_ids) - whole.prompt_length
    for kept, comparable in ((answered + 2, True), (answered + 1, False)):
        encoded = cut(ROW, kept, Truncation.left, tokenizer)
        assert encoded is not None
        assert encoded.input_ids[0] == tokenizer.bos_token_id
        assert (encoded.answer is not None) == comparable
