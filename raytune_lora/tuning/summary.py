"""The last lines on the terminal: what came out, and where it is."""

from __future__ import annotations

from typing import Any

from raytune_lora.config.typed import typed


def lines(results: dict[str, Any], folder: str) -> tuple[str, bool]:
    """The closing words, and whether there is a trained model."""
    best = results["best"]
    statuses = [trial["status"] for trial in results["trials"] if not trial.get("confirms")]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    shown = [f"trials: {counts or 'none'}; {results['seconds']['total']:.0f} s in all"]
    if ended := results.get("ended_by"):
        shown += [f"ended early: {ended['why']}", f"to search on: {typed('resume', folder)} {ended['remedy']}"]
    for trial in results["trials"]:
        if trial["error"]:
            shown.append(
                f"trial {trial['trial_id']} {trial['status']}: {trial['error']} (log: {folder}/{trial['log']})"
            )
    if best is None:
        return "\n".join([*shown, f"no trial gave a model; logs: {folder}/trials"]), False
    if confirmation := results.get("confirmation"):
        shown.append(f"confirmed: {confirmation['words']}")
    shown += [
        f"best trial:      {best['trial_id']}",
        f"validation loss: {_figure(results, 'eval_loss', 'validation')}",
        f"exact match:     {_figure(results, 'exact_match', 'test')}",
        f"adapter: {folder}/{best['adapter']}",
        f"report:  {folder}/report.html",
        f"logs:    {folder}/trials/<trial>/logs",
    ]
    return "\n".join(shown), True


def _figure(results: dict[str, Any], name: str, split: str) -> str:
    """A figure before and after, how sure the latter is, and on how many of the split's rows."""
    base, best = results["baseline"], results["best"]
    text = f"{_number(base[name])} before, {_number(best[name])} after"
    if interval := best.get(f"{name}_interval"):
        text += " (95% interval {:.4f} to {:.4f})".format(*interval)
    rows, there = best.get(f"{name}_rows"), results["data"]["rows"].get(split)
    if not rows or not there:
        return text
    return f"{text}, on {'all' if rows == there else f'{rows} of'} {there} {split} rows"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
