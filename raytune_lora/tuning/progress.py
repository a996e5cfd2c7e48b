"""What is said while a sweep runs: a live table on a terminal, a line for each event elsewhere, or JSON for machines.

Of the latter each line has ``time`` (seconds since 1970), ``clock`` (seconds of this sitting), ``sweep``, ``event`` and
``message``: an event of the journal with all its facts, or ``note`` or ``doing``.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from raytune_lora.names import printable
from raytune_lora.tuning.trials import PAUSED, Record, Trial

_COLOURS = {"completed": "green", "stopped": "yellow", "running": "cyan"}
_SHOWN = 20  # trials in the live table


class Progress:
    """Follows the journal."""

    def __init__(self, title: str, total: int, as_json: bool = False) -> None:
        """
        Args:
            title: of the table.
            total: trials to be run.
            as_json: print for machines.
        """
        self._as_json = as_json
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._title = title
        self._total = total
        self._goal = 0
        self._record = Record()
        self._doing = ""
        self._live: Live | None = None
        self._began = time.monotonic()

    def know(self, goal: int, record: Record) -> None:
        """Samples of a whole trial, once the data is known, and what was done before."""
        self._goal = goal
        self._record = record
        if record.trials:
            self.note(f"going on: {standing(record)}")

    def watch(self, event: dict[str, Any], record: Record) -> None:
        """Take a new event of the journal."""
        self._record = record
        if self._live is not None:
            self._live.update(self)
        else:
            self._say(line(event, record), event)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show what is being done for as long as it takes."""
        self._doing = what
        if self._live is None:
            self._say(what, {"event": "doing"})
        try:
            yield
        finally:
            self._doing = ""

    def note(self, words: str) -> None:
        """Say something that stays, above the table where there is one."""
        self._say(words, {"event": "note"})

    def _say(self, words: str, event: dict[str, Any]) -> None:
        if self._as_json:
            seconds = round(time.monotonic() - self._began, 3)
            entry = {"time": time.time(), **event, "clock": seconds, "sweep": self._title, "message": words}
            print(json.dumps(entry, ensure_ascii=False), file=sys.stderr, flush=True)
        elif words:
            self._console.print(printable(f"{self._clock()} {words}"), soft_wrap=True)

    @contextlib.contextmanager
    def shown(self) -> Iterator[Progress]:
        """Live on a terminal; lines elsewhere."""
        if self._as_json or not self._console.is_terminal:
            yield self
            return
        with Live(self, console=self._console, refresh_per_second=4, transient=False) as live:
            self._live = live
            try:
                yield self
            finally:
                self._doing = ""
                live.update(self, refresh=True)
                self._live = None

    def __rich__(self) -> Group:
        title = f"{self._title}: {self._record.ended} of {self._total} trials ended, {self._clock()}"
        parts: list[Any] = [table(self._record, title, self._goal)] if self._record.trials else []
        if self._doing:
            parts.append(Spinner("dots", Text(f"{self._clock()} {self._doing}")))
        return Group(*parts)

    def _clock(self) -> str:
        return clock(time.monotonic() - self._began)


def table(record: Record, title: str, goal: int | None) -> Table:
    """The newest trials, the best one in bold.

    Args:
        record: of the sweep.
        title: above the table.
        goal: samples of a whole trial; None where they are not known.
    """
    trials = list(record.trials.values())
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    shown = Table(title=title, title_justify="left")
    shown.add_column("trial")
    shown.add_column("status")
    for key in keys:
        shown.add_column(key.rpartition(".")[2], justify="right")
    for column in ("samples", "eval loss", "seconds"):
        shown.add_column(column, justify="right")
    best = record.best()
    for trial in trials[-_SHOWN:]:
        style = "bold" if trial is best else ""
        shown.add_row(
            trial.trial_id,
            Text(printable(trial.status), style=_COLOURS.get(trial.status, "red")),
            *(_short(trial.params.get(key)) for key in keys),
            f"{trial.samples_seen}/{goal}" if goal else str(trial.samples_seen),
            "" if trial.eval_loss is None else f"{trial.eval_loss:.4f}",
            f"{trial.seconds:.0f}" if trial.ended else "",
            style=style,
        )
    return shown


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:d}:{rest:02d}"


def line(event: dict[str, Any], record: Record) -> str:
    """One event in words; nothing for events that say nothing new."""
    if event["event"] == "phase":
        loss, match = event.get("eval_loss"), event.get("exact_match")
        measured = f", validation loss {loss:.4f}{_on(event, 'eval_loss')}" if loss is not None else ""
        measured += f", exact match {match:.2f}{_on(event, 'exact_match')}" if match is not None else ""
        return f"{event['name']} done in {event['seconds']:.0f} s{measured}"
    if event["event"] == "mismatch":
        return str(event["why"])
    if event["event"] == "moved":
        return "going on with " + ", ".join(f"{key}={_short(value)}" for key, value in event["changes"].items())
    if "trial_id" not in event:
        return ""
    trial: Trial = record.trials[event["trial_id"]]
    if event["event"] == "trial_started":
        values = ", ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in trial.params.items())
        if event.get("parent") and not trial.curve:
            return f"trial {trial.trial_id} started from {trial.parent} at {trial.born} samples: {values}"
        if trial.curve:
            return f"trial {trial.trial_id} goes on after {trial.samples_seen} samples"
        return f"trial {trial.trial_id} started: {values}"
    if event["event"] == "trial_retried":
        return f"trial {trial.trial_id} goes on ({event['kind']}): {event['error']}"
    if event["event"] == "trial_result":
        return f"trial {trial.trial_id}: validation loss {event['eval_loss']:.4f} after {event['samples_seen']} samples"
    why = f": {trial.error}" if trial.error else ""
    ended = f"trial {trial.trial_id} {trial.status} after {trial.samples_seen} samples, {trial.seconds:.0f} s{why}"
    return ended if trial.status == PAUSED else f"{ended}; {standing(record)}"


def standing(record: Record) -> str:
    """How many trials have ended, and the best of all."""
    best = record.best()
    found = "" if best is None else f", lowest validation loss {best.eval_loss:.4f} (trial {best.trial_id})"
    return f"{record.ended} ended{found}"


def _on(event: dict[str, Any], figure: str) -> str:
    rows = event.get(f"{figure}_rows")
    return "" if rows is None else f" on {rows} rows"


_STANDING = re.compile(r"\b(\d+) ended(?:, lowest validation loss (\d+\.\d+) \(trial (\w+)\))?$")
_MEASURED = re.compile(r"trial (\w+): validation loss (\d+\.\d+) after")


class Tally:
    """How a sweep stands, by the lines that it printed: what is known of one whose folder is out of sight."""

    def __init__(self, total: int, log: str = "") -> None:
        """
        Args:
            total: trials to be run.
            log: printed so far.
        """
        self._total = total
        self._ended = 0
        self._losses: dict[str, float] = {}
        for words in log.splitlines():
            self.add(words)

    def add(self, words: str) -> None:
        """Take a line in, as people or machines are told."""
        if words.startswith("{"):
            with contextlib.suppress(ValueError):
                words = str(json.loads(words).get("message"))
        if found := _STANDING.search(words):
            self._ended = int(found[1])
            name, loss = found[3], found[2]
        elif found := _MEASURED.search(words):
            name, loss = found[1], found[2]
        if found and name:
            self._losses[name] = min(float(loss), self._losses.get(name, math.inf))

    def __str__(self) -> str:
        best = min(self._losses, key=lambda name: (self._losses[name], name), default=None)
        shown = f"{self._ended} of {self._total} trials ended"
        return shown if best is None else f"{shown}, lowest validation loss {self._losses[best]:.4f} (trial {best})"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))
