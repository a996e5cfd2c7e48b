"""How a sweep stands, from its folder alone, here or in a store: no cluster, no Ray and no torch are needed to look.

``--json`` prints one object, schema version 2. Null stands for what is not known.

- ``schema_version``, ``name``, ``folder``, ``kind`` (``sweep`` or ``run``)
- ``state``: ``running``, ``interrupted`` (no process works on it and something is left to do), ``finished``, or
  ``unknown`` (the file system cannot say whether a process holds the folder's lock)
- ``doing``: the phase under way (``prepare``, ``baseline``, ``trials``, ``confirm``, ``best``); null when finished
- ``seconds``: at work, in all sittings; ``phases``: seconds of each finished one
- ``counts``: trials of the search by status, and ``ended`` and ``total``
- ``budget``: by key of the group ``budget`` that has a limit: ``limit`` and ``used``; ``ended_by``: as in results.json
- ``baseline``: ``eval_loss``, ``trial_loss`` (on the rows that trials are measured on), ``exact_match``; ``best``: the
  same of the best adapter, whose ``eval_loss`` (on ``eval_loss_rows`` rows) and ``exact_match`` are null until it is
  measured, and ``trial_id``, ``params``; null before
- ``last``: ``event``, ``time`` (seconds since 1970, by the clock where the sweep runs), ``age`` (seconds)
- ``eta_seconds``: until the last trial ends, if they go on as they went; null before the third has ended
- ``hints``: sentences: what looks wrong, and what to do about it
- ``goal``: samples of a whole trial; ``trials``: each with ``trial_id``, ``confirms``, ``status``, ``params``,
  ``samples_seen``, ``eval_loss``, ``seconds``, ``error``, ``log`` (folder relative to the sweep's)
- with ``--trial``: ``trial``, one of ``trials`` and its ``curve``, ``steps`` (the newest, as in ``steps.jsonl``) and
  ``lines`` (the newest of the first worker's log)
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_lora import storage
from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.typed import typed
from raytune_lora.errors import StorageError, UserError
from raytune_lora.training.plan import plan_run
from raytune_lora.tuning import parts
from raytune_lora.tuning.budget import remedy
from raytune_lora.tuning.claim import lives
from raytune_lora.tuning.folder import JOURNAL, SweepFolder, address, read
from raytune_lora.tuning.trials import BASELINE, BEST, CONFIRM, PHASES, TRIALS, Record, Trial, replay

SCHEMA_VERSION = 2
RUNNING, INTERRUPTED, FINISHED, UNKNOWN = "running", "interrupted", "finished", "unknown"
_STALLED = 600.0  # seconds without a step after which one looks at a trial
_SKEW = 5.0  # seconds that an event may lie in the future before clocks are said to differ
_SOME = 3  # trials that must have ended before their pace says anything
_TAIL = 20  # newest lines and steps of a trial
_READ = 2**16  # bytes at the end of a file that are looked at for them


@dataclass(frozen=True)
class Status:
    """What is in a sweep's folder at one moment."""

    folder: SweepFolder
    kind: str
    cfg: SweepConfig
    events: list[dict[str, Any]]
    record: Record
    busy: bool | None
    now: float  # seconds since 1970, here
    size: int  # bytes of the journal

    @property
    def state(self) -> str:
        """``running``, ``interrupted``, ``finished`` or ``unknown``."""
        if self.record.finished:
            return FINISHED
        return {True: RUNNING, False: INTERRUPTED, None: UNKNOWN}[self.busy]

    @property
    def doing(self) -> str | None:
        """The phase under way."""
        if self.record.finished:
            return None
        left = [name for name in PHASES if name not in self.record.phases]
        return next((name for name in left if name != CONFIRM or self.cfg.confirm.top), None)

    @property
    def total(self) -> int:
        """Trials that the search is to have."""
        return self.cfg.search.trials if self.kind == "sweep" else 1

    @property
    def age(self) -> float | None:
        """Seconds since the last event; negative where that machine's clock is ahead of this one's."""
        return self.now - self.events[-1]["time"] if self.events else None

    @property
    def seconds(self) -> float:
        """At work until now, in all sittings."""
        since = max(0.0, self.age or 0.0) if self.state == RUNNING else 0.0
        return float(self.record.clock) + since

    @property
    def elapsed(self) -> float:
        """Seconds since its first sitting began, until now or until it was finished."""
        if self.record.since is None:
            return self.seconds
        until = self.events[-1]["time"] if self.state == FINISHED else self.now
        return max(self.seconds, until - self.record.since)

    @property
    def goal(self) -> int | None:
        """Samples of a whole trial."""
        try:
            rows = json.loads((self.folder.path / "data_report.json").read_text())["rows"]["splits"]["train"]
        except (OSError, ValueError, KeyError):
            return None
        return plan_run(self.cfg, rows).total

    def log(self, trial_id: str) -> Path:
        """What the first worker of a trial prints; in a store, as of its last checkpoint."""
        self.folder.copy.within(self.folder.trials.name, trial_id).bring("steps.jsonl", "logs/worker-0.log")
        return self.folder.trials / trial_id / "logs" / "worker-0.log"

    @property
    def eta(self) -> float | None:
        """Seconds until the search's last trial ends, at the pace of those that have ended."""
        first = next((event for event in self.events if event["event"] == "trial_started"), None)
        ended = self.record.ended
        if self.state != RUNNING or self.doing != TRIALS or first is None or ended < _SOME:
            return None
        left = (self.seconds - first["clock"]) / ended * max(0, self.total - ended)
        limits = ((self.cfg.budget.hours, self.seconds), (self.cfg.budget.wall_hours, self.elapsed))
        return max(0.0, min([left, *(3600 * hours - spent for hours, spent in limits if hours is not None)]))


def refresh(status: Status) -> Status:
    """The same folder, looked at again; the journal is read where it has grown."""
    journal = status.folder.journal
    if status.folder.uri is not None:
        return look(status.folder.uri, status.folder.path)
    if journal.is_file() and journal.stat().st_size != status.size:
        return look(status.folder.path)
    return replace(status, busy=status.folder.busy(), now=time.time())


def look(output: str | Path, scratch: Path | None = None) -> Status:
    """Read a sweep's folder, which may be written to at the same time.

    Args:
        output: the folder, or its URI.
        scratch: a folder for what is read of one in a store.

    Raises:
        UserError: it holds no sweep or run, or the store does not answer.
    """
    where = address(str(output))
    cfg, kind = read(where)
    if storage.local_path(where) is not None:
        folder = SweepFolder(Path(where))
        busy = folder.busy()
    else:
        folder = SweepFolder(scratch or Path(tempfile.mkdtemp()), where)
        try:
            folder.journal.write_bytes(parts.read(storage.join(where, JOURNAL)))
            folder.copy.bring("data_report.json")
        except StorageError as error:
            raise UserError(str(error)) from error
        busy = lives(where)
    size = folder.journal.stat().st_size if folder.journal.is_file() else 0
    record, events, _ = replay(folder.journal) if size else (Record(), [], 0)
    return Status(folder, kind, cfg, events, record, busy, time.time(), size)


def hints(status: Status) -> list[str]:
    """What looks wrong, and what to do about it."""
    path, found = status.folder.address, list[str]()
    age, state = status.age, status.state
    if age is not None and age < -_SKEW:
        found.append(
            f"the clock of the sweep's machine is at least {-age:.0f} s ahead of this one's: ages are too small"
        )
    again = typed("resume", str(path))
    if state == INTERRUPTED:
        mismatch = status.record.mismatch
        found.append(mismatch["why"] if mismatch else f"no process works on it; go on with {again}")
    if status.record.ended_by is not None and state == FINISHED:
        ended = status.record.ended_by
        found.append(f"the search ended early: {ended['why']}; to search on: {again} {remedy(ended['budget'])}")
    if state != RUNNING:
        return found
    for trial in status.record.trials.values():
        silent = _silence(status, trial)
        if silent is not None and silent > _STALLED:
            found.append(
                f"trial {trial.trial_id} has made no step for {silent / 60:.0f} minutes; its log is in "
                f"{status.log(trial.trial_id)}; search.stalled=<seconds> has such a trial tried again"
            )
    return found


def summary(status: Status) -> dict[str, Any]:
    """What ``--json`` prints; the module's docstring is its schema."""
    record, best, last = status.record, status.record.best(), status.events[-1] if status.events else None
    statuses = Counter(trial.status for trial in record.searched)
    baseline, measured = record.phases.get(BASELINE), record.phases.get(BEST, {})
    return {
        "schema_version": SCHEMA_VERSION,
        "name": status.folder.name,
        "folder": status.folder.address,
        "kind": status.kind,
        "state": status.state,
        "doing": status.doing,
        "seconds": round(status.seconds, 1),
        "phases": {name: phase["seconds"] for name, phase in record.phases.items()},
        "counts": {**statuses, "ended": record.ended, "total": status.total},
        "budget": budget(status),
        "ended_by": record.ended_by,
        "baseline": baseline and {key: baseline.get(key) for key in ("eval_loss", "trial_loss", "exact_match")},
        "best": best
        and {
            "trial_id": best.trial_id,
            "params": best.params,
            "eval_loss": measured.get("eval_loss"),
            "eval_loss_rows": measured.get("eval_loss_rows"),
            "trial_loss": best.eval_loss,
            "exact_match": measured.get("exact_match"),
        },
        "last": last and {"event": last["event"], "time": last["time"], "age": round(status.age or 0.0, 1)},
        "eta_seconds": None if status.eta is None else round(status.eta),
        "hints": hints(status),
        "goal": status.goal,
        "trials": [_trial(trial) for trial in record.trials.values()],
    }


def budget(status: Status) -> dict[str, dict[str, float | None]]:
    """The limits there are, and what has been used of each."""
    best = status.record.leader
    used = {
        "hours": status.seconds / 3600,
        "wall_hours": status.elapsed / 3600,
        "gpu_hours": status.record.gpu_seconds / 3600,
        "target": best.eval_loss if best else None,
        "patience": status.record.in_vain,
    }
    limits = to_plain(status.cfg.budget)
    return {
        key: {"limit": limits[key], "used": value and round(value, 4)}
        for key, value in used.items()
        if limits[key] is not None
    }


def detail(status: Status, trial_id: str) -> dict[str, Any]:
    """One trial: what the journal knows of it, its newest steps and the newest lines of its first worker's log.

    Raises:
        UserError: there is no such trial.
    """
    trial = status.record.trials.get(trial_id)
    if trial is None:
        known = ", ".join(status.record.trials) or "none yet"
        raise UserError(f"--trial {trial_id}: there is no such trial; there are: {known}")
    log = status.log(trial_id)
    steps = [json.loads(line) for line in _last_lines(status.folder.trials / trial_id / "steps.jsonl")]
    return {**_trial(trial), "curve": trial.curve, "steps": steps, "lines": _last_lines(log)}


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "trial_id": trial.trial_id,
        "confirms": trial.confirms,
        "status": trial.status,
        "params": trial.params,
        "samples_seen": trial.samples_seen,
        "eval_loss": trial.eval_loss,
        "seconds": round(trial.seconds, 3),
        "error": trial.error,
        "log": f"trials/{trial.trial_id}/logs",
    }


def _silence(status: Status, trial: Trial) -> float | None:
    """Seconds since a trial that runs wrote anything; None of one that has ended or written nothing, or in a store."""
    if status.folder.uri is not None:
        return None
    files = [status.folder.trials / trial.trial_id / "steps.jsonl", status.log(trial.trial_id)]
    newest = max((file.stat().st_mtime for file in files if file.is_file()), default=None)
    return None if trial.ended or newest is None else status.now - newest


def _last_lines(path: Path) -> list[str]:
    """The newest whole lines of a file that may be growing."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _READ))
        data = file.read()
    lines = data[: data.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    return (lines[1:] if size > _READ else lines)[-_TAIL:]
