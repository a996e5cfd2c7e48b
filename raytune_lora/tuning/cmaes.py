"""CMA-ES whose state is what its trials reached."""

from __future__ import annotations

from typing import Any

import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

_GENERATION = "cma:generation"  # system attribute of a trial


class Cmaes(optuna.samplers.CmaEsSampler):
    """Optuna's CMA-ES without its pickles.

    Optuna keeps the optimizer pickled in the study and unpickles it at each ask, so that whoever wrote a study has code
    run where a search goes on with it. Here the study holds the generation of each trial alone. The optimizer follows
    from that: it is told one generation after the other, of each the first whole trials. What was told is kept in
    memory and told anew where a trial that ended late belongs to it, so that a search that goes on has the same state.
    """

    def __init__(self, **settings: Any) -> None:
        """
        Args:
            settings: of ``CmaEsSampler``.
        """
        super().__init__(**settings)
        self._optimizer: Any = None
        self._told: list[list[int]] = []  # numbers of the trials of each generation

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A point of the newest generation; nothing before there is a whole trial."""
        whole = self._get_trials(study)
        if not search_space or len(whole) < self._n_startup_trials:
            return {}
        space = _SearchSpaceTransform(search_space, transform_0_1=True)
        optimizer = self._state(study, whole, space)
        optimizer.reseed_rng(self._cma_rng.rng.randint(1, 2**16) + trial.number)
        point: dict[str, Any] = space.untransform(optimizer.ask())
        study._storage.set_trial_system_attr(trial._trial_id, _GENERATION, optimizer.generation)
        return point

    def _state(self, study: optuna.Study, whole: list[FrozenTrial], space: Any) -> Any:
        """The optimizer after all generations of which enough trials are whole."""
        of: dict[int, list[FrozenTrial]] = {}
        for trial in whole:
            generation = trial.system_attrs.get(_GENERATION)
            if isinstance(generation, int) and space._search_space.keys() <= trial.params.keys():
                of.setdefault(generation, []).append(trial)
        if self._optimizer is None or not self._holds(of):
            self._optimizer, self._told = self._init_optimizer(space, study.direction), []
        size = self._optimizer.population_size
        while len(trials := of.get(len(self._told), [])) >= size:
            sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
            self._optimizer.tell([(space.transform(t.params), sign * _value(t)) for t in trials[:size]])
            self._told.append([trial.number for trial in trials[:size]])
        return self._optimizer

    def _holds(self, of: dict[int, list[FrozenTrial]]) -> bool:
        """Whether what was told is still what there is to tell."""
        first = (of.get(generation, [])[: len(numbers)] for generation, numbers in enumerate(self._told))
        return [[trial.number for trial in trials] for trials in first] == self._told


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "it is whole"
    return trial.value
