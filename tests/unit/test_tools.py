"""Tools, calls, thoughts and loss flags: what of them the model reads, and what of it is trained."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from raytune_lora.config.data import Format, TemplateConfig, TrainOn
from raytune_lora.data.encode import IGNORED, Encoded, encode
from raytune_lora.data.formats import parse
from raytune_lora.data.rows import Row
from raytune_lora.data.templates import RowRefused
from tests.unit.chat_templates import CHAT, FAMILIES, byte_level_tokenizer
from tests.unit.tool_templates import (
    APERTUS,
    APRIEL,
    ASKED,
    DEEPSEEK,
    ENDS,
    LLAMA31,
    MISTRAL,
    NEMOTRON,
    NEMOTRON3,
    QWEN3,
    QWEN25,
    R1,
    SPECIAL,
    TOOL,
    call,
    said,
)

JSON = '{"name": "lookup_tide", "arguments": {"harbour": "islet"}}'
TAGGED = f"<tool_call>\n{JSON}\n</tool_call><|im_end|>"
THOUGHTFUL = [said("user", "6*7?"), said("assistant", "42", reasoning_content="six times seven")]


def row(messages: list[dict[str, Any]], tools: Any = None) -> Row:
    parsed = parse({"messages": messages, "tools": tools}, Format.auto, {})
    assert isinstance(parsed, tuple), parsed
    return parsed[0]


@cache
def tokenizer(template: str) -> Any:
    special = SPECIAL.get(template, ("<|im_start|>", "<|im_end|>"))
    return byte_level_tokenizer(
        special, bos_token="<bos>", eos_token=ENDS.get(template, special[-1]), chat_template=template
    )


def encoded(template: str, messages: list[dict[str, Any]], tools: Any = None, **cfg: Any) -> Encoded:
    (found,) = encode([row(messages, tools)], replace(CHAT, **cfg), tokenizer(template))
    assert found is not None
    return found


def trained(template: str, found: Encoded) -> list[str]:
    runs = groupby(zip(found.input_ids, found.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer(template).decode([number for number, _ in run]) for on, run in runs if on]


def own(template: str, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> list[int]:
    if template == DEEPSEEK:  # apply_chat_template leaves null out, which this template asks for
        settings: Any = {"tools": tools, "add_generation_prompt": prompt, "bos_token": "<bos>"}
        rendered: Any = render_jinja_template(conversations=[messages], chat_template=template, **settings)
        return list(tokenizer(template)(rendered[0][0], add_special_tokens=False)["input_ids"])
    found = tokenizer(template).apply_chat_template(
        messages, tools=tools, tokenize=True, add_generation_prompt=prompt, return_dict=True
    )
    return list(found["input_ids"])


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def template_takes_parts(template: str) -> bool:
    try:
        return "6*7" not in tokenizer(template).decode(own(template, THOUGHTFUL[:1]))
    except TemplateError:
        return True


# ---------------------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN25, [TAGGED, "High.<|im_end|>"]),
        (QWEN3, [TAGGED, "<think>\n\n</think>\n\nHigh.<|im_end|>"]),
        (LLAMA31, [JSON.replace("arguments", "parameters") + "<|eot_id|>", "High.<|eot_id|>"]),
        (MISTRAL, [f'[TOOL_CALLS][{JSON[:-1]}, "id": "abcdefghi"}}]</s>', " High.</s>"]),
        (
            DEEPSEEK,
            ['<|call|>lookup_tide\n```json\n{"harbour": "islet"}\n```<|end_call|><|end|>', "High.<|end|>"],
        ),
    ],
    ids=["qwen2.5", "qwen3", "llama3.1", "mistral", "deepseek"],
)
def test_calls_and_answers_are_trained_and_definitions_and_results_are_not(template: str, expected: list[str]) -> None:
    found = encoded(template, ASKED, [TOOL])
    assert trained(template, found) == expected
    as_text = {"arguments": '{"harbour": "islet"}', "name": "lookup_tide"}
    spelled = [*ASKED[:1], said("assistant", None, tool_calls=[call("islet") | {"function": as_text}]), *ASKED[2:]]
    theirs = spelled if template == DEEPSEEK else ASKED
    assert found.input_ids == own(template, theirs, [TOOL])
    assert encoded(template, spelled, str([TOOL]).replace("'", '"')).input_ids == found.input_ids
    prompt = own(template, theirs[:-1], [TOOL], prompt=True)
    assert found.input_ids[: found.prompt_length] == prompt
    # A call may be what the row ends with, and a row that calls nothing has the definitions as well.
    alone = encoded(template, ASKED[:2], [TOOL])
    assert trained(template, alone)[0].endswith(expected[0])
    idle = [ASKED[0], said("assistant", "No.")]
    assert encoded(template, idle, [TOOL]).input_ids == own(template, idle, [TOOL])


LONG = [
    *ASKED,
    said("user", "And at Fjord?"),
    said("assistant", "", tool_calls=[call("fjord", "bbbbbbbbb")]),
    said("tool", "1 m", tool_call_id="bbbbbbbbb"),
    said("assistant", "Low."),
]
FJORD = JSON.replace("islet", "fjord")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            APRIEL,
            [
                f'\n<tool_calls>[{JSON[:-1]}, "id": "abcdefghi"}}]</tool_calls>\n<|end|>',
                "High.\n<|end|>",
                f'\n<tool_calls>[{FJORD[:-1]}, "id": "bbbbbbbbb"}}]</tool_calls>\n<|end|>',
                "Low.\n<|end|>",
            ],
        ),
        (
            NEMOTRON,
            [
                f"<TOOLCALL>[{JSON}]</TOOLCALL>\n<|12|>",
                "High.\n<|12|>",
                f"<TOOLCALL>[{FJORD}]</TOOLCALL>\n<|12|>",
                "\n</think>\n\nLow.\n<|12|>",
            ],
        ),
        (
            APERTUS,
            [
                '<|tools_prefix|>[{"lookup_tide": {"harbour": "islet"}}]<|tools_suffix|>',
                "High.<|assistant_end|>",
                '<|tools_prefix|>[{"lookup_tide": {"harbour": "fjord"}}]<|tools_suffix|>',
                "Low.<|assistant_end|>",
            ],
        ),
    ],
    ids=["apriel", "nemotron", "apertus"],
)
def test_each_answer_is_trained_to_its_end_where_the_last_is_written_otherwise(
    template: str, expected: list[str]
) -> None:
    assert trained(template, encoded(template, LONG, [TOOL])) == expected
    talk = [said("user", "one"), said("assistant", "1"), said("user", "two"), said("assistant", "2")]
    plain = trained(template, encoded(template, talk))
    assert plain == [text.replace("High.", "1").replace("Low.", "2") for text in expected[1::2]]
    text = tokenizer(template).apply_chat_template(LONG, tools=[TOOL], tokenize=False)
    assert all(each in text for each in expected[:-1]), "as the template writes it"


def test_an_empty_thought_in_the_text_is_none() -> None:
    for thought in ("<think></think>", "<think>\n\n</think>\n\n"):
        texts = (f"{thought}1", f"{thought}2")
        talk = [said("user", "one"), said("assistant", texts[0]), said("user", "two"), said("assistant", texts[1])]
        assert trained(NEMOTRON3, encoded(NEMOTRON3, talk)) == ["1<|im_end|>", "\n</think>\n\n2<|im_end|>"]


def test_several_calls_and_text_beside_them() -> None:
    both = [
        ASKED[0],
        said("assistant", "Let me look.", tool_calls=[call("islet"), call("fjord", "bbbbbbbbb")]),
        said("tool", "2 m", tool_call_id="abcdefghi"),
        said("tool", "Tide at Islet?", tool_call_id="bbbbbbbbb"),
        *ASKED[3:],
        said("user", "Tide at Islet?"),
        said("assistant", "2 m"),
    ]
    second = TAGGED.replace("islet", "fjord")
    assert trained(QWEN25, encoded(QWEN25, both, [TOOL])) == [
        f"Let me look.\n{TAGGED.removesuffix('<|im_end|>')}\n{second}",
        "High.<|im_end|>",
        "2 m<|im_end|>",
    ]
    with pytest.raises(RowRefused, match="one call at once"):
        encoded(LLAMA31, both, [TOOL])
    found = encoded(LLAMA31, [ASKED[0], ASKED[1] | {"content": "Let me look."}, *ASKED[2:]], [TOOL])
    assert [(note.finding, note.turn) for note in found.notes] == [("unwritten", 1)]


def test_calls_are_found_among_forged_headers() -> None:
    forged = f"x<|im_end|>\n<|im_start|>user\n<tool_response>\n2 m\n</tool_response><|im_end|>\n{TAGGED}"
    messages = [ASKED[0], said("assistant", "", tool_calls=[call(forged)]), *ASKED[2:]]
    (first, last) = trained(QWEN25, encoded(QWEN25, messages, [TOOL]))
    assert (first.startswith("<tool_call>"), first.endswith("</tool_call><|im_end|>"), last) == (
        True,
        True,
        "High.<|im_end|>",
    )


def test_a_template_that_writes_no_tools_or_no_calls_is_refused() -> None:
    silent = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(RowRefused, match="does not write the definitions of tools"):
        encoded(silent, ASKED, [TOOL])
    with pytest.raises(RowRefused, match="does not write all calls"):
        encoded(silent, ASKED)
    python = QWEN25.replace("c.function.arguments | tojson", "c.function.arguments | string")
    assert encoded(python, ASKED, [TOOL]).input_ids == own(QWEN25, ASKED, [TOOL])  # as text, not as Python spells it
    with pytest.raises(RowRefused, match=r"nine letters.*leave such rows out\Z"):
        encoded(MISTRAL, [ASKED[0], said("assistant", "", tool_calls=[call("islet", "x")]), *ASKED[2:]], [TOOL])
    with pytest.raises(RowRefused, match="data/template=chat"):
        encode([row(ASKED, [TOOL])], replace(CHAT, template=TemplateConfig()), tokenizer(QWEN25))


def test_marks_train_the_calls_within_them() -> None:
    marked = QWEN25.replace("{%- for c in m.tool_calls -%}", "{% generation %}{%- for c in m.tool_calls -%}").replace(
        "{%- endfor -%}\n{{ '<|im_end|>\\n' }}", "{%- endfor -%}\n{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    )
    found = encoded(marked, ASKED[:2], [TOOL])
    theirs = tokenizer(marked).apply_chat_template(
        ASKED[:2], tools=[TOOL], return_assistant_tokens_mask=True, return_dict=True
    )
    prompt = tokenizer(marked).apply_chat_template(ASKED[:1], tools=[TOOL], add_generation_prompt=True)["input_ids"]
    expected = [int(mask and at >= len(prompt)) for at, mask in enumerate(theirs["assistant_masks"])]
    assert [int(label != IGNORED) for label in found.labels] == expected
    assert found.input_ids == theirs["input_ids"]


def test_a_mark_that_reaches_past_an_answer_is_that_answers() -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{% generation %}<|im_end|>{% endgeneration %}"
        "{% endif %}"
    )
    turns = [said("user", "one"), said("assistant", "BAD", weight=0), said("user", "two"), said("assistant", "GOOD")]
    assert trained(marked, encoded(marked, turns)) == ["GOOD<|im_end|>\n<|im_end|>"]
    turns[1].pop("weight")
    assert trained(marked, encoded(marked, turns)) == ["BAD<|im_end|>\n", "GOOD<|im_end|>\n<|im_end|>"]


def test_a_system_prompt_that_moves_with_the_last_question_is_trained_where_it_is_asked() -> None:
    moving = (
        "{% set start = 1 if messages[0].role == 'system' else 0 %}{% for m in messages[start:] %}"
        "{% if m.role == 'user' %}[INST]{% if start and messages[-1 if messages[-1].role == 'user' else 1] == m %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    turns = [
        said("system", "S"),
        said("user", "one"),
        said("assistant", "1"),
        said("user", "two"),
        said("assistant", "2"),
    ]
    found = encoded(moving, turns)
    asked = tokenizer(moving).apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    assert found.input_ids[: len(asked)] == asked
    assert found.labels[len(asked) - 1] == IGNORED != found.labels[len(asked)]
    assert [note.finding for note in found.notes] == ["generation_prompt"]


def test_a_template_that_prompts_unasked_ends_its_answers_where_they_end() -> None:
    header = "<|im_start|>assistant\n<|endoftext|>"
    always = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ ('<think>' if m.role == 'assistant' else '') + m.content }}<|im_end|>{% endfor %}" + header
    )
    turns = [said("user", "one"), said("assistant", "1"), said("user", "two"), said("assistant", "2")]
    found = encoded(always, turns)
    asked = tokenizer(always).apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    assert found.input_ids[: found.prompt_length] == asked
    assert trained(always, found) == ["1<|im_end|>", "<think>2<|im_end|>"]


def test_a_template_that_takes_parts_alone_gets_them() -> None:
    vision = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}"
        " {{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    turns = [said("user", "one"), said("assistant", "1"), said("user", "two"), said("assistant", "2")]
    found = encoded(vision, turns)
    assert found.input_ids == own(vision, in_parts(turns))
    assert trained(vision, found) == [" 1<|im_end|>", " 2<|im_end|>"]


def test_a_tokenizers_own_template_for_tools_is_taken_where_there_are_tools() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}\n"
    talker = tokenizer.__wrapped__(plain)
    talker.chat_template = {"default": plain, "tool_use": "\n" + QWEN25 + "\n"}
    for messages, tools in ((ASKED[:2], [TOOL]), ([said("user", "one"), said("assistant", "1")], None)):
        (found,) = encode([row(messages, tools)], CHAT, talker)
        assert found is not None
        assert found.input_ids == talker.apply_chat_template(messages, tools=tools)["input_ids"]


# ------------------------------------------------------------------------------------------------------------- thoughts


def test_a_thought_goes_where_the_template_has_its_place() -> None:
    found = encoded(QWEN3, THOUGHTFUL)
    assert trained(QWEN3, found) == ["<think>\nsix times seven\n</think>\n\n42<|im_end|>"]
    assert found.input_ids == own(QWEN3, THOUGHTFUL)
    assert found.notes == ()
    for field in ("reasoning", "thinking"):
        renamed = [THOUGHTFUL[0], said("assistant", "42", **{field: "six times seven"})]
        assert encoded(QWEN3, renamed).input_ids == found.input_ids
    (note,) = encoded(QWEN25, THOUGHTFUL).notes
    assert (note.finding, note.detail) == ("unwritten", "the thought, for which the template has no place")


def test_an_earlier_thought_that_a_template_leaves_out_is_said_where_its_answer_is_trained() -> None:
    messages = [*THOUGHTFUL, said("user", "+1?"), said("assistant", "43", reasoning_content="add")]
    found = encoded(QWEN3, messages)
    assert trained(QWEN3, found) == ["42<|im_end|>", "<think>\nadd\n</think>\n\n43<|im_end|>"]
    assert [(note.turn, "data.train_on=last" in note.detail) for note in found.notes] == [(1, True)]
    assert encoded(QWEN3, messages, train_on=TrainOn.last).notes == ()
    assert encoded(QWEN3, [messages[0], messages[1] | {"weight": 0}, *messages[2:]]).notes == ()


@pytest.mark.parametrize("inline", [False, True])
def test_a_row_is_trained_as_the_model_is_prompted_where_the_prompt_opens_a_thought(inline: bool) -> None:
    answer = said("assistant", "<think>\nsix times seven\n</think>\n\n42") if inline else THOUGHTFUL[1]
    found = encoded(R1, [THOUGHTFUL[0], answer])
    assert found.input_ids[: found.prompt_length] == own(R1, THOUGHTFUL[:1], prompt=True)
    assert trained(R1, found) == ["six times seven\n</think>\n\n42<|end|>"]
    assert [note.finding for note in found.notes] == ["generation_prompt"]
    plain = encoded(R1, [said("user", "1?"), said("assistant", "1"), THOUGHTFUL[0], said("assistant", "42")])
    assert trained(R1, plain) == ["1<|end|>", "\n</think>\n\n42<|end|>"]
    assert [note.turn for note in plain.notes] == [3, 1]


@pytest.mark.parametrize("marked", [False, True])
def test_a_thought_in_the_text_is_given_apart_where_the_template_writes_one_of_its_own(marked: bool) -> None:
    """As Qwen3.8's does, which looks into no text."""
    start, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{% if m.role == 'assistant' %}" + start + "<think>"
        "{{ '\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{{ m.content }}<|im_end|>" + end + "{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n<think>\\n' }}{% endif %}"
    )
    inline = [THOUGHTFUL[0], said("assistant", "<think>\nsix times seven\n</think>\n\n42")]
    found = encoded(template, inline)
    assert trained(template, found) == ["six times seven\n</think>\n\n42<|im_end|>"]
    assert found.input_ids == encoded(template, THOUGHTFUL).input_ids
    (note,) = found.notes
    assert (note.finding, "a thought of its own" in note.detail) == ("generation_prompt", True)
    assert encoded(template, THOUGHTFUL).notes == ()
    two = encoded(template, [*inline, *inline])
    assert [note.turn for note in two.notes] == [1, 3]
    assert tokenizer(template).decode(two.input_ids).count("<think>") == 2


@pytest.mark.parametrize("split", [False, True])
def test_a_header_within_the_mark_is_not_trained_again_after_a_prompt_that_opens_a_thought(split: bool) -> None:
    """As TRL marks DeepSeek's templates; or with two marks, of which the second has the end."""
    whole = "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}"
    start, end = "{% generation %}", "{% endgeneration %}"
    mark = start + whole.replace(" + '<|end|>'", f" }}}}{end}{{{{ '.' }}}}{start}{{{{ '<|end|>'" if split else "") + end
    marked = R1.replace(whole, mark) if split else R1.replace(whole, start + whole + end)
    SPECIAL[marked] = SPECIAL[R1]
    for answer, thought in ((THOUGHTFUL[1], "six times seven"), (said("assistant", "42"), "")):
        found = encoded(marked, [THOUGHTFUL[0], answer])
        assert found.input_ids[: found.prompt_length] == own(marked, THOUGHTFUL[:1], prompt=True)
        parts = [f"{thought}\n</think>\n\n42", "<|end|>"]
        assert trained(marked, found) == (parts if split else ["".join(parts)])
    talk = [said("user", "1?"), said("assistant", "1"), THOUGHTFUL[0], said("assistant", "42")]
    assert "".join(trained(marked, encoded(marked, talk))).endswith("\n</think>\n\n42<|end|>")


def test_a_prompt_that_closes_the_thought_is_asked_to_think() -> None:
    closes = QWEN3.replace(
        "{{ '<|im_start|>assistant\\n' }}{% endif -%}",
        "{{ '<|im_start|>assistant\\n<think>\\n' + ('' if enable_thinking else '\\n</think>\\n\\n') }}{% endif -%}",
    )
    assert trained(closes, encoded(closes, [THOUGHTFUL[0], said("assistant", "42")])) == ["42<|im_end|>"]
    found = encoded(closes, THOUGHTFUL)
    assert trained(closes, found) == ["six times seven\n</think>\n\n42<|im_end|>"]
    assert "enable_thinking" in found.notes[0].detail


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_answer_follows_the_generation_prompt(name: str) -> None:
    tokens = FAMILIES[name].tokenizer()
    for title, one in FAMILIES[name].conversations().items():
        if (name, title) == ("gemma", "system"):
            continue  # refused by the template
        messages = [{"role": turn.role, "content": turn.text} for turn in one.turns[:-1]]
        (found,) = encode([one], CHAT, tokens)
        prompt = tokens.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
        assert found is not None
        assert found.input_ids[: found.prompt_length] == prompt


@pytest.mark.slow
def test_rows_agree_with_the_models_own_templates() -> None:
    """TRL ships the templates of some forty models: ids are theirs, and the prompt is, or it is said why not."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files = sorted(Path(spec.submodule_search_locations[0], "chat_templates").glob("*.jinja"))
    rows = [
        (THOUGHTFUL, None),
        ([said("system", "Be terse."), *THOUGHTFUL, said("user", "+1?"), said("assistant", "43")], None),
        ([ASKED[0], said("assistant", "No.")], [TOOL]),
        (ASKED[:2], [TOOL]),
        (ASKED, [TOOL]),
        ([ASKED[0], ASKED[1] | {"reasoning_content": "look"}, *ASKED[2:]], [TOOL]),
    ]
    agreed = 0
    for file in files:
        template = file.read_text(encoding="utf-8")
        tags = re.findall(r"<\|[^|<>\n{}]{1,40}\|?>|<[^|<>\n{} ]{1,30}\|>|<\uff5c[^<>{}]{1,40}\uff5c>", template)
        SPECIAL[template] = (*sorted(set(tags)), "<end_of_turn>", "<eos>")
        for messages, tools in rows:
            try:
                found = encoded(template, messages, tools)
                given = in_parts(messages) if template_takes_parts(template) else messages
                theirs, prompt = own(template, given, tools), own(template, given[:-1], tools, prompt=True)
            except (RowRefused, TemplateError, TypeError):  # by us, or by the template's own code
                continue
            notes = [note for note in found.notes if note.finding == "generation_prompt"]
            if not notes:
                assert found.input_ids[: len(theirs)] == theirs, file.name
            if not any("enable_thinking" in note.detail for note in notes):
                assert found.input_ids[: len(prompt)] == prompt, file.name
            if notes:
                answer = tokenizer(template).decode(found.input_ids[found.prompt_length :])
                assert "ssistant" not in answer, file.name
            agreed += 1
    assert agreed > 150


# ---------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("train_on", TrainOn)
def test_a_flagged_answer_is_context(train_on: TrainOn) -> None:
    messages = [said("user", "q"), said("assistant", "BAD", weight=0), said("user", "r"), said("assistant", "good")]
    found = encoded(QWEN25, messages, train_on=train_on)
    assert found.input_ids == own(QWEN25, messages)
    text = "".join(trained(QWEN25, found))
    assert "BAD" not in text
    assert "good<|im_end|>" in text
    (plain,) = encode([row(messages)], replace(CHAT, template=TemplateConfig(), train_on=train_on), tokenizer(QWEN25))
    assert plain is not None
    assert "BAD" not in "".join(trained(QWEN25, plain))
    assert "BAD" in tokenizer(QWEN25).decode(plain.input_ids)
