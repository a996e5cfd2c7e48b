"""Trials and the journal that records them.

The journal is the truth of a sweep: JSON lines, each on disk before anything is done about it. What a sweep knows is
the fold of its journal, so a sweep that was killed knows all that it knew.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_lora.errors import UserError
from raytune_lora.names import checked
from raytune_lora.training.failures import DIVERGED, FAILED, LOST, OOM, QUOTA, STOPPED
from raytune_lora.tuning.parts import Parts

RUNNING, PAUSED, COMPLETED = "running", "paused", "completed"
ENDED_BADLY = (FAILED, DIVERGED, OOM, LOST, QUOTA)
PACKING = "packing"  # the phase in which a model is asked whether it keeps packed rows apart, where rows are packed
PREPARE, BASELINE, TRIALS, CONFIRM, BEST = PHASES = "prepare", "baseline", "trials", "confirm", "best"

_SILENT = ("clock", "ended_by", "reopened", "mismatch")  # events that nobody watches
_HEARTBEAT = 60.0  # seconds without an event after which the clock is written down

# what a validation reports
MEASURED = (
    "samples_seen",
    "eval_loss",
    "train_loss",
    "training_seconds",
    "trainable_parameters",
    "peak_memory_bytes",
    "micro_batch",
    "checkpoint",
    "last",
)

RETRIED = ("attempt", "kind", "error")


@dataclass
class Trial:
    """What is known of one trial."""

    trial_id: str
    params: dict[str, Any]  # by dotted config key
    status: str = RUNNING
    samples_seen: int = 0
    eval_loss: float | None = None  # the lowest measured
    checkpoint: str | None = None  # of that loss
    latest: str | None = None  # checkpoint of the last measure
    seconds: float = 0.0  # from start to end, all its starts together
    training_seconds: float = 0.0  # in optimizer steps
    trainable_parameters: int | None = None
    peak_memory_bytes: int | None = None  # of the first worker
    micro_batch: int | None = None  # smaller than the config's where memory ran out
    last: bool = False  # whether it was trained to its end
    error: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)  # samples_seen, eval_loss, train_loss
    confirms: str | None = None  # the trial whose parameters it runs again with another seed
    gpus: int = 0  # of all its workers
    retries: int = 0  # new attempts: after memory ran out, or a worker or machine was lost
    resumed: int = 0  # how often it was taken up again after it had ended
    parent: str | None = None  # the trial from whose checkpoint it began
    born: int = 0  # samples that its parent had seen at that checkpoint
    replaces: str | None = None  # the member of the population whose place it took
    until: int | None = None  # samples after which it pauses

    @property
    def ended(self) -> bool:
        return self.status not in (RUNNING, PAUSED)

    def measured(self, report: dict[str, Any]) -> bool:
        """Whether a report is known: a trial that goes on from a checkpoint says again what it measured before."""
        known = {point["samples_seen"]: point["eval_loss"] for point in self.curve}
        return "samples_seen" in report and known.get(report["samples_seen"]) == report["eval_loss"]


@dataclass
class Record:
    """What is known of a sweep or run: the fold of a journal."""

    trials: dict[str, Trial] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)  # finished ones: seconds and what they measured
    clock: float = 0.0  # seconds at work, in all sittings
    since: float | None = None  # Unix time at which its first sitting began
    progressed: float = 0.0  # Unix time of the last event that was not the clock's
    began: float | None = None  # the clock when the first trial started
    ended_by: dict[str, Any] | None = None  # the budget that ended the search, and why
    mismatch: dict[str, Any] | None = None  # where the best adapter is not what its trial measured: losses, and why
    # of the search's trials:
    ended: int = 0  # how many have ended, well or badly
    in_vain: int = 0  # how many ended since one that ended with a lower loss than all before
    gpu_seconds: float = 0.0
    leader: Trial | None = None  # lowest loss of those that run or did not end badly
    _lowest: float = math.inf  # loss of those that did not end badly

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        kind = event["event"]
        self.clock = event.get("clock", self.clock)
        if self.since is None and "time" in event:
            self.since = event["time"] - self.clock
        if kind != "clock":
            self.progressed = event.get("time", self.progressed)
        if kind == "phase":
            self.phases[event["name"]] = event
            self.mismatch = None if event["name"] == BEST else self.mismatch
        elif kind == "trial_started":
            self.began = self.clock if self.began is None else self.began
            self._started(event)
        elif kind == "trial_retried":
            self.trials[event["trial_id"]].retries += 1
        elif kind == "trial_result":
            self._result(self.trials[event["trial_id"]], event)
        elif kind == "trial_paused":
            trial = self.trials[event["trial_id"]]
            trial.status = PAUSED
            trial.seconds += event["seconds"]
        elif kind == "trial_ended":
            self._ended(self.trials[event["trial_id"]], event)
        elif kind == "ended_by":
            self.ended_by = {"budget": event["budget"], "why": event["why"]}
        elif kind == "mismatch":
            self.mismatch = {key: event[key] for key in ("trial_id", "trial", "measured", "tolerance", "why")}
        elif kind == "reopened":
            self.ended_by = self.mismatch = None
            for name in (TRIALS, CONFIRM, BEST):
                self.phases.pop(name, None)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the best model is measured, or no trial gave one."""
        return BEST in self.phases or (TRIALS in self.phases and self.best() is None)

    @property
    def searched(self) -> list[Trial]:
        """The trials that the search proposed; the others run one of these again."""
        return [trial for trial in self.trials.values() if trial.confirms is None]

    def runs(self, trial_id: str) -> list[Trial]:
        """A trial of the search and those that confirm it."""
        return [trial for trial in self.trials.values() if trial_id in (trial.trial_id, trial.confirms)]

    def best(self) -> Trial | None:
        """The trial with the lowest validation loss among those that did not end badly.

        Once the best configurations are confirmed, it is the best run of the one that won.
        """
        confirmed = self.phases.get(CONFIRM)
        among = self.searched if confirmed is None else self.runs(confirmed["winner"])
        return lowest(among)

    def lineage(self, trial: Trial) -> list[Trial]:
        """The trials whose training led to this one, the first one first, and itself last."""
        found = [trial]
        while found[0].parent is not None:
            found.insert(0, self.trials[found[0].parent])
        return found

    def _started(self, event: dict[str, Any]) -> None:
        name = checked(event["trial_id"], "the journal", deep=False)  # a trial's folder has its name
        trial = self.trials.get(name)
        if trial is None:
            given = {key: event[key] for key in ("confirms", "parent", "born", "replaces") if key in event}
            trial = self.trials[name] = Trial(name, event["params"], **given)
            trial.samples_seen = trial.born
            if trial.replaces is not None and not self.trials[trial.replaces].ended:
                self._ended(self.trials[trial.replaces], {"status": STOPPED, "error": None, "seconds": 0.0})
        if trial.ended:
            trial.resumed += 1
            self.ended -= trial.confirms is None
        trial.status, trial.gpus, trial.until = RUNNING, event.get("gpus", 0), event.get("until")

    def _result(self, trial: Trial, event: dict[str, Any]) -> None:
        seen = event["samples_seen"]
        # a trial that goes on from a checkpoint measures again what it measured after it
        trial.curve = [point for point in trial.curve if point["samples_seen"] < seen]
        trial.curve.append({key: event[key] for key in ("samples_seen", "eval_loss", "train_loss")})
        trained = max(0.0, event["training_seconds"] - trial.training_seconds)
        trial.samples_seen = seen
        trial.training_seconds = event["training_seconds"]
        trial.trainable_parameters = event["trainable_parameters"]
        trial.peak_memory_bytes = event["peak_memory_bytes"]
        trial.micro_batch, trial.last, trial.latest = event["micro_batch"], event["last"], event["checkpoint"]
        if math.isfinite(event["eval_loss"]) and (trial.eval_loss is None or event["eval_loss"] <= trial.eval_loss):
            trial.eval_loss, trial.checkpoint = event["eval_loss"], event["checkpoint"]
        if trial.confirms is None:
            self.gpu_seconds += trial.gpus * trained
            self.leader = lowest([trial] if self.leader is None else [self.leader, trial])

    def _ended(self, trial: Trial, event: dict[str, Any]) -> None:
        again = trial.ended
        trial.status, trial.error = event["status"], event["error"]
        trial.seconds += event["seconds"]
        if trial.confirms is not None or again:
            return
        self.ended += 1
        if trial.status in ENDED_BADLY and self.leader is trial:
            self.leader = lowest(self.searched)
        loss = math.inf if trial.eval_loss is None or trial.status in ENDED_BADLY else trial.eval_loss
        self.in_vain = 0 if loss < self._lowest else self.in_vain + (not trial.resumed)
        self._lowest = min(self._lowest, loss)


def lowest(trials: list[Trial]) -> Trial | None:
    """The one with the lowest validation loss among those that did not end badly."""
    able = [t for t in trials if t.eval_loss is not None and t.status not in ENDED_BADLY]
    return min(able, key=lambda t: (t.eval_loss, t.trial_id), default=None)


class Journal:
    """An append-only file of events, and the record they add up to."""

    def __init__(
        self,
        path: Path,
        watch: Callable[[dict[str, Any], Record], None] = lambda _event, _record: None,
        began: float | None = None,
        parts: Parts | None = None,
    ) -> None:
        """
        Args:
            path: of the file; what it holds already is read.
            watch: called with each new event of a trial or phase once it is on disk and in the record.
            began: when this sitting began, as ``time.monotonic`` says; None: now.
            parts: of the journal in a store, where the sweep is in one: what it holds replaces the file.
        """
        self.record = Record()
        self._began = time.monotonic() if began is None else began
        self._path = path
        self._watch = watch
        self._parts = parts
        if parts is not None:
            path.write_bytes(parts.open())
        if path.exists():
            self.record, _, whole = replay(path)
            os.truncate(path, whole)
        self._before = self.record.clock

    @property
    def clock(self) -> float:
        """Seconds at work until now, in all sittings; up to a minute of one that was killed is lost."""
        return self._before + time.monotonic() - self._began

    @property
    def elapsed(self) -> float:
        """Seconds since the first sitting began, those between sittings among them, by the clocks of their machines."""
        return self.clock if self.record.since is None else max(self.clock, time.time() - self.record.since)

    def keep_time(self) -> None:
        """Write the clock down where nothing else has for a while, and see that this process may still write."""
        self.check()
        if self.clock - self.record.clock > _HEARTBEAT:
            self.append("clock")

    def check(self) -> None:
        """See that this process may write, where the sweep is in a store.

        Raises:
            StorageError: another may soon.
            JobFailed: another may.
        """
        if self._parts is not None:
            self._parts.check()

    def append(self, event: str, **values: Any) -> None:
        """Record one event durably."""
        entry = {"time": time.time(), "clock": round(self.clock, 3), "event": event, **values}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        self._write(line.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's own escape
        self.record.add(entry)
        if event not in _SILENT:
            self._watch(entry, self.record)

    def report(self, trial_id: str, report: dict[str, Any]) -> None:
        """Record what a trial says while it runs: a measure that is not known, or that it was tried again."""
        if trial_id in self.record.trials and self.record.trials[trial_id].measured(report):
            return
        event, keys = ("trial_retried", RETRIED) if "attempt" in report else ("trial_result", MEASURED)
        self.append(event, trial_id=trial_id, **{key: report[key] for key in keys})

    def _write(self, line: bytes) -> None:
        """A line whole, or nothing: what follows half a line could not be read."""
        if self._parts is not None:
            self._parts.append(line)
        with self._path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except BaseException:
                os.ftruncate(file.fileno(), whole)
                raise


def replay(path: Path) -> tuple[Record, list[dict[str, Any]], int]:
    """What a journal tells, its events, and how many bytes they take: a line cut short by a kill was never acted on.

    Raises:
        UserError: a line is damaged, or names a trial that leads out of the folder.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    record, events = Record(), list[dict[str, Any]]()
    for number, line in enumerate(data[:whole].split(b"\n")[:-1]):
        try:
            events.append(json.loads(line))
            record.add(events[-1])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number + 1}: it is damaged, as after a loss of power; bring back a copy of the file, "
                f"or keep the lines before it alone (head -n {number}): what those do not tell is done again"
            ) from error
    return record, events, whole


def trial_name(number: int) -> str:
    """The name of the study's trial of that number."""
    return f"{number:04d}"
