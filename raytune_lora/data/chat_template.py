"""A chat template: the text that it writes of a conversation, and what it does with systems, prompts and tools."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from raytune_lora.config.data import TemplateConfig
from raytune_lora.data.chat_messages import STYLES, TEXT, THOUGHT, WORD, Message, Style, calls_written, word
from raytune_lora.data.endless import Endless, bounded
from raytune_lora.data.findings import excerpt
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER
from raytune_lora.data.templates import RowRefused, Tokenizer
from raytune_lora.errors import UserError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Chat:
    """A conversation as a template gets it."""

    messages: Sequence[Message]
    words: Sequence[Message] = ()  # for its skeleton
    tools: Tools = None
    shape: str = ""
    style: Style = STYLES[0]
    unfolded: Sequence[Message] = ()  # the messages with the system's apart, where the prompt is written so


class ChatTemplate:
    """A model's chat template, or the one that the config names instead."""

    def __init__(self, cfg: TemplateConfig, tokenizer: Tokenizer) -> None:
        self._text = template_text(cfg, tokenizer)
        self._special = dict(tokenizer.special_tokens_map)
        self._end = tokenizer.eos_token
        self.marked = _MARK.search(self._text) is not None  # its author has marked the assistant's part

    def render(
        self, chat: Chat, messages: Sequence[Message], prompt: bool = False, **settings: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text and the marked ranges of characters, as ``apply_chat_template`` has them before it tokenizes.

        Without what the template prompts with unasked.

        Raises:
            RowRefused: the template does not take the conversation.
            Endless: it does not come to an end.
        """
        text, marks = self._as_written(chat, messages, prompt, **settings)
        return text if prompt else text.removesuffix(self._unasked), marks

    def _as_written(
        self, chat: Chat, messages: Sequence[Message], prompt: bool = False, **settings: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        plain = [message.plain(chat.style) for message in messages]
        tools = None if chat.tools is None else [*chat.tools]
        try:
            rendered = self._rendered(
                map(in_parts, plain) if self.takes_parts else plain, tools, add_generation_prompt=prompt, **settings
            )
        except Endless:
            raise
        except Exception as error:  # whatever a template's own code raises
            roles = ", ".join(message.role for message in messages)
            what, remedy = f"the chat template refuses a conversation of {roles}", "leave such rows out"
            remedy += "" if chat.tools or any(m.calls for m in messages) else ", or use data/template=alpaca"
            about = "" if WORD.search(messages[-1].text) else f" that ends with {excerpt(messages[-1].text, 60)!r}"
            raise RowRefused(f"{what} ({error}): {remedy}", f"{what}{about} ({error}): {remedy}") from error
        (text,), marks = rendered
        return text, [(start, end) for start, end in marks[0] if end > start] if self.marked else []

    def _rendered(self, messages: Iterable[dict[str, Any]], tools: Any = None, **settings: Any) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        with bounded():
            return render_jinja_template(
                conversations=[[*messages]],
                tools=tools,
                chat_template=self._text,
                return_assistant_tokens_mask=self.marked,
                **self._special,
                **settings,
            )

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a content must be a list of parts, as templates of models with vision want it, and no text."""
        asked = _words(USER)[0]

        def written(message: dict[str, Any]) -> bool:
            try:
                return asked.text in self._rendered([message])[0][0]
            except Endless:
                raise
            except Exception:  # which is told where a row is written
                return False

        return not written(asked.plain(STYLES[0])) and written(in_parts(asked.plain(STYLES[0])))

    @cached_property
    def _unasked(self) -> str:
        """The generation prompt that a template writes whether asked or not, as Cohere's do; else nothing.

        Then what follows a conversation's last answer does not begin what follows an answer that is not the last. It
        begins after the end-of-sequence token, as what follows a question does.
        """
        words = _words(USER, ASSISTANT, USER)
        try:
            question, answer, two = (self._as_written(Chat(words[:n]), words[:n])[0] for n in (1, 2, 3))
        except RowRefused:
            return ""
        tail, between = answer.partition(words[1].text)[2], two.partition(words[1].text)[2]
        prompt = tail.rpartition(self._end)[2] if self._end else ""
        always = prompt.strip() and not between.startswith(tail.rstrip()) and question.endswith(prompt)
        return prompt if always else ""

    @cached_property
    def closing(self) -> str:
        """The space between an answer that a question follows and the end-of-sequence token that closes it."""
        words = _words(USER, ASSISTANT, USER)
        try:
            after = self.render(Chat(words), words)[0].partition(words[1].text)[2]
        except RowRefused:
            return ""
        space = after[: len(after) - len(after.lstrip())]
        return space if self._end and after.startswith(self._end, len(space)) else ""

    @cached_property
    def writes_system(self) -> bool:
        """Whether a system message is written, or must go into the first user message, as for Gemma."""
        return self._writes_first(_words(SYSTEM, USER, ASSISTANT))

    @cached_property
    def prompts_system(self) -> bool:
        """Whether it is written in a prompt: by Mistral's templates in that alone, with the user's last message."""
        return self._writes_first(_words(SYSTEM, USER), prompt=True)

    def _writes_first(self, words: list[Message], prompt: bool = False) -> bool:
        try:
            return words[0].text in self.render(Chat(words), words, prompt)[0]
        except RowRefused:
            return False

    @cached_property
    def doubles_thoughts(self) -> bool:
        """Whether an answer that begins with a thought gets another before it, which one given apart would be."""
        question, answer = _words(USER, ASSISTANT)
        thought = word(THOUGHT, 1)
        inline = replace(answer, text=f"<think>\n{thought}\n</think>\n\n{answer.text}")
        found = []
        for message in (inline, inline.apart()):
            try:
                text, _ = self.render(Chat([question, message]), [question, message])
            except RowRefused:
                return False
            found.append([*text.partition(question.text)[2].partition(answer.text)[0].split("</think>")])
        return [len(parts) for parts in found] == [3, 2] and thought in found[1][0]

    @cached_property
    def prompts(self) -> bool:
        """Whether the template has a generation prompt."""
        asked = _words(USER)
        return self.render(Chat(asked), asked) != self.render(Chat(asked), asked, prompt=True)

    def check_tools(self, tools: list[dict[str, Any]]) -> None:
        """Raise where the template does not write the tools' definitions.

        Raises:
            RowRefused: that is so.
        """
        asked = _words(USER)
        text, _ = self.render(Chat(asked, tools=tools), asked, prompt=True)
        missing = [str(tool["function"]["name"]) for tool in tools if tool["function"]["name"] not in text]
        if missing:
            raise RowRefused(
                "the chat template does not write the definitions of tools, so that the model would not know what it "
                "may call: leave such rows out, or take a template that does (data.template.chat_template=…)"
            )

    def style(self, chat: Chat) -> Style:
        """The first spelling of messages in which the template writes every call.

        Raises:
            RowRefused: there is none.
        """
        refused: list[RowRefused] = []
        for style in STYLES:
            try:
                text, _ = self.render(replace(chat, style=style), chat.words)
            except RowRefused as error:
                refused.append(error)
                continue
            if calls_written(chat.words, text):
                return style
        if len(refused) == len(STYLES):
            raise refused[0]
        raise RowRefused(
            "the chat template does not write all calls of tools: leave such rows out, or take a template that does "
            "(data.template.chat_template=…)"
        )


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text is a list of one part."""
    content = message["content"]
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _words(*roles: str) -> list[Message]:
    """Messages of one word each, to be found in the text."""
    return [Message(role, word(TEXT, number), number) for number, role in enumerate(roles)]


def template_text(cfg: TemplateConfig, tokenizer: Tokenizer) -> str:
    """The template's Jinja: of the config's file or of the tokenizer; of its own for tools too, where it has one.

    Raises:
        UserError: there is none.
    """
    if cfg.chat_template is not None:
        return Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
    try:
        plain = str(tokenizer.get_chat_template())
        with_tools = str(tokenizer.get_chat_template(tools=[]))
    except ValueError as error:  # none, or several of which none is the default
        raise UserError(
            "data.template: the model's tokenizer has no chat template; use data/template=alpaca, or name a file "
            "with a Jinja template: data.template.chat_template=my.jinja"
        ) from error
    if plain == with_tools:
        return plain
    # One file for both; a newline after a tag, and one that ends a template, are not written.
    both = (text.removesuffix("\n") for text in (with_tools, plain))
    return "{% if tools is defined and tools is not none %}\n" + "{% else %}\n".join(both) + "{% endif %}"


def end_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that may end a turn: end-of-sequence and every special token but the one that begins a sequence."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {tokenizer.bos_token}
    special |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    return sorted(special, key=lambda token: (-len(token), token))
