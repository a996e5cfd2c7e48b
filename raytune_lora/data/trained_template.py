"""The template that rows were written with, as a chat template in Jinja: what goes with an adapter to wherever it runs.

A chat template goes as it is. Patterns of text become one that writes the same text. Whether that gives the model the
same tokens as in training is tried out on a few conversations: patterns are tokenized piece by piece, a chat template's
text in one, and a tokenizer may join what lies on both sides of a seam, or begin each piece with a space of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from raytune_lora.artifacts import write_json
from raytune_lora.config.data import DataConfig, TemplateConfig, TemplateKind
from raytune_lora.data.endless import bounded
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn
from raytune_lora.data.templates import _PLACEHOLDER, Tokenizer

TEMPLATE, TRIED = "chat_template.jinja", "chat_template.json"  # in a token store: the template, and ``tried`` of it
_GAPS = ("", " ")  # what may stand before a piece so that it begins with a space, as where it is tokenized alone
_NO_LIMIT = 10**9

_TALKS: tuple[tuple[tuple[str, str], ...], ...] = (
    ((USER, "What is the capital of Korea?"), (ASSISTANT, "Seoul, since 1394.")),
    ((USER, "대한민국의 수도는 어디입니까?"), (ASSISTANT, "서울입니다.")),
    ((USER, "Give me JSON."), (ASSISTANT, '{"name": "김민수", "age": 31}')),
    ((USER, "Two plus two?"), (ASSISTANT, "Four."), (USER, "And 하나 더?"), (ASSISTANT, "다섯 (five).")),
    ((SYSTEM, "Answer briefly."), (USER, "안녕하세요"), (ASSISTANT, "Hello!"), (USER, "Bye"), (ASSISTANT, "또 봐요")),
)


def write_template(cfg: TemplateConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a data set's template into its token store, and how far it gives the same tokens.

    Args:
        cfg: the template of the rows.
        tokenizer: of the base model.
        folder: of the store.

    Raises:
        UserError: the tokenizer has no chat template, and the config names none.
    """
    if cfg.kind is TemplateKind.chat:
        from raytune_lora.data.chat_template import ChatTemplate, template_text

        texts, parts = [template_text(cfg, tokenizer)], ChatTemplate(cfg, tokenizer).takes_parts
    else:
        parts = False
        texts = [jinja(cfg, *gaps, bos=_begins(tokenizer)) for gaps in product(_GAPS, repeat=3)]
    found = {text: tried(text, cfg, tokenizer, parts=parts) for text in texts}
    best = max(found, key=lambda text: list(found[text].values()))  # the first of equals
    (folder / TEMPLATE).write_text(best, encoding="utf-8")
    write_json(folder / TRIED, found[best])


def tried(text: str, cfg: TemplateConfig, tokenizer: Tokenizer, *, parts: bool) -> dict[str, bool]:
    """Whether a chat template gives the same tokens as the token store has.

    Args:
        text: of the template.
        cfg: the template of the rows.
        tokenizer: of the base model.
        parts: whether a message's content must be a list of parts, as templates of models that see want it.

    Returns:
        ``prompts``: of single questions, as one asks them; ``rows``: of whole conversations with their answers; and
        ``parts`` as given.
    """
    prompts, rows = [], []
    for talk in _TALKS:
        found = _both(text, cfg, tokenizer, talk, parts=parts)
        if found is None:  # a role that the template does not take
            continue
        (ids, prompt), (written, asked) = found
        rows.append(ids in (written, [*written, tokenizer.eos_token_id]))
        if len(talk) == 2:
            prompts.append(prompt == asked)
    return {"prompts": all(prompts) and bool(prompts), "rows": all(rows) and bool(rows), "parts": parts}


def _both(
    text: str, cfg: TemplateConfig, tokenizer: Tokenizer, talk: Sequence[tuple[str, str]], *, parts: bool
) -> list[tuple[list[int], list[int]]] | None:
    """Tokens of a row and of the prompt of its last answer, as the store has them and as the template gives them."""
    from jinja2 import TemplateError

    from raytune_lora.data.chat_template import in_parts
    from raytune_lora.data.encode import encode
    from raytune_lora.errors import UserError

    row = Row(tuple(Turn(role, said) for role, said in talk))
    plain: list[dict[str, Any]] = [{"role": role, "content": said} for role, said in talk]
    messages = [in_parts(message) for message in plain] if parts else plain
    try:
        (own,) = encode([row], DataConfig(kind="file", template=cfg, max_length=_NO_LIMIT), tokenizer)
        whole = _apply(tokenizer, messages, text, prompt=False)
        asked = _apply(tokenizer, messages[:-1], text, prompt=True)
    except (TemplateError, UserError):
        return None
    return None if own is None else [(own.input_ids, own.input_ids[: own.prompt_length]), (whole, asked)]


def _apply(tokenizer: Tokenizer, messages: list[dict[str, Any]], text: str, prompt: bool) -> list[int]:
    with bounded():
        found: Any = tokenizer.apply_chat_template(
            messages, chat_template=text, add_generation_prompt=prompt, tokenize=True, return_dict=True
        )
    return list(found["input_ids"])


def _begins(tokenizer: Tokenizer) -> bool:
    """Whether texts begin with the beginning-of-sequence token."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def jinja(
    cfg: TemplateConfig, before_text: str = "", before_answer: str = "", before_turn: str = "", *, bos: bool = False
) -> str:
    """Patterns of text as a chat template.

    A user's message may have a field ``input`` beside its ``content``, as rows of the Alpaca form do.

    Args:
        cfg: the patterns.
        before_text: what stands before all of it.
        before_answer: what stands before each answer.
        before_turn: what stands before what follows an answer.
        bos: begin with the beginning-of-sequence token.
    """
    lines = [
        f"{{{{- {'bos_token + ' if bos else ''}{_literal(before_text)} -}}}}",
        "{%- for message in messages -%}",
        "{%- if not loop.first and messages[loop.index0 - 1].role == 'assistant' -%}",
        f"{{{{- {_literal(before_turn + cfg.between)} -}}}}",
        "{%- endif -%}",
        "{%- if message.role == 'assistant' -%}",
        f"{{{{- {_literal(before_answer)} + message.content + eos_token -}}}}",
        "{%- elif message.role == 'system' -%}",
        f"{{{{- {_filled(cfg.system)} -}}}}",
        "{%- elif message.role == 'user' and message.input -%}",
        f"{{{{- {_filled(cfg.with_input)} -}}}}",
        "{%- elif message.role == 'user' -%}",
        f"{{{{- {_filled(cfg.without_input)} -}}}}",
        "{%- else -%}",
        "{{- raise_exception('roles are system, user and assistant; got ' + message.role) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(lines) + "\n"


def _filled(pattern: str) -> str:
    """A pattern as an expression; what it is filled with is never searched for placeholders."""
    values = {"text": "message.content", "input": "message.input"}
    parts = _PLACEHOLDER.split(pattern)
    terms = [values[part] if at % 2 else _literal(part) for at, part in enumerate(parts) if at % 2 or part]
    return " + ".join(terms) or "''"


def _literal(text: str) -> str:
    """Text as Jinja's literal, whose escapes are Python's."""
    return json.dumps(text, ensure_ascii=False)
