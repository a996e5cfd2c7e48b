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

All but text may have ``system`` or ``system_prompt``, ``tools`` (or ``functions``: definitions, a list or JSON text)
and, where ``data.columns`` names it, ``reasoning`` (the last answer's thought) and ``label`` (KTO: rows whose label is
true are taken). Alpaca and completion rows may have ``history``, a list of [question, answer], and completion rows
``context``, what the question is about. ``raytune_lora.data.messages`` says what a message may hold. A field that has
none of these places, and holds something, is named in ``Row.unused``; a record is a fault where such a field says that
it must not be trained as it stands: by a flag, by pictures, by tools that the model would not be told of.

A conversation is one optional system turn, then turns of the user and the assistant that alternate, as chat templates
demand it: one that starts with the assistant, or has two turns of one role in a row, is a fault. Between two turns of
the assistant may stand the answers of tools. What follows the last answer that is trained has no influence on it, so it
is cut off. An empty system turn is left out, as if it were absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from raytune_lora.config.data import Format
from raytune_lora.config.typed import typed
from raytune_lora.data.columns import mapping, proposed
from raytune_lora.data.faults import FaultError, filled, kind_of, listed, wrong
from raytune_lora.data.json_stream import decode_json
from raytune_lora.data.messages import (
    check_calls,
    checked_text,
    conversation,
    definitions,
    holds_definitions,
    is_answer,
    messages,
    reasoning,
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
_SYSTEM = ("system", "system_prompt")
_COMMON = (*_SYSTEM, "tools", "functions", "reasoning", "label")
OPTIONAL = {
    "alpaca": ("input", "history", *_COMMON),
    "chat": _COMMON,
    "sharegpt": _COMMON,
    "completion": ("history", "context", *_COMMON),
    "text": (),
}
_MAPPED = (
    "reasoning",
    "label",
)  # of OPTIONAL: other data has columns of that name, so that data.columns must name them
_VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# Fields that say, by true or false, whether an answer is a good one.
_LABELS = ("label", "kto_tag", "preferred", "is_preferred", "desirable", "is_chosen")
_KTO = ("prompt", "completion")  # fields beside which 0 and 1 are such a label
_JUDGED = ("is_correct", "is_good", "accepted", "is_accepted")  # the same of data that may hold the good ones alone
_MASKS = {  # of a row, an item a message or an answer: the field of a message that says the same
    "loss_mask": "loss_mask",
    "train_mask": "loss_mask",
    "loss_weights": "weight",
    "weights": "weight",
}
_FLAGS = ("weight", "loss_weight", "sample_weight", "train", "training", "trainable", "loss", "loss_mask", "train_mask")
_MEASURED = ("1.0", "0.0")  # as ``loss``, a number that was measured and no flag
_PICTURES = ("images", "image", "videos", "video", "audios", "audio")


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
        return value if isinstance(value, Fault) else Fault("wrong_types", _no_object(value))
    try:
        fields = _renamed(value, columns) if columns else value
        name, names = _recognize(fields, format, columns)
        if name != "text":
            _refuse_bad(fields, names, columns)
            _refuse_pictures(fields, columns)
        fields, masks = _masked(fields, name, names, columns)
        unused = _unused(fields, name, names, columns, stratify) - _refuse_untrained(fields, columns) - masks
        turns = _TURNS[name](fields, names, unused)
        if name != "text" and "reasoning" in columns:
            thought = reasoning(fields["reasoning"], "reasoning")
            turns = (*turns[:-1], replace(turns[-1], thought=thought or turns[-1].thought))
        tools = () if name == "text" else _tools(fields, unused)
        if name != "text" and not tools and (other := [each for each in unused if holds_definitions(fields.get(each))]):
            raise FaultError(
                "wrong_types", f"{other[0]} defines tools: name it by {typed('data.columns.tools', other[0])}"
            )
        check_calls(turns, tools)
        row = Row(turns, _stratum(value, stratify) if stratify else "", tools, tuple(sorted(unused)))
    except FaultError as error:
        return error.fault
    return row, name


def _no_object(value: Any) -> str:
    said = f"a row is an object, not {kind_of(value)}"
    if isinstance(value, str) and isinstance(decode_json(value), dict):
        return f"{said}: it is an object in JSON that was encoded twice; write it with one json.dumps"
    if isinstance(value, list):
        return f'{said}: write {{"messages": […]}} for a conversation, or an object of named fields'
    return said


def _renamed(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record by the format's names."""
    absent = [f"{column!r} (for {field})" for field, column in columns.items() if column not in value]
    if absent:
        near = {
            field: next(iter(get_close_matches(column, map(str, value), 1)), "…")
            for field, column in columns.items()
            if column not in value
        }
        there = f"there are {listed(value)}: name one of them, {mapping(near)}"
        raise FaultError("missing_fields", f"no column {', '.join(absent)}; {there}")
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
    raise _unrecognized(fields, forms, columns)


_FORMS = {form: tuple(f for f in FIELDS if form is Format.auto or f[0] == form.value) for form in Format}


def _unrecognized(
    fields: dict[str, Any], forms: tuple[tuple[str, tuple[str, ...]], ...], columns: Mapping[str, str]
) -> FaultError:
    if len(forms) > 1:
        _refuse_preferences(fields)
    begun = [names for _, names in forms if any(fields.get(name) is not None for name in names)]
    absent = [[name for name in names if fields.get(name) is None] for names in begun or [names for _, names in forms]]
    wanted = " or ".join(dict.fromkeys("+".join(names) for names in absent))
    there = [columns.get(str(name), str(name)) for name in fields]
    remedy = proposed(fields, begun or [names for _, names in forms], columns)
    return FaultError("missing_fields", f"no {wanted}; there are {listed(there)}{remedy}")


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


def _refuse_bad(fields: dict[str, Any], names: tuple[str, ...], columns: Mapping[str, str]) -> None:
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
        verdicts = _VERDICTS if name == "label" and names == _KTO else ("true", "false")
        if str(content).strip().lower() in verdicts:
            raise FaultError(
                "wrong_types",
                f"{name} says whether the answer is a good one (preference data): "
                f"{typed('data.columns.label', name)} trains the rows where it is "
                "true and leaves the others out; if it says something else, rename the column",
            )

    for name in _JUDGED:
        if str(fields.get(name)).strip().lower() == "false":
            raise FaultError(
                "wrong_types",
                f"{name} is false: a bad answer, which is not trained; if it says something else, rename the column",
            )


def _refuse_untrained(fields: dict[str, Any], columns: Mapping[str, str]) -> set[str]:
    """Raise for a record that a field of its own keeps out of the training; the fields that say that it is in."""
    texts = {name: str(fields.get(name)).strip().lower() for name in _FLAGS if name not in columns}
    said = {name: _VERDICTS.get(text) for name, text in texts.items() if name != "loss" or text not in _MEASURED}
    for name, trained in said.items():
        if trained is False:
            raise FaultError(
                "nothing_trained",
                f"{name} is {fields[name]!r}: the row is not trained; if it says something else, rename the column",
            )
    return {name for name, trained in said.items() if trained}


def _masked(
    fields: dict[str, Any], name: str, names: tuple[str, ...], columns: Mapping[str, str]
) -> tuple[dict[str, Any], set[str]]:
    """The record with what lists say of its messages written into each of them, and the names of such lists."""
    masks = {mask: fields[mask] for mask in _MASKS if mask not in columns and filled(fields.get(mask))}
    masks = {mask: decode_json(said) if isinstance(said, str) else said for mask, said in masks.items()}
    masks = {mask: said for mask, said in masks.items() if isinstance(said, list)}
    if not masks:
        return fields, set()
    is_talk = name in ("chat", "sharegpt")
    talk: Any = [{"role": ASSISTANT, "weight": fields.get("weight")}]
    if is_talk:
        content = fields[names[0]]
        talk = decode_json(content) if isinstance(content, str) else content
        if not isinstance(talk, list):
            return fields, set()  # which is told where it is read
    answers = [number for number, message in enumerate(talk) if is_answer(message)]
    used = set[str]()
    for mask, flags in masks.items():
        if len(flags) in (len(talk), len(answers)):
            used.add(mask)
            talk = _flagged(talk, range(len(talk)) if len(flags) == len(talk) else answers, flags, mask)
        elif mask != "weights":  # a name of many things
            raise FaultError(
                "wrong_types",
                f"{mask} has {len(flags)} items, and there are {len(talk)} messages, {len(answers)} of them answers: "
                "give it an item a message or an answer, or write weight, 0 or 1, into each message",
            )
    if is_talk:
        return ({**fields, names[0]: talk} if used else fields), used
    said = {flag: talk[0][flag] for flag in {_MASKS[mask] for mask in used}}
    if neither := [flag for flag in said.values() if flag not in (0, 1)]:
        raise FaultError("wrong_types", f"{', '.join(used)} must hold 0 or 1, true or false (found {neither[0]!r})")
    return {**fields, **said}, used


def _flagged(talk: list[Any], places: Sequence[int], flags: list[Any], mask: str) -> list[Any]:
    """Messages with a flag in each of those places."""
    name, flagged = _MASKS[mask], [*talk]
    for number, flag in zip(places, flags, strict=True):
        message = flagged[number]
        if isinstance(message, dict):
            if message.get(name) not in (None, flag):
                raise FaultError("wrong_types", f"{mask} and message {number} say opposite things of its training")
            flagged[number] = {**message, name: flag}
    return flagged


def _refuse_pictures(fields: dict[str, Any], columns: Mapping[str, str]) -> None:
    """Raise for a record that is more than text."""
    if pictures := [name for name in _PICTURES if name not in columns and filled(fields.get(name))]:
        why = "and only text is trained; if the text needs none, drop the column"
        raise FaultError("wrong_types", f"{pictures[0]} beside the text, {why}")


# --------------------------------------------------------------------------------------------------------- the formats


def _alpaca(fields: dict[str, Any], names: tuple[str, ...], unused: set[str]) -> tuple[Turn, ...]:
    about = fields.get("input")
    if about is None:
        about = ""
    elif not isinstance(about, str):
        raise wrong("input", "text", about)
    return (
        *_system(fields, unused),
        *_history(fields, unused),
        Turn(USER, checked_text(fields["instruction"], "instruction"), about),
        Turn(ASSISTANT, checked_text(fields["output"], "output")),
    )


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
    if filled(context := fields.get("context")):
        if isinstance(context, str) and isinstance(fields[names[0]], str):
            turns[0] = replace(turns[0], input="" if context in turns[0].text else context)
        else:
            unused.add("context")
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
        unused |= {name for name in _SYSTEM if filled(fields.get(name)) and fields[name] != turns[0].text}
    else:
        turns = [*_system(fields, unused), *turns]
    return conversation(turns)


def _system(fields: dict[str, Any], unused: set[str]) -> tuple[Turn, ...]:
    """The turn that the first of the fields stands for that is not null or empty; none if all are."""
    found = [name for name in _SYSTEM if filled(fields.get(name))]
    for name in found:
        if not isinstance(fields[name], str):
            raise wrong(name, "text", fields[name])
    said = [name for name in found if fields[name].strip()]
    unused |= {name for name in said if fields[name] != fields[said[0]]}
    return (Turn(SYSTEM, fields[said[0]]),) if said else ()


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
