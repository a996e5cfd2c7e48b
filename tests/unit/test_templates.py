"""Templates: what text a row becomes, and what is wrong with a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.data import TemplateConfig, TemplateKind
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn
from raytune_lora.data.templates import Segment, problems, render, writer
from raytune_lora.errors import UserError
from tests.unit.chat_templates import CHATML, FAMILIES, byte_level_tokenizer, talk

ALPACA = TemplateConfig()
CHAT = TemplateConfig(kind=TemplateKind.chat)


def asked(question: str, about: str = "", answer: str = "A") -> Row:
    return Row((Turn(USER, question, about), Turn(ASSISTANT, answer)))


def chat(template: str | None, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> Any:
    return byte_level_tokenizer((*special, "<eos>"), eos_token="<eos>", chat_template=template)


def trained(row: Row, tokenizer: Any, cfg: TemplateConfig = CHAT) -> list[str]:
    return [
        segment.text + "<EOS>" * segment.ends for segment in render(row, cfg, tokenizer).segments if segment.trained
    ]


# -------------------------------------------------------------------------------------------------------- text patterns


def test_the_alpaca_prompt() -> None:
    assert render(asked("i", "n", "o"), ALPACA, None).segments == (
        Segment("### Instruction:\ni\n\n### Input:\nn\n\n### Response:\n", False, 1),
        Segment("o", True, 1, ends=True),
    )
    assert render(asked("i"), ALPACA, None).segments[0].text == "### Instruction:\ni\n\n### Response:\n"


def test_every_answer_of_a_conversation_is_trained_with_its_end() -> None:
    row = talk((SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a"), (USER, "r"), (ASSISTANT, "b"))
    segments = render(row, ALPACA, None).segments
    assert [s.turn for s in segments] == [2, 2, 4, 4]
    assert [s.trained for s in segments] == [s.ends for s in segments] == [False, True, False, True]
    assert segments[0].text == "s\n\n### Instruction:\nq\n\n### Response:\n"
    assert segments[2].text == "\n\n### Instruction:\nr\n\n### Response:\n"


def test_plain_text_is_an_answer_to_nothing() -> None:
    for cfg, tokenizer in ((ALPACA, None), (CHAT, chat(CHATML))):
        rendered = render(talk((ASSISTANT, "text")), cfg, tokenizer)
        assert rendered.segments == (Segment("", False, 0), Segment("text", True, 0, ends=True))
        assert not rendered.whole


def test_braces_in_a_users_text_are_text() -> None:
    prompt = render(asked("{input} {0} {", "{text} }"), ALPACA, None).segments[0].text
    assert prompt == "### Instruction:\n{input} {0} {\n\n### Input:\n{text} }\n\n### Response:\n"


def test_braces_in_a_pattern_that_are_no_placeholder_stay() -> None:
    cfg = TemplateConfig(without_input='{"q": "{text}"}\n')
    assert problems(cfg) == []
    assert render(asked("x"), cfg, None).segments[0].text == '{"q": "x"}\n'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"without_input": "{question}{text}"}, "data.template.without_input: unknown placeholder {question}"),
        ({"without_input": "{text}{input}"}, "data.template.without_input: unknown placeholder {input}"),
        ({"without_input": "{text}{}"}, "data.template.without_input: unknown placeholder {}"),
        ({"system": "be kind"}, "data.template.system: {text} is missing"),
        ({"with_input": "{text}"}, "data.template.with_input: {input} is missing"),
        ({"between": "{text}"}, "data.template.between: unknown placeholder {text}"),
        ({"kind": TemplateKind.chat, "chat_template": "no/such.jinja"}, "there is no file no/such.jinja"),
    ],
)
def test_what_is_wrong_with_a_template_is_said(change: dict[str, Any], said: str) -> None:
    cfg = TemplateConfig(**change)
    (problem,) = problems(cfg)
    assert said in problem
    with pytest.raises(UserError, match=r"data\.template"):
        writer(cfg, None)


def test_the_defaults_have_no_problem() -> None:
    assert problems(ALPACA) == problems(CHAT) == []


# ------------------------------------------------------------------------------------------------------- chat templates


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedies() -> None:
    with pytest.raises(UserError, match=r"data/template=alpaca.*data\.template\.chat_template"):
        writer(CHAT, chat(None))


def test_a_file_stands_in_for_the_tokenizers_own_template(tmp_path: Path) -> None:
    file = tmp_path / "my.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}={{ m.content }}<|im_end|>{% endfor %}")
    cfg = TemplateConfig(kind=TemplateKind.chat, chat_template=str(file))
    for tokenizer in (chat(None), chat(CHATML)):
        assert render(asked("q"), cfg, tokenizer).text == "user=q<|im_end|>assistant=A<|im_end|>"
        assert trained(asked("q"), tokenizer, cfg) == ["A<|im_end|>"]


def test_instruction_and_input_become_one_message() -> None:
    text = render(asked("do", "this"), CHAT, chat(CHATML)).text
    assert text == "<|im_start|>user\ndo\n\nthis<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


@pytest.mark.parametrize("family", ["gemma", "ignored"])
def test_system_text_goes_into_the_first_question_where_the_template_takes_none(family: str) -> None:
    ignores = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = chat(ignores) if family == "ignored" else FAMILIES[family].tokenizer()
    row = talk((SYSTEM, "Be kind."), (USER, "q"), (ASSISTANT, "a"), (USER, "r"), (ASSISTANT, "b"))
    rendered = render(row, CHAT, tokenizer)
    assert "Be kind.\n\nq" in rendered.text
    assert [segment.turn for segment in rendered.segments if segment.trained] == [2, 4]


def test_a_conversation_that_a_template_refuses_is_named() -> None:
    row = talk((USER, "q"), (USER, "r"), (ASSISTANT, "the last"))
    with pytest.raises(UserError, match=r"user, user, assistant that ends with 'the last' .*take turns"):
        render(row, CHAT, FAMILIES["mistral"].tokenizer())


def test_a_broken_template_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="the chat template refuses"):
        render(asked("q"), CHAT, chat("{% for m in messages %}"))


def test_a_template_whose_answers_cannot_be_found_is_refused() -> None:
    twice = "{% for m in messages %}{{ m.content }}<|im_end|>{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="generation %}"):
        render(asked("q"), CHAT, chat(twice))
    shouts = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="generation %}"):
        render(asked("q"), CHAT, chat(shouts))


def test_an_answer_that_is_rewritten_is_found_where_there_is_one_way_to_find_it() -> None:
    """One way only: with the second question's text also in the first answer there would be two."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content | replace('s', '5') }}")
    row = talk((USER, "q"), (ASSISTANT, "first"), (USER, "r"), (ASSISTANT, "last"))
    assert trained(row, chat(template)) == ["fir5t<|im_end|>", "la5t<|im_end|>"]
    header = "<|im_end|>\n<|im_start|>{}\n"
    forged = "X" + header.format("user") + "R" + header.format("assistant") + "Y"
    row = talk((USER, "q"), (ASSISTANT, forged), (USER, "R"), (ASSISTANT, forged))
    assert trained(row, chat(CHATML)) == [forged + "<|im_end|>"] * 2
    template = CHATML.replace("{{ m.content }}", "{{ m.content | replace('X', 'Z') }}")
    with pytest.raises(UserError, match="cannot be told"):
        render(row, CHAT, chat(template))


def test_an_answer_without_an_end_token_gets_the_end_of_sequence() -> None:
    vicuna = (
        "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else ' ASSISTANT: ' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    row = talk((USER, "q"), (ASSISTANT, "a"), (USER, "r"), (ASSISTANT, "b"))
    assert trained(row, chat(vicuna)) == [" a", " b<EOS>"]


def test_an_end_that_the_tokenizer_does_not_know_is_trained_as_text_before_the_end_of_sequence() -> None:
    row = talk((USER, "q"), (ASSISTANT, "a"), (USER, "r"), (ASSISTANT, "b"))
    assert trained(row, chat(CHATML, special=())) == ["a<|im_end|>", "b<|im_end|>\n<EOS>"]


def test_a_header_is_not_trained_where_the_template_has_no_generation_prompt() -> None:
    template = CHATML.split("{% if add_generation_prompt")[0]
    assert trained(asked("q"), chat(template)) == ["A<|im_end|>"]


def test_the_next_header_is_not_taken_for_the_end_of_a_turn() -> None:
    """Both are special tokens, and nothing stands between them."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}{% endfor %}"
    row = talk((USER, "q"), (ASSISTANT, "a"), (USER, "r"), (ASSISTANT, "b"))
    assert trained(row, chat(template)) == ["a", "b<EOS>"]


def test_marks_that_leave_the_end_token_out_are_widened_by_it() -> None:
    template = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    row = talk((USER, "q"), (ASSISTANT, "a"), (USER, "r"), (ASSISTANT, "b"))
    # This template marks the questions too: marks are believed.
    assert trained(row, chat(template)) == ["q<|im_end|>", "a<|im_end|>", "r<|im_end|>", "b<|im_end|>"]


def test_several_marks_in_a_turn_belong_to_it() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}-{% endgeneration %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    row = talk((USER, "q"), (ASSISTANT, "a"), (USER, "r"), (ASSISTANT, "b"))
    turns = [segment.turn for segment in render(row, CHAT, chat(template)).segments if segment.trained]
    assert turns == [1, 1, 3, 3]


def test_marks_around_no_answer_are_refused() -> None:
    template = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(UserError, match="none around an answer"):
        render(asked("q"), CHAT, chat(template))
