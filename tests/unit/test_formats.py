"""Formats: what each form of record becomes, and what is said of one that is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from raytune_lora.config.data import Format
from raytune_lora.config.typed import typed
from raytune_lora.data.formats import parse
from raytune_lora.data.rows import ASSISTANT, SYSTEM, TOOL, USER, Call, Fault, Row, Turn

ASK, ANSWER = Turn(USER, "ask"), Turn(ASSISTANT, "answer")
SAID = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
CALL = {"name": "tide", "arguments": {"at": "Islet"}}
TIDE: dict[str, Any] = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
SHARED = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "answer"}]


def turns(value: Any, format: Format = Format.auto, **columns: str) -> tuple[Turn, ...]:
    parsed = parse(value, format, columns)
    assert not isinstance(parsed, Fault), parsed
    return parsed[0].turns


def fault(value: Any, format: Format = Format.auto, **columns: str) -> tuple[str, str]:
    found = parse(value, format, columns)
    assert isinstance(found, Fault), found
    return found.kind, found.reason


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize(
    ("value", "format", "expected"),
    [
        ({"instruction": "ask", "output": "answer"}, "alpaca", (ASK, ANSWER)),
        ({"instruction": "ask", "input": None, "output": "answer"}, "alpaca", (ASK, ANSWER)),
        ({"instruction": "ask", "input": "", "output": "answer", "n": 3}, "alpaca", (ASK, ANSWER)),
        ({"instruction": "ask", "input": "it", "output": "answer"}, "alpaca", (Turn(USER, "ask", "it"), ANSWER)),
        ({"system": "be", "instruction": "ask", "output": "answer"}, "alpaca", (Turn(SYSTEM, "be"), ASK, ANSWER)),
        ({"system": " ", "instruction": "ask", "output": "answer"}, "alpaca", (ASK, ANSWER)),
        ({"system": None, "instruction": "ask", "output": "answer"}, "alpaca", (ASK, ANSWER)),
        ({"messages": SAID}, "chat", (ASK, ANSWER)),
        ({"messages": SAID * 2}, "chat", (ASK, ANSWER) * 2),
        ({"messages": json.dumps(SAID)}, "chat", (ASK, ANSWER)),
        ({"messages": SHARED}, "chat", (ASK, ANSWER)),
        ({"system": "be", "messages": SAID}, "chat", (Turn(SYSTEM, "be"), ASK, ANSWER)),
        ({"conversations": SHARED}, "sharegpt", (ASK, ANSWER)),
        ({"conversations": json.dumps(SHARED)}, "sharegpt", (ASK, ANSWER)),
        ({"conversations": SAID}, "sharegpt", (ASK, ANSWER)),
        ({"prompt": "ask", "completion": "answer"}, "completion", (ASK, ANSWER)),
        ({"prompt": "ask", "response": "answer"}, "completion", (ASK, ANSWER)),
        ({"prompt": "ask", "answer": "answer"}, "completion", (ASK, ANSWER)),
        ({"question": "ask", "answer": "answer"}, "completion", (ASK, ANSWER)),
        ({"prompt": SAID[:1], "completion": SAID[1:]}, "completion", (ASK, ANSWER)),
        ({"prompt": SAID * 2 + SAID[:1], "completion": "answer"}, "completion", (ASK, ANSWER) * 3),
        ({"text": "answer"}, "text", (ANSWER,)),
        # One that could be more than one is the first; what is null is not there.
        ({"messages": SAID, "instruction": "i", "output": "o", "text": "t"}, "chat", (ASK, ANSWER)),
        ({"messages": None, "instruction": "ask", "output": "answer"}, "alpaca", (ASK, ANSWER)),
        ({"prompt": "ask", "completion": "answer", "text": "both"}, "completion", (ASK, ANSWER)),
        ({"text": "answer", "prompt": "alone"}, "text", (ANSWER,)),
        ({"prompt": "ask", "completion": "answer", "chosen": "a", "rejected": "b"}, "completion", (ASK, ANSWER)),
    ],
)
def test_a_record_is_recognized_by_its_fields(value: Any, format: str, expected: tuple[Turn, ...]) -> None:
    assert parse(value, Format.auto, {}) == (Row(expected), format)
    assert parse(value, Format[format], {}) == (Row(expected), format)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        *(("system", SYSTEM), ("developer", SYSTEM), ("user", USER), ("human", USER), ("User", USER)),
        *(("assistant", ASSISTANT), ("gpt", ASSISTANT), ("model", ASSISTANT), ("chatgpt", ASSISTANT)),
    ],
)
def test_roles_have_several_names(role: str, expected: str) -> None:
    before = [("user", "ask")] if expected == ASSISTANT else []
    after = [("user", "ask")] * (expected == SYSTEM) + [("assistant", "answer")]
    found = turns(chat(*before, (role, "x"), *after[: 2 * (expected != ASSISTANT)]))
    assert found[len(before)] == Turn(expected, "x")


def test_the_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]
    assert turns(chat(("user", parts), ("assistant", ["ans", "wer"]))) == (ASK, ANSWER)


def test_an_empty_system_message_is_left_out() -> None:
    assert turns(chat(("system", " \n"), ("user", "ask"), ("assistant", "answer"))) == (ASK, ANSWER)


def test_a_system_message_comes_before_a_system_field() -> None:
    value = {**chat(("system", "own"), ("user", "ask"), ("assistant", "answer")), "system": "field"}
    assert turns(value) == (Turn(SYSTEM, "own"), ASK, ANSWER)


def test_what_follows_the_last_answer_is_cut_off() -> None:
    assert turns({"messages": [*SAID, {"role": "user", "content": "thanks"}]}) == (ASK, ANSWER)


def test_white_space_is_kept() -> None:
    found = turns({"prompt": "ask\n", "completion": " answer"})
    assert found == (Turn(USER, "ask\n"), Turn(ASSISTANT, " answer"))


# -------------------------------------------------------------------------------------------------------------- columns


def test_columns_are_read_under_other_names() -> None:
    value = {"question": "ask", "context": "it", "answer": "answer"}
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    for format in (Format.auto, Format.alpaca):
        assert parse(value, format, columns) == (Row((Turn(USER, "ask", "it"), ANSWER)), "alpaca")


def test_what_is_mapped_decides_between_formats() -> None:
    value = {"messages": SAID, "instruction": "i", "output": "o", "body": "answer", "q": "ask"}
    assert parse(value, Format.auto, {"text": "body"}) == (Row((ANSWER,)), "text")
    assert parse(value, Format.auto, {"prompt": "q", "completion": "body"}) == (Row((ASK, ANSWER)), "completion")


def test_a_column_may_take_another_fields_name() -> None:
    value = {"output": "ask", "instruction": "answer", "input": "unmapped"}
    found = turns(value, instruction="output", output="instruction")
    assert found == (Turn(USER, "ask", "unmapped"), ANSWER)
    assert turns({"input": "ask", "output": "answer"}, instruction="input") == (ASK, ANSWER)


def test_a_column_that_is_not_there_is_named() -> None:
    reason = "no column 'question' (for instruction); there are q, answer: name one of them, data.columns.instruction=…"
    assert fault({"q": "a", "answer": "b"}, instruction="question", output="answer") == ("missing_fields", reason)
    assert "data.columns.output=answer" in fault({"q": "a", "answer": "b"}, instruction="q", output="answr")[1]


@pytest.mark.parametrize(
    ("record", "mapped", "proposed"),
    [
        ({"Question": "ask", "Answer": "answer"}, {}, {"question": "Question", "answer": "Answer"}),
        ({"question": "ask", "reply": "answer"}, {}, {"answer": "reply"}),
        ({"Query": "ask", "Target ": "answer"}, {}, {"instruction": "Query", "output": "Target "}),
        ({"instruction": "ask", "output": None, "reply": "answer"}, {}, {"output": "reply"}),
        ({"question": "ask", "reply": "answer"}, {"instruction": "question"}, {"output": "reply"}),
        ({"Messages": SAID}, {}, {"messages": "Messages"}),
    ],
)
def test_what_maps_columns_of_other_names_is_named_and_does(
    record: dict[str, Any], mapped: dict[str, str], proposed: dict[str, str]
) -> None:
    kind, reason = fault(record, **mapped)
    columns = mapped | proposed
    assert kind == "missing_fields"
    assert reason.endswith(" ".join(typed(f"data.columns.{name}", of) for name, of in columns.items()) + " maps them")
    assert turns(record, **columns) == (ASK, ANSWER)


def test_columns_of_which_nothing_is_known_are_to_be_named() -> None:
    assert fault({"a": 1, "b": "x"})[1].endswith("name the columns, data.columns.instruction=… data.columns.output=…")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            {"instruction": "i", "output": 3},
            "(found a number: 3): write it as text, in quotation marks, or name another",
        ),
        (
            {"instruction": "i", "output": ["a", "b"]},
            "(found a list): join its items into one text, or give each a row",
        ),
        ({"instruction": "i", "output": {"a": 1}}, "(found an object with a): write it as JSON text (json.dumps)"),
        (json.dumps({"messages": SAID}), "not text: it is an object in JSON that was encoded twice; write it with one"),
        (SAID, 'not a list: write {"messages": […]}'),
        ({"conversations": str(SHARED)}, "it is spelled as Python prints it: write it with json.dumps, not with str"),
        (
            {"messages": {"role": ["user"], "content": ["q"]}},
            "(found an object with role, content): these are lists in",
        ),
        ({"messages": [list(said.items()) for said in SAID]}, "(found a list): these are pairs, as a map of Arrow"),
        (chat(("user", [{"text": "q", "type": None}])), """without a type: write "type": "text" into it"""),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_remedy(value: Any, told: str) -> None:
    assert told in fault(value)[1]


def test_a_stratum_is_a_columns_value() -> None:
    value = {"question": "ask", "answer": "answer", "topic": "art", "level": 3, "none": None, "list": []}
    columns = {"prompt": "question", "completion": "answer"}
    strata = {"topic": "art", "level": "3", "none": "", "answer": "answer"}
    for column, stratum in strata.items():
        assert parse(value, Format.auto, columns, column) == (Row((ASK, ANSWER), stratum), "completion")
    missing = parse(value, Format.auto, {}, "subject")
    assert isinstance(missing, Fault)
    assert missing.kind == "missing_fields"
    assert "no column 'subject' (data.stratify); there are question, answer, topic" in missing.reason
    assert parse(value, Format.auto, {}, "list") == Fault(
        "wrong_types", "list (data.stratify) must be text or a number (found a list)"
    )


# --------------------------------------------------------------------------------------------------------------- faults


def test_what_could_not_be_read_stays_as_it_is() -> None:
    unread = Fault("unreadable", "not JSON")
    assert parse(unread, Format.auto, {"text": "body"}, "topic") is unread


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ([], "wrong_types", "a row is an object, not a list"),
        ("text", "wrong_types", "a row is an object, not text"),
        (None, "wrong_types", "a row is an object, not null"),
        (3, "wrong_types", "a row is an object, not a number"),
        ({}, "missing_fields", "there are none"),
        ({"a": 1, "b": 2}, "missing_fields", "no messages or conversations or instruction+output or prompt+completion"),
        ({"instruction": "i", "input": "n"}, "missing_fields", "no output; there are instruction, input"),
        ({"instruction": "i", "output": None}, "missing_fields", "no output; there are instruction, output"),
        ({"prompt": "p"}, "missing_fields", "no completion or response or answer; there are prompt"),
        ({"chosen": "a", "rejected": "b", "prompt": "p"}, "wrong_types", "(preference data) are not supported"),
        ({"instruction": "", "output": "o"}, "empty_fields", "instruction is empty"),
        ({"instruction": "i", "output": " \n\u3000"}, "empty_fields", "output is empty"),
        ({"prompt": "", "completion": "o"}, "empty_fields", "prompt is empty"),
        ({"text": "\t"}, "empty_fields", "text is empty"),
        ({"instruction": ["i"], "output": "o"}, "wrong_types", "instruction must be text (found a list"),
        ({"instruction": "i", "input": 3, "output": "o"}, "wrong_types", "input must be text (found a number"),
        ({"instruction": "i", "output": {}}, "wrong_types", "output must be text (found an object"),
        ({"instruction": "i", "output": True}, "wrong_types", "output must be text (found true or false"),
        ({"instruction": "i", "output": "o", "system": 1}, "wrong_types", "system must be text (found a number"),
        ({"text": b"t"}, "wrong_types", "text must be text (found bytes)"),
    ],
)
def test_a_field_that_is_not_as_it_must_be_is_named(value: Any, kind: str, reason: str) -> None:
    found = fault(value)
    assert found[0] == kind
    assert reason in found[1]


@pytest.mark.parametrize(
    ("messages", "kind", "reason"),
    [
        ([], "empty_fields", "messages is empty"),
        ("", "empty_fields", "messages is empty"),
        ("[{", "unreadable", "messages is text and must then be a list in JSON: not JSON: "),
        ("[{'role': 'user'}]", "unreadable", "messages is text and must then be a list in JSON: not JSON: "),
        ('[{"role": "user", "content": "\\ud83d"}]', "unreadable", "holds half a character"),
        ('"text"', "wrong_types", "messages must be a list of messages (found text)"),
        ({"chosen": SAID}, "wrong_types", "messages must be a list of messages (found an object"),
        ([SAID], "wrong_types", "messages[0] must be a message (an object with role and content) (found a list"),
        (["hello"], "wrong_types", "messages[0] must be a message (an object with role and content) (found text)"),
        ([{"role": "user"}], "missing_fields", "messages[0] has no content; there are role"),
        ([{"text": "x"}], "missing_fields", "messages[0] has no role and no content; there are text"),
        ([{"from": "gpt"}], "missing_fields", "messages[0] has no value; there are from"),
        ([{"role": "user", "content": None}], "missing_fields", "messages[0] has no content"),
        ([{"role": 1, "content": "x"}], "wrong_types", "messages[0].role must be text (found a number"),
        ([{"role": "bard", "content": "x"}], "wrong_types", "messages[0].role is 'bard'; known are system, developer"),
        ([{"role": "user", "content": " "}], "empty_fields", "messages[0].content is empty"),
        ([*SAID, {"role": "assistant", "content": ""}], "empty_fields", "messages[2].content is empty"),
        ([{"role": "user", "content": 5}], "wrong_types", "messages[0].content must be text (found a number"),
        ([{"role": "user", "content": []}], "empty_fields", "messages[0].content is empty"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "wrong_types",
            "messages[0].content[0] is a part of the type 'image_url'; only text is supported",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "wrong_types", "content[0] is a part without a type"),
        ([{"role": "user", "content": [3]}], "wrong_types", "content[0] must be a part with type and text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "wrong_types", "content[0].text must be text (found null)"),
        ([SAID[0], {"role": "tool", "content": "x"}, SAID[1]], "wrong_types", "turn 2 of 3 is the tool's where the"),
        ([{"role": "function", "content": None}], "missing_fields", "messages[0] has no content"),
        ([SAID[0], {**SAID[1], "tool_calls": [{"id": 1}]}], "wrong_types", "must hold calls, each with name and"),
        (
            [SAID[0], {**SAID[1], "tool_calls": [CALL | {"arguments": "[1]"}]}],
            "wrong_types",
            "must be an object, or an",
        ),
        ([{**SAID[0], "tool_calls": [CALL]}, SAID[1]], "wrong_types", "only the assistant calls tools"),
        ([{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}], "unreadable", "[1].value is text"),
        (
            [SAID[0], {**SAID[1], "weight": 0.5}],
            "wrong_types",
            "messages[1].weight must be 0 or 1, true or false (found",
        ),
        ([SAID[0], {**SAID[1], "loss_mask": [0, 1]}], "wrong_types", "messages[1].loss_mask must be 0 or 1"),
        ([SAID[0], {**SAID[1], "train": "no"}], "wrong_types", "messages[1].train must be 0 or 1"),
        ([SAID[0], {**SAID[1], "train": True, "masked": True}], "wrong_types", "train and masked say opposite things"),
        ([{**SAID[0], "train": True}, SAID[1]], "wrong_types", "messages[0].train asks to train the user's message"),
        ([SAID[0], {**SAID[1], "train_detail": [{"train": False}]}], "wrong_types", "parts of a message cannot be"),
        ([SAID[0], {**SAID[1], "weight": 0}], "nothing_trained", "every answer is marked"),
        (
            [SAID[0], {**SAID[1], "reasoning": ["x"]}],
            "wrong_types",
            "messages[1].reasoning must be text (found a list",
        ),
        (SAID[:1], "missing_fields", "no turn of the assistant"),
        (SAID[1:], "wrong_types", "turn 1 of 1 is the assistant's where the user's was expected"),
        (SAID[:1] + SAID, "wrong_types", "turn 2 of 3 is the user's where the assistant's was expected"),
        (SAID + SAID[1:], "wrong_types", "turn 3 of 3 is the assistant's where the user's was expected"),
        (
            [*SAID, {"role": "system", "content": "x"}, *SAID],
            "wrong_types",
            "turn 3 of 5 is the system's where the user's was expected",
        ),
    ],
)
def test_a_conversation_that_is_not_as_it_must_be_is_named(messages: Any, kind: str, reason: str) -> None:
    found = fault({"messages": messages})
    assert found[0] == kind
    assert reason in found[1]
    assert fault({"conversations": messages}) == (kind, found[1].replace("messages", "conversations", 1))


@pytest.mark.parametrize(
    "off",
    [{name: 0} for name in ("weight", "loss_weight", "loss_scale", "loss_mask")]
    + [{name: False} for name in ("train", "training", "loss")]
    + [{"masked": True}],
)
def test_an_answer_that_is_not_to_be_trained_stays_in_the_context(off: dict[str, Any]) -> None:
    first = {**SAID[1], **off}
    assert turns({"messages": [SAID[0], first, *SAID]}) == (ASK, replace(ANSWER, trained=False), ASK, ANSWER)
    assert turns({"messages": [*SAID, SAID[0], first]}) == (ASK, ANSWER)  # nothing that is trained comes after
    on = {name: not value for name, value in off.items()}
    assert turns({"messages": [{**SAID[0], **off}, {**SAID[1], **on}]}) == (ASK, ANSWER)


@pytest.mark.parametrize("name", ["weight", "loss_weight", "loss_scale"])
def test_the_weight_that_columns_give_to_every_message_asks_for_nothing_of_a_question(name: str) -> None:
    assert turns({"messages": [{**said, name: 1.0} for said in SAID]}) == (ASK, ANSWER)


def test_nan_is_what_a_column_of_numbers_has_for_nothing() -> None:
    nan = float("nan")
    flagged = [SAID[0] | {"weight": nan}, SAID[1] | {"weight": 0.0}, SAID[0] | {"weight": nan, "score": nan}, SAID[1]]
    parsed = parse({"messages": flagged, "rating": nan}, Format.auto, {})
    assert parsed == (Row((ASK, replace(ANSWER, trained=False), ASK, ANSWER)), "chat")
    assert isinstance(parsed, tuple)
    assert parsed[0].unused == ()


def test_calls_and_the_answers_of_tools() -> None:
    called = Turn(ASSISTANT, "", calls=(Call("tide", {"at": "Islet"}, "c1"),))
    answered = Turn(TOOL, "2 m", name="tide", call_id="c1")
    openai = [
        SAID[0],
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        {"role": "tool", "name": "tide", "tool_call_id": "c1", "content": "2 m"},
        SAID[1],
    ]
    assert turns({"messages": openai}) == (ASK, called, answered, ANSWER)
    bare = Turn(ASSISTANT, "", calls=(Call("tide", {"at": "Islet"}),))
    shared = [
        SHARED[0],
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([CALL])},
        {"from": "observation", "value": "2 m"},
        SHARED[1],
    ]
    twice = replace(bare, calls=bare.calls * 2)
    assert turns({"conversations": shared}) == (ASK, twice, Turn(TOOL, "2 m"), ANSWER)
    legacy = {"role": "assistant", "content": "", "function_call": CALL | {"arguments": json.dumps(CALL["arguments"])}}
    assert turns({"messages": [SAID[0], legacy]}) == (ASK, bare)


def test_definitions_of_tools() -> None:
    bare, wrapped = (
        {"name": "tide", "parameters": {}},
        {"type": "function", "function": {"name": "tide", "parameters": {}}},
    )
    for tools in (
        {"tools": [bare]},
        {"tools": json.dumps([wrapped])},
        {"functions": [bare]},
        {"tools": [json.dumps(bare)]},
    ):
        parsed = parse({"messages": SAID, **tools}, Format.auto, {})
        assert isinstance(parsed, tuple)
        assert parsed[0].tools == (wrapped,)
        assert parsed[0].unused == ()
    assert parse({"messages": SAID, "tools": "[]"}, Format.auto, {}) == (Row((ASK, ANSWER)), "chat")
    joined: Any = {"name": "tide", "parameters": {"properties": {"at": {}, "city": None}}}
    assert "keep tools and arguments there as JSON text" in fault({"messages": SAID, "tools": [joined]})[1]
    at: Any = {"name": "tide", "parameters": {"properties": {"at": {}}}}
    calls = [SAID[0], {"role": "assistant", "tool_calls": [{"name": "tide", "arguments": {"at": None, "city": None}}]}]
    assert fault({"messages": calls, "tools": [at]})[1].startswith("a call of tide has city as null")
    assert isinstance(parse({"messages": calls}, Format.auto, {}), tuple)  # nothing says what the tool has
    assert fault({"messages": SAID, "tools": ["tide"]})[1].startswith("tools[0] must be a tool's definition")
    assert (
        fault({"messages": SAID, "tools": [{"type": "web"}]})[1]
        == "tools[0] is the definition of a tool without a name"
    )


def test_a_thought_comes_from_its_field_or_its_part() -> None:
    thought = replace(ANSWER, thought="hm")
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert turns({"messages": [SAID[0], {**SAID[1], name: "hm"}]}) == (ASK, thought)
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "answer"}]
    assert turns(chat(("user", "ask"), ("assistant", parts))) == (ASK, thought)
    row = {"question": "ask", "answer": "answer", "cot": "hm"}
    assert turns(row, reasoning="cot") == (ASK, thought)


@pytest.mark.parametrize("label", [False, True, "False", "true"])
def test_rows_with_a_verdict_are_taken_only_where_it_is_named(label: Any) -> None:
    row = {"prompt": "ask", "completion": "answer", "label": label}
    assert "data.columns.label=label" in fault(row)[1]
    good = str(label).lower() == "true"
    if good:
        assert turns(row, label="label") == (ASK, ANSWER)
    else:
        assert fault(row, label="label") == (
            "wrong_types",
            "label is false: a bad answer (preference data), which is not trained",
        )
    assert "data.columns.label=kto_tag" in fault({"messages": SAID, "kto_tag": good})[1]
    assert turns({"text": "answer", "label": good}) == (ANSWER,)  # a text's class


@pytest.mark.parametrize("label", [0, 1, 0.0, "1"])
def test_a_number_is_a_verdict_beside_the_fields_of_kto_and_a_class_elsewhere(label: Any) -> None:
    row = {"prompt": "ask", "completion": "answer", "label": label}
    assert "data.columns.label=label" in fault(row)[1]
    if float(label):
        assert turns(row, label="label") == (ASK, ANSWER)
    assert turns(row | {"label": 3}) == (ASK, ANSWER)
    assert turns({"instruction": "ask", "output": "answer", "label": label}) == (ASK, ANSWER)


@pytest.mark.parametrize("name", ["is_correct", "is_good", "accepted", "is_accepted"])
def test_an_answer_that_is_marked_as_bad_is_a_fault_and_one_marked_as_good_is_not(name: str) -> None:
    row = {"instruction": "ask", "output": "answer"}
    assert fault(row | {name: False})[1].startswith(f"{name} is false")
    assert turns(row | {name: True}) == turns(row | {name: "a text"}) == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("more", "kind", "told"),
    [
        *(({name: off}, "nothing_trained", f"{name} is ") for name in ("weight", "train") for off in (0, 0.0, False)),
        *(({"loss": off}, "nothing_trained", "loss is ") for off in (False, 0, "false")),
        ({"loss_mask": [0]}, "nothing_trained", "every answer is marked"),
        ({"loss_mask": [0, 0]}, "nothing_trained", "every answer is marked"),
        ({"loss_mask": [1, 1]}, "wrong_types", "messages[0].loss_mask asks to train the user's message"),
        ({"loss_mask": [0.5]}, "wrong_types", "messages[1].loss_mask must be 0 or 1"),
        ({"loss_mask": [0, 1, 1, 0]}, "wrong_types", "loss_mask has 4 items, and there are 2 messages, 1 of them"),
        ({"loss_mask": "[0, 1, 1]"}, "wrong_types", "loss_mask has 3 items"),
        ({"loss_mask": [0], "train_mask": [1]}, "wrong_types", "train_mask and message 1 say opposite things"),
        ({"images": ["a.png"]}, "wrong_types", "images beside the text"),
        ({"apis": [TIDE]}, "wrong_types", "apis defines tools: name it by data.columns.tools=apis"),
        ({"apis": json.dumps([TIDE["function"]])}, "wrong_types", "apis defines tools"),
    ],
)
def test_a_record_that_says_it_must_not_be_trained_as_it_stands_is_a_fault(
    more: dict[str, Any], kind: str, told: str
) -> None:
    found = fault({"messages": SAID, **more})
    assert found[0] == kind
    assert told in found[1]


def test_what_only_resembles_such_a_mark_is_none() -> None:
    like = {
        "weight": 0.5,
        "train": "ICE 4",
        "loss": 0.0,
        "weights": [0.2, 1, 1, 0],
        "images": [],
        "apis": [{"name": "x"}],
    }
    assert turns({"messages": SAID, **like}) == (ASK, ANSWER)
    assert turns({"text": "answer", "image": "a.png"}) == (ANSWER,)


@pytest.mark.parametrize("mask", [[0, 1], [0, 0, 0, 1], [False, True], "[0, 1]"])
@pytest.mark.parametrize("name", ["loss_mask", "train_mask", "weights", "loss_weights"])
def test_a_list_of_flags_has_an_item_an_answer_or_a_message(name: str, mask: Any) -> None:
    for content in (SAID * 2, json.dumps(SAID * 2)):
        parsed = parse({"messages": content, name: mask}, Format.auto, {})
        assert isinstance(parsed, tuple)
        assert parsed[0].turns == (ASK, replace(ANSWER, trained=False), ASK, ANSWER)
        assert parsed[0].unused == ()


def test_a_list_of_flags_beside_one_answer_has_one_item() -> None:
    record = {"instruction": "ask", "output": "answer"}
    assert turns(record | {"loss_mask": [1]}) == (ASK, ANSWER)
    assert fault(record | {"loss_mask": [0]})[0] == fault({"text": "a", "weights": [0]})[0] == "nothing_trained"
    assert "opposite" in fault(record | {"weight": 0, "weights": [1]})[1]
    assert turns(record | {"weight": 1, "loss_mask": [1]}) == (ASK, ANSWER)
    assert fault({"messages": {}, "loss_mask": [1]})[1].startswith("messages must be a list")
    assert "must hold 0 or 1" in fault(record | {"loss_mask": [0.5]})[1]
    assert fault(record | {"loss_mask": [0, 1]})[0] == fault({"text": "a", "loss_mask": [0, 1, 1]})[0] == "wrong_types"


@pytest.mark.parametrize("record", [{"messages": SAID}, {"instruction": "ask", "output": "answer"}, {"text": "answer"}])
def test_a_flag_of_a_row_is_used_in_every_format(record: dict[str, Any]) -> None:
    assert fault(record | {"train": False})[0] == "nothing_trained"
    for flag, unused in (
        ({"weight": 1}, ()),
        ({"train": True}, ()),
        ({"loss": True}, ()),
        ({"weight": 0.5}, ("weight",)),
    ):
        parsed = parse(record | flag, Format.auto, {})
        assert isinstance(parsed, tuple)
        assert parsed[0].unused == unused


def test_tools_in_a_message_are_a_fault_and_tools_of_other_makers_are_read() -> None:
    system = {"role": "system", "content": "be", "tools": [TIDE]}
    assert "messages[0].tools defines tools" in fault({"messages": [system, *SAID]})[1]
    own = TIDE["function"]
    for name in ("input_schema", "inputSchema"):
        theirs = {name if key == "parameters" else key: value for key, value in own.items()}
        parsed = parse({"messages": SAID, "tools": [theirs]}, Format.auto, {})
        assert isinstance(parsed, tuple)
        assert parsed[0].tools == (TIDE,)


def test_a_question_may_have_a_context_and_a_system_prompt() -> None:
    row = {"question": "ask", "answer": "answer", "context": "it", "system_prompt": "be"}
    assert turns(row) == (Turn(SYSTEM, "be"), Turn(USER, "ask", "it"), ANSWER)
    assert turns({"prompt": "it: ask", "completion": "answer", "context": "it"}) == (Turn(USER, "it: ask"), ANSWER)
    parsed = parse(row | {"context": ["it"], "system": "other"}, Format.auto, {})
    assert isinstance(parsed, tuple)
    assert (parsed[0].turns, parsed[0].unused) == ((Turn(SYSTEM, "other"), ASK, ANSWER), ("context", "system_prompt"))


def test_preference_data_is_told_from_answers() -> None:
    pair = {"chosen": SAID[1], "rejected": {"role": "assistant", "content": "bad"}}
    assert "(preference data)" in fault({"conversations": [*SAID, SAID[0]], **pair})[1]
    assert turns({"messages": SAID, "chosen": SAID, "rejected": SAID[:1]}) == (ASK, ANSWER)
    assert turns({"chosen": SAID, "rejected": SAID[:1]}, messages="chosen") == (ASK, ANSWER)
    many = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
    assert fault(many) == ("wrong_types", "completions with labels (preference data) are not supported")


def test_history_comes_before_the_question() -> None:
    for history in ([["ask", "answer"]], '[["ask", "answer"]]'):
        row = {"instruction": "ask", "output": "answer", "history": history}
        assert turns(row) == (ASK, ANSWER, ASK, ANSWER)
    parsed = parse({"instruction": "ask", "output": "answer", "history": "born 1900"}, Format.auto, {})
    assert isinstance(parsed, tuple)
    assert (parsed[0].turns, parsed[0].unused) == ((ASK, ANSWER), ("history",))


def test_fields_without_a_place_are_named() -> None:
    row = {"messages": [SAID[0] | {"name": "Ann"}, SAID[1] | {"id": 3, "flag": None}], "id": 7, "topic": "t", "x": ""}
    parsed = parse(row, Format.auto, {}, "topic")
    assert isinstance(parsed, tuple)
    assert parsed[0].unused == ("id", "messages.id", "messages.name")
    parsed = parse({"q": "ask", "output": "answer", "id": 7, "label": 2}, Format.auto, {"instruction": "q"})
    assert isinstance(parsed, tuple)
    assert parsed[0].unused == ("id", "label")


def test_a_message_without_tool_calls_may_have_the_field() -> None:
    assert turns({"messages": [{**message, "tool_calls": None} for message in SAID]}) == (ASK, ANSWER)
    assert turns({"messages": [{**message, "tool_calls": []} for message in SAID]}) == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (Format.alpaca, "no instruction+output; there are messages"),
        (Format.text, "no text; there are messages"),
        (Format.sharegpt, "no conversations; there are messages"),
        (Format.completion, "no prompt+completion or prompt+response or prompt+answer or question+answer; there are"),
    ],
)
def test_a_format_that_is_named_is_the_only_one(format: Format, reason: str) -> None:
    kind, found = fault({"messages": SAID}, format)
    assert kind == "missing_fields"
    assert found.startswith(reason)


def test_of_two_fields_that_say_the_same_otherwise_one_is_used_and_the_other_counted() -> None:
    call = {"name": "f", "arguments": "{}"}
    asked = [{"role": "system", "content": "one"}, {"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "a", "reasoning_content": "t", "thinking": "u", "reasoning": "t"}
    parsed = parse({"messages": [*asked, answer], "system": "two"}, Format.auto, {})
    assert not isinstance(parsed, Fault)
    assert parsed[0].unused == ("messages.thinking", "system")
    assert parsed[0].turns[-1].thought == "t"
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": call}], "function_call": call}
    tools = [{"name": "f", "parameters": {}}]
    parsed = parse({"messages": [*asked, answer], "system": "one", "tools": tools, "functions": tools}, Format.auto, {})
    assert not isinstance(parsed, Fault)
    assert parsed[0].unused == ("functions",)
    assert len(parsed[0].turns[-1].calls) == 1
