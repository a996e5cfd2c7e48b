"""``raytune-lora status``: how a sweep stands, once or followed, for people and for programs."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from raytune_lora.names import printable
from raytune_lora.tuning.progress import clock, line, table
from raytune_lora.tuning.status import RUNNING, Status, budget, detail, hints, look, refresh, summary
from raytune_lora.tuning.trials import Record

_EVERY = 1.0  # seconds between two looks


def show(folder: str, *, as_json: bool = False, follow: bool = False, trial_id: str | None = None) -> int:
    """Print how a sweep stands, and with ``follow`` go on until no process works on it any more.

    Args:
        folder: of the sweep or run, or its URI.
        as_json: print an object for programs; followed, one a line, whenever something has changed.
        follow: do not end before the sweep does.
        trial_id: show this trial.

    Returns:
        The exit status.

    Raises:
        UserError: there is no such sweep, or no such trial in it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _show(look(folder, Path(scratch)), as_json, follow, trial_id)
    return 0


def _show(status: Status, as_json: bool, follow: bool, trial_id: str | None) -> None:
    if as_json:
        _print_json(status, trial_id, follow)
        return
    console = Console(highlight=False, markup=False, emoji=False)
    told = len(status.events) if trial_id is None else _whole_lines(status.log(trial_id))
    if not (follow and console.is_terminal):
        console.print(_view(status, trial_id), soft_wrap=trial_id is not None)
    if follow and console.is_terminal:
        with Live(_view(status, trial_id), console=console, auto_refresh=False) as live:
            for now in _looks(status):
                live.update(_view(now, trial_id), refresh=True)
    elif follow:
        _print_news(status, trial_id, told)


def _looks(status: Status) -> Iterator[Status]:
    """The sweep at each look, until no process works on it."""
    while status.state == RUNNING:
        time.sleep(_EVERY)
        status = refresh(status)
        yield status


def _print_json(status: Status, trial_id: str | None, follow: bool) -> None:
    def facts(of: Status) -> dict[str, Any]:
        return summary(of) | ({} if trial_id is None else {"trial": detail(of, trial_id)})

    print(json.dumps(facts(status), ensure_ascii=False, indent=None if follow else 2), flush=True)
    known = (status.size, status.state)
    for now in _looks(status) if follow else ():
        if (now.size, now.state) != known:
            known = (now.size, now.state)
            print(json.dumps(facts(now), ensure_ascii=False), flush=True)


def _print_news(status: Status, trial_id: str | None, told: int) -> None:
    """What is new at each look, in lines: of the sweep's journal, or of a trial's log.

    Args:
        status: at the first look.
        trial_id: of the trial; None: the journal.
        told: events of the journal, or bytes of the log, that have been shown.
    """
    now = status
    for now in _looks(status):
        if trial_id is None:
            record = Record()
            for number, event in enumerate(now.events):
                record.add(event)
                if number >= told and (words := line(event, record)):
                    print(printable(f"{clock(event['clock'])} {words}"), flush=True)
            told = len(now.events)
        else:
            told = _print_log(now, trial_id, told)
            if now.record.trials[trial_id].ended:
                return
    print(f"{now.folder.name}: {now.state}", *(f"hint: {hint}" for hint in hints(now)), sep="\n")


def _whole_lines(log: Path) -> int:
    """Bytes of a log up to the end of its last whole line, which is what has been shown of it."""
    return log.read_bytes().rfind(b"\n") + 1 if log.is_file() else 0


def _print_log(status: Status, trial_id: str, told: int) -> int:
    log = status.log(trial_id)
    if log.is_file():
        with log.open("rb") as file:
            file.seek(told)
            data = file.read()
        sys.stdout.write(printable(data.decode(errors="replace")))
        sys.stdout.flush()
        told += len(data)
    return told


# ----------------------------------------------------------------------------------------------------------- for people


def _view(status: Status, trial_id: str | None) -> Group:
    if trial_id is not None:
        return _trial_view(status, trial_id)
    parts: list[Any] = [Text(printable(words)) for words in _head(status)]
    if status.record.trials:
        parts.append(table(status.record, "", status.goal))
    return Group(*parts, *(Text(f"hint: {hint}", style="yellow") for hint in hints(status)))


def _head(status: Status) -> Iterator[str]:
    facts, record = summary(status), status.record
    doing = f", {status.doing}" if status.doing else ""
    yield f"{facts['name']}: {status.state}{doing}; at work for {clock(status.seconds)}{_age(status)}"
    counts = ", ".join(f"{n} {name}" for name, n in facts["counts"].items() if name not in ("ended", "total"))
    yield f"trials: {record.ended} of {status.total} ended" + (f" ({counts})" if counts else "")
    base, best = facts["baseline"], facts["best"]
    if best:
        key = "trial_loss" if best["eval_loss"] is None else "eval_loss"  # both on the same rows
        before = f" ({base[key]:.4f} before)" if base and base[key] is not None else ""
        rows = f" on {best['eval_loss_rows']} rows" if best["eval_loss"] is not None else ""  # a trial's are fewer
        yield f"best:   trial {best['trial_id']}, validation loss {best[key]:.4f}{rows}{before}"
    for key, spent in budget(status).items():
        used = "none yet" if spent["used"] is None else f"{spent['used']:g}"
        yield f"budget: {key} {used} of {spent['limit']:g}"
    if status.eta is not None:
        yield f"left:   about {clock(status.eta)}"


def _age(status: Status) -> str:
    if status.age is None:
        return ""
    age = max(0.0, status.age)
    return f", last event {age:.0f} s ago" if age < 120 else f", last event {age / 60:.0f} minutes ago"


def _trial_view(status: Status, trial_id: str) -> Group:
    facts = detail(status, trial_id)
    head = [f"trial {trial_id} of {status.folder.name}: {facts['status']}, {facts['samples_seen']} samples"]
    head += [f"  {key}={value}" for key, value in facts["params"].items()]
    head += [f"error: {facts['error']}"] if facts["error"] else []
    curve = [f"validation loss {p['eval_loss']:.4f} after {p['samples_seen']} samples" for p in facts["curve"]]
    steps = [
        ", ".join(f"{key} {value:.4g}" for key, value in step.items() if isinstance(value, (int, float)))
        for step in facts["steps"][-5:]
    ]
    return Group(
        *(Text(printable(words)) for words in [*head, *curve, *steps, f"log: {status.log(trial_id)}", *facts["lines"]])
    )
