"""Chat templates: which part of the text that they write is the assistant's.

Chat templates are Jinja programs that come with a tokenizer; they say nowhere, unless their author put
``{% generation %}`` marks in, which part of their text is the assistant's. Without marks it is found from a *skeleton*:
the same roles with a made-up word as each message, rendered once. What stands between the words is the template's own
text, and a row's text must be exactly that with the row's messages in the places of the words. The header that
``add_generation_prompt`` writes says where the assistant's own part begins.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_lora.config.data import TemplateConfig
from raytune_lora.data.findings import excerpt
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row
from raytune_lora.data.templates import Rendered, Segment, TextWriter, Tokenizer
from raytune_lora.errors import UserError

Span = tuple[int, int, int]  # first character, the one after the last, turn

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORD = re.compile(r"qzx(\d+)xzq")  # a skeleton's message: nothing in it that a template would trim or split
_MARKS_REMEDY = (
    "put {% generation %} and {% endgeneration %} around the assistant's part in a copy of the template, and name that "
    "file with data.template.chat_template"
)


@dataclass(frozen=True)
class _Message:
    role: str
    text: str
    turn: int


@dataclass(frozen=True)
class _Slot:
    """A message's place in a skeleton."""

    message: int  # its number
    fixed: str  # the template's text before it
    extra: str  # of an assistant's message: text after the generation prompt, such as an empty thought; trained with it
    end: int  # of an assistant's message: how many characters after it end the turn


@dataclass(frozen=True)
class _Skeleton:
    slots: tuple[_Slot, ...]
    tail: str  # the template's text after the last message
    ends: bool  # the tail holds the turn's end token


class ChatWriter:
    """Writes rows with a chat template, and tells the assistant's part of the text from the rest."""

    def __init__(self, cfg: TemplateConfig, tokenizer: Tokenizer) -> None:
        self._template = _chat_template(cfg, tokenizer)
        self._marked = _MARK.search(self._template) is not None
        self._special = dict(tokenizer.special_tokens_map)
        ends = _end_tokens(tokenizer)
        token = "|".join(re.escape(end) for end in ends) or "(?!)"
        self._one_end, self._ends = re.compile(rf"\s*(?:{token})"), re.compile(rf"\s*(?:{token})+")
        self._closed = tuple(ends)
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        self._folds: dict[tuple[str, ...], bool] = {}
        self._text_writer = TextWriter(cfg)

    def __call__(self, row: Row) -> Rendered:
        if len(row.turns) == 1 and row.turns[0].role == ASSISTANT:
            return self._text_writer(row)  # plain text is no conversation
        messages = _messages(row, self._takes_no_system(tuple(turn.role for turn in row.turns)))
        text, marks = self._render(messages)
        if self._marked:
            spans, closed = self._marked_spans(messages, text, marks)
        else:
            skeleton = self._skeleton(tuple(message.role for message in messages))
            spans, closed = _locate(messages, text, skeleton), skeleton.ends
        return _split(text, spans, closed, len(row.turns) - 1)

    def _render(self, messages: Sequence[_Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Text and the marked ranges of characters, as ``apply_chat_template`` has them before it tokenizes."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[[{"role": message.role, "content": message.text} for message in messages]],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self._special,
            )
        except Exception as error:  # whatever a template's own code raises
            roles = ", ".join(message.role for message in messages)
            about = excerpt(messages[-1].text, 60)
            raise UserError(
                f"data.template: the chat template refuses a conversation of {roles} that ends with {about!r} "
                f"({error}): leave such rows out, or use data/template=alpaca"
            ) from error
        (text,), marks = rendered
        return text, [(start, end) for start, end in marks[0] if end > start] if self._marked else []

    def _takes_no_system(self, roles: tuple[str, ...]) -> bool:
        """Whether a system message must go into the first user message, as for Gemma and Mistral."""
        if SYSTEM not in roles:
            return False
        if roles not in self._folds:
            words = _words(roles)
            try:
                text, _ = self._render(words)
                self._folds[roles] = any(m.role == SYSTEM and m.text not in text for m in words)
            except UserError:
                self._folds[roles] = True
        return self._folds[roles]

    # ------------------------------------------------------------------------------------------------- without marks

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        words = _words(roles)
        text, _ = self._render(words)
        parts = _WORD.split(text)
        befores, places, tail = parts[:-1:2], [int(part) for part in parts[1::2]], parts[-1]
        answers = [number for number, role in enumerate(roles) if role == ASSISTANT]
        complete = set(places) == set(range(len(roles)))
        if not complete or [number for number in places if roles[number] == ASSISTANT] != answers:
            raise UserError(
                "data.template: the chat template does not write every message of a conversation of "
                f"{', '.join(roles)}, each answer once and in order, so that the answers cannot be found in its text: "
                + _MARKS_REMEDY
            )
        slots = []
        for before, after, number in zip(befores, [*befores[1:], tail], places, strict=True):
            begin, end = len(before), 0
            if roles[number] == ASSISTANT:
                begin = self._begin(before, words[:number])
                end = self._end(after, tail, last=number == answers[-1])
            slots.append(_Slot(number, before[:begin], before[begin:], end))
        return _Skeleton(tuple(slots), tail, self._one_end.match(tail) is not None)

    def _begin(self, before: str, prompt: Sequence[_Message]) -> int:
        """Where in the text between a question and its answer the model's own part begins.

        It begins after the generation prompt, since what is rendered beyond that (Qwen3's empty thought, Llama-2's
        space) the model writes itself when it answers. A template without a generation prompt may still write such a
        space.
        """
        if not prompt:
            return len(before)
        asked, plain = self._render(prompt, prompt=True)[0], self._render(prompt)[0]
        header = _WORD.split(asked)[-1]
        beyond = before[len(header) :]
        own = before.startswith(header) and (asked != plain or not beyond.strip())
        return len(header) if own else len(before)

    def _end(self, after: str, tail: str, last: bool) -> int:
        """How many characters of the text after an answer end its turn: the end token, but no newline and no header.

        What ends a turn is what follows every answer, so that the next turn's header, which may begin with a special
        token too, is not taken for it.

        Args:
            after: the text up to the next message.
            tail: the text after the row's last answer.
            last: whether this is the row's last answer.
        """
        common = _common_start(after, tail)
        if self._one_end.match(tail):
            found = self._ends.match(common) or self._one_end.match(after)
            return found.end() if found else 0
        # The tokenizer knows no end token here; the row gets one at its end, and all that leads to it is trained.
        return len(after) if last else len(common.rstrip())

    # ---------------------------------------------------------------------------------------------------- with marks

    def _marked_spans(
        self, messages: Sequence[_Message], text: str, marks: list[tuple[int, int]]
    ) -> tuple[list[Span], bool]:
        """The marked parts, with the end token that follows where the marks leave it out."""
        if not marks:
            raise UserError(
                "data.template: the chat template has generation marks, but none around an answer of a conversation of "
                f"{', '.join(message.role for message in messages)}; move them around the assistant's part"
            )
        turns = self._turns_of(messages, text, marks)
        tail = text[marks[-1][1] :]
        spans, closed = [], False
        for at, (start, end) in enumerate(marks):
            last = at == len(marks) - 1
            closed = text[start:end].rstrip().endswith(self._closed)
            if not closed:
                after = text[end:] if last else text[end : marks[at + 1][0]]
                end += self._end(after, tail, last)
                closed = self._one_end.match(after) is not None
            spans.append((start, end, turns[at]))
        return spans, closed

    def _turns_of(self, messages: Sequence[_Message], text: str, marks: list[tuple[int, int]]) -> list[int]:
        """The turn that each mark belongs to: one each, or by where the answers are."""
        answers = [message.turn for message in messages if message.role == ASSISTANT]
        if len(marks) == len(answers):
            return answers
        spans = _locate(messages, text, self._skeleton(tuple(message.role for message in messages)))
        ends = [end for _, end, _ in spans]
        return [spans[min(bisect_left(ends, end), len(ends) - 1)][2] for _, end in marks]


def _chat_template(cfg: TemplateConfig, tokenizer: Tokenizer) -> str:
    if cfg.chat_template is not None:
        return Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # none, or several of which none is the default
        raise UserError(
            "data.template: the model's tokenizer has no chat template; use data/template=alpaca, or name a file "
            "with a Jinja template: data.template.chat_template=my.jinja"
        ) from error


def _end_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that may end a turn: end-of-sequence and every special token but the one that begins a sequence."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {tokenizer.bos_token}
    special |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    return sorted(special, key=lambda token: (-len(token), token))


def _common_start(first: str, second: str) -> str:
    pairs = zip(first, second, strict=False)
    return first[: next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))]


def _messages(row: Row, folds: bool) -> list[_Message]:
    """A row's turns as messages; with ``folds``, system text goes before the next user's message."""
    messages: list[_Message] = []
    pending = ""
    for number, turn in enumerate(row.turns):
        text = f"{turn.text}\n\n{turn.input}" if turn.input else turn.text
        if turn.role == SYSTEM and folds:
            pending = f"{pending}\n\n{text}" if pending else text
            continue
        if pending and turn.role == USER:
            text = f"{pending}\n\n{text}"
        elif pending:
            messages.append(_Message(USER, pending, number - 1))
        pending = ""
        messages.append(_Message(turn.role, text, number))
    return messages


def _words(roles: Sequence[str]) -> list[_Message]:
    """A skeleton's messages."""
    return [_Message(role, f"qzx{number}xzq", number) for number, role in enumerate(roles)]


def _locate(messages: Sequence[_Message], text: str, skeleton: _Skeleton) -> list[Span]:
    """The trained parts of a row's text, one an answer.

    Raises:
        UserError: the text is not the skeleton with the row's messages in their places, or is so in several ways.
    """
    spans = _follow(messages, text, skeleton)
    if spans is None:
        spans = _search(messages, text, skeleton)
    if spans is None:
        raise UserError(
            "data.template: the chat template rewrites the messages of a row, so that its answers cannot be told from "
            f"the rest (its text begins {excerpt(text, 120)!r}): {_MARKS_REMEDY}"
        )
    return spans


def _follow(messages: Sequence[_Message], text: str, skeleton: _Skeleton) -> list[Span] | None:
    """The spans, where every message stands in the text as it is, trimmed, or without its thought."""
    spans: list[Span] = []
    nexts = [*(slot.fixed for slot in skeleton.slots[1:]), skeleton.tail]
    at = len(skeleton.slots[0].fixed)
    if not text.startswith(skeleton.slots[0].fixed):
        return None
    for slot, following in zip(skeleton.slots, nexts, strict=True):
        message = messages[slot.message]
        forms = _forms(message)
        if slot.extra:
            forms = [*(slot.extra + form for form in forms), *forms]
        ends = (at + len(form) for form in forms if text.startswith(form, at))
        end = next((end for end in ends if text.startswith(following, end)), None)
        if end is None:
            return None
        if message.role == ASSISTANT:
            spans.append((at, end + slot.end, message.turn))
        at = end + len(following)
    return spans if at == len(text) else None


def _search(messages: Sequence[_Message], text: str, skeleton: _Skeleton) -> list[Span] | None:
    """The spans, where answers may have become anything, if there is only one way to find them.

    The match with the shortest first answer (then the shortest second, and so on) and the one with the longest are the
    ends of all matches in lexical order: where they are the same there is no other.
    """
    matches = []
    for anything in ("(.*?)", "(.*)"):
        pattern = ""
        for slot in skeleton.slots:
            forms = "|".join(re.escape(form) for form in dict.fromkeys(_forms(messages[slot.message])))
            pattern += re.escape(slot.fixed)
            pattern += anything if messages[slot.message].role == ASSISTANT else f"(?:{forms})"
        matches.append(re.fullmatch(pattern + re.escape(skeleton.tail), text, re.DOTALL))
    first, second = matches
    if first is None or second is None or first.regs != second.regs:
        return None
    slots = [slot for slot in skeleton.slots if messages[slot.message].role == ASSISTANT]
    return [
        (start, end + slot.end, messages[slot.message].turn)
        for slot, (start, end) in zip(slots, first.regs[1:], strict=True)
    ]


def _forms(message: _Message) -> list[str]:
    """What templates make of a message."""
    text = message.text
    forms = [text, text.strip(), text.rstrip(), text.lstrip()]
    if message.role == ASSISTANT and "</think>" in text:
        forms.append(text.rpartition("</think>")[2].lstrip("\n"))
    return forms


def _split(text: str, spans: Sequence[Span], closed: bool, last: int) -> Rendered:
    """The text as segments; where the template closes no turn, the row ends with the end-of-sequence token."""
    segments: list[Segment] = []
    at = 0
    for start, end, turn in spans:
        if start > at:
            segments.append(Segment(text[at:start], False, turn))
        segments.append(Segment(text[start:end], True, turn))
        at = end
    if at < len(text):
        segments.append(Segment(text[at:], False, last))
    if not closed:
        final = segments[-1]
        segments[-1] = Segment(final.text, True, final.turn, ends=True)
    return Rendered(tuple(segments), whole=True)
