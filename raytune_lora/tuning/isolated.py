"""The isolated backend: a worker group trains one trial at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Task, TaskFailed, stream
from raytune_lora.tuning.space import apply


def run_trial(proposal: dict[str, Any], *, board: Any, cfg: RunConfig, store: TokenStore, trials: Path) -> None:
    """A Tune trial: have what the searcher proposed trained, and pass the reports on; end in order whatever happens.

    Args:
        proposal: ``trial_id`` and ``params``.
        board: of the pool whose groups train.
        cfg: of the sweep, without the parameters.
        store: the data.
        trials: the folder of all trials.
    """
    for report in _reports(board, training_task(proposal["trial_id"], apply(cfg, proposal["params"]), store, trials)):
        tune.report(report)


def training_task(trial_id: str, cfg: RunConfig, store: TokenStore, trials: Path) -> Task:
    """The task of training one trial in its folder, from its last checkpoint on if it has one."""
    return Task(trial_id, train, cfg, store, trials / trial_id)


def train(*arguments: Any) -> None:
    """``training.worker.train``, imported where it runs: it brings torch and transformers."""
    from raytune_lora.training import worker

    worker.train(*arguments)


def _reports(board: Any, task: Task) -> Any:
    try:
        yield from stream(board, task)
    except TaskFailed as failure:
        yield {"status": failure.ended.status, "error": failure.ended.error}
