"""What the study is told of trials: how they began, what was measured and how they ended.

The journal is the truth: the study's database may lag behind it, and ``reconcile`` brings it up.
"""

from __future__ import annotations

import math
from collections import Counter

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import Objective
from raytune_lora.training.failures import DIVERGED, OOM, STOPPED
from raytune_lora.tuning import samplers
from raytune_lora.tuning.space import apply, configured_point, fitting
from raytune_lora.tuning.study import CONTINUES, PARENT, REPLACES, keep, warm_start
from raytune_lora.tuning.trials import COMPLETED, Record, Trial

_REFUSED = "refused"  # user attribute of a proposal that broke constraints: their names
_WORST = 1e9  # a violation that a database can hold
# system attributes that Optuna reads a constraint from: above zero is infeasible
_INFEASIBLE = {OOM: "constraints:memory", DIVERGED: "constraints:finite"}


def reconcile(study: optuna.Study, record: Record, cfg: SweepConfig) -> list[Trial]:
    """Bring the study up to the journal after a kill.

    A trial that the journal saw start and the study's database did not is added, all of them where another machine goes
    on and begins a database; one that the journal never saw start is told as failed, and its parameters are proposed
    again; a child waits until its turn comes again. Then the study hears what was measured and how it ended.

    Returns:
        The trials that were running or paused: they are to go on.
    """
    known = {int(trial.trial_id): trial for trial in record.searched}
    if known and not study.get_trials(deepcopy=False):
        warm_start(study, cfg.space, cfg)
    for number in range(len(study.get_trials(deepcopy=False)), max(known, default=-1) + 1):
        study.add_trial(_as_begun(known[number], cfg) if number in known else create_trial(state=TrialState.FAIL))
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)):
        trial = known.get(frozen.number)
        if trial is None:
            if frozen.state is TrialState.RUNNING and PARENT not in frozen.user_attrs:
                study.tell(frozen.number, state=TrialState.FAIL)
                study.enqueue_trial({**frozen.system_attrs.get("fixed_params", {}), **frozen.params})
            continue
        if frozen.state is TrialState.WAITING:
            _begin(study, frozen, _as_begun(trial, cfg))
        if trial.ended:
            tell(study, trial)
        else:
            report(study, trial)
    for trial in known.values():
        if trial.resumed and trial.ended:
            tell(study, trial)
    keep(study)
    return [trial for trial in record.trials.values() if not trial.ended]


def _as_begun(trial: Trial, cfg: SweepConfig) -> FrozenTrial:
    """A trial as the study had it when it began: the sampler's parameters are those that give its own."""
    point = configured_point(cfg.space, apply(cfg, trial.params))
    distributions = fitting(cfg.space, apply(cfg, trial.params), point)
    params = {name: point[name] for name in distributions}
    marks = samplers.marks(cfg)
    family = {} if trial.parent is None else {PARENT: trial.parent, REPLACES: trial.replaces}
    return create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions=distributions,
        user_attrs=family,
        system_attrs=marks,
    )


def _begin(study: optuna.Study, waiting: FrozenTrial, begun: FrozenTrial) -> None:
    """Have a trial begin that waits in the study, with the parameters that it began with."""
    storage, trial_id = study._storage, waiting._trial_id
    storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    for name, own in begun.distributions.items():
        storage.set_trial_param(trial_id, name, own.to_internal_repr(begun.params[name]), own)


def report(study: optuna.Study, trial: Trial) -> None:
    """Give the study what has been measured of a trial that runs.

    Nothing with several objectives: Optuna has no intermediate values there, and no trial is stopped early.
    """
    if len(study.directions) > 1:
        return
    trial_id = _id(study, trial)
    known = study._storage.get_trial(trial_id)
    for measure in [] if known.state.is_finished() else trial.curve:
        seen = int(measure["samples_seen"])
        if seen not in known.intermediate_values:
            study._storage.set_trial_intermediate_value(trial_id, seen, measure["eval_loss"])


def tell(study: optuna.Study, trial: Trial) -> None:
    """Tell the study how a trial ended; never by a made-up number.

    - completed: its objectives' values
    - stopped: pruned, with its curve
    - diverged or out of memory: pruned and infeasible, of which TPE and GP keep away; others learn nothing of it
    - failed, or completed without a finite value: failed

    What a stopped trial measured after it was taken up again is told as a trial of its own.
    """
    number, trial_id = int(trial.trial_id), _id(study, trial)
    own = study._storage.get_trial(trial_id)
    if own.state.is_finished():
        _tell_more(study, trial, own)
        return
    report(study, trial)
    reached = _values(study, trial)
    if trial.status == COMPLETED and reached:
        study.tell(number, reached)
        return
    study._storage.set_trial_user_attr(trial_id, "status", trial.status)
    if trial.error:
        study._storage.set_trial_user_attr(trial_id, "error", trial.error)
    if trial.status in _INFEASIBLE:
        study._storage.set_trial_system_attr(trial_id, _INFEASIBLE[trial.status], 1.0)
    learned = trial.status == STOPPED or trial.status in _INFEASIBLE
    study.tell(number, state=TrialState.PRUNED if learned else TrialState.FAIL)


def refuse(study: optuna.Study, trial: optuna.Trial, broken: dict[str, float]) -> None:
    """Tell the study that a proposal is infeasible, and by how much; it takes a number, so trials' names have holes."""
    trial.set_user_attr(_REFUSED, list(broken))
    for name, amount in broken.items():
        trial.set_constraint(name, min(amount, _WORST))
    study.tell(trial, state=TrialState.PRUNED)


def refused(study: optuna.Study) -> dict[str, int]:
    """How many proposals broke each constraint."""
    names = (name for t in study.get_trials(deepcopy=False) for name in t.user_attrs.get(_REFUSED, ()))
    return dict(Counter(names))


def _tell_more(study: optuna.Study, trial: Trial, own: FrozenTrial) -> None:
    """Add what a trial measured beyond what the study knows; a trial that was told cannot be opened again there.

    The added one has the same parameters, the whole curve, and the user attribute ``continues``. It takes a number that
    no trial is named after then. ``counted`` leaves out what it continues.
    """
    entries = [own, *(t for t in study.get_trials(deepcopy=False) if t.user_attrs.get(CONTINUES) == trial.trial_id)]
    if trial.samples_seen <= max((step for t in entries for step in t.intermediate_values), default=0):
        return
    reached = _values(study, trial) if trial.status == COMPLETED else []
    stopped = TrialState.PRUNED if trial.status == STOPPED or trial.status in _INFEASIBLE else TrialState.FAIL
    kept = {key: value for key, value in own.system_attrs.items() if key.endswith("generation")}
    infeasible = {_INFEASIBLE[trial.status]: 1.0} if trial.status in _INFEASIBLE else {}
    family = {key: own.user_attrs[key] for key in (PARENT, REPLACES) if key in own.user_attrs}
    more = create_trial(
        state=TrialState.COMPLETE if reached else stopped,
        values=reached or None,
        params=own.params,
        distributions=own.distributions,
        intermediate_values={int(measure["samples_seen"]): measure["eval_loss"] for measure in trial.curve},
        user_attrs={**family, CONTINUES: trial.trial_id, **({} if reached else {"status": trial.status})},
        system_attrs=kept | infeasible,
    )
    study.add_trial(more)


def _id(study: optuna.Study, trial: Trial) -> int:
    """The storage's own number of a trial."""
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, int(trial.trial_id))


def _values(study: optuna.Study, trial: Trial) -> list[float]:
    """What a trial reached in each objective; empty where one was not measured."""
    values = [getattr(trial, name) for name in study.metric_names or [Objective.eval_loss.value]]
    return [] if any(value is None or not math.isfinite(value) for value in values) else values
