"""A sweep: baseline, trials, the best adapter."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune import Callback, TuneConfig, Tuner
from ray.tune import RunConfig as TuneRunConfig

from raytune_lora.config.schema import SweepConfig
from raytune_lora.training.failures import FAILED, STOPPED
from raytune_lora.tuning.isolated import run_trial
from raytune_lora.tuning.job import SWEEP, Job, open_job, plain_run
from raytune_lora.tuning.results import TRIALS
from raytune_lora.tuning.scheduler import build
from raytune_lora.tuning.search import StudySearcher, open_study, reconcile, report, tell
from raytune_lora.tuning.trials import COMPLETED, MEASURED, Journal

_ENOUGH = 10  # completed trials before parameter importance says anything
_RESOURCES: dict[str, float] = {"memory": 1}  # a byte: a Tune trial only waits for its workers, and zero is refused


def run_sweep(cfg: SweepConfig, moved: Sequence[str] = ()) -> dict[str, Any]:
    """Run a sweep, or go on with one.

    Args:
        cfg: of the sweep; to go on, its ``resume`` and ``moved`` count.
        moved: the keys that change where a sweep goes on.

    Returns:
        What ``results.json`` says.

    Raises:
        UserError: the config cannot work; nothing was started.
        JobFailed: the base model or the best one could not be measured.
    """
    return open_job(SWEEP, cfg, moved, _sweep)


def _sweep(job: Job) -> None:
    job.measure_baseline()
    study = open_study(job.folder.path, job.cfg.search)
    interrupted = reconcile(study, job.journal.record)
    remaining = job.cfg.search.trials - job.journal.record.ended
    if remaining > 0:
        with job.phase(TRIALS, "running trials"):
            _tune(job, study, interrupted, remaining)
    job.importance = _importance(study)
    job.finish()


def _tune(job: Job, study: optuna.Study, interrupted: list[Any], remaining: int) -> None:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    cfg = job.cfg
    board = job.pool.board
    trainable = partial(run_trial, board=board, cfg=plain_run(cfg), store=job.store, trials=job.folder.trials)
    tuner = Tuner(
        tune.with_resources(trainable, _RESOURCES),
        tune_config=TuneConfig(
            search_alg=StudySearcher(study, cfg.space, cfg, interrupted),
            scheduler=build(cfg.scheduler, total=job.plan.total, every=job.plan.every, record=job.journal.record),
            num_samples=remaining,
            max_concurrent_trials=cfg.search.concurrent,
            reuse_actors=True,
        ),
        run_config=TuneRunConfig(
            name="tune",
            storage_path=str(job.folder.path),
            callbacks=[_Recorder(job.journal, study, board)],
            verbose=0,
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner.fit()
    if job.journal.record.ended < cfg.search.trials:
        raise KeyboardInterrupt  # Tune ends in order at the first Ctrl-C and says nothing of it


class _Recorder(Callback):
    """Writes what Tune does into the journal, and the ends of trials from there into the study."""

    def __init__(self, journal: Journal, study: optuna.Study, board: Any) -> None:
        self._journal = journal
        self._study = study
        self._board = board
        self._began: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for Tune's own snapshots: a sweep goes on from the journal."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = trial.config["trial_id"]
        self._began[name] = time.monotonic()
        self._journal.append("trial_started", trial_id=name, params=trial.config["params"])

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "samples_seen" not in result or "status" in result:
            return
        name, measured = trial.config["trial_id"], {key: result[key] for key in MEASURED}
        self._journal.append("trial_result", trial_id=name, **measured)
        report(self._study, self._journal.record.trials[name])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        known = self._journal.record.trials[trial.config["trial_id"]]
        status = trial.last_result.get("status") or (COMPLETED if known.last else STOPPED)
        self._end(trial, status, trial.last_result.get("error"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error()
        self._end(trial, FAILED, str(error).strip().splitlines()[-1] if error else "the trial's process ended")

    def _end(self, trial: Any, status: str, error: str | None) -> None:
        name = trial.config["trial_id"]
        ray.get(self._board.stop.remote(name))
        if name not in self._journal.record.trials:  # its Tune actor never came up
            self.on_trial_start(0, [], trial)
        seconds = round(time.monotonic() - self._began[name], 3)
        self._journal.append("trial_ended", trial_id=name, status=status, error=error, seconds=seconds)
        tell(self._study, self._journal.record.trials[name])


def _importance(study: optuna.Study) -> dict[str, float]:
    """How much each parameter matters for the loss, by fANOVA's kin PED-ANOVA; nothing where too few trials say so."""
    completed = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(completed) < _ENOUGH:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
