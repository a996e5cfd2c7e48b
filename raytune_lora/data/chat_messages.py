"""Messages as chat templates read them, and the made-up words that stand for a row's texts in a skeleton."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from raytune_lora.data.rows import ASSISTANT, SYSTEM, TOOL, USER, Call, Row

# A skeleton's words: nothing in them that a template would trim or split. Nine letters, as Mistral's ids of calls.
WORD = re.compile(r"qz([xtci])(\d{3,})xzq")
TEXT, THOUGHT, CALL, ID = "xtci"  # what a word stands for; its number is the message's, or that of the id
_ARGUMENT = "qza"
_THOUGHT_START = re.compile(r"^\s*(?:<(?:think|thinking|thought|reasoning)>|\[THINK\])")
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]")


def word(kind: str, number: int) -> str:
    """A skeleton's word."""
    return f"qz{kind}{number:03}xzq"


@dataclass(frozen=True)
class Style:
    """How messages are spelled, where templates differ."""

    no_text: str | None  # the content of a message that only calls
    json_arguments: bool  # calls have their arguments as JSON text


STYLES = tuple(Style(no_text, as_json) for no_text, as_json in product(("", None), (False, True)))


@dataclass(frozen=True)
class Message:
    """A turn as a chat template gets it."""

    role: str
    text: str
    turn: int
    thought: str = ""
    calls: tuple[Call, ...] = ()
    name: str = ""
    call_id: str = ""

    def plain(self, style: Style) -> dict[str, Any]:
        """As ``apply_chat_template`` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.thought:
            message |= {"reasoning_content": self.thought, "reasoning": self.thought}
        if self.calls:
            message["content"] = self.text or style.no_text
            message["tool_calls"] = [_plain_call(call, style) for call in self.calls]
        if self.name:
            message["name"] = self.name
        if self.call_id:
            message["tool_call_id"] = self.call_id
        return message

    @property
    def reasoning(self) -> str:
        """The thought, given by itself or at the start of the text."""
        return self.apart().thought.strip()

    def apart(self) -> Message:
        """The same with a thought that its text begins with given by itself."""
        end = _THOUGHT_END.search(self.text) if self.role == ASSISTANT and not self.thought else None
        if end is None:
            return self
        thought = _THOUGHT_START.sub("", self.text[: end.start()]).strip()
        return replace(self, thought=thought, text=self.text[end.end() :].lstrip("\n"))


def _plain_call(call: Call, style: Style) -> dict[str, Any]:
    arguments: Any = json.dumps(call.arguments, ensure_ascii=False) if style.json_arguments else call.arguments
    named = {"id": call.id} if call.id else {}
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}, **named}


def messages_of(row: Row, folds: bool) -> list[Message]:
    """A row's turns as messages; with ``folds``, system text goes before the next user's message."""
    messages: list[Message] = []
    pending = ""
    for number, turn in enumerate(row.turns):
        text = f"{turn.text}\n\n{turn.input}" if turn.input else turn.text
        if turn.role == SYSTEM and folds:
            pending = f"{pending}\n\n{text}" if pending else text
            continue
        if pending and turn.role == USER:
            text = f"{pending}\n\n{text}"
        elif pending:
            messages.append(Message(USER, pending, number - 1))
        pending = ""
        messages.append(Message(turn.role, text, number, turn.thought, turn.calls, turn.name, turn.call_id))
    return messages


def ids_of(messages: Sequence[Message]) -> list[str]:
    """The ids of calls, each once."""
    found = (each for m in messages for each in (*(call.id for call in m.calls), m.call_id) if each)
    return list(dict.fromkeys(found))


def words_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with a word in the place of each text, thought, argument and id: equal for rows of one shape."""
    ids = {each: word(ID, number) for number, each in enumerate(ids_of(messages))}
    return tuple(
        replace(
            message,
            turn=number,
            text=word(TEXT, number) if message.text else "",
            thought=word(THOUGHT, number) if message.thought else "",
            calls=tuple(Call(c.name, {_ARGUMENT: word(CALL, number)}, ids.get(c.id, "")) for c in message.calls),
            call_id=ids.get(message.call_id, ""),
        )
        for number, message in enumerate(messages)
    )


def shape_of(words: Sequence[Message]) -> str:
    """What tells the shapes of conversations apart."""
    return repr([(m.role, m.text, m.thought, [(c.name, c.id) for c in m.calls], m.name, m.call_id) for m in words])


def calls_written(words: Sequence[Message], text: str) -> bool:
    """Whether a skeleton's text holds every call, its arguments as JSON or one by one and not as Python spells them."""
    if any(call.name not in text for message in words for call in message.calls):
        return False
    if f"'{_ARGUMENT}'" in text or f'\\"{_ARGUMENT}' in text:
        return False
    found = [int(number) for kind, number in WORD.findall(text) if kind == CALL]
    return all(found.count(n) >= len(message.calls) for n, message in enumerate(words))


def forms(message: Message) -> list[str]:
    """What templates make of a message's text."""
    text = message.text
    found = [text, text.strip(), text.rstrip(), text.lstrip()]
    if message.role == ASSISTANT and "</think>" in text:
        found.append(text.rpartition("</think>")[2].lstrip("\n"))
    if message.role == TOOL:
        found += [json.dumps(each, ensure_ascii=False)[1:-1] for each in (text, text.strip())]
    return list(dict.fromkeys(found))
