"""The isolated backend: a worker group trains one trial at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import StorageError
from raytune_lora.training.board import Report
from raytune_lora.training.failures import DISK, LOST, MOVED, OOM, Ended
from raytune_lora.training.inherit import inherit
from raytune_lora.training.plan import smaller_micro_batch
from raytune_lora.training.task import Task, TaskFailed, stream
from raytune_lora.tuning.space import apply
from raytune_lora.working_copy import WorkingCopy


def run_trial(proposal: dict[str, Any], *, board: Any, cfg: RunConfig, store: TokenStore, trials: Path) -> None:
    """A Tune trial: have what the searcher proposed trained, and pass the reports on; end in order whatever happens.

    Args:
        proposal: as ``StudySearcher.suggest`` makes it.
        board: of the pool whose groups train.
        cfg: of the sweep, without the parameters.
        store: the data.
        trials: the folder of all trials.
    """
    name = proposal["trial_id"]
    where = (apply(cfg, proposal["params"]), store, trials)
    try:
        if "inherits" in proposal:
            inherit(proposal["inherits"], WorkingCopy.at(cfg.output, cfg.cluster.node_cache, trials), name)
        for report in train(board, name, *where, task=task_name(proposal), until=proposal.get("until")):
            tune.report(report)
    except TaskFailed as failure:
        tune.report({"status": failure.ended.status, "error": failure.ended.error})
    except StorageError as error:
        tune.report({"status": DISK, "error": str(error)})


def task_name(proposal: dict[str, Any]) -> str:
    """What a trial's task is stopped by; another in each sitting, so that the end of one is not that of the next."""
    return f"{proposal['trial_id']}+{proposal['sitting']}" if "sitting" in proposal else str(proposal["trial_id"])


def train(
    board: Any,
    trial_id: str,
    cfg: RunConfig,
    store: TokenStore,
    trials: Path,
    *,
    task: str | None = None,
    until: int | None = None,
) -> Iterator[Report]:
    """Have one trial trained in its folder, from its last checkpoint on if it has one, and yield its reports.

    Where memory runs out it goes on from its last checkpoint with half the micro batch, and as many more of them a
    step; each report says which micro batch it was. Where a worker or its machine is lost, or about to be, it goes on
    as it was on another group. A new attempt is a report of its own: ``attempt``, ``kind`` and ``error``.

    Args:
        board: of the pool whose groups train.
        trial_id: its name.
        cfg: with its parameters.
        store: the data.
        trials: the folder of all trials.
        task: what it is stopped by; None: its name.
        until: samples from which on the first validation ends this sitting; None: it is trained to its end.

    Raises:
        TaskFailed: it did not end well; out of memory only where a micro batch of one was too much, and lost only
            where that came ``cluster.retries`` times before without a new validation in between.
    """
    extra = {} if until is None else {"until": until}
    return attempts(board, Task(task or trial_id, _train, cfg, store, trials / trial_id, extra=extra, steps=True))


def attempts(board: Any, task: Task) -> Iterator[Report]:
    """Have a task done, again where the kind of its failure allows it, and yield the reports of all attempts.

    Raises:
        TaskFailed: it did not end well, and is not tried again.
    """
    losses = seen = 0
    while True:
        try:
            for report in stream(board, task, again=True):
                if report.get("samples_seen", 0) > seen:  # where machines come and go, each may take it further
                    losses, seen = 0, report["samples_seen"]
                yield report
            return
        except TaskFailed as failure:
            ended = failure.ended
            losses += ended.status == LOST
            following = _again(task, ended, losses)
            if following is None:
                raise
        task = following
        yield {"attempt": task.attempt, "kind": ended.status, "error": ended.error}


def _again(task: Task, ended: Ended, losses: int) -> Task | None:
    """The next attempt at a task, by the kind of its failure; None where there is to be none."""
    cfg = task.cfg
    if ended.status == OOM and (smaller := smaller_micro_batch(cfg)) is not None:
        cfg = replace(cfg, training=replace(cfg.training, micro_batch=smaller))
    elif ended.status != MOVED and (ended.status != LOST or losses > cfg.cluster.retries):
        return None
    return replace(task, cfg=cfg, attempt=task.attempt + 1)


def _train(*arguments: Any, **extra: Any) -> None:
    """``training.worker.train``, imported where it runs: it brings torch and transformers."""
    from raytune_lora.training import worker

    worker.train(*arguments, **extra)
