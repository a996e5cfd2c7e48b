"""What a record means: the forms that instruction data comes in, each turned into a conversation.

======================  ==============================================================================================
Format                  Fields
======================  ==============================================================================================
alpaca                  ``instruction``, ``output``, and ``input``, which may be empty, null or absent
chat                    ``messages``: a list of {role, content}
sharegpt                ``conversations``: a list of {from, value}
completion              ``prompt`` with ``completion``, ``response`` or ``answer``, or ``question`` with ``answer``:
                        text, or lists of messages
text                    ``text``
======================  ==============================================================================================

All but text may have a field ``system``. A conversation is one optional system turn, then turns of the user and the
assistant that alternate, as chat templates demand it: one that starts with the assistant, or has two turns of one role
in a row, is a fault. What follows the assistant's last turn has no answer to learn from and no influence on the answers
before it, so it is cut off. An empty system turn is left out, as if it were absent. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raytune_lora.config.data import Format
from raytune_lora.data.json_stream import decode_json
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Fault, Row, Turn

ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "chatgpt": ASSISTANT,
}
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
# What makes a record one of a format; the first whose fields are all there is taken.
FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("chat", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("completion", ("prompt", "completion")),
    ("completion", ("prompt", "response")),
    ("completion", ("prompt", "answer")),
    ("completion", ("question", "answer")),
    ("text", ("text",)),
)
OPTIONAL = {"alpaca": ("input", "system"), "chat": ("system",), "sharegpt": ("system",), "completion": ("system",)}
_NAMES = {
    "dict": "an object",
    "list": "a list",
    "str": "text",
    "bytes": "bytes",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
}

Parsed = tuple[tuple[Turn, ...], str]


class _FaultError(Exception):
    """A record is no row."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(kind, reason)


def parse(
    value: Any, format: Format, columns: Mapping[str, str], stratify: str | None = None
) -> tuple[Row, str] | Fault:
    """The row that a record is, and the name of the format that it is in.

    Args:
        value: the record as it was read; a Fault is returned as it is.
        format: of the record; ``auto`` recognizes it by its fields.
        columns: field of the format -> column of the record. A column that is named here counts as that field only.
        stratify: column of the record whose value becomes ``Row.stratum``; null counts as a value of its own.

    Returns:
        The row, or the fault: missing_fields (absent or null), empty_fields (empty or white space), wrong_types, or
        unreadable (of a list in the form of JSON text).
    """
    if not isinstance(value, dict):
        return value if isinstance(value, Fault) else Fault("wrong_types", f"a row is an object, not {_kind(value)}")
    try:
        fields = _renamed(value, columns) if columns else value
        name, names = _recognize(fields, format, columns)
        row = Row(_TURNS[name](fields, names), _stratum(value, stratify) if stratify else "")
    except _FaultError as error:
        return error.fault
    return row, name


def _renamed(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record by the format's names."""
    absent = [f"{column!r} (for {field})" for field, column in columns.items() if column not in value]
    if absent:
        raise _FaultError("missing_fields", f"no column {', '.join(absent)}; there are {_list(value)}")
    used = set(columns.values())
    fields = {name: content for name, content in value.items() if name not in used}
    fields.update((field, value[column]) for field, column in columns.items())
    return fields


def _recognize(fields: dict[str, Any], format: Format, columns: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """The record's format, and those of its fields that make it one."""
    forms = _FORMS[format]
    if columns and format is Format.auto:  # what is mapped is what is meant
        forms = tuple(form for form in forms if columns.keys() <= {*form[1], *OPTIONAL.get(form[0], ())}) or forms
    get = fields.get
    for form in forms:
        for field in form[1]:
            if get(field) is None:
                break
        else:
            return form
    raise _unrecognized(fields, forms)


_FORMS = {form: tuple(f for f in FIELDS if form is Format.auto or f[0] == form.value) for form in Format}


def _unrecognized(fields: dict[str, Any], forms: tuple[tuple[str, tuple[str, ...]], ...]) -> _FaultError:
    if len(forms) > 1 and fields.get("chosen") is not None and fields.get("rejected") is not None:
        return _FaultError("wrong_types", "chosen and rejected answers (preference data) are not supported")
    begun = [names for _, names in forms if any(fields.get(name) is not None for name in names)]
    absent = [[name for name in names if fields.get(name) is None] for names in begun or [names for _, names in forms]]
    wanted = " or ".join(dict.fromkeys("+".join(names) for names in absent))
    return _FaultError("missing_fields", f"no {wanted}; there are {_list(fields)}")


def _stratum(value: dict[str, Any], column: str) -> str:
    if column not in value:
        raise _FaultError("missing_fields", f"no column {column!r} (data.stratify); there are {_list(value)}")
    content = value[column]
    if isinstance(content, (dict, list)):
        raise _FaultError("wrong_types", f"{column} (data.stratify) must be text or a number (found {_kind(content)})")
    return "" if content is None else str(content)


# --------------------------------------------------------------------------------------------------------- the formats


def _alpaca(fields: dict[str, Any], names: tuple[str, ...]) -> tuple[Turn, ...]:
    about = fields.get("input")
    if about is None:
        about = ""
    elif not isinstance(about, str):
        raise _wrong("input", "text", about)
    turns = (
        Turn(USER, _text(fields["instruction"], "instruction"), about),
        Turn(ASSISTANT, _text(fields["output"], "output")),
    )
    return (*_system(fields), *turns) if "system" in fields else turns


def _chat(fields: dict[str, Any], names: tuple[str, ...]) -> tuple[Turn, ...]:
    return _conversation(fields, _messages(fields[names[0]], names[0]))


def _completion(fields: dict[str, Any], names: tuple[str, ...]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for name, role in zip(names, (USER, ASSISTANT), strict=True):
        content = fields[name]
        turns += _messages(content, name) if isinstance(content, list) else [Turn(role, _text(content, name))]
    return _conversation(fields, turns)


def _plain(fields: dict[str, Any], names: tuple[str, ...]) -> tuple[Turn, ...]:
    return (Turn(ASSISTANT, _text(fields["text"], "text")),)


_TURNS: dict[str, Callable[[dict[str, Any], tuple[str, ...]], tuple[Turn, ...]]] = {
    "alpaca": _alpaca,
    "chat": _chat,
    "sharegpt": _chat,
    "completion": _completion,
    "text": _plain,
}


def _text(content: Any, name: str) -> str:
    if not isinstance(content, str):
        raise _wrong(name, "text", content)
    if not content or content.isspace():
        raise _FaultError("empty_fields", f"{name} is empty")
    return content


def _system(fields: dict[str, Any]) -> tuple[Turn, ...]:
    """The turn that a field ``system`` stands for: none if it is null or empty."""
    content = fields.get("system")
    if content is None:
        return ()
    if not isinstance(content, str):
        raise _wrong("system", "text", content)
    return (Turn(SYSTEM, content),) if content.strip() else ()


def _wrong(name: str, wanted: str, content: Any) -> _FaultError:
    return _FaultError("wrong_types", f"{name} must be {wanted} (found {_kind(content)})")


def _kind(content: Any) -> str:
    return _NAMES.get(type(content).__name__, type(content).__name__)


def _list(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


# ------------------------------------------------------------------------------------------------------- conversations


def _conversation(fields: dict[str, Any], turns: list[Turn]) -> tuple[Turn, ...]:
    """The turns up to the assistant's last one, if they are in the order that chat templates demand."""
    if "system" in fields and not (turns and turns[0].role == SYSTEM):
        turns = [*_system(fields), *turns]
    while turns and turns[-1].role != ASSISTANT:
        turns.pop()
    if not turns:
        raise _FaultError("missing_fields", "no turn of the assistant")
    start = int(turns[0].role == SYSTEM)
    expected = USER
    for number, turn in enumerate(turns[start:], start + 1):
        if turn.role != expected:
            where = f"turn {number} of {len(turns)} is the {turn.role}'s where the {expected}'s was expected"
            raise _FaultError(
                "wrong_types", f"user and assistant must alternate after an optional system turn: {where}"
            )
        expected = ASSISTANT if expected == USER else USER
    return tuple(turns)


def _messages(content: Any, name: str) -> list[Turn]:
    """The turns of a list of messages, which may have the form of JSON text."""
    if isinstance(content, str):
        content = _decoded(content, name)
    if not isinstance(content, list):
        raise _wrong(name, "a list of messages", content)
    if not content:
        raise _FaultError("empty_fields", f"{name} is empty")
    turns = [_turn(message, f"{name}[{index}]") for index, message in enumerate(content)]
    return [turn for turn in turns if turn.text]


def _decoded(text: str, name: str) -> Any:
    if not text.strip():
        raise _FaultError("empty_fields", f"{name} is empty")
    content = decode_json(text)
    if isinstance(content, Fault):
        raise _FaultError("unreadable", f"{name} is text and must then be a list in JSON: {content.reason}")
    return content


def _turn(message: Any, where: str) -> Turn:
    """A message's turn; of an empty system message, one without text."""
    if not isinstance(message, dict):
        raise _wrong(where, "a message (an object with role and content)", message)
    keys = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
    said, content = message.get(keys[0]), message.get(keys[1])
    if said in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise _FaultError("wrong_types", f"{where}: tool calls are not supported")
    absent = [key for key in keys if message.get(key) is None]
    if absent:
        raise _FaultError("missing_fields", f"{where} has no {' and no '.join(absent)}; there are {_list(message)}")
    if not isinstance(said, str):
        raise _wrong(f"{where}.{keys[0]}", "text", said)
    role = ROLES.get(said) or ROLES.get(said.strip().lower())
    if role is None:
        raise _FaultError("wrong_types", f"{where}.{keys[0]} is {said!r}; known are {_list(ROLES)}")
    text = _joined(content, f"{where}.{keys[1]}") if isinstance(content, list) else content
    if role == SYSTEM and isinstance(text, str) and not text.strip():
        return Turn(SYSTEM, "")
    return Turn(role, _text(text, f"{where}.{keys[1]}"))


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content that is given in parts."""
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, (dict, str)):
            raise _wrong(f"{where}[{index}]", "a part with type and text", part)
        if isinstance(part, dict) and part.get("type") != "text":
            kind = f"of the type {part['type']!r}" if part.get("type") else "without a type"
            raise _FaultError("wrong_types", f"{where}[{index}] is a part {kind}; only text is supported")
        text = part if isinstance(part, str) else part.get("text")
        if not isinstance(text, str):
            raise _wrong(f"{where}[{index}].text", "text", text)
        texts.append(text)
    return "".join(texts)
