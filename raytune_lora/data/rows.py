"""What every source's rows become before anything else looks at them, and what is said of those that cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str  # SYSTEM, USER or ASSISTANT
    text: str
    input: str = ""  # of a user's turn: what the instruction is about (the Alpaca form's second field)


@dataclass(frozen=True)
class Row:
    """One example: a conversation whose last turn is the assistant's. Plain text is an answer to nothing."""

    turns: tuple[Turn, ...]
    stratum: str = ""  # the value of the column that ``data.stratify`` names

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All that comes before the last answer."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        """The last turn's text."""
        return self.turns[-1].text

    def texts(self) -> Iterator[str]:
        """Every piece of text in it that is not empty, in order."""
        for turn in self.turns:
            yield from (text for text in (turn.text, turn.input) if text)


@dataclass(frozen=True)
class Record:
    """One record of a file as it was read, before its format is known."""

    where: str  # `file:line`, or `file#record` where there are no lines
    value: Any  # what JSON, CSV or Parquet hold there; a Fault where it could not be read


@dataclass(frozen=True)
class Fault:
    """Why a record cannot be a row."""

    kind: str  # a finding's name: unreadable, missing_fields, empty_fields, wrong_types
    reason: str
