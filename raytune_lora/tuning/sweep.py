"""A sweep: baseline, trials, the confirmation of the best, the best adapter."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna
from ray import tune
from ray.tune import Callback, TuneConfig, Tuner
from ray.tune import RunConfig as TuneRunConfig

from raytune_lora.config.schema import SweepConfig
from raytune_lora.training.failures import FAILED, STOPPED
from raytune_lora.tuning.budget import Budget
from raytune_lora.tuning.confirm import best_configurations, planned, ranked, train_runs
from raytune_lora.tuning.isolated import run_trial
from raytune_lora.tuning.job import SWEEP, Job, open_job, plain_run
from raytune_lora.tuning.results import TRIALS
from raytune_lora.tuning.scheduler import build
from raytune_lora.tuning.search import StudySearcher, keep, open_study, pareto, reconcile, report, tell
from raytune_lora.tuning.trials import COMPLETED, CONFIRM, MEASURED, Journal, Trial

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
    record = job.journal.record
    study = open_study(job.folder.path, job.cfg.search)
    interrupted = [trial for trial in reconcile(study, record, job.cfg) if trial.confirms is None]
    budget = Budget(job.cfg.budget, job.journal, job.cfg.search.trials, job.progress.note)
    if budget.spent():
        _end(interrupted, job.journal, study)
    if TRIALS not in record.phases or (record.ended < job.cfg.search.trials and not budget.spent()):
        with job.phase(TRIALS, "running trials"):
            if record.ended < job.cfg.search.trials and not budget.spent():
                _tune(job, study, interrupted, budget)
    several = len(job.cfg.search.objectives) > 1
    job.learned = {"importance": _importance(study), "pareto": pareto(study) if several else []}
    _confirm(job)
    job.finish()


def _end(interrupted: list[Trial], journal: Journal, study: optuna.Study) -> None:
    """Record the ends of trials that were running when a sweep was killed after its budget had ended the search."""
    for trial in interrupted:
        journal.append("trial_ended", trial_id=trial.trial_id, status=STOPPED, error=None, seconds=0.0)
        tell(study, trial)
    keep(study)


def _confirm(job: Job) -> None:
    """Train the best configurations with other seeds, where that is asked for and there are some to compare."""
    cfg, record = job.cfg, job.journal.record
    chosen = [trial.trial_id for trial in best_configurations(record, cfg.confirm.top)]
    if not chosen or CONFIRM in record.phases:
        return
    with job.phase(CONFIRM, f"confirming the best: {', '.join(chosen)}") as facts:
        runs = planned(record, cfg.confirm, cfg.training.seed)
        where = (job.pool.board, plain_run(cfg), job.store, job.folder.trials)
        train_runs(runs, job.journal, *where, at_once=cfg.search.concurrent)
        facts |= {"confirmed": chosen, "winner": next(ranked(record, chosen))}


class _Searcher(StudySearcher):
    """Proposes nothing more once the budget is spent."""

    budget: Budget

    def suggest(self, trial_id: str) -> Any:
        return self.FINISHED if self.budget.spent() else super().suggest(trial_id)


def _tune(job: Job, study: optuna.Study, interrupted: list[Trial], budget: Budget) -> None:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    cfg = job.cfg
    board = job.pool.board
    searcher = _Searcher(study, cfg.space, cfg, interrupted)
    searcher.budget = budget
    trainable = partial(run_trial, board=board, cfg=plain_run(cfg), store=job.store, trials=job.folder.trials)
    tuner = Tuner(
        tune.with_resources(trainable, _RESOURCES),
        tune_config=TuneConfig(
            search_alg=searcher,
            scheduler=build(cfg.scheduler, total=job.plan.total, every=job.plan.every, record=job.journal.record),
            num_samples=cfg.search.trials - job.journal.record.ended,
            max_concurrent_trials=cfg.search.concurrent,
            reuse_actors=True,
        ),
        run_config=TuneRunConfig(
            name="tune",
            storage_path=str(job.folder.path),
            callbacks=[_Recorder(job.journal, study, board, budget, gpus=cfg.workers * cfg.gpus_per_worker)],
            verbose=0,
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner.fit()
    keep(study)
    record = job.journal.record
    if not all(trial.ended for trial in record.searched) or not (record.ended_by or record.ended >= cfg.search.trials):
        raise KeyboardInterrupt  # Tune ends in order at the first Ctrl-C and says nothing of it


class _Recorder(Callback):
    """Writes what Tune does into the journal, and the ends of trials from there into the study.

    It also ends the trials that run when the budget is spent. A ``tune.Stopper`` would not do: where it stops the whole
    experiment, Tune tells nobody how its trials ended, and where it stops each trial, that waits for its next report.
    """

    def __init__(self, journal: Journal, study: optuna.Study, board: Any, budget: Budget, gpus: int) -> None:
        self._journal = journal
        self._study = study
        self._board = board
        self._budget = budget
        self._gpus = gpus  # of a trial
        self._began: dict[str, float] = {}
        self._told: set[str] = set()  # trials that were asked to end

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for Tune's own snapshots: a sweep goes on from the journal."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = trial.config["trial_id"]
        self._began[name] = time.monotonic()
        self._journal.append("trial_started", trial_id=name, params=trial.config["params"], gpus=self._gpus)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "samples_seen" not in result or "status" in result:
            return
        name, measured = trial.config["trial_id"], {key: result[key] for key in MEASURED}
        self._journal.append("trial_result", trial_id=name, **measured)
        report(self._study, self._journal.record.trials[name])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        known = self._journal.record.trials[trial.config["trial_id"]]
        status = trial.last_result.get("status", STOPPED)
        if status == STOPPED and known.last:  # it had come to its end when it was told to stop
            status = COMPLETED
        self._end(trial, status, trial.last_result.get("error"))

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._journal.keep_time()
        keep(self._study, sparing=True)
        if not self._budget.spent():
            return
        for trial in trials:
            name = trial.config["trial_id"]
            if not trial.is_finished() and name not in self._told:
                self._told.add(name)
                self._board.stop.remote(name)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error()
        self._end(trial, FAILED, str(error).strip().splitlines()[-1] if error else "the trial's process ended")

    def _end(self, trial: Any, status: str, error: str | None) -> None:
        name = trial.config["trial_id"]
        self._board.stop.remote(name)  # the board does what it is asked in order: nothing is to be waited for
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
        return dict(
            optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[0])
        )
