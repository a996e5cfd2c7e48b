"""A search in virtual time on made-up losses, by the sweep's own searcher, scheduler, journal and study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import TrialScheduler

from raytune_lora.config.schema import SweepConfig
from raytune_lora.training.failures import STOPPED
from raytune_lora.tuning.scheduler import build, turns
from raytune_lora.tuning.search import StudySearcher
from raytune_lora.tuning.told import reconcile, report, tell
from raytune_lora.tuning.trials import COMPLETED, MEASURED, PAUSED, RUNNING, Journal, Trial
from raytune_lora.tuning.turns import TERMS

EVERY = 16
Weights = tuple[int, float]  # samples seen and the loss then
Train = Callable[[Weights, dict[str, Any]], float]  # the loss after one more interval


class Killed(Exception):
    """The driver was killed."""


class Disk:
    """What outlives a sitting beside the journal: the study, and the newest checkpoint of each trial."""

    def __init__(self) -> None:
        self.study = optuna.create_study(directions=["minimize"])
        self.weights: dict[str, Weights] = {}


class Play:
    """One sitting of a sweep; the next one takes the same folder and disk.

    Trials advance in turn by an interval. A stopped trial's worker goes on a little: it has one checkpoint more than
    the journal knows of.
    """

    def __init__(self, folder: Path, cfg: SweepConfig, train: Train, total: int, disk: Disk) -> None:
        self._cfg, self._train, self._total, self._disk = cfg, train, total, disk.weights
        self._journal = Journal(folder / "journal.jsonl")
        self.record = self._journal.record
        self.study = disk.study
        interrupted = [trial for trial in reconcile(self.study, self.record, cfg) if trial.status == RUNNING]
        when = {"total": total, "every": EVERY}
        self._scheduler = build(cfg.scheduler, record=self.record, **when)
        whose = turns(cfg, self._scheduler, self.record, **when)
        self.searcher = StudySearcher(self.study, cfg.space, cfg, interrupted, turns=whose)
        self._running: list[dict[str, Any]] = []
        self._proposed = 0
        self.events = 0

    def run(self, killed_after: int | None = None) -> Play:
        """Search to the end, or be killed after so many events: proposals, journal entries, entries into the study."""
        self._killed_after = killed_after
        while True:
            while len(self._running) < self._cfg.search.concurrent and self._propose():
                pass
            if not self._running:
                assert self.searcher.over
                return self
            self._advance(self._running.pop(0))

    def _count(self) -> None:
        self.events += 1
        if self.events == self._killed_after:
            raise Killed

    def _append(self, event: str, **values: Any) -> None:
        self._journal.append(event, **values)
        self._count()

    def _propose(self) -> bool:
        self._proposed += 1
        tune_id = str(self._proposed)
        proposal = self.searcher.suggest(tune_id)
        if proposal is None or proposal == self.searcher.FINISHED:
            return False
        self._count()
        name = proposal["trial_id"]
        terms = {key: proposal[key] for key in TERMS if key in proposal}
        self._append("trial_started", trial_id=name, params=proposal["params"], **terms)
        if "parent" in terms:
            assert self._disk[terms["parent"]][0] == terms["born"], "the parent has gone on"
            assert self.record.trials[terms["parent"]].latest == proposal["inherits"]
            self._disk.setdefault(name, self._disk[terms["parent"]])
            tell(self.study, self.record.trials[terms["replaces"]])
        self._running.append({"tune_id": tune_id, **proposal})
        if name in self._disk:
            self._report(self._running.pop(), self._disk[name])
        return True

    def _advance(self, proposal: dict[str, Any]) -> None:
        samples, loss = self._disk.get(proposal["trial_id"], (0, 10.0))
        if samples >= proposal.get("until", self._total):  # it has reported, and now its sitting ends
            self._end(proposal, PAUSED)
            return
        weights = samples + EVERY, self._train((samples, loss), proposal["params"])
        self._disk[proposal["trial_id"]] = weights
        self._report(proposal, weights)

    def _report(self, proposal: dict[str, Any], weights: Weights) -> None:
        name, (samples, loss) = proposal["trial_id"], weights
        last = samples == self._total
        facts = {"samples_seen": samples, "eval_loss": loss, "train_loss": loss, "checkpoint": f"{name}/{samples}"}
        self._append("trial_result", trial_id=name, **(dict.fromkeys(MEASURED, 0) | facts | {"last": last}))
        report(self.study, self.record.trials[name])
        live: Any = SimpleNamespace(trial_id=proposal["tune_id"], config=proposal)
        none: Any = None
        stop = self._scheduler.on_trial_result(none, live, facts) == TrialScheduler.STOP
        if last or stop:
            if stop and not last:  # the worker hears of it a validation later
                self._disk[name] = samples + EVERY, self._train(weights, proposal["params"])
            self._end(proposal, COMPLETED if last else STOPPED)
        else:
            self._running.append(proposal)

    def _end(self, proposal: dict[str, Any], status: str) -> None:
        name = proposal["trial_id"]
        self.searcher.on_trial_complete(proposal["tune_id"])
        if status == PAUSED:
            self._append("trial_paused", trial_id=name, seconds=1.0)
            return
        self._append("trial_ended", trial_id=name, status=status, error=None, seconds=1.0)
        tell(self.study, self.record.trials[name])
        self._count()


def outcome(record: Any) -> list[tuple[Any, ...]]:
    """Each trial's parameters, end and curve, whatever its name."""

    def of(trial: Trial) -> tuple[Any, ...]:
        curve = [(point["samples_seen"], point["eval_loss"]) for point in trial.curve]
        return sorted(trial.params.items()), trial.status, trial.born, curve

    return sorted(map(of, record.searched))
