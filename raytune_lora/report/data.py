"""``data_report.html``: what a data set holds, and whether it is fit for training, from ``data_report.json`` alone.

Schema of ``data_report.json``, version 1. Null stands for what is not known; a check that is off is absent.

- ``schema_version``; ``sources``: ``role`` (``data``, ``validation``, ``test``, ``benchmark``, or ``mix.`` and a name),
  ``name``, ``files`` (the first few names and how many more; of a hub data set, its splits), ``left_out`` (rows
  by reason)
- ``rows``: ``read`` by the source's name, ``left_out`` (of the data's own, mixed-in sources and benchmarks aside),
  ``splits`` (``train``, ``validation``, ``test``), ``reasons`` (those left out, each once by the first
  finding for which it is, or as ``too_long``; they add up to ``left_out``), ``too_long``, ``cut`` (shortened),
  ``groups`` (of the main source's rows that stay in one split: ``count``, rows of the ``largest``, ``rows`` in all)
- ``max_length`` (tokens of a row; null without a tokenizer), ``truncation`` (``drop``, ``right`` or ``left``);
  ``tokens`` and ``trained_tokens`` by split, ``stop_ids`` (tokens that rows train as the end of an answer) and
  ``largest_id`` (of all tokens), null without a tokenizer
- ``findings``: by name ``count`` (rows), ``examples`` (the first few, and one of each reason: ``where``, ``text``,
  ``detail``), ``reasons`` (rows by reason, or by field; empty where there is nothing to tell apart) and ``action``
  (``stop``, ``drop``, ``mask`` or ``report``); under ``pii`` one such object per kind
- ``mixed``: by name ``asked`` and ``share`` (of the training rows), ``rows`` and ``available``
- ``statistics``, of the rows that can be encoded, before duplicates and the like are left out: ``rows``; ``languages``:
  by ISO 639-1 code (or ``other``) ``rows`` and ``share``; ``formats`` and ``turns``: rows by form, and by messages in a
  row (``50`` stands for that many or more); ``lengths``: ``characters``, ``prompt_characters``, ``answer_characters``
  and, with a tokenizer, ``tokens``, ``prompt_tokens`` (not trained) and ``answer_tokens`` (trained), each with ``min``,
  ``max``, ``mean``, ``p50``, ``p90``, ``p99`` and ``histogram`` (pairs of a bar's least length and its rows; a bar's
  lengths reach up to 1.05^4 times the least, bars without rows are absent); ``diversity``: ``asked`` and ``answered``,
  each with ``words``, ``types`` (different words) and ``distinct_1`` to ``distinct_3`` (share of n-grams that differ),
  and their relative ``standard_error``; ``verbs`` and ``first_words`` of instructions: rows by word; ``outliers``:
  ``unit``, and ``low`` and ``high``, between which a row's length is ordinary
- ``padding``: share of padding in padded batches of 4 rows; null without a tokenizer
- ``advice``: sentences; ``gate``: why the data must not be trained on, empty when it is fit
- ``preview``, with a tokenizer: rows, each a list of pairs of a piece of text and whether it is trained
- ``cost``, with a model: ``tokens_per_epoch``, ``steps_per_epoch``, ``global_batch`` (rows a step),
  ``forward_passes_per_step``, ``packing`` (whether it is on)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from raytune_lora.report.charts import Bar, histogram, number
from raytune_lora.report.html import filled, template
from raytune_lora.report.text import amount

SCHEMA_VERSION = 1

# What a report looks like when nothing is known: a key that is absent reads like one that is null or empty.
_REPORT: dict[str, Any] = {
    "sources": [],
    "rows": {},
    "max_length": None,
    "truncation": "drop",
    "tokens": None,
    "trained_tokens": None,
    "findings": {},
    "mixed": {},
    "statistics": {},
    "padding": None,
    "advice": [],
    "gate": [],
    "preview": [],
    "cost": None,
}
_ROWS: dict[str, Any] = {"read": {}, "left_out": 0, "reasons": {}, "splits": {}, "too_long": 0, "cut": 0}

_EXPLAINED = {  # finding: what its rows are
    "unreadable": "no record: broken JSON, a table's line of too few or many fields, no text",
    "missing_fields": "without a field that their form needs, such as the answer",
    "wrong_types": "a field holds a number, a list or the like where text belongs",
    "empty_fields": "a question or an answer of nothing but space",
    "nothing_trained": "every answer is marked as one that is not to be trained",
    "unused_fields": "fields that have no place in a row's form: the model never sees them",
    "unwritten": "thoughts, or text beside calls of tools, that the template leaves out",
    "generation_prompt": "prompted otherwise than a whole conversation is written; trained as prompted",
    "mixed_formats": "in another form than most rows of the data",
    "encoding": "characters that a wrong decoding left, such as Ã© for é",
    "control_characters": "invisible characters, which a model learns like any other",
    "leftovers": "marks of a prompt template or of HTML within the text, or nan for text",
    "exact_duplicates": "the same as an earlier row",
    "near_duplicates": "nearly the same as another row",
    "contradictions": "the same question as another row, and another answer",
    "leakage": "in training and in a test, the same or nearly: the score would flatter",
    "harmful": "words from the list of harmful ones",
    "outliers": "far longer or far shorter than most rows",
}
_PERSONAL = {
    "email": "addresses of e-mail",
    "phone": "telephone numbers",
    "credit_card": "numbers of payment cards, with a valid check digit",
    "iban": "numbers of bank accounts, with valid check digits",
    "resident_number": "Korean resident registration numbers, with a valid check digit",
    "ssn": "social security numbers of the United States",
    "ip_address": "addresses of computers on a network",
    "secret": "keys, tokens and passwords",
}
_SPELLED = {"email": "e-mail", "iban": "IBAN", "ssn": "SSN", "ip_address": "IP address", "encoding": "wrong encoding"}
_ACTIONS = {  # action, in the order of what matters: how it reads, the class of its colour
    "stop": ("stops the job", "bad"),
    "drop": ("left out", "warn"),
    "mask": ("masked", "warn"),
    "report": ("kept", "quiet"),
    "keep together": ("kept, in one split", "quiet"),
}
_ROLES = {
    "data": "training data",
    "validation": "validation rows",
    "test": "test rows",
    "benchmark": "benchmark, not trained on",
}
_LANGUAGES = {
    "en": "English",
    "ko": "Korean",
    "ja": "Japanese",
    "zh": "Chinese",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "ru": "Russian",
    "ar": "Arabic",
    "hi": "Hindi",
    "other": "other or unclear",
}
_BAR = 1.05**4  # ratio of the two ends of a histogram's bar
_MOST_BARS = 6  # of languages, forms and turns
_MOST_WORDS = 12
_OPEN_PREVIEWS = 2  # rows shown without being asked for
# Characters that show as nothing, or that turn the text around them: an override could make it read as something else.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Finding:
    """One line of the table of findings."""

    name: str  # as the config and data_report.json spell it
    title: str
    clause: str  # what its rows are
    count: int
    share: float | None  # of the rows read, benchmarks aside
    action: str  # as it reads
    colour: str  # CSS class
    examples: list[dict[str, str]]  # where, text, detail
    reasons: list[tuple[str, int]]  # with their rows


def render_data(report: dict[str, Any]) -> str:
    """The report as one HTML page that fetches nothing and runs nothing.

    Args:
        report: the content of data_report.json. What is not known may be null, empty or absent.

    Raises:
        ValueError: the report has another schema version.
    """
    if report["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"data_report.json has schema version {report['schema_version']}; this reads {SCHEMA_VERSION}")
    known = filled(_REPORT, _seen(report))
    known["rows"] = filled(_ROWS, known["rows"])
    known["findings"] = filled({}, known["findings"])
    found = _findings(known)
    return template("data.html.j2").render(
        r=known,
        total=sum(known["rows"]["splits"].values()),
        read=_rows_of(known, ("data", "validation", "test")),
        facts=_facts(known),
        divided=_divided(known["rows"]),
        reasons=_reasons(known),
        found=[finding for finding in found if finding.count],
        absent=[finding.title for finding in found if not finding.count],
        off=_off(known["findings"]),
        lengths=_lengths(known),
        mixes=_mixes(known["statistics"]),
        diversity=_diversity(known["statistics"]),
        words=_words(known["statistics"]),
        previews=(known["preview"][:_OPEN_PREVIEWS], known["preview"][_OPEN_PREVIEWS:]),
        sources=_sources(known),
        amount=amount,
        percent=_percent,
    )


def _seen(value: Any) -> Any:
    """The same with every character that cannot be seen replaced by one that can, in names as well."""
    if isinstance(value, dict):
        return {_seen(key): _seen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_seen(item) for item in value]
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


# --------------------------------------------------------------------------------------------------------------- header


def _rows_of(r: dict[str, Any], roles: tuple[str, ...]) -> int:
    """Rows read from the sources of these roles."""
    read, names = r["rows"]["read"], {s["name"] for s in r["sources"] if s["role"].partition(".")[0] in roles}
    return sum(count for name, count in read.items() if name in names)


def _facts(r: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The header's facts: what it is, its value, and a detail."""
    rows, tokens, cost = r["rows"], r["tokens"] or {}, filled({}, r["cost"] or {})
    facts = []
    for split, title in (("train", "Training"), ("validation", "Validation"), ("test", "Test")):
        if split in rows["splits"]:
            count, of = rows["splits"][split], tokens.get(split)
            detail = f"{amount(of)} tokens, {number(round(of / count))} a row" if of and count else ""
            facts.append((title, _counted(count, "row"), detail))
    if r["tokens"] is None:
        facts.append(("Tokens", "not counted", "name a model to count them and to see what is trained"))
    if tokens.get("train") and (trained := (r["trained_tokens"] or {}).get("train")) is not None:
        facts.append(("Trained", _percent(trained / tokens["train"]), "of the training tokens; the rest is only read"))
    if r["max_length"] is not None:
        facts.append(("Longest row", f"{number(r['max_length'])} tokens", _truncated(r)))
    if r["padding"] is not None:
        saved = "which packing saves" if cost.get("packing") else "which training.packing=true saves"
        facts.append(("Padding", _percent(r["padding"]), f"of padded batches of 4 rows, {saved}"))
    if cost.get("steps_per_epoch"):
        passes = cost.get("forward_passes_per_step") or 1
        each = f"of {number(cost['global_batch'])} rows" if cost.get("global_batch") else ""
        times = f"{number(passes)} forward passes a step" if passes > 1 else ""
        per = f"{amount(cost['tokens_per_epoch'])} tokens" if cost.get("tokens_per_epoch") else ""
        facts.append(
            ("One epoch", _counted(cost["steps_per_epoch"], "step"), "; ".join(filter(None, (each, times, per))))
        )
    return facts


def _truncated(r: dict[str, Any]) -> str:
    """What became of longer rows."""
    gone, cut = r["rows"]["too_long"], r["rows"]["cut"]
    end = {"right": "at the end", "left": "at the start"}.get(r["truncation"], "")
    said = [f"{number(cut)} cut {end}".rstrip()] if cut else []
    if gone:
        said.append(f"{number(gone)} longer, left out")
    return ", ".join(said) or "none is longer"


def _divided(rows: dict[str, Any]) -> list[tuple[str, str, int, float]]:
    """Where the rows went: each part's name, class of its colour, rows and share of all."""
    names = {"train": ("training", "s3"), "validation": ("validation", "s4"), "test": ("test", "s2")}
    parts = [(*names.get(split, (split, "s1")), count) for split, count in rows["splits"].items()]
    parts.append(("left out", "", rows["left_out"]))
    total = sum(count for *_, count in parts)
    return [(*part, part[-1] / total) for part in parts if part[-1]]


def _reasons(r: dict[str, Any]) -> str:
    """Why rows are left out, each row once."""
    limit = f" than {number(r['max_length'])} tokens" if r["max_length"] is not None else ""
    long = "longer" + limit if r["truncation"] == "drop" else "with nothing to train in what the cut leaves"
    names = {"too_long": long}
    return ", ".join(
        f"{amount(count)} {names.get(name) or _spelled(name)}" for name, count in r["rows"]["reasons"].items()
    )


# ------------------------------------------------------------------------------------------------------------- findings


def _findings(r: dict[str, Any]) -> list[Finding]:
    """All that was looked for: what stops the job first, then what goes, what is changed and what is only shown."""
    read = _rows_of(r, ("data", "validation", "test", "mix"))
    given = {name: (finding, _EXPLAINED.get(name, "")) for name, finding in r["findings"].items() if name != "pii"}
    for kind, finding in r["findings"].get("pii", {}).items():
        given[f"pii.{kind}"] = finding, _PERSONAL.get(kind, "personal data")
    order = list(_ACTIONS)
    ranked = []
    for name, (finding, clause) in given.items():
        action, count = finding.get("action") or "", finding.get("count") or 0
        reads, colour = _ACTIONS.get(action, (action, "quiet"))
        examples = [
            {key: e.get(key) or "" for key in ("where", "text", "detail")} for e in finding.get("examples") or []
        ]
        share = count / read if 0 < count <= read else None
        reasons = list((finding.get("reasons") or {}).items())
        line = Finding(name, _spelled(name), clause, count, share, reads, colour, examples, reasons)
        ranked.append((order.index(action) if action in order else len(order), -count, line))
    return [line for *_, line in sorted(ranked, key=lambda item: item[:2])]


def _off(findings: dict[str, Any]) -> list[str]:
    """What was not looked for."""
    kinds = [kind for kind in _PERSONAL if kind not in findings.get("pii", {})]
    return [_spelled(name) for name in _EXPLAINED if name not in findings] + [_spelled(kind) for kind in kinds]


def _spelled(name: str) -> str:
    name = name.removeprefix("pii.")
    return _SPELLED.get(name, name.replace("_", " "))


# ---------------------------------------------------------------------------------------------------- what the rows are


def _lengths(r: dict[str, Any]) -> list[tuple[str, Markup, str]]:
    """Histograms of whole rows, prompts and answers, each with its title and its quantiles; in tokens where known."""
    lengths = r["statistics"].get("lengths") or {}
    if lengths.get("tokens"):
        unit, names = "tokens", {"tokens": "Rows", "prompt_tokens": "Read only", "answer_tokens": "Trained"}
    else:
        unit = "characters"
        names = {"characters": "Rows", "prompt_characters": "Prompts", "answer_characters": "Last answers"}
    charts = []
    for key, title in names.items():
        known = lengths.get(key) or {}
        bars = _histogram(known, unit)
        if not any(bar.low for bar in bars):
            continue
        limit = r["max_length"] if key == "tokens" else None
        most = limit if limit is not None and limit <= 2 * bars[-1].high else None
        parts = {"median": "p50", "90% up to": "p90", "longest": "max"}
        note = " · ".join(
            f"{word} {number(known[part])}" for word, part in parts.items() if known.get(part) is not None
        )
        charts.append((f"{title}, in {unit}", histogram(bars, f"{title} by length in {unit}", most), note))
    return charts


def _histogram(lengths: dict[str, Any], unit: str) -> list[Bar]:
    given = lengths.get("histogram") or []
    ends = [low for low, _ in given[1:]] + [(lengths.get("max") or 0) + 1]  # no bar reaches into the next
    bars = []
    for (least, rows), end in zip(given, ends, strict=False):
        low = max(least, lengths.get("min") or 0)
        high = max(math.ceil(min(least * _BAR, end)), low + 1) if low else 1
        last = high - 1
        span = number(low) if last == low else f"{number(low)}\N{EN DASH}{number(last)}"
        bars.append(Bar(low, high, rows, f"{span} {unit}: {_counted(rows, 'row')}"))
    return bars


def _mixes(statistics: dict[str, Any]) -> list[tuple[str, list[tuple[str, int, float]]]]:
    """Languages, forms and messages a row, each with rows and share of all."""
    languages = {_LANGUAGES.get(code, code): of["rows"] for code, of in (statistics.get("languages") or {}).items()}
    turns = statistics.get("turns") or {}
    messages = {f"{n} or more" if n == "50" else n: count for n, count in turns.items()}
    forms = statistics.get("formats") or {}
    mixes = (("Languages", languages), ("Forms", forms), ("Messages a row", messages))
    return [(title, _bars(rows, _MOST_BARS)) for title, rows in mixes if rows]


def _bars(rows: dict[str, int], most: int) -> list[tuple[str, int, float]]:
    """The most common with their shares, the rest together as the last."""
    total = sum(rows.values()) or 1
    shown = sorted(rows.items(), key=lambda item: -item[1])[: most if len(rows) <= most else most - 1]
    if rest := sum(rows.values()) - sum(count for _, count in shown):
        shown.append((f"{len(rows) - len(shown)} others", rest))
    return [(name, count, count / total) for name, count in shown]


def _words(statistics: dict[str, Any]) -> list[tuple[str, list[tuple[str, int, float]]]]:
    """The most common verbs and first words, with rows and share of all rows."""
    total = statistics.get("rows") or 1
    lists = (("Verbs", statistics.get("verbs") or {}), ("First words", statistics.get("first_words") or {}))
    return [
        (title, [(word, count, count / total) for word, count in list(rows.items())[:_MOST_WORDS]])
        for title, rows in lists
        if rows
    ]


def _diversity(statistics: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Words, different ones, and the shares of pairs and triples that differ, of both sides."""
    lines = []
    for side, title in (("asked", "Asked"), ("answered", "Answered")):
        known = (statistics.get("diversity") or {}).get(side) or {}
        if known.get("words"):
            shares = [_percent(known.get(f"distinct_{n}") or 0) for n in (2, 3)]
            lines.append((title, [amount(known["words"]), amount(known.get("types") or 0), *shares]))
    return lines


# -------------------------------------------------------------------------------------------------------------- sources


def _sources(r: dict[str, Any]) -> list[dict[str, Any]]:
    """Each source: what it is for, its name, rows read and, where it is mixed in, what was asked for and what it is."""
    lines = []
    for source in r["sources"]:
        name, role = source.get("name") or "", source.get("role") or ""
        mixed = r["mixed"].get(role.removeprefix("mix.")) if role.startswith("mix.") else None
        line = {"name": name, "role": _ROLES.get(role, role), "read": r["rows"]["read"].get(name), "mixed": ""}
        files = source.get("files") or []
        line["files"] = "" if name.endswith(tuple(files)) else ", ".join(files)
        if mixed:
            asked, share = _percent(mixed.get("asked") or 0), _percent(mixed.get("share") or 0)
            line["role"] = f"mixed in as {role.removeprefix('mix.')}"
            line["mixed"] = f"{share} of training, {asked} asked"
            line["rows"] = f"{number(mixed.get('rows') or 0)} of {number(mixed.get('available') or 0)} usable"
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------------ values as text


def _percent(share: float) -> str:
    """A share to two digits, and never 0 % or 100 % of what is neither."""
    percent = 100 * share
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%" if 0 < percent < 10 or 99 < percent < 100 else f"{percent:.0f}%"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
