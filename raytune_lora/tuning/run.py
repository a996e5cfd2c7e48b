"""A single run: one trial with the config as it stands, by the same driver as a sweep's trials."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from raytune_lora.config.schema import SweepConfig
from raytune_lora.training.failures import halting
from raytune_lora.training.task import TaskFailed
from raytune_lora.tuning.isolated import train
from raytune_lora.tuning.job import RUN, Job, open_job, plain_run
from raytune_lora.tuning.results import TRIALS
from raytune_lora.tuning.trials import COMPLETED, trial_name


def run_once(cfg: SweepConfig, moved: Sequence[str] = ()) -> dict[str, Any]:
    """Train one configuration, or go on with a run.

    Args:
        cfg: of the run; to go on, its ``resume`` and ``moved`` count.
        moved: the keys that change where a run goes on.

    Returns:
        What ``results.json`` says.

    Raises:
        UserError: the config cannot work; nothing was started.
        JobFailed: the base model or the trained one could not be measured.
    """
    return open_job(RUN, cfg, moved, _run)


def _run(job: Job) -> None:
    job.measure_baseline()
    known = job.journal.record.trials.get(trial_name(0))
    if known is None or not known.ended:
        with job.phase(TRIALS, "training"):
            _train(job)
    job.finish()


def _train(job: Job) -> None:
    name = trial_name(0)
    job.journal.append("trial_started", trial_id=name, params={})
    began, status, error = time.monotonic(), COMPLETED, None
    try:
        for report in train(job.pool.board, name, plain_run(job.cfg), job.store, job.folder.trials):
            job.journal.report(name, report)
    except TaskFailed as failure:
        status, error = failure.ended.status, failure.ended.error
        if (halt := halting(status, error)) is not None:
            raise halt from failure
    seconds = round(time.monotonic() - began, 3)
    job.journal.append("trial_ended", trial_id=name, status=status, error=error, seconds=seconds)
