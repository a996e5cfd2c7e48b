"""A sweep: baseline, trials, the confirmation of the best, the best adapter."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import optuna
from ray import tune
from ray.tune import Callback, FailureConfig, TuneConfig, Tuner
from ray.tune import RunConfig as TuneRunConfig

from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import Scheduler
from raytune_lora.training.driver import PROCESS_ENDED, this_node
from raytune_lora.training.failures import FAILED, STOPPED, halting
from raytune_lora.training.place import SAVE_AND_STOP, STOP
from raytune_lora.tuning.budget import SPACE, Budget
from raytune_lora.tuning.confirm import best_configurations, planned, ranked, train_runs
from raytune_lora.tuning.disk import Quota
from raytune_lora.tuning.interrupt import Interrupts
from raytune_lora.tuning.isolated import run_trial, task_name
from raytune_lora.tuning.job import SWEEP, Job, open_job, plain_run
from raytune_lora.tuning.results import TRIALS
from raytune_lora.tuning.scheduler import build, turns
from raytune_lora.tuning.search import StudySearcher
from raytune_lora.tuning.study import NAME_FILE, keep, open_study, pareto
from raytune_lora.tuning.thrift import without_credentials, without_trackers
from raytune_lora.tuning.told import reconcile, refused, report, tell
from raytune_lora.tuning.trials import COMPLETED, CONFIRM, PAUSED, RUNNING, Journal, Trial
from raytune_lora.tuning.turns import TERMS

_ENOUGH = 10  # completed trials before parameter importance says anything
_RESOURCES = {"memory": 1.0}  # a byte: a Tune trial only waits for its workers, and zero is refused


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
    job.folder.copy.send(job.folder.path / NAME_FILE)
    interrupted = [trial for trial in reconcile(study, record, job.cfg) if trial.confirms is None]
    budget = Budget(job.cfg.budget, job.journal, job.cfg.search.trials, job.progress.note)
    if budget.spent():
        _end(interrupted, job.journal, study)
    more = record.ended < job.cfg.search.trials and not job.cfg.scheduler.goes_on
    if TRIALS not in record.phases or (more and not budget.spent()):
        with job.phase(TRIALS, "running trials"):
            if not budget.spent():
                _tune(job, study, interrupted, budget)
    several = len(job.cfg.search.objectives) > 1
    front = pareto(study) if several else []
    job.learned = {"importance": _importance(study, job.cfg), "pareto": front, "refused": refused(study)}
    _confirm(job)
    job.finish()


def _end(interrupted: list[Trial], journal: Journal, study: optuna.Study) -> None:
    """Record the ends of trials that were running or paused when a budget had ended the search."""
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


class _Halt:
    """Why a search cannot go on for now: its trials are told to stop, and are not recorded as ended."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._why: BaseException | None = None

    @property
    def why(self) -> BaseException | None:
        if self._why is None:
            self._why = self._interrupts.why
        return self._why

    def because(self, error: BaseException) -> None:
        """Halt; the first reason counts."""
        self._why = self.why or error


def _halting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Tune would drop its trials as they are where one of its callbacks fails; here that halts the search."""

    @wraps(method)
    def guarded(self: Any, *arguments: Any, **settings: Any) -> Any:
        if self.halt.why is None:
            try:
                return method(self, *arguments, **settings)
            except Exception as error:
                self.halt.because(error)
        return getattr(self, "FINISHED", None)

    return guarded


class _Searcher(StudySearcher):
    """Proposes nothing more once the budget is spent; where nothing is left to propose, that ends the search too."""

    budget: Budget
    halt: _Halt

    @_halting
    def suggest(self, trial_id: str) -> Any:
        return self.FINISHED if self.budget.spent() else super().suggest(trial_id)

    def exhausted(self, why: str) -> Any:
        self.budget.end(SPACE, why)
        return super().exhausted(why)


def _tune(job: Job, study: optuna.Study, interrupted: list[Trial], budget: Budget) -> None:
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what goes wrong is in the journal
    cfg, board, record = job.cfg, job.pool.board, job.journal.record
    when = {"total": job.plan.total, "every": job.plan.every}
    scheduler = build(cfg.scheduler, record=record, **when)
    running = [trial for trial in interrupted if trial.status == RUNNING]
    searcher = _Searcher(study, cfg.space, cfg, running, job.constraints, turns(cfg, scheduler, record, **when))
    halt = _Halt(job.interrupts)
    searcher.budget, searcher.halt = budget, halt
    if searcher.over:
        return
    trainable = partial(run_trial, board=board, cfg=plain_run(cfg), store=job.store, trials=job.folder.trials)
    trainable.__name__ = f"{job.folder.name} trials"  # type: ignore[attr-defined]  # Ray's dashboard shows it
    tuner = Tuner(
        tune.with_resources(trainable, _on_this_node()),
        tune_config=TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # the searcher says when there are no more
            max_concurrent_trials=cfg.search.concurrent,
            reuse_actors=True,
        ),
        run_config=TuneRunConfig(
            name="tune",
            storage_path=str(job.folder.path),
            callbacks=[_Recorder(job, study, budget, halt)],
            failure_config=FailureConfig(max_failures=cfg.cluster.retries),  # of the Tune trial's own process
            verbose=0,
        ),
    )
    job.interrupts.awaited = True
    try:
        with warnings.catch_warnings(), without_trackers(), without_credentials():
            warnings.simplefilter("ignore")
            tuner.fit()
    finally:
        job.interrupts.awaited = False
    if halt.why is None or isinstance(halt.why, KeyboardInterrupt):  # else the journal has what the database lacks
        keep(study)
    if halt.why is not None:
        raise halt.why
    if record.ended_by:
        _end([trial for trial in record.searched if trial.status == PAUSED], job.journal, study)


def _on_this_node() -> tune.PlacementGroupFactory:
    """What a Tune trial asks for: a place beside the driver, so that no other machine takes it along when it goes."""
    return tune.PlacementGroupFactory([_RESOURCES], bundle_label_selector=[this_node()])


class _Recorder(Callback):
    """Writes what Tune does into the journal, and the ends of trials from there into the study.

    It also ends the trials that run when the budget is spent. A ``tune.Stopper`` would not do: where it stops the whole
    experiment, Tune tells nobody how its trials ended, and where it stops each trial, that waits for its next report.
    """

    def __init__(self, job: Job, study: optuna.Study, budget: Budget, halt: _Halt) -> None:
        self.halt = halt
        self._journal = job.journal
        self._study = study
        self._board = job.pool.board
        self._budget = budget
        trials = job.folder.copy.within(job.folder.trials.name)
        self._quota = Quota(job.cfg.disk, trials, job.cfg.scheduler.goes_on)
        self._gpus = job.cfg.workers * job.cfg.gpus_per_worker  # of a trial
        self._began: dict[str, float] = {}
        self._told: set[str] = set()  # trials that were asked to end

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for Tune's own snapshots: a sweep goes on from the journal."""
        return {}

    @_halting
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = trial.config["trial_id"]
        self._began[name] = time.monotonic()
        terms = {key: trial.config[key] for key in TERMS if key in trial.config}
        self._journal.append("trial_started", trial_id=name, params=trial.config["params"], gpus=self._gpus, **terms)
        if "replaces" in terms:
            tell(self._study, self._journal.record.trials[terms["replaces"]])

    @_halting
    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "status" in result or not ("samples_seen" in result or "attempt" in result):
            return
        name = trial.config["trial_id"]
        self._journal.report(name, result)
        report(self._study, self._journal.record.trials[name])
        self._quota.keep(self._journal.record)

    @_halting
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        known = self._journal.record.trials[trial.config["trial_id"]]
        status = trial.last_result.get("status", PAUSED if "until" in trial.config else STOPPED)
        if (halt := halting(status, trial.last_result.get("error"))) is not None:
            raise halt
        if status in (STOPPED, PAUSED) and known.last:  # it had come to its end when it was told to stop
            status = COMPLETED
        self._end(trial, status, trial.last_result.get("error"))

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        why = self.halt.why
        if why is None and not self._spent():
            return
        for trial in trials:
            task = task_name(trial.config)
            if not trial.is_finished() and task not in self._told:
                self._told.add(task)
                self._board.stop.remote(task, SAVE_AND_STOP if isinstance(why, KeyboardInterrupt) else STOP)

    @_halting
    def _spent(self) -> bool:
        self._journal.keep_time()
        keep(self._study, sparing=True)
        return self._budget.spent() and not self._budget.is_out_of_points

    @_halting
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error()
        if isinstance(error, PROCESS_ENDED):
            raise error  # of the process that reads of the trial's task, again and again
        self._end(trial, FAILED, str(error).strip().splitlines()[-1] if error else "the trial's process ended")

    def _end(self, trial: Any, status: str, error: str | None) -> None:
        name = trial.config["trial_id"]
        self._board.stop.remote(task_name(trial.config))  # it does what it is asked in order
        if name not in self._journal.record.trials:  # its Tune actor never came up
            self.on_trial_start(0, [], trial)
        seconds = round(time.monotonic() - self._began[name], 3)
        if status == PAUSED:
            self._journal.append("trial_paused", trial_id=name, seconds=seconds)
            return
        self._journal.append("trial_ended", trial_id=name, status=status, error=error, seconds=seconds)
        tell(self._study, self._journal.record.trials[name])


def _importance(study: optuna.Study, cfg: SweepConfig) -> dict[str, float]:
    """How much each parameter matters for the loss, by fANOVA's kin PED-ANOVA; nothing where too few trials say so.

    Nothing of a population either: what a child reached is not owed to its own parameters alone.
    """
    completed = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(completed) < _ENOUGH or cfg.scheduler.kind is Scheduler.pbt:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(
            optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[0])
        )
