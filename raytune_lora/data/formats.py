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

All but text may have ``system``, ``tools`` (or ``functions``: definitions, a list or JSON text) and, where
``data.columns`` names it, ``reasoning`` (the last answer's thought) and ``label`` (KTO: rows whose label is true are
taken). Alpaca and completion rows may have ``history``, a list of [question, answer]. ``raytune_lora.data.messages``
says what a message may hold. A field that has none of these places, and holds something, is named in ``Row.unused``.

A conversation is one optional system turn, then turns of the user and the assistant that alternate, as chat templates
demand it: one that starts with the assistant, or has two turns of one role in a row, is a fault. Between two turns of
the assistant may stand the answers of tools. What follows the last answer that is trained has no influence on it, so it
is cut off. An empty system turn is left out, as if it were absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from raytune_lora.config.data import Format
from raytune_lora.config.typed import typed
from raytune_lora.data.json_stream import decode_json
from raytune_lora.data.messages import (
    FaultError,
    check_calls,
    checked_text,
    conversation,
    definitions,
    filled,
    kind_of,
    listed,
    messages,
    reasoning,
    wrong,
)
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Fault, Row, Turn

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
_COMMON = ("system", "tools", "functions", "reasoning", "label")
OPTIONAL = {
    "alpaca": ("input", "history", *_COMMON),
    "chat": _COMMON,
    "sharegpt": _COMMON,
    "completion": ("history", *_COMMON),
    "text": (),
}
_MAPPED = (
    "reasoning",
    "label",
)  # of OPTIONAL: other data has columns of that name, so that data.columns must name them
_VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# Fields that say, by true or false, whether an answer is a good one.
_LABELS = ("label", "kto_tag", "preferred", "is_preferred", "desirable", "is_chosen")


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
        return value if isinstance(value, Fault) else Fault("wrong_types", f"a row is an object, not {kind_of(value)}")
    try:
        fields = _renamed(value, columns) if columns else value
        name, names = _recognize(fields, format, columns)
        if name != "text":
            _refuse_bad(fields, columns)
        unused = _unused(fields, name, names, columns, stratify)
        turns = _TURNS[name](fields, names, unused)
        if name != "text" and "reasoning" in columns:
            thought = reasoning(fields["reasoning"], "reasoning")
            turns = (*turns[:-1], replace(turns[-1], thought=thought or turns[-1].thought))
        tools = () if name == "text" else _tools(fields, unused)
        check_calls(turns, tools)
        row = Row(turns, _stratum(value, stratify) if stratify else "", tools, tuple(sorted(unused)))
    except FaultError as error:
        return error.fault
    return row, name


def _renamed(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record by the format's names."""
    absent = [f"{column!r} (for {field})" for field, column in columns.items() if column not in value]
    if absent:
        raise FaultError("missing_fields", f"no column {', '.join(absent)}; there are {listed(value)}")
    used = set(columns.values())
    fields = {name: content for name, content in value.items() if name not in used}
    fields.update((field, value[column]) for field, column in columns.items())
    return fields


def _recognize(fields: dict[str, Any], format: Format, columns: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """The record's format, and those of its fields that make it one."""
    forms = _FORMS[format]
    if columns and format is Format.auto:  # what is mapped is what is meant
        forms = tuple(form for form in forms if columns.keys() <= {*form[1], *OPTIONAL[form[0]]}) or forms
    get = fields.get
    for form in forms:
        for field in form[1]:
            if get(field) is None:
                break
        else:
            return form
    raise _unrecognized(fields, forms)


_FORMS = {form: tuple(f for f in FIELDS if form is Format.auto or f[0] == form.value) for form in Format}


def _unrecognized(fields: dict[str, Any], forms: tuple[tuple[str, tuple[str, ...]], ...]) -> FaultError:
    if len(forms) > 1:
        _refuse_preferences(fields)
    begun = [names for _, names in forms if any(fields.get(name) is not None for name in names)]
    absent = [[name for name in names if fields.get(name) is None] for names in begun or [names for _, names in forms]]
    wanted = " or ".join(dict.fromkeys("+".join(names) for names in absent))
    return FaultError("missing_fields", f"no {wanted}; there are {listed(fields)}")


def _unused(
    fields: dict[str, Any], name: str, names: tuple[str, ...], columns: Mapping[str, str], stratify: str | None
) -> set[str]:
    """Fields that hold something and have no place in the format."""
    used = {*names, *(field for field in OPTIONAL[name] if field not in _MAPPED), *columns, stratify}
    return {str(field) for field, content in fields.items() if field not in used and filled(content)}


def _stratum(value: dict[str, Any], column: str) -> str:
    if column not in value:
        raise FaultError("missing_fields", f"no column {column!r} (data.stratify); there are {listed(value)}")
    content = value[column]
    if isinstance(content, (dict, list)):
        raise FaultError("wrong_types", f"{column} (data.stratify) must be text or a number (found {kind_of(content)})")
    return "" if content is None else str(content)


# --------------------------------------------------------------------------------------------------------- preferences


def _refuse_preferences(fields: dict[str, Any]) -> None:
    """Raise for a record that holds answers to be told apart and none that is simply the answer."""
    pairs = [name for name, content in fields.items() if str(name).startswith(("chosen", "rejected")) and content]
    if any(name.startswith("rejected") for name in pairs):
        raise FaultError(
            "wrong_types",
            f"{' and '.join(pairs)} answers (preference data) are not supported; to train the good ones name their "
            "field, such as data.columns.messages=chosen or data.columns.completion=chosen",
        )
    lists = [name for name in ("completions", "responses") if isinstance(fields.get(name), list)]
    verdicts = [name for name in ("labels", "scores", "ranks", "rewards") if isinstance(fields.get(name), list)]
    if lists and verdicts:
        raise FaultError("wrong_types", f"{lists[0]} with {verdicts[0]} (preference data) are not supported")


def _refuse_bad(fields: dict[str, Any], columns: Mapping[str, str]) -> None:
    """Raise for an answer that is labelled as a bad one, and for a label that ``data.columns`` does not name."""
    if "label" in columns:
        good = _VERDICTS.get(str(fields["label"]).strip().lower())
        if good is None:
            raise FaultError("wrong_types", f"label must be true or false (found {fields['label']!r:.40})")
        if not good:
            raise FaultError("wrong_types", "label is false: a bad answer (preference data), which is not trained")
        return
    for name in _LABELS:
        content = fields.get(name)
        if isinstance(content, bool) or (isinstance(content, str) and content.strip().lower() in ("true", "false")):
            raise FaultError(
                "wrong_types",
                f"{name} says whether the answer is a good one (preference data): "
                f"{typed('data.columns.label', name)} trains the rows where it is "
                "true and leaves the others out; if it says something else, rename the column",
            )


# --------------------------------------------------------------------------------------------------------- the formats


def _alpaca(fields: dict[str, Any], names: tuple[str, ...], unused: set[str]) -> tuple[Turn, ...]:
    about = fields.get("input")
    if about is None:
        about = ""
    elif not isinstance(about, str):
        raise wrong("input", "text", about)
    turns = (
        *_history(fields, unused),
        Turn(USER, checked_text(fields["instruction"], "instruction"), about),
        Turn(ASSISTANT, checked_text(fields["output"], "output")),
    )
    return (*_system(fields), *turns) if "system" in fields else turns


def _chat(fields: dict[str, Any], names: tuple[str, ...], unused: set[str]) -> tuple[Turn, ...]:
    turns = messages(fields[names[0]], names[0], unused)
    if turns and turns[-1].role == USER:
        _refuse_preferences(fields)
    return _conversation(fields, turns, unused)


def _completion(fields: dict[str, Any], names: tuple[str, ...], unused: set[str]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for name, role in zip(names, (USER, ASSISTANT), strict=True):
        content = fields[name]
        is_list = isinstance(content, list)
        turns += messages(content, name, unused) if is_list else [Turn(role, checked_text(content, name))]
    return _conversation(fields, [*_history(fields, unused), *turns], unused)


def _plain(fields: dict[str, Any], names: tuple[str, ...], unused: set[str]) -> tuple[Turn, ...]:
    return (Turn(ASSISTANT, checked_text(fields["text"], "text")),)


_TURNS: dict[str, Callable[[dict[str, Any], tuple[str, ...], set[str]], tuple[Turn, ...]]] = {
    "alpaca": _alpaca,
    "chat": _chat,
    "sharegpt": _chat,
    "completion": _completion,
    "text": _plain,
}


def _conversation(fields: dict[str, Any], turns: list[Turn], unused: set[str]) -> tuple[Turn, ...]:
    if turns and turns[0].role == SYSTEM:
        unused |= {"system"} if filled(fields.get("system")) and fields["system"] != turns[0].text else set()
    else:
        turns = [*_system(fields), *turns]
    return conversation(turns)


def _system(fields: dict[str, Any]) -> tuple[Turn, ...]:
    """The turn that a field ``system`` stands for: none if it is null or empty."""
    content = fields.get("system")
    if content is None:
        return ()
    if not isinstance(content, str):
        raise wrong("system", "text", content)
    return (Turn(SYSTEM, content),) if content.strip() else ()


def _history(fields: dict[str, Any], unused: set[str]) -> list[Turn]:
    """Earlier turns, from a list of [question, answer]; a field of that name that holds something else is not used."""
    content = fields.get("history")
    if not filled(content):
        return []
    pairs = decode_json(content) if isinstance(content, str) and content.lstrip().startswith("[") else content
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        unused.add("history")
        return []
    texts = [checked_text(text, f"history[{number}]") for number, pair in enumerate(pairs) for text in pair]
    return [Turn(ASSISTANT if number % 2 else USER, text) for number, text in enumerate(texts)]


def _tools(fields: dict[str, Any], unused: set[str]) -> tuple[dict[str, Any], ...]:
    """The tools' definitions: of the first of the fields that may hold them."""
    names = [name for name in ("tools", "functions") if filled(fields.get(name))]
    unused |= set(names[1:])
    return definitions(fields[names[0]], names[0]) if names else ()
