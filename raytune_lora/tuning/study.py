"""The sweep's study: its database, what is read from it, and what earlier sweeps give it."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from raytune_lora.config.compose import load
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import SearchConfig
from raytune_lora.errors import Passing, UserError
from raytune_lora.network import failure
from raytune_lora.tuning import samplers, secrets
from raytune_lora.tuning.samplers import WARM
from raytune_lora.tuning.space import Space, fitting
from raytune_lora.tuning.storage import KeptStorage
from raytune_lora.tuning.trials import trial_name

STUDY_FILE = "study.db"
STUDY_NAME = "sweep"  # in the folder's own database
NAME_FILE = "study_name"  # in the folder: the study's name in a database that sweeps share

# user attributes of the study's trials
CONTINUES = "continues"  # the trial whose later part it is
PARENT, REPLACES = "parent", "replaces"  # of a child in a population

_JOURNAL = "journal://"
_SECONDS = 10.0  # for a database server to take a connection
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
        Passing: the database cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        name, directions = _study_name(folder, cfg), [StudyDirection.MINIMIZE] * len(cfg.objectives)
        study = optuna.load_study(study_name=name, storage=KeptStorage(_storage(folder, cfg.storage), name, directions))
    except (SQLAlchemyError, OptunaError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Passing(f"search.storage: {_shown(cfg.storage)} cannot be reached or written ({reason})") from error
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.value for objective in cfg.objectives])
    return study


def keep(study: optuna.Study, sparing: bool = False) -> None:
    """Have the study's database catch up; sparing: at most for a share of the time."""
    storage = study._storage
    if isinstance(storage, KeptStorage):
        storage.keep(sparing)


def problems(cfg: SweepConfig) -> list[str]:
    """Why there can be no such study: its database, the sweeps it is to learn from."""
    return _storage_problems(cfg.search.storage) + _warm_problems(cfg)


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Each trial once: without those that another continues."""
    last = {t.user_attrs[CONTINUES]: t.number for t in trials if CONTINUES in t.user_attrs}
    if not last:
        return list(trials)
    own = ((t, t.user_attrs.get(CONTINUES, trial_name(t.number))) for t in trials)
    return [t for t, name in own if last.get(name, t.number) == t.number]


class EachOnce(optuna.Study):
    """What a sampler sees: each trial once."""

    _looked = 0  # trials that were looked at; at each ask all of them would be what a search of thousands waits for
    _twice = False  # whether one of them continues another

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        whole = self._storage.get_all_trials(self._study_id, deepcopy=False)
        self._twice = self._twice or any(CONTINUES in trial.user_attrs for trial in whole[self._looked :])
        self._looked = len(whole)
        trials = super()._get_trials(*args, **kwargs)
        return counted(trials) if self._twice else trials


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
    return _path_problems(url, parsed.database or "") if parsed.get_backend_name() == "sqlite" else _silent(url)


def _silent(url: str) -> list[str]:
    """Whether a database server answers, found before anything is measured."""
    engine = create_engine(secrets.with_password(url), poolclass=NullPool)
    why = failure(lambda: engine.connect().close(), _SECONDS)
    where = "see that the server runs, takes connections from here, and knows the user"
    return [f"search.storage: {_shown(url)} cannot be reached ({why}); {where}"] if why else []


def _path_problems(url: str, path: str) -> list[str]:
    if not path.startswith("/"):
        return [f"search.storage={url} must name an absolute path, so that a resume from elsewhere finds it again"]
    if not Path(path).parent.is_dir():
        return [f"search.storage={url}: there is no folder {Path(path).parent}; make it, or name another"]
    return []


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
