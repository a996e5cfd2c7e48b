"""Messages of a conversation as data sets spell them, and the order that they must be in.

=====================================================  ==============================================================
Field of a message                                      What it is
=====================================================  ==============================================================
``role`` and ``content``, or ``from`` and ``value``     who speaks, and the text, or a list of parts with texts
``weight``, ``loss_weight``, ``loss_scale``, ``train``, whether an answer is trained: 0 or 1, true or false (OpenAI,
``trainable``, ``training``, ``loss``, ``loss_mask``;   Axolotl, ms-swift, verl; torchtune's ``masked`` is the opposite)
``masked``
``reasoning_content``, ``reasoning``, ``thinking``      the thought before an answer
``tool_calls``, ``function_call``                       calls of tools; a role ``function_call`` or ``tool_call`` has
                                                        them as its text, in JSON
``name``, ``tool_call_id``                              of a tool's message: which tool, and which call it answers
=====================================================  ==============================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raytune_lora.data.faults import FaultError, filled, listed, wrong
from raytune_lora.data.json_stream import decode_json
from raytune_lora.data.rows import ASSISTANT, SYSTEM, TOOL, USER, Call, Fault, Turn

ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "chatgpt": ASSISTANT,
    "tool": TOOL,
    "function": TOOL,
    "observation": TOOL,
    "ipython": TOOL,
    "tool_response": TOOL,
    "tool_result": TOOL,
    "function_response": TOOL,
}
_CALLING = ("function_call", "tool_call")  # roles of the assistant whose text is calls
_FLAGS = {  # field of a message: the value that has it trained
    **dict.fromkeys(
        ("weight", "loss_weight", "loss_scale", "train", "trainable", "training", "loss", "loss_mask"), True
    ),
    "masked": False,
}
_WEIGHTS = ("weight", "loss_weight", "loss_scale")  # of answers: other messages have them where files are columns
_PARTIAL = ("train_detail", "training_detail")  # Axolotl's: parts of a message
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SCHEMAS = ("parameters", "input_schema", "inputSchema")  # of a tool: OpenAI's name, Anthropic's and MCP's
_JOINED = (  # what data sets of columns make of objects of different shapes
    "this comes of a file that gives every object the fields of all; keep tools and arguments there as JSON text"
)
_PYTHON_WITHIN = 20  # characters of a text that show how it is spelled


def checked_text(content: Any, name: str) -> str:
    """A field's text, which must not be empty."""
    if not isinstance(content, str):
        raise wrong(name, "text", content)
    if not content or content.isspace():
        raise FaultError("empty_fields", f"{name} is empty")
    return content


def decoded(text: str, name: str) -> Any:
    """The value of a field that holds JSON text."""
    if not text.strip():
        raise FaultError("empty_fields", f"{name} is empty")
    content = decode_json(text)
    if isinstance(content, Fault):
        python = text.lstrip()[:2] in ("[{", "{'") and "{'" in text[:_PYTHON_WITHIN]
        remedy = "; it is spelled as Python prints it: write it with json.dumps, not with str" if python else ""
        raise FaultError("unreadable", f"{name} is text and must then be a list in JSON: {content.reason}{remedy}")
    return content


# ------------------------------------------------------------------------------------------------------- conversations


def conversation(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns up to the last answer that is trained, if they are in the order that chat templates demand."""
    turns = list(turns)
    if not any(turn.role == ASSISTANT for turn in turns):
        raise FaultError("missing_fields", "no turn of the assistant")
    while turns and not (turns[-1].role == ASSISTANT and turns[-1].trained):
        turns.pop()
    if not turns:
        raise FaultError("nothing_trained", "every answer is marked as one that is not to be trained")
    before = ""
    for number, turn in enumerate(turns[turns[0].role == SYSTEM :], 1 + (turns[0].role == SYSTEM)):
        allowed = {"": (USER,), USER: (ASSISTANT,), TOOL: (ASSISTANT, TOOL), ASSISTANT: (USER, TOOL)}[before]
        if turn.role not in allowed:
            where = f"turn {number} of {len(turns)} is the {turn.role}'s where the {allowed[0]}'s was expected"
            raise FaultError("wrong_types", f"user and assistant must alternate after an optional system turn: {where}")
        before = turn.role
    return tuple(turns)


def is_answer(message: Any) -> bool:
    """Whether a message, as a data set spells it, is the assistant's."""
    said = str(message.get("role") or message.get("from")) if isinstance(message, dict) else ""
    return said in _CALLING or ROLES.get(said.strip().lower()) == ASSISTANT


def messages(content: Any, name: str, unused: set[str]) -> list[Turn]:
    """The turns of a list of messages, which may have the form of JSON text.

    Args:
        content: of the field.
        name: of the field.
        unused: gets the names of the messages' fields that are in no turn.
    """
    if isinstance(content, str):
        content = decoded(content, name)
    if not isinstance(content, list):
        raise wrong(name, "a list of messages", content)
    if not content:
        raise FaultError("empty_fields", f"{name} is empty")
    turns: list[Turn] = []
    for index, message in enumerate(content):
        turn = _turn(message, f"{name}[{index}]", name, unused)
        if turn.role == SYSTEM and not turn.text:
            continue
        if turns and turn.calls and not turn.text and message.get("from", message.get("role")) in _CALLING:
            before = turns[-1]
            if before.role == ASSISTANT and before.trained == turn.trained:  # one message, written as several
                turns[-1] = replace(before, calls=before.calls + turn.calls)
                continue
        turns.append(turn)
    return turns


def _turn(message: Any, where: str, name: str, unused: set[str]) -> Turn:
    """A message's turn; of an empty system message, one without text."""
    if not isinstance(message, dict):
        raise wrong(where, "a message (an object with role and content)", message)
    keys = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
    said, content = message.get(keys[0]), message.get(keys[1])
    place = f"{where}.{keys[1]}"
    calling = said in _CALLING
    calls = _message_calls(message, where) + (_calls(content, place) if calling and content is not None else ())
    absent = [key for key in keys if message.get(key) is None and not (key == keys[1] and calls)]
    if absent:
        raise FaultError("missing_fields", f"{where} has no {' and no '.join(absent)}; there are {listed(message)}")
    if not isinstance(said, str):
        raise wrong(f"{where}.{keys[0]}", "text", said)
    role = ASSISTANT if calling else ROLES.get(said) or ROLES.get(said.strip().lower())
    if role is None:
        raise FaultError("wrong_types", f"{where}.{keys[0]} is {said!r}; known are {listed((*ROLES, *_CALLING))}")
    if calls and role != ASSISTANT:
        raise FaultError("wrong_types", f"{where}: only the assistant calls tools, and this message is the {role}'s")
    thoughts = [key for key in _THOUGHTS if filled(message.get(key))]
    thoughts = [key for key in thoughts if key == thoughts[0] or message[key] == message[thoughts[0]]]
    own = {ASSISTANT: (*thoughts, "tool_calls", "function_call"), TOOL: ("name", "tool_call_id")}.get(role, ())
    used = {*keys, *_FLAGS, *own}
    for key, value in message.items():
        if key not in used and filled(value):
            if holds_definitions(value):
                raise FaultError("wrong_types", f"{where}.{key} defines tools: write them as the row's own field tools")
            unused.add(f"{name}.{key}")
    text, thought = ("", "") if calling else _content(content, role, place, bool(calls))
    turn = Turn(role, text, trained=_trained(message, role, where), calls=calls)
    if role == ASSISTANT:
        apart = reasoning(message[thoughts[0]], f"{where}.{thoughts[0]}") if thoughts else ""
        return replace(turn, thought=apart or thought)
    if role == TOOL:
        name, call_id = (_label(message.get(key), f"{where}.{key}") for key in ("name", "tool_call_id"))
        return replace(turn, name=name, call_id=call_id)
    return turn


def _content(content: Any, role: str, where: str, calls: bool) -> tuple[str, str]:
    """A message's text and, where it is given in parts, the thought among them."""
    thought = ""
    if isinstance(content, list):
        content, thought = _joined(content, role, where)
    if role == TOOL and isinstance(content, dict):
        content = json.dumps(_json(content, where), ensure_ascii=False)
    may_be_empty = role in (SYSTEM, TOOL) or calls
    if may_be_empty and (content is None or (isinstance(content, str) and not content.strip())):
        return "", thought
    return checked_text(content, where), thought


def _joined(parts: list[Any], role: str, where: str) -> tuple[str, str]:
    """The text of a content that is given in parts, and the thought."""
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(parts):
        if not isinstance(part, (dict, str)):
            raise wrong(f"{where}[{index}]", "a part with type and text", part)
        kind = part.get("type") if isinstance(part, dict) else "text"
        thinks = role == ASSISTANT and kind in ("thinking", "reasoning")
        if kind != "text" and not thinks:
            named = f"of the type {kind!r}" if kind else 'without a type: write "type": "text" into it'
            raise FaultError("wrong_types", f"{where}[{index}] is a part {named}; only text is supported")
        text = part if isinstance(part, str) else part.get("text") if not thinks else part.get(kind, part.get("text"))
        if not isinstance(text, str):
            raise wrong(f"{where}[{index}].{kind}", "text", text)
        (thoughts if thinks else texts).append(text)
    return "".join(texts), "".join(thoughts)


def _trained(message: dict[str, Any], role: str, where: str) -> bool:
    """Whether the flags of a message, if it has any, have it trained."""
    for key in _PARTIAL:
        if filled(message.get(key)):
            raise FaultError("wrong_types", f"{where}.{key}: parts of a message cannot be trained, only whole answers")
    found = {key: message[key] for key in _FLAGS if message.get(key) is not None and message[key] == message[key]}
    for key, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise FaultError("wrong_types", f"{where}.{key} must be 0 or 1, true or false (found {value!r})")
    wanted = {bool(value) == _FLAGS[key] for key, value in found.items()}
    if len(wanted) > 1:
        raise FaultError("wrong_types", f"{where}: {' and '.join(found)} say opposite things")
    asking = [key for key, value in found.items() if bool(value) == _FLAGS[key] and key not in _WEIGHTS]
    if role != ASSISTANT and asking:
        raise FaultError(
            "wrong_types",
            f"{where}.{asking[0]} asks to train the {role}'s message, and only answers are trained: leave it "
            "out there (data.train_on=all trains every token)",
        )
    return wanted != {False} if role == ASSISTANT else True


def reasoning(content: Any, name: str) -> str:
    """A thought; none where it is blank."""
    if content is not None and not isinstance(content, str):
        raise wrong(name, "text", content)
    return content if content and content.strip() else ""


def _label(content: Any, name: str) -> str:
    if content is not None and not isinstance(content, str):
        raise wrong(name, "text", content)
    return content or ""


# --------------------------------------------------------------------------------------------------------------- tools


def _message_calls(message: dict[str, Any], where: str) -> tuple[Call, ...]:
    """The calls of a message; one that is said in the older field too is the same."""
    found: tuple[Call, ...] = ()
    for key in ("tool_calls", "function_call"):
        if filled(message.get(key)):
            known = [(call.name, call.arguments) for call in found]
            calls = _calls(message[key], f"{where}.{key}")
            found += tuple(call for call in calls if (call.name, call.arguments) not in known)
    return found


def _calls(content: Any, where: str) -> tuple[Call, ...]:
    """Calls: one or a list of them, as objects or as JSON text."""
    if isinstance(content, str):
        content = decoded(content, where)
    return tuple(_call(each, where) for each in (content if isinstance(content, list) else [content]))


def _call(call: Any, where: str) -> Call:
    outer = call if isinstance(call, dict) else {}
    function = outer.get("function")
    inner = function if isinstance(function, dict) else outer
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters"))
    if not isinstance(name, str) or not name.strip():
        raise FaultError("wrong_types", f"{where} must hold calls, each with name and arguments (found {call!r:.80})")
    if isinstance(arguments, str):
        arguments = decode_json(arguments) if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, dict):
        raise FaultError("wrong_types", f"{where}: the arguments of {name} must be an object, or an object in JSON")
    identity = outer.get("id")
    return Call(name, _json(arguments or {}, where), identity if isinstance(identity, str) else "")


def definitions(content: Any, name: str) -> tuple[dict[str, Any], ...]:
    """Definitions of tools, each in the form ``{"type": "function", "function": …}`` that chat templates read."""
    if isinstance(content, str):
        content = decoded(content, name) if content.strip() else []
    content = [content] if isinstance(content, dict) else content
    if content is not None and not isinstance(content, list):
        raise wrong(name, "a list of tools' definitions", content)
    found = []
    for index, tool in enumerate(content or ()):
        if isinstance(tool, str) and tool.lstrip().startswith("{"):
            tool = decoded(tool, f"{name}[{index}]")
        if not isinstance(tool, dict):
            raise wrong(f"{name}[{index}]", "a tool's definition (an object with name and parameters)", tool)
        if not isinstance(tool.get("function"), dict):
            tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        schema = next((tool["function"][key] for key in _SCHEMAS if isinstance(tool["function"].get(key), dict)), None)
        if schema is not None:
            rest = {key: value for key, value in tool["function"].items() if key not in _SCHEMAS}
            tool = {**tool, "function": {**rest, "parameters": schema}}
        if None in _properties(tool).values():
            raise FaultError("wrong_types", f"{name}[{index}] has a property that is null: {_JOINED}")
        if not isinstance(tool["function"].get("name"), str):
            raise FaultError("wrong_types", f"{name}[{index}] is the definition of a tool without a name")
        found.append(_json(tool, f"{name}[{index}]"))
    return tuple(found)


def holds_definitions(content: Any) -> bool:
    """Whether a field of another name holds what ``definitions`` reads."""
    if isinstance(content, str) and content.lstrip().startswith("[") and '"name"' in content:
        content = decode_json(content)
    tools = content if isinstance(content, list) else []
    inner = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in tools]
    return bool(inner) and all(
        isinstance(tool, dict)
        and isinstance(tool.get("name"), str)
        and any(isinstance(tool.get(key), dict) for key in _SCHEMAS)
        for tool in inner
    )


def check_calls(turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> None:
    """Raise for arguments that are null and that the tool does not have."""
    known = {tool["function"]["name"]: _properties(tool) for tool in tools}
    for call in (call for turn in turns for call in turn.calls if None in call.arguments.values()):
        foreign = [
            key for key, value in call.arguments.items() if value is None and key not in known.get(call.name, ())
        ]
        if foreign and call.name in known:
            raise FaultError("wrong_types", f"a call of {call.name} has {', '.join(foreign)} as null: {_JOINED}")


def _properties(tool: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a tool has, by name."""
    parameters = tool["function"].get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _json(value: dict[str, Any], where: str) -> dict[str, Any]:
    """The value, if JSON can hold it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise FaultError("wrong_types", f"{where} holds what JSON cannot: {error}") from None
    return value
