"""The samplers: who proposes a trial's parameters, by the name in ``search.sampler``.

What they learn from differs. TPE and GP take whole, stopped and infeasible trials, and running ones as far as they
came; CMA-ES and NSGA-II take whole ones only; random, QMC and the grid learn nothing. Dimensions that a sampler cannot
model (categorical ones in CMA-ES, conditional ones in GP, QMC and NSGA-II) are drawn one by one, each by itself.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import DimensionKind, Sampler, Scheduler
from raytune_lora.tuning import space as spaces
from raytune_lora.tuning.at_rung import MOST
from raytune_lora.tuning.cmaes import Cmaes
from raytune_lora.tuning.constraints import Constraints
from raytune_lora.tuning.gp import Gp
from raytune_lora.tuning.tpe import Tpe

WARM = "warm_start"  # user attribute of a trial that an earlier sweep ran: its folder and number
_GRID_LIMIT = 100_000  # points
_CHILDREN = 20  # tries at one that is new
_WARM_CMAES = 10  # whole trials of earlier sweeps: CMA-ES begins from the best tenth of them (Nomura et al. 2021)

Own = optuna.samplers.BaseSampler


@dataclass(frozen=True)
class _Entry:
    """One sampler."""

    build: Callable[[SweepConfig, int, Sequence[FrozenTrial]], Own]  # config, seed, the study's trials so far
    problems: Callable[[SweepConfig], list[str]] = lambda _cfg: []
    packages: tuple[str, ...] = ()  # beside Optuna
    learns: bool = True  # whether what was found before changes what it proposes


def build(cfg: SweepConfig, study: optuna.Study, constraints: Constraints) -> Own:
    """The sampler of a sweep, to begin or to go on with what is in its study; the grid's points fulfil constraints."""
    trials = study.get_trials(deepcopy=False)
    # with the same seed again, a sweep that goes on would propose again what it proposed before
    seed = cfg.search.seed + len(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _SAMPLERS[chosen(cfg)].build(cfg, seed, trials)
    if isinstance(sampler, Grid):
        sampler.keep(constraints)
    return sampler


def chosen(cfg: SweepConfig) -> Sampler:
    """The sampler of a sweep by name; of ``auto``, the one that finds more for its samples there.

    With ASHA and half of the samples of 64 whole trials, GP's regret is 0.44, 0.57 and 0.79 of TPE's on the three tasks
    of the benchmark ``search_quality``. TPE it is where GP models a part of the space only, where it has several losses
    to model, where the later trials are not proposed at all, and where trials are so many that GP would forget some.
    """
    if cfg.search.sampler is not Sampler.auto:
        return cfg.search.sampler
    part = any(dimension.when for dimension in cfg.space.values())
    several = len(cfg.search.objectives) > 1
    bred = cfg.scheduler.kind is Scheduler.pbt
    return Sampler.tpe if part or several or bred or cfg.search.trials > MOST else Sampler.gp


def at_random(cfg: SweepConfig, study: optuna.Study) -> Own:
    """Who proposes where the sweep's own sampler comes back to points that are refused."""
    return _random(cfg, cfg.search.seed + len(study.get_trials(deepcopy=False)), ())


def problems(cfg: SweepConfig, *, here: bool = True) -> list[str]:
    """Why the sampler cannot search this space; the space itself has none of ``space.problems``.

    Args:
        cfg: of the sweep.
        here: whether it is to run on this machine, with what is installed here.
    """
    named, entry = f"search.sampler={cfg.search.sampler.value}", _SAMPLERS[chosen(cfg)]
    found = [
        f"{named} needs the package {package}: pip install {package}"
        for package in entry.packages
        if here and importlib.util.find_spec(package) is None
    ]
    if cfg.search.warm_start and not entry.learns:
        learning = ", ".join(name.value for name, other in _SAMPLERS.items() if other.learns)
        found.append(f"search.warm_start: {named} does not learn from earlier trials; take one of {learning}, or none")
    return found + entry.problems(cfg)


def marks(cfg: SweepConfig) -> dict[str, Any]:
    """System attributes that make the sampler count a trial of an earlier sweep as one of its own."""
    if chosen(cfg) is Sampler.nsga2:
        return {Nsga2._get_generation_key(): 0}
    return {}


# ------------------------------------------------------------------------------------------------------------- builders


def _tpe(cfg: SweepConfig, seed: int, trials: Sequence[FrozenTrial] = ()) -> Own:
    """Tree-structured Parzen estimators (Bergstra et al. 2011), one over all dimensions that go together."""
    return Tpe(cfg.search.startup_trials, _random_share(cfg, 0.33), seed)


def _gp(cfg: SweepConfig, seed: int, trials: Sequence[FrozenTrial]) -> Own:
    """A Gaussian process with expected improvement; what still runs is taken into account."""
    return Gp(cfg.search.startup_trials, _random_share(cfg, 0.1), seed)


def _cmaes(cfg: SweepConfig, seed: int, trials: Sequence[FrozenTrial]) -> Own:
    """CMA-ES on the numbers, TPE on the names. It begins in the middle of the space, so it needs no random start."""
    return Cmaes(
        independent_sampler=_tpe(cfg, seed),
        warn_independent_sampling=False,
        seed=seed,
        source_trials=_numbers_of_warm(trials),
    )


def _random(cfg: SweepConfig, seed: int, trials: Sequence[FrozenTrial]) -> Own:
    return optuna.samplers.RandomSampler(seed=seed)


def _qmc(cfg: SweepConfig, seed: int, trials: Sequence[FrozenTrial]) -> Own:
    """A scrambled Sobol sequence; the study knows how far it has come, so the scrambling keeps its seed."""
    return optuna.samplers.QMCSampler(
        scramble=True,
        seed=cfg.search.seed,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )


def _grid(cfg: SweepConfig, seed: int, trials: Sequence[FrozenTrial]) -> Own:
    return Grid(cfg)


def _nsga2(cfg: SweepConfig, seed: int, trials: Sequence[FrozenTrial]) -> Own:
    """NSGA-II (Deb et al. 2002). Its first generation is random: as many trials as any sampler starts with."""
    return Nsga2(population_size=max(2, cfg.search.startup_trials), seed=seed)


def _random_share(cfg: SweepConfig, usual: float) -> float:
    return usual if cfg.search.random_share is None else cfg.search.random_share


def _numbers_of_warm(trials: Sequence[FrozenTrial]) -> list[FrozenTrial] | None:
    """Earlier sweeps' whole trials without what CMA-ES has no place for; None where they are too few."""
    found = []
    for trial in trials:
        if WARM in trial.user_attrs and trial.state is TrialState.COMPLETE:
            kept = {
                name: own
                for name, own in trial.distributions.items()
                if not isinstance(own, CategoricalDistribution) and not own.single()
            }
            params = {name: trial.params[name] for name in kept}
            found.append(create_trial(params=params, distributions=kept, value=trial.value))
    return found if len(found) >= _WARM_CMAES else None


class Nsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II whose children are no copies: crossing may give a point that has been trained already."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A child; what it lacks is a mutation, and drawn by itself."""
        taken = {_identity(t.params) for t in study.get_trials(deepcopy=False)}
        for _ in range(_CHILDREN):
            child = super().sample_relative(study, trial, search_space)
            if _identity(child) not in taken:
                break
        return child


# ------------------------------------------------------------------------------------------------------------- the grid


class Grid(Own):
    """Every point of the space once, in an order shuffled by the seed.

    Unlike Optuna's own it takes the config as it stands for one of the points, and knows dimensions that exist at some
    points only. Which points are left follows from the study's trials.
    """

    def __init__(self, cfg: SweepConfig) -> None:
        self._space = cfg.space
        self._points = {_identity(point): point for point in _points(cfg)}
        self._order = list(self._points)
        random.Random(cfg.search.seed).shuffle(self._order)

    def keep(self, constraints: Constraints) -> None:
        """Leave out the points that break a constraint."""
        self._order = [name for name in self._order if not constraints.broken_at(self._points[name])]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {spaces.parameter(d): spaces.distribution(d) for d in self._space.values()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The first point that no other trial has; where a trial's parameters are set in part, one that has those."""
        others = (t for t in study.get_trials(deepcopy=False) if t.number != trial.number)
        taken = {_identity({**t.system_attrs.get("fixed_params", {}), **t.params}) for t in others}
        left = [name for name in self._order if name not in taken]
        asked = _identity(trial.system_attrs.get("fixed_params", {}))
        agreeing = [name for name in left if asked <= name] if asked else left
        # none is left where a trial that never started is proposed again
        return self._points[(agreeing or left or self._order)[0]]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise RuntimeError(f"{param_name} is in no point of the grid")


def _identity(point: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """A point by its values, the last digits of a float aside."""
    return frozenset(
        (name, f"{float(value):.10g}" if isinstance(value, (int, float)) else str(value))
        for name, value in point.items()
    )


def _points(cfg: SweepConfig) -> list[dict[str, Any]]:
    """At most one more than a grid may have."""
    return list(itertools.islice(spaces.points(cfg.space, cfg), _GRID_LIMIT + 1))


# ------------------------------------------------------------------------------------------------------------- problems


def _grid_problems(cfg: SweepConfig) -> list[str]:
    found = [
        f"search.sampler=grid: space.{name} is continuous; give it a step, or kind: categorical and choices"
        for name, d in cfg.space.items()
        if spaces.values(d) is None
    ]
    if found:
        return found
    count = len(_points(cfg))
    if count > _GRID_LIMIT:
        return [f"search.sampler=grid: the space has more than {_GRID_LIMIT:,} points; take search.sampler=qmc"]
    if cfg.search.trials > count:
        return [
            f"search.trials must be <= the {count} points of the grid (got {cfg.search.trials}); "
            f"set search.trials={count}, or give the space more steps or choices"
        ]
    return []


def _cmaes_problems(cfg: SweepConfig) -> list[str]:
    numeric = {name: d for name, d in cfg.space.items() if d.kind is not DimensionKind.categorical and d.low != d.high}
    found = [
        f"search.sampler=cmaes: space.{name} is a number that exists only at times (when), and CMA-ES works in a space "
        "of fixed size; make it hold always, or take search.sampler=tpe"
        for name, d in numeric.items()
        if d.when
    ]
    if not numeric:
        found.append(
            "search.sampler=cmaes: the space has no float or int dimension of more than one value, and CMA-ES has no "
            "use for others; take search.sampler=tpe"
        )
    if len(cfg.search.objectives) > 1:
        found.append(
            f"search.sampler=cmaes has one objective (got {len(cfg.search.objectives)} in search.objectives); "
            "take search.sampler=nsga2"
        )
    return found


_SAMPLERS: dict[Sampler, _Entry] = {  # all but ``auto``
    Sampler.tpe: _Entry(_tpe),
    Sampler.gp: _Entry(_gp, packages=("scipy", "torch")),
    Sampler.cmaes: _Entry(_cmaes, _cmaes_problems, packages=("cmaes",)),
    Sampler.random: _Entry(_random, learns=False),
    Sampler.qmc: _Entry(_qmc, packages=("scipy",), learns=False),
    Sampler.grid: _Entry(_grid, _grid_problems, learns=False),
    Sampler.nsga2: _Entry(_nsga2),
}
