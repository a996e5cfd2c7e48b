"""What the report's charts show: lines, dots and legends from the trials of results.json."""

from __future__ import annotations

from typing import Any

from raytune_lora.report.charts import Dot, Line, curves, scatter
from raytune_lora.report.text import STATUS, loss_text, shown

_LEGEND = {  # class of a line: what it shows
    "best": "best",
    "train": "training",
    "completed": "completed",
    "stopped": "stopped early",
    "lost": "failed",
    "reference": "untouched model",
}


def _kind(trial: dict[str, Any], best: dict[str, Any] | None) -> str:
    if best and trial["trial_id"] == best["trial_id"]:
        return "best"
    return {"completed": "completed", "stopped": "stopped"}.get(trial["status"], "lost")


def _points(trial: dict[str, Any], metric: str) -> list[tuple[float, float]]:
    return [(p["samples_seen"], p[metric]) for p in trial["curve"] if p.get(metric) is not None]


def _title(trial: dict[str, Any], names: dict[str, str]) -> str:
    status = STATUS.get(trial["status"], (trial["status"], ""))[0]
    loss = "" if trial["eval_loss"] is None else f" · loss {loss_text(trial['eval_loss'])}"
    params = ", ".join(f"{names[key]} {shown(value)}" for key, value in trial["params"].items() if key in names)
    return f"{trial['trial_id']} · {status}{loss}\n{params}".strip()


def lines_of(r: dict[str, Any], names: dict[str, str]) -> list[Line]:
    """Each trial's losses; the best comes last, to be drawn on top. A single trial shows its training loss too."""
    alone = len(r["trials"]) == 1
    lines = []
    if alone and (points := _points(r["trials"][0], "train_loss")):
        lines.append(Line(points, "train", "training loss", loss_text(points[-1][1], 3)))
    for trial in reversed(r["trials"]):
        if points := _points(trial, "eval_loss"):
            kind = "best" if alone else _kind(trial, r["best"])
            label = loss_text(points[-1][1], 3) if kind == "best" else ""
            lines.append(Line(points, kind, _title(trial, names), label))
    return lines


def loss_curves(lines: list[Line], baseline: float | None) -> list[Any]:
    """The chart of the losses, for a wide and for a narrow screen."""
    return [curves(lines, baseline, *size) for size in ((1024, 372), (360, 300))] if lines else []


def progress(r: dict[str, Any], names: dict[str, str]) -> list[Any]:
    """The lowest loss so far over the samples that all trials were trained on, for a wide and for a narrow screen.

    Trials count one after another, as they were proposed; nothing where the search has measured fewer than two.
    """
    spent = 0.0
    points: list[tuple[float, float]] = []
    dots: list[Dot] = []
    searched = [trial for trial in r["trials"] if not trial["confirms"]]
    for trial in sorted(searched, key=lambda trial: trial["trial_id"]):
        spent += trial["samples_seen"] or 0
        if trial["eval_loss"] is not None:
            lowest = min(trial["eval_loss"], points[-1][1]) if points else trial["eval_loss"]
            points += [(spent, points[-1][1])] if points else []
            points.append((spent, lowest))
            dots.append(Dot(spent, trial["eval_loss"], _kind(trial, r["best"]), _title(trial, names)))
    if len(dots) < 2:
        return []
    line = Line(points, "best", "lowest loss so far", loss_text(points[-1][1], 3))
    axis = "samples trained on by all trials"
    return [curves([line], None, width, height, axis, dots) for width, height in ((1024, 300), (360, 260))]


def legend(r: dict[str, Any], lines: list[Line]) -> list[tuple[str, str]]:
    """The kinds of lines in the chart, and what each is called."""
    best = f"best ({r['best']['trial_id']})" if r["best"] else ""
    words = _LEGEND | {"best": "validation" if len(r["trials"]) == 1 else best}
    kinds = {line.kind for line in lines} | ({"reference"} if r["baseline"].get("trial_loss") is not None else set())
    return [(kind, text) for kind, text in words.items() if kind in kinds]


def scatters(r: dict[str, Any], names: dict[str, str]) -> list[tuple[str, str, Any]]:
    """Each searched parameter's key, short name and plot, the most important first."""
    trials = [t for t in reversed(r["trials"]) if t["eval_loss"] is not None and not t["confirms"]]
    losses = [trial["eval_loss"] for trial in trials]
    plots = []
    for key in sorted(names, key=lambda key: -r["importance"].get(key, 0)):
        dots = []
        for trial in trials:
            value = trial["params"].get(key)
            if value is not None:
                x = value if type(value) in (int, float) else shown(value)
                dots.append(Dot(x, trial["eval_loss"], _kind(trial, r["best"]), _title(trial, names)))
        if len({dot.x for dot in dots}) > 1:
            plots.append((key, names[key], scatter(dots, losses, names[key])))
    return plots
