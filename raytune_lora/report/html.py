"""From results.json to the page: what to show, in which words and order. The template says how it looks."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from raytune_lora.report.charts import number
from raytune_lora.report.plots import legend, lines_of, loss_curves, progress, scatters
from raytune_lora.report.text import STATUS, amount, date, duration, literal, loss_text, shown

SCHEMA_VERSION = 2

# What a result looks like when nothing is known: a key that is absent reads like one that is null or empty.
_RESULTS: dict[str, Any] = {
    "kind": "sweep",
    "name": "",
    "version": "",
    "state": "finished",
    "created": "",
    "model": {},
    "data": {},
    "search": None,
    "baseline": {},
    "best": None,
    "ended_by": None,
    "remarks": [],
    "confirmation": None,
    "trials": [],
    "importance": {},
    "examples": [],
    "seconds": {},
}
_TRIAL: dict[str, Any] = {"trial_id": "", "status": "", "params": {}, "curve": [], "parameters": {}}
_TRIAL |= dict.fromkeys(
    ("confirms", "parent", "born", "eval_loss", "samples_seen", "seconds", "training_seconds", "error", "log")
)
_BEST: dict[str, Any] = {"trial_id": "", "params": {}, "mismatch": None}
_BEST |= dict.fromkeys(("eval_loss", "trial_loss", "exact_match", "adapter", "loading"))

_STAGES = {
    "prepare": "data and model",
    "packing": "packing",
    "baseline": "baseline",
    "trials": "trials",
    "confirm": "confirmation",
    "best": "best adapter",
}
_SAMPLERS = {"tpe": "TPE", "gp": "GP"}
_SCHEDULERS = {
    "asha": "ASHA",
    "hyperband": "HyperBand",
    "median": "median stopping",
    "pbt": "PBT",
    "none": "no early stopping",
}


@dataclass(frozen=True)
class Measure:
    """One number of the untouched model beside the same of the best adapter."""

    title: str
    texts: tuple[str | None, str | None]  # before and after
    bars: tuple[float, float]  # lengths, 0 to 1
    change: str | None
    better: bool
    note: str


def render(results: dict[str, Any]) -> str:
    """The report as one HTML page that fetches nothing.

    Args:
        results: the content of results.json. What is not known may be null, empty or absent.

    Raises:
        ValueError: the results have another schema version.
    """
    if results["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"results.json has schema version {results['schema_version']}; this reads {SCHEMA_VERSION}")
    known = filled(_RESULTS, results)
    known["best"] = filled(_BEST, known["best"]) if known["best"] else None
    known["trials"] = _best_first([filled(_TRIAL, trial) for trial in known["trials"]], known["best"])
    names = _short_names(known["trials"])
    lines = lines_of(known, names)
    return template("report.html.j2").render(
        r=known,
        names=names,
        facts=_facts(known),
        measures=_measures(known),
        charts=loss_curves(lines, known["baseline"].get("trial_loss")),
        trial_rows=_note(
            "on", _trial_rows(known), (known["data"].get("rows") or {}).get("validation"), "validation rows"
        ),
        legend=legend(known, lines),
        progress=progress(known, names),
        plots=scatters(known, names),
        importance=sorted(known["importance"].items(), key=lambda item: -item[1]),
        tally=_tally(known["trials"]),
        examples=[_example(example) for example in known["examples"]],
        overrides=" ".join(_override(k, v) for k, v in known["best"]["params"].items()) if known["best"] else "",
        stages=_stages(known["seconds"]),
        training=_training_share(known["trials"]),
    )


@cache
def template(name: str) -> Template:
    """One of the templates beside this file, with the filters that they share."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"value": shown, "loss": loss_text, "duration": duration}
    environment.globals["status"] = lambda name: STATUS.get(name, (name, "quiet"))
    return environment.get_template(name)


def filled(empty: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given, with what stands for nothing where a key is absent or null."""
    return empty | {key: value for key, value in given.items() if value is not None}


def _best_first(trials: list[dict[str, Any]], best: dict[str, Any] | None) -> list[dict[str, Any]]:
    winner = best["trial_id"] if best else None

    def rank(trial: dict[str, Any]) -> tuple[bool, float, str]:
        loss = trial["eval_loss"]
        return trial["trial_id"] != winner, math.inf if loss is None else loss, trial["trial_id"]

    return sorted(trials, key=rank)


def _short_names(trials: list[dict[str, Any]]) -> dict[str, str]:
    """Each searched parameter's key and its last part, where that tells it from the others."""
    keys = list(dict.fromkeys(key for trial in trials if not trial["confirms"] for key in trial["params"]))
    ends = Counter(key.split(".")[-1] for key in keys)
    return {key: key.split(".")[-1] if ends[key.split(".")[-1]] == 1 else key for key in keys}


# ------------------------------------------------------------------------------------------------- header and headline


def _facts(r: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The header's facts: what it is, its value, and a detail."""
    model, data, search, rows = r["model"], r["data"], r["search"], r["data"].get("rows") or {}
    size = f"{amount(model['parameters'])} parameters" if model.get("parameters") else ""
    split = ", ".join(f"{number(count)} {name}" for name, count in rows.items())
    facts = [
        ("Model", model.get("name") or "", size),
        ("Data", data.get("name") or "", f"{split} rows" if split else ""),
    ]
    if search:
        sampler, scheduler = search.get("sampler") or "", search.get("scheduler") or ""
        how = " + ".join(filter(None, [_SAMPLERS.get(sampler, sampler), _SCHEDULERS.get(scheduler, scheduler)]))
        at_once = search.get("concurrent") or 1
        beside = f", {at_once} at a time" if at_once > 1 else ""
        searched = sum(not trial["confirms"] for trial in r["trials"])
        asked = search.get("trials") or searched
        count = f"{searched} of {asked}" if r["ended_by"] else str(asked)
        facts.append(("Search", how, f"{count} trials{beside}"))
    if r["best"] and r["trials"] and (trainable := r["trials"][0]["parameters"].get("trainable")):
        detail = ""
        if whole := model.get("parameters"):
            share = 100 * trainable / whole
            detail = f"{share:{'.0f' if share >= 10 else '.2g'}}% of the model"
        facts.append(("Best adapter" if search else "Adapter", f"{amount(trainable)} parameters", detail))
    total = r["seconds"].get("total")
    facts.append(("Written", date(r["created"]), f"took {duration(total)}" if total is not None else ""))
    return [fact for fact in facts if fact[1]]


def _measures(r: dict[str, Any]) -> list[Measure]:
    """The headline: what is known of the loss and the exact match, before and after."""
    best, rows = r["best"] or {}, r["data"].get("rows") or {}
    measures = []
    key, asked = _compared(r)
    before, after = r["baseline"].get(key), best.get(key)
    if before is not None or after is not None:
        change = _signed(100 * (after - before) / before, "%") if before and after is not None else None
        longest = max(before or 0, after or 0) or 1
        measures.append(
            Measure(
                "Validation loss",
                (None if before is None else loss_text(before, 3), None if after is None else loss_text(after, 3)),
                ((before or 0) / longest, (after or 0) / longest),
                change,
                better=change is not None and after <= before,
                note=_note("on", asked, rows.get("validation"), "validation rows")
                + (
                    _interval(best, r["baseline"], "eval_loss", lambda v: loss_text(v, 3)) if key == "eval_loss" else ""
                ),
            )
        )
    before, after = r["baseline"].get("exact_match"), best.get("exact_match")
    if before is not None or after is not None:
        change = _signed(100 * (after - before), " points") if None not in (before, after) else None
        asked = best.get("exact_match_rows") or r["baseline"].get("exact_match_rows")
        right = f"{round(after * asked)} of {asked} answers right, " if asked and after is not None else ""
        measures.append(
            Measure(
                "Exact match",
                (None if before is None else f"{before:.0%}", None if after is None else f"{after:.0%}"),
                (before or 0, after or 0),
                change,
                better=change is not None and after >= before,
                note=right
                + _note("on", asked, rows.get("test"), "test rows")
                + _interval(best, r["baseline"], "exact_match", lambda v: f"{v:.0%}"),
            )
        )
    return measures


def _compared(r: dict[str, Any]) -> tuple[str, int | None]:
    """Which loss is shown of both, so that it is on the same rows, and how many these are."""
    best = r["best"]
    measured = best and (best["eval_loss"] is not None or best["mismatch"])
    if best and not measured and best["trial_loss"] is not None:
        return "trial_loss", _trial_rows(r)
    return "eval_loss", (best or r["baseline"]).get("eval_loss_rows")


def _note(before: str, asked: int | None, there: int | None, what: str) -> str:
    """How many rows a figure is of, and of how many: ``on all 74 validation rows``."""
    if not asked:
        return f"{before} the {what}"
    return (
        f"{before} all {asked} {what}"
        if asked == there
        else f"{before} {asked}{f' of {there}' if there else ''} {what}"
    )


def _interval(best: dict[str, Any], baseline: dict[str, Any], figure: str, text: Callable[[float], str]) -> str:
    known = (baseline if best.get(figure) is None else best).get(f"{figure}_interval")
    return f" · 95% interval {text(known[0])}\N{EN DASH}{text(known[1])}" if known else ""


def _signed(value: float, unit: str) -> str:
    return f"{value:+.0f}{unit}".replace("-", "\N{MINUS SIGN}")


def _trial_rows(r: dict[str, Any]) -> int | None:
    """How many rows trials are measured on: 0 asks for all, and no more can be used than there are."""
    asked, there = r["data"].get("loss_rows"), (r["data"].get("rows") or {}).get("validation")
    return min(asked, there) if asked and there else asked or there


# -------------------------------------------------------------------------------------------- trials, examples and time


def _tally(trials: list[dict[str, Any]]) -> str:
    """How many trials ended in which way."""
    counts = Counter(trial["status"] for trial in trials)
    order = [*STATUS, *sorted(set(counts) - set(STATUS))]
    return ", ".join(f"{counts[name]} {STATUS.get(name, (name, ''))[0]}" for name in order if counts[name])


def _example(example: dict[str, Any]) -> dict[str, Any]:
    prompt, expected = example.get("prompt") or "", example.get("expected") or ""
    base, tuned = example.get("base"), example.get("tuned")
    return {
        "prompt": prompt,
        "message": _message(prompt),
        "base": base,
        "base_right": base is not None and base.strip() == expected.strip(),
        "tuned": tuned,
        "pieces": _difference(tuned or "", expected),
        "tuned_right": tuned is not None and tuned.strip() == expected.strip(),
        "expected": expected,
    }


def _message(prompt: str) -> str:
    """What an Alpaca prompt is about: its input, or else its instruction."""
    for heading in ("### Input:", "### Instruction:"):
        body = prompt.partition(heading)[2].partition("\n### ")[0].strip()
        if body:
            return body
    return prompt.strip()


def _difference(text: str, expected: str) -> tuple[str, str, str]:
    """The text before, between and after the first and the last place where it is not as expected."""
    if text.strip() == expected.strip():
        return text, "", ""
    start = _shared(text, expected)
    end = len(text) - _shared(text[start:][::-1], expected[start:][::-1])
    return text[:start], text[start:end], text[end:]


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _override(key: str, value: Any) -> str:
    """A Hydra override for a shell, exact to the last digit."""
    bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value)
    return shlex.quote(f"{key}={value if bare else literal(value)}")


def _stages(seconds: dict[str, float | None]) -> list[tuple[str, float, float]]:
    """Where the time went: each stage's name, seconds and share of the whole."""
    parts = {_STAGES.get(name, name): s for name, s in seconds.items() if name != "total" and s}
    total = max(seconds.get("total") or 0, sum(parts.values()))
    if not total:
        return []
    if (other := total - sum(parts.values())) > 0.01 * total:
        parts["other"] = other
    return [(name, spent, spent / total) for name, spent in parts.items()]


def _training_share(trials: list[dict[str, Any]]) -> tuple[float, float] | None:
    """All trials' seconds, and the share of it that trained."""
    timed = [trial for trial in trials if trial["seconds"] and trial["training_seconds"] is not None]
    whole = sum(trial["seconds"] for trial in timed)
    return (whole, min(1, sum(trial["training_seconds"] for trial in timed) / whole)) if whole else None
