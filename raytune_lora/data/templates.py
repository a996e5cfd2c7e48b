"""How a row is written for the model: as segments of text, each of which is trained or not.

Text templates fill the patterns of the config; ``raytune_lora.data.chat`` does what chat templates need.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_lora.config.data import TemplateConfig, TemplateKind
from raytune_lora.data.rows import ASSISTANT, SYSTEM, TOOL, Row
from raytune_lora.errors import UserError

Tokenizer = Any  # of transformers; untyped there


class RowRefused(UserError):
    """A template cannot write a row; ``reason`` says why without the row's own text."""

    def __init__(self, reason: str, said: str | None = None) -> None:
        super().__init__(f"data.template: {said or reason}")
        self.reason = reason


_PATTERNS = {
    "system": {"text"},
    "with_input": {"text", "input"},
    "without_input": {"text"},
    "between": set[str](),
}  # of TemplateConfig, with the placeholders that each must hold
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Segment:
    """A piece of a row's text."""

    text: str
    trained: bool
    turn: int  # of the row: the one it holds, or the one that it leads to
    ends: bool = False  # the end-of-sequence token follows, trained as the segment is


@dataclass(frozen=True)
class Note:
    """What a template makes of a row otherwise than one would think."""

    finding: str  # its name: unwritten or generation_prompt
    detail: str
    turn: int  # of the row: the answer that it is about


@dataclass(frozen=True)
class Rendered:
    """A row as text."""

    segments: tuple[Segment, ...]
    whole: bool  # tokenized in one piece, without special tokens but those that it spells out; else segment by segment
    notes: tuple[Note, ...] = ()

    @property
    def text(self) -> str:
        """All of it, without the end-of-sequence tokens that segments end with."""
        return "".join(segment.text for segment in self.segments)


def problems(cfg: TemplateConfig) -> list[str]:
    """What is wrong with a template, seen without a tokenizer."""
    if cfg.kind is TemplateKind.chat:
        if cfg.chat_template is None or Path(cfg.chat_template).expanduser().is_file():
            return []
        return [f"data.template.chat_template: there is no file {cfg.chat_template}; name a file with a Jinja template"]
    found = []
    for name, needed in _PATTERNS.items():
        pattern = getattr(cfg, name)
        held = set(_PLACEHOLDER.findall(pattern))
        allowed = " and ".join(f"{{{each}}}" for each in sorted(needed, reverse=True)) or "none"
        for each in sorted(held - needed):
            found.append(f"data.template.{name}: unknown placeholder {{{each}}} in {pattern!r}; it may hold: {allowed}")
        for each in sorted(needed - held, reverse=True):
            found.append(
                f"data.template.{name}: {{{each}}} is missing in {pattern!r}; add it, or part of a row is lost"
            )
    return found


def writer(cfg: TemplateConfig, tokenizer: Tokenizer) -> Callable[[Row], Rendered]:
    """The function that writes rows; it keeps what it learns about a chat template, so take one for many rows.

    Raises:
        UserError: the template is wrong, or the tokenizer has no chat template; from the function, RowRefused: the
            template cannot write a row, or its answers cannot be told from the rest.
    """
    found = problems(cfg)
    if found:
        raise UserError(found)
    if cfg.kind is TemplateKind.text:
        return TextWriter(cfg)
    from raytune_lora.data.chat import ChatWriter

    return ChatWriter(cfg, tokenizer)


def render(row: Row, cfg: TemplateConfig, tokenizer: Tokenizer) -> Rendered:
    """One row, as ``writer`` writes it."""
    return writer(cfg, tokenizer)(row)


class TextWriter:
    """Fills the patterns of the config."""

    def __init__(self, cfg: TemplateConfig) -> None:
        self._parts = {name: _PLACEHOLDER.split(getattr(cfg, name)) for name in _PATTERNS}

    def __call__(self, row: Row) -> Rendered:
        if row.tools or any(turn.role == TOOL or turn.calls for turn in row.turns):
            raise RowRefused("patterns of text cannot write tools and their calls; use data/template=chat")
        segments: list[Segment] = []
        prompt = ""
        for number, turn in enumerate(row.turns):
            if number and row.turns[number - 1].role == ASSISTANT:
                prompt += self._fill("between", "", "")
            if turn.role == ASSISTANT:
                segments += [Segment(prompt, False, number), Segment(turn.text, True, number, ends=True)]
                prompt = ""
            elif turn.role == SYSTEM:
                prompt += self._fill("system", turn.text, "")
            else:
                prompt += self._fill("with_input" if turn.input else "without_input", turn.text, turn.input)
        notes = (
            Note("unwritten", "a thought: patterns of text have no place for it", number)
            for number, turn in enumerate(row.turns)
            if turn.thought
        )
        return Rendered(tuple(segments), whole=False, notes=tuple(notes))

    def _fill(self, name: str, text: str, about: str) -> str:
        """The pattern, with the values in; a value is never searched for placeholders."""
        parts = self._parts[name]
        return "".join((about if part == "input" else text) if at % 2 else part for at, part in enumerate(parts))
