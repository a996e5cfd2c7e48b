"""The sweep's study, what it is told of trials, and what earlier sweeps give it.

The journal is the truth: the study's database may lag behind it, and ``reconcile`` brings it up.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from raytune_lora.config.compose import load
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import Objective, SearchConfig
from raytune_lora.errors import UserError
from raytune_lora.training.failures import DIVERGED, OOM, STOPPED
from raytune_lora.tuning import samplers, secrets
from raytune_lora.tuning.samplers import WARM
from raytune_lora.tuning.space import Space, apply, configured_point, fitting
from raytune_lora.tuning.storage import KeptStorage
from raytune_lora.tuning.trials import COMPLETED, Record, Trial, trial_name

STUDY_FILE = "study.db"
STUDY_NAME = "sweep"  # in the folder's own database
NAME_FILE = "study_name"  # in the folder: the study's name in a database that sweeps share

# user attributes of the study's trials
CONTINUES = "continues"  # the trial whose later part it is
PARENT, REPLACES = "parent", "replaces"  # of a child in a population

_JOURNAL = "journal://"
_REFUSED = "refused"  # user attribute of a proposal that broke constraints: their names
_WORST = 1e9  # a violation that a database can hold
# system attributes that Optuna reads a constraint from: above zero is infeasible
_INFEASIBLE = {OOM: "constraints:memory", DIVERGED: "constraints:finite"}
_DRIVERS = {
    "postgresql": "pip install psycopg2-binary, and write postgresql+psycopg2://…",
    "mysql": "pip install pymysql, and write mysql+pymysql://…",
}

# ------------------------------------------------------------------------------------------------------------ the study


def open_study(folder: Path, cfg: SearchConfig) -> optuna.Study:
    """The sweep's study, made where it is missing. Its sampler is ``StudySearcher``'s to set.

    Args:
        folder: of the sweep.
        cfg: with the objectives, all of them to be small, and the database.

    Raises:
        UserError: the database cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        name, directions = _study_name(folder, cfg), [StudyDirection.MINIMIZE] * len(cfg.objectives)
        study = optuna.load_study(study_name=name, storage=KeptStorage(_storage(folder, cfg.storage), name, directions))
    except (SQLAlchemyError, OptunaError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"search.storage: {_shown(cfg.storage)} cannot be reached or written ({reason})") from error
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.value for objective in cfg.objectives])
    return study


def problems(cfg: SweepConfig) -> list[str]:
    """Why there can be no such study: its database, the sweeps it is to learn from."""
    return _storage_problems(cfg.search.storage) + _warm_problems(cfg)


def pareto(study: optuna.Study) -> list[str]:
    """The sweep's own trials that no other is as good as in all objectives and better in one, best loss first."""
    front: list[FrozenTrial] = []
    ended = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if WARM not in t.user_attrs]
    # in this order, none is beaten by a later one
    for trial in sorted(ended, key=lambda t: (t.values, t.number)):
        if not any(_beats(other.values, trial.values) for other in front):
            front.append(trial)
    return [trial_name(trial.number) for trial in front]


def _beats(one: list[float], other: list[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _study_name(folder: Path, cfg: SearchConfig) -> str:
    """In a shared database, one that no other sweep has, nor had: a folder may be deleted and made anew."""
    if cfg.storage is None:
        return STUDY_NAME
    file = folder / NAME_FILE
    if not file.exists():
        file.write_text(f"{folder.name}-{uuid.uuid4().hex[:8]}")
    return file.read_text()


def _storage(folder: Path, url: str | None) -> BaseStorage:
    if url is None:
        return RDBStorage(f"sqlite:///{folder / STUDY_FILE}")
    if url.startswith(_JOURNAL):
        return JournalStorage(JournalFileBackend(url.removeprefix(_JOURNAL)))
    # a server may end a connection between two trials
    return RDBStorage(secrets.with_password(url), engine_kwargs={"pool_pre_ping": True})


def _shown(url: str | None) -> str:
    """A URL without its password."""
    if url is None:
        return STUDY_FILE
    return url if url.startswith(_JOURNAL) else make_url(url).render_as_string(hide_password=True)


def _storage_problems(url: str | None) -> list[str]:
    if url is None:
        return []
    known = "sqlite:////path.db, postgresql+psycopg2://…, mysql+pymysql://… or journal:///path"
    if url.startswith(_JOURNAL):
        return _path_problems(url, url.removeprefix(_JOURNAL))
    try:
        parsed = make_url(url)
        dialect = parsed.get_dialect()
        dialect.import_dbapi()
    except NoSuchModuleError:
        return [f"search.storage: there is no database {parsed.drivername!r}; write {known}"]
    except ArgumentError:  # the URL may hold a password, and is not shown
        return [f"search.storage is no URL of a database; write {known}"]
    except ModuleNotFoundError as error:
        remedy = _DRIVERS.get(parsed.get_backend_name(), "install it")
        return [f"search.storage={parsed.drivername}://… needs the driver {error.name}: {remedy}"]
    return _path_problems(url, parsed.database or "") if parsed.get_backend_name() == "sqlite" else []


def _path_problems(url: str, path: str) -> list[str]:
    if not path.startswith("/"):
        return [f"search.storage={url} must name an absolute path, so that a resume from elsewhere finds it again"]
    if not Path(path).parent.is_dir():
        return [f"search.storage={url}: there is no folder {Path(path).parent}; make it, or name another"]
    return []


# ------------------------------------------------------------------------------------------ what trials were and became


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


def keep(study: optuna.Study, sparing: bool = False) -> None:
    """Have the study's database catch up; sparing: at most for a share of the time."""
    storage = study._storage
    if isinstance(storage, KeptStorage):
        storage.keep(sparing)


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
    - diverged or out of memory: pruned and infeasible, of which TPE keeps away; other samplers learn nothing of it
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


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Each trial once: without those that another continues."""
    last = {t.user_attrs[CONTINUES]: t.number for t in trials if CONTINUES in t.user_attrs}
    if not last:
        return list(trials)
    own = ((t, t.user_attrs.get(CONTINUES, trial_name(t.number))) for t in trials)
    return [t for t, name in own if last.get(name, t.number) == t.number]


class EachOnce(optuna.Study):
    """What a sampler sees: each trial once."""

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return counted(super()._get_trials(*args, **kwargs))


def _id(study: optuna.Study, trial: Trial) -> int:
    """The storage's own number of a trial."""
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, int(trial.trial_id))


def _values(study: optuna.Study, trial: Trial) -> list[float]:
    """What a trial reached in each objective; empty where one was not measured."""
    values = [getattr(trial, name) for name in study.metric_names or [Objective.eval_loss.value]]
    return [] if any(value is None or not math.isfinite(value) for value in values) else values


# ----------------------------------------------------------------------------------------------------------- warm start


def warm_start(study: optuna.Study, space: Space, cfg: SweepConfig) -> int:
    """Add to the study what earlier sweeps found at points of this space, once; their own warm starts aside.

    The added trials come before the sweep's own, take the first numbers, and carry the user attribute ``warm_start``.
    They teach the sampler; the journal and the results do not know them.

    Returns:
        How many the study has of them.
    """
    there = {t.user_attrs[WARM] for t in study.get_trials(deepcopy=False) if WARM in t.user_attrs}
    for folder in cfg.search.warm_start:
        for trial in _fitting_trials(Path(folder).expanduser(), space, cfg):
            if trial.user_attrs[WARM] not in there:
                study.add_trial(trial)
                there.add(trial.user_attrs[WARM])
    return len(there)


def _fitting_trials(folder: Path, space: Space, cfg: SweepConfig) -> Iterator[FrozenTrial]:
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    for trial in counted(_earlier(folder).get_trials(deepcopy=False, states=states)):
        distributions = fitting(space, cfg, trial.params)
        # memory ran out or the loss diverged on another machine, or with another model: that says nothing here; and
        # what a child of a population reached, its own parameters reached in part only
        if distributions and not trial.constraints and not {WARM, PARENT} & trial.user_attrs.keys():
            yield create_trial(
                state=trial.state,
                values=trial.values,
                params=trial.params,
                distributions=distributions,
                intermediate_values=trial.intermediate_values,
                user_attrs={WARM: f"{folder.absolute()}#{trial_name(trial.number)}"},
                system_attrs=samplers.marks(cfg),
            )


def _earlier(folder: Path) -> optuna.Study:
    """The study of an earlier sweep, to read.

    Raises:
        UserError: there is none.
    """
    try:
        if (folder / NAME_FILE).is_file():
            shared = load(folder / "config.yaml").search.storage
            return optuna.load_study(study_name=(folder / NAME_FILE).read_text(), storage=_storage(folder, shared))
        if (folder / STUDY_FILE).is_file():
            url = f"sqlite:///file:{(folder / STUDY_FILE).absolute()}?mode=ro&uri=true"
            return optuna.load_study(study_name=STUDY_NAME, storage=RDBStorage(url, skip_table_creation=True))
    except (SQLAlchemyError, OptunaError, OSError, KeyError, RuntimeError, UserError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"search.warm_start: the study of {folder} cannot be read ({reason})") from error
    raise UserError(f"search.warm_start: {folder} holds no study; name the folder of an earlier sweep")


def _warm_problems(cfg: SweepConfig) -> list[str]:
    found = []
    for name in cfg.search.warm_start:
        folder = Path(name).expanduser()
        try:
            if len(_earlier(folder).directions) != len(cfg.search.objectives):
                found.append(f"search.warm_start: the sweep in {folder} had another number of objectives")
            elif not any(_fitting_trials(folder, cfg.space, cfg)):
                found.append(
                    f"search.warm_start: no trial of {folder} lies in this space (the same keys, values within their "
                    "bounds); widen the space, or leave the folder out"
                )
        except UserError as error:
            found += error.problems
    return found
