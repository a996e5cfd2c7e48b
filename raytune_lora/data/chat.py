"""Chat templates: rows as the text that the model's own template writes, each answer as the model is prompted for it.

Chat templates are Jinja programs that come with a tokenizer. Which part of their text is the assistant's is said by
``{% generation %}`` marks, if the author put them in, or else by a skeleton (``chat_skeleton``).

A row's last answer is trained as the model will be prompted for it. Where the template writes a whole conversation
otherwise (the generation prompt of DeepSeek-R1's distillations opens a thought, which their template leaves out), the
row is the generation prompt, the thought, and the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from raytune_lora.config.data import TemplateConfig
from raytune_lora.data.chat_messages import (
    Message,
    Style,
    messages_of,
    shape_of,
    words_of,
)
from raytune_lora.data.chat_skeleton import (
    MARKS_REMEDY,
    Ends,
    Skeleton,
    Span,
    after_last,
    common_start,
    locate,
    make_skeleton,
    parting,
)
from raytune_lora.data.chat_template import Chat, ChatTemplate, Tools, end_tokens
from raytune_lora.data.findings import excerpt
from raytune_lora.data.rows import ASSISTANT, SYSTEM, Row
from raytune_lora.data.templates import Note, Rendered, RowRefused, Segment, TextWriter, Tokenizer

_TAGS = "think|thinking|thought|reasoning|THINK"
_OPEN, _CLOSE = rf"[<\[](?:{_TAGS})[>\]]", rf"[<\[]/(?:{_TAGS})[>\]]"
_OPEN_THOUGHT = re.compile(rf"([<\[])({_TAGS})([>\]])(\s*)\Z")
_CLOSED_THOUGHT = re.compile(rf"{_CLOSE}\s*\Z")
_SHOWN = 40  # characters of a generation prompt that a finding shows
_MOST_SHAPES = 2000  # skeletons that are kept
_UNPROMPTED = (
    "an earlier answer has no thought, which the model is prompted for: data.train_on=last trains the last alone"
)
_THOUGHT = "the thought, for which the template has no place"
_APART = "the template writes a thought of its own before one in the text, so that it gets the thought apart"
_EARLIER = "the thought of an earlier answer, which the template leaves out: data.train_on=last trains the last alone"


class ChatWriter:
    """Writes rows with a chat template, and tells the assistant's part of the text from the rest."""

    def __init__(self, cfg: TemplateConfig, tokenizer: Tokenizer) -> None:
        self._template = ChatTemplate(cfg, tokenizer)
        self._ends = Ends(end_tokens(tokenizer), tokenizer.eos_token)
        self._styles: dict[str, Style] = {}  # by the shape of a row with calls
        self._skeletons: dict[str, Skeleton] = {}  # by shape
        self._whole: set[str] = set()  # shapes that a template with marks writes all of
        self._headers: dict[str, str] = {}  # by shape: what ``_marked_header`` says
        self._text_writer = TextWriter(cfg)

    def __call__(self, row: Row) -> Rendered:
        if len(row.turns) == 1 and row.turns[0].role == ASSISTANT:
            return self._text_writer(row)  # plain text is no conversation
        folds = row.turns[0].role == SYSTEM and not self._template.writes_system
        chat = self._chat(self._messages(row, folds), list(row.tools) or None)
        if folds and self._template.prompts_system:
            chat = replace(chat, unfolded=self._messages(row, False))
        try:
            text, spans, closed = self._written(chat)
        except RowRefused as error:
            # A thought that the text begins with and that is empty is none: a template may write another in its place.
            plain, unfolded = _without_empty_thoughts(chat.messages), _without_empty_thoughts(chat.unfolded)
            if plain == chat.messages:
                raise
            try:
                chat = replace(self._chat(plain, chat.tools), unfolded=unfolded)
                text, spans, closed = self._written(chat)
            except RowRefused:
                raise error from None
        text, spans, notes = self._as_prompted(chat, text, spans)
        notes += _lost(chat.messages, text, spans)
        notes += tuple(
            Note("generation_prompt", _APART, message.turn)
            for message in chat.messages
            if message.thought and not row.turns[message.turn].thought
        )
        return _split(text, spans, "" if closed else self._template.closing, closed, len(row.turns) - 1, notes)

    def _messages(self, row: Row, folds: bool) -> list[Message]:
        """The row's messages, with thoughts apart where the template would write one of its own before the text's."""
        messages = messages_of(row, folds)
        apart = [message.apart() for message in messages]
        return apart if apart != messages and self._template.doubles_thoughts else messages

    def _chat(self, messages: Sequence[Message], tools: Tools) -> Chat:
        """The row as the template is to get it: its messages in the spelling in which it writes their calls."""
        words = words_of(messages)
        chat = Chat(messages, words, tools, shape_of(words) + json.dumps(tools))
        if tools is not None and chat.shape not in self._skeletons:
            self._template.check_tools(tools)
        if any(message.calls for message in messages):
            if chat.shape not in self._styles:
                if len(self._styles) == _MOST_SHAPES:
                    self._styles.clear()
                self._styles[chat.shape] = self._template.style(chat)
            chat = replace(chat, style=self._styles[chat.shape])
        return chat

    # ----------------------------------------------------------------------------------------------------- the spans

    def _written(self, chat: Chat) -> tuple[str, list[Span], bool]:
        """A conversation's text, the trained part of each answer, and whether an end token closes the last."""
        text, marks = self._template.render(chat, chat.messages)
        if self._template.marked:
            self._check_words(chat)
            return text, *self._marked_spans(chat, text, marks)
        skeleton = self._skeleton(chat)
        return text, self._located(chat, text), skeleton.ends

    def _check_words(self, chat: Chat) -> None:
        """Raise where a template with marks leaves a message's text out."""
        if chat.shape in self._whole:
            return
        text, _ = self._template.render(chat, chat.words)
        missing = [m.role for m in chat.words if m.text and not m.calls and m.text not in text]
        if missing:
            raise RowRefused(
                f"the chat template does not write the text of the {missing[0]} in a conversation of "
                f"{', '.join(message.role for message in chat.messages)}; name another with data.template.chat_template"
            )
        if len(self._whole) == _MOST_SHAPES:
            self._whole.clear()
        self._whole.add(chat.shape)

    def _skeleton(self, chat: Chat) -> Skeleton:
        if chat.shape not in self._skeletons:
            if len(self._skeletons) == _MOST_SHAPES:
                self._skeletons.clear()
            self._skeletons[chat.shape] = make_skeleton(
                chat.words, lambda words, prompt: self._template.render(chat, words, prompt)[0], self._ends
            )
        return self._skeletons[chat.shape]

    def _located(self, chat: Chat, text: str) -> list[Span]:
        spans = locate(chat.messages, text, self._skeleton(chat))
        if spans is None and any(message.reasoning and not message.thought for message in chat.messages):
            # The template takes thoughts out of the answers' text and writes them as it writes those given apart.
            apart = self._chat([message.apart() for message in chat.messages], chat.tools)
            spans = locate(apart.messages, text, self._skeleton(apart))
        if spans is None:
            what = "the chat template rewrites the messages of a row, so that its answers cannot be told from the rest"
            raise RowRefused(
                f"{what}: {MARKS_REMEDY}", f"{what} (its text begins {excerpt(text, 120)!r}): {MARKS_REMEDY}"
            )
        return spans

    def _marked_spans(self, chat: Chat, text: str, marks: list[tuple[int, int]]) -> tuple[list[Span], bool]:
        """The marked parts, with the end token that follows where the marks leave it out."""
        if not marks:
            raise RowRefused(
                "the chat template has generation marks, but none around an answer of a conversation of "
                f"{', '.join(message.role for message in chat.messages)}; move them around the assistant's part"
            )
        turns = self._turns_of(chat, text, marks)
        tail = text[marks[-1][1] :]
        spans, closed = [], False
        for at, (start, end) in enumerate(marks):
            last = at == len(marks) - 1
            closed = text[start:end].rstrip().endswith(self._ends.tokens)
            if not closed:
                after = text[end:] if last else text[end : marks[at + 1][0]]
                end += self._ends.after(after, tail, last)
                closed = self._ends.one.match(after) is not None
            spans.append((start, end, turns[at]))
        return spans, closed

    def _turns_of(self, chat: Chat, text: str, marks: list[tuple[int, int]]) -> list[int]:
        """The turn of each mark: one each, or that of the answer that it covers most of, or is nearest to."""
        answers = [message.turn for message in chat.messages if message.role == ASSISTANT]
        if len(marks) == len(answers):
            return answers
        spans = self._located(chat, text)
        return [max(spans, key=lambda s: min(s[1], end) - max(s[0], start))[2] for start, end in marks]

    # ----------------------------------------------------------------------------------------------------- the prompt

    def _as_prompted(self, chat: Chat, text: str, spans: list[Span]) -> tuple[str, list[Span], tuple[Note, ...]]:
        """The text with the last answer after what the model is prompted with for it."""
        messages = chat.messages
        plain_row = not (chat.tools or any(m.calls or m.apart() is not m for m in messages))
        if plain_row and not self._template.marked and not chat.unfolded:
            slot = self._skeleton(chat).last
            if slot.prompted and not _OPEN_THOUGHT.search(slot.fixed):
                return text, spans, ()  # what the skeleton says of the header holds for every row of this shape
        before = replace(chat, messages=(chat.unfolded or messages)[:-1])
        asked, plain = (self._template.render(before, before.messages, prompt)[0] for prompt in (True, False))
        begin, end, turn = spans[-1]
        left_open = text.startswith(asked) and not self._template.marked and _left_open(asked, text[len(asked) : end])
        if text.startswith(asked) and not left_open:
            if asked == plain and not self._template.prompts:
                return text, spans, ()
            if self._template.marked:  # what the marks leave out of an answer stays out
                last = [(max(s, len(asked)), e, turn) for s, e, t in spans if t == turn and e > len(asked)]
            else:
                last = [(len(asked), end, turn)]
            return text, [*(span for span in spans[:-1] if span[2] != turn), *last], ()
        if thinking := self._asked_to_think(before, text, asked, messages[-1]):
            note = Note(
                "generation_prompt",
                "the default prompt closes the thought: a row with one is trained after the "
                "prompt of enable_thinking=true",
                turn,
            )
            return text, [*spans[:-1], (len(thinking), end, turn)], (note,)
        earlier = [span for span in spans if span[2] != turn]
        if len(common_start(text, asked)) < len(common_start(plain, asked).rstrip()):  # it reads otherwise
            if not asked.startswith(plain.rstrip()):
                raise RowRefused(f"the chat template's generation prompt rewrites what comes before it: {MARKS_REMEDY}")
            earlier = self._written(self._chat(before.messages, chat.tools))[1] if earlier else []
        marks = [(start, end) for start, end, of in spans if of == turn]
        begin = marks[0][0]
        if self._template.marked and text.startswith(header := self._marked_header(chat), begin):
            begin += len(header)
        begin = min(begin, parting(text, asked)) if text.startswith(plain) else begin
        lead, body = _after_prompt(asked, text[begin:end], messages[-1])
        said = asked[len(common_start(plain, asked)) :]
        how = (
            f"the model is prompted with {said[-_SHOWN:]!r}" if said else "the prompt is written otherwise than the row"
        )
        notes = [Note("generation_prompt", f"{how}, trained as prompted", turn)]
        if lead:
            notes += [Note("generation_prompt", _UNPROMPTED, at) for *_, at in earlier]
        whole = asked + lead + body
        shift = len(whole) - end
        first = len(asked), max(marks[0][1] + shift, len(asked + lead)), turn
        others = [(max(start + shift, first[1]), stop + shift, turn) for start, stop in marks[1:]]
        return whole + text[end:], [*earlier, first, *(each for each in others if each[0] < each[1])], tuple(notes)

    def _marked_header(self, chat: Chat) -> str:
        """What the mark of a row's last answer begins with that the model is prompted with."""
        if chat.shape not in self._headers:
            if len(self._headers) == _MOST_SHAPES:
                self._headers.clear()
            text, spans, _ = self._written(replace(chat, messages=chat.words))
            begin = next(start for start, _, turn in spans if turn == spans[-1][2])
            prompt = after_last(self._template.render(chat, chat.words[:-1], prompt=True)[0])
            before = len(after_last(text[:begin]))
            self._headers[chat.shape] = text[
                begin : max(begin, begin - before + parting(text[begin - before :], prompt))
            ]
        return self._headers[chat.shape]

    def _asked_to_think(self, before: Chat, text: str, asked: str, answer: Message) -> str:
        """The generation prompt for an answer with a thought, where the default one closes it; else nothing."""
        if not answer.reasoning or not _CLOSED_THOUGHT.search(asked):
            return ""
        for setting in ("enable_thinking", "thinking"):
            thinking, _ = self._template.render(before, before.messages, prompt=True, **{setting: True})
            if text.startswith(thinking) and not _CLOSED_THOUGHT.search(thinking):
                return thinking
        return ""


def _without_empty_thoughts(messages: Sequence[Message]) -> list[Message]:
    return [message if message.reasoning else message.apart() for message in messages]


def _left_open(asked: str, body: str) -> bool:
    """Whether an answer stands within the thought that the prompt opens, or opens another there."""
    if not _OPEN_THOUGHT.search(asked):
        return False
    return re.search(_CLOSE, body) is None or re.match(rf"\s*{_OPEN}", body) is not None


def _after_prompt(asked: str, body: str, answer: Message) -> tuple[str, str]:
    """What stands between a generation prompt and an answer, and the answer as the template writes it, thought aside.

    Args:
        asked: the prompt.
        body: what the template writes as the answer, which may begin with a thought of its own.
        answer: the message.
    """
    thought = answer.reasoning
    if leading := re.match(rf"\s*(?:{_OPEN})?\s*{re.escape(thought)}\s*{_CLOSE}\s*", body):
        body = body[leading.end() :]
    elif thought and not answer.thought:
        body = body.lstrip("\n")  # what stood between the thought and the answer in the text
    opened = _OPEN_THOUGHT.search(asked)
    if opened is None:
        return "", body
    bracket, tag, end_bracket, space = opened.groups()
    line = "\n" if "\n" in space else ""
    return f"{thought}{line}{bracket}/{tag}{end_bracket}{2 * line}", body


def _lost(messages: Sequence[Message], text: str, spans: Sequence[Span]) -> tuple[Note, ...]:
    """What of the answers is not in what is trained."""
    trained: dict[int, str] = {}
    for start, end, turn in spans:
        trained[turn] = trained.get(turn, "") + text[start:end]
    last = messages[-1].turn
    notes = []
    for message in messages:
        said = trained.get(message.turn, "")
        if message.role == ASSISTANT and message.reasoning not in said:
            notes.append(Note("unwritten", _THOUGHT if message.turn == last else _EARLIER, message.turn))
        if message.calls and message.text.strip() not in said:
            notes.append(Note("unwritten", "the text beside a call, which the template leaves out", message.turn))
    return tuple(notes)


def _split(
    text: str, spans: Sequence[Span], closing: str, closed: bool, last: int, notes: tuple[Note, ...]
) -> Rendered:
    """The text as segments; where the template does not close the last turn, the end-of-sequence token does."""
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
        segments[-1] = Segment(final.text + (closing if at == len(text) else ""), True, final.turn, ends=True)
    return Rendered(tuple(segments), True, notes)
