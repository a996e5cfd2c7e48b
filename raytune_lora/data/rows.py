"""What every source's rows become before anything else looks at them, and what is said of those that cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


@dataclass(frozen=True)
class Call:
    """A call of a tool, as the assistant makes it."""

    name: str
    arguments: dict[str, Any]  # as JSON has them
    id: str = ""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str  # SYSTEM, USER, ASSISTANT or TOOL
    text: str  # empty where an assistant's message only calls tools
    input: str = ""  # of a user's turn: what the instruction is about (the Alpaca form's second field)
    trained: bool = True  # of an assistant's turn: False leaves it in the context and out of the loss
    thought: str = ""  # of an assistant's turn: the reasoning before the text
    calls: tuple[Call, ...] = ()  # of an assistant's turn
    name: str = ""  # of a tool's turn: the tool that answers
    call_id: str = ""  # of a tool's turn: the ``Call.id`` that it answers

    def texts(self) -> Iterator[str]:
        """Every piece of text in it that is not empty, in order."""
        yield from (text for text in (self.thought, self.text, self.input) if text)
        for call in self.calls:
            yield call.name
            yield from leaves(call.arguments)

    def mapped(self, change: Callable[[str], str]) -> Turn:
        """The turn with each piece of text changed; names of tools and ids stay."""
        calls = tuple(replace(call, arguments=_mapped(call.arguments, change)) for call in self.calls)
        text, about, thought = map(change, (self.text, self.input, self.thought))
        return replace(self, text=text, input=about, thought=thought, calls=calls)

    def identity(self) -> str:
        """All that the model reads of it and that decides what is trained, as one text."""
        plain = f"{self.text}\x00{self.input}"
        rest = (self.thought, [[call.name, call.arguments, call.id] for call in self.calls], self.name, self.call_id)
        if self.trained and not any(rest):
            return plain
        return "\x00".join((plain, json.dumps([self.trained, *rest], ensure_ascii=False)))


@dataclass(frozen=True)
class Row:
    """One example: a conversation whose last turn is the assistant's. Plain text is an answer to nothing."""

    turns: tuple[Turn, ...]
    stratum: str = ""  # the value of the column that ``data.stratify`` names
    tools: tuple[dict[str, Any], ...] = ()  # definitions that the model may call, as JSON schemas of functions
    unused: tuple[str, ...] = field(default=(), compare=False)  # fields of the record that are not in the row

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All that comes before the last answer."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        """The last turn's text."""
        return self.turns[-1].text

    def texts(self) -> Iterator[str]:
        """Every piece of text of the conversation that is not empty, in order."""
        for turn in self.turns:
            yield from turn.texts()

    def mapped(self, change: Callable[[str], str]) -> Row:
        """The row with each piece of text changed, that of the tools' definitions as well."""
        tools = tuple(_mapped(tool, change) for tool in self.tools)
        return replace(self, turns=tuple(turn.mapped(change) for turn in self.turns), tools=tools)


def leaves(value: Any) -> Iterator[str]:
    """The texts and numbers within a JSON value, as text."""
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif value is not None and not isinstance(value, bool) and value != "":
        yield str(value)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with its leaves changed; a number whose text does not change stays a number."""
    if isinstance(value, dict):
        return {name: _mapped(each, change) for name, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    if value is None or isinstance(value, bool):
        return value
    changed = change(str(value))
    return value if changed == str(value) else changed


@dataclass(frozen=True)
class Record:
    """One record of a file as it was read, before its format is known."""

    where: str  # `file:line`, or `file#record` where there are no lines
    value: Any  # what JSON, CSV or Parquet hold there; a Fault where it could not be read


@dataclass(frozen=True)
class Fault:
    """Why a record cannot be a row."""

    kind: str  # a finding's name: unreadable, missing_fields, empty_fields, wrong_types, nothing_trained
    reason: str
