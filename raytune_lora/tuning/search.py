"""Optuna as a Tune searcher that survives a kill.

Ray's OptunaSearch dies when it is restored with a persistent study. Here the study is the only state: a searcher can
be made anew at any time, from the study and the journal.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from raytune_lora.config.schema import RunConfig
from raytune_lora.config.search import Sampler, SearchConfig
from raytune_lora.training.failures import STOPPED
from raytune_lora.tuning.space import Space, configured_point, sample
from raytune_lora.tuning.trials import COMPLETED, Record, Trial, trial_name

STUDY_FILE = "study.db"
STUDY_NAME = "sweep"


def open_study(folder: Path, cfg: SearchConfig) -> optuna.Study:
    """The sweep's study, made where it is missing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=STUDY_NAME, storage=f"sqlite:///{folder / STUDY_FILE}", direction="minimize", load_if_exists=True
    )
    # with the same seed again, a sweep that goes on would propose again what it proposed before
    study.sampler = _sampler(cfg, cfg.seed + len(study.get_trials(deepcopy=False)))
    return study


def _sampler(cfg: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    if cfg.sampler is Sampler.random:
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=cfg.startup_trials, multivariate=True, group=True, constant_liar=True, seed=seed
        )


def reconcile(study: optuna.Study, record: Record) -> list[Trial]:
    """Bring the study up to the journal after a kill.

    A trial that the journal never saw start is told as failed, and its parameters are proposed again. One that it saw
    end is told so.

    Returns:
        The trials that were running: they are to go on.
    """
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        known = record.trials.get(trial_name(frozen.number))
        if known is None:
            study.tell(frozen.number, state=TrialState.FAIL)
            study.enqueue_trial(frozen.params)
        elif known.ended:
            tell(study, known)
    return [trial for trial in record.trials.values() if not trial.ended]


def report(study: optuna.Study, trial: Trial) -> None:
    """Give the study what has been measured of a trial that runs."""
    study_trial = study.get_trials(deepcopy=False)[int(trial.trial_id)]
    for point in trial.curve:
        if int(point["samples_seen"]) not in study_trial.intermediate_values:
            study._storage.set_trial_intermediate_value(
                study_trial._trial_id, int(point["samples_seen"]), point["eval_loss"]
            )


def tell(study: optuna.Study, trial: Trial) -> None:
    """Tell the study how a trial ended: its loss, pruned with its curve, or failed; never a made-up number."""
    number = int(trial.trial_id)
    if not study.get_trials(deepcopy=False)[number].state.is_finished():
        report(study, trial)
    if trial.status == COMPLETED and trial.eval_loss is not None:
        study.tell(number, trial.eval_loss, skip_if_finished=True)
    elif trial.status == STOPPED:
        study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
    else:
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


class StudySearcher(Searcher):
    """Proposes what the study asks for; the trials that were interrupted come first."""

    def __init__(self, study: optuna.Study, space: Space, cfg: RunConfig, interrupted: list[Trial]) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._study = study
        self._space = space
        self._cfg = cfg
        self._interrupted = list(interrupted)
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(configured_point(space, cfg))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        if self._interrupted:
            known = self._interrupted.pop(0)
            return {"trial_id": known.trial_id, "params": known.params}
        trial = self._study.ask()
        return {"trial_id": trial_name(trial.number), "params": sample(trial, self._space, self._cfg)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the study hears of measures and ends from the journal, by ``report`` and ``tell``."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for Tune's own snapshots: a sweep goes on from the study and the journal."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk."""
