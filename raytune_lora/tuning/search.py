"""Optuna as a Tune searcher that survives a kill.

Ray's OptunaSearch dies when it is restored with a persistent study. Here the study is the only state: a searcher can
be made anew at any time, from the study and the journal.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from raytune_lora.config.schema import SweepConfig
from raytune_lora.tuning import samplers, study
from raytune_lora.tuning.constraints import Constraints
from raytune_lora.tuning.population import perturbed
from raytune_lora.tuning.samplers import WARM
from raytune_lora.tuning.space import Space, configured_point, sample, settings
from raytune_lora.tuning.study import PARENT, REPLACES, EachOnce, keep, warm_start
from raytune_lora.tuning.told import refuse
from raytune_lora.tuning.trials import Trial, trial_name
from raytune_lora.tuning.turns import Child, Turn, Turns

_OWN_TRIES, _TRIES = 20, 1000  # refusals in a row after which points are drawn at random, and after which none is


def problems(cfg: SweepConfig) -> list[str]:
    """Why the search cannot be done: its sampler, its database, the sweeps it is to learn from."""
    return samplers.problems(cfg) + study.problems(cfg)


class StudySearcher(Searcher):
    """Proposes what the study asks for, or what is to go on; the trials that were interrupted come first."""

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        cfg: SweepConfig,
        interrupted: list[Trial],
        constraints: Constraints | None = None,
        turns: Turns | None = None,
    ) -> None:
        """
        Args:
            study: of the sweep.
            space: that is searched.
            cfg: of the sweep.
            interrupted: trials that were running when the sweep was killed.
            constraints: that proposals must fulfil; None: those of the config.
            turns: says whose turn it is; None: always a new trial's.
        """
        super().__init__(metric="eval_loss", mode="min")
        self._constraints = constraints or Constraints(cfg)
        self._study = study
        self._space = space
        self._cfg = cfg
        self._interrupted = list(interrupted)
        self._turns = turns or Turns()
        self._out: dict[str, Trial] = {}  # what was proposed and has not ended, by Tune's name
        self._sittings: Counter[str] = Counter()  # proposals of each trial in this process
        if all(WARM in trial.user_attrs for trial in study.get_trials(deepcopy=False)):
            warm_start(study, space, cfg)
            study.enqueue_trial(configured_point(space, cfg))
            keep(study)  # so that the numbers of what follows hold after a kill
        self._asked = EachOnce(study.study_name, study._storage, samplers.build(cfg, study, self._constraints))

    @property
    def over(self) -> bool:
        """Whether there is nothing more to run, and nothing runs."""
        return not self._interrupted and not self._out and self._turns.next({}) is Turn.END

    def suggest(self, trial_id: str) -> Any:
        """What to run: ``trial_id``, ``params``, the terms of ``Turns``, and ``sitting`` where it is not the first."""
        if self._interrupted:
            turn: Trial | Child | Turn = self._interrupted.pop(0)
        else:
            turn = self._turns.next({trial.trial_id: trial for trial in self._out.values()})
        if turn is Turn.WAIT or turn is Turn.END:
            return None if turn is Turn.WAIT else self.FINISHED
        known = turn if isinstance(turn, Trial) else self._child(turn) if isinstance(turn, Child) else self._new()
        if known is None:
            return self.exhausted(f"none of {_TRIES} proposals fulfils search.constraints")
        self._out[trial_id] = known
        proposal = {"trial_id": known.trial_id, "params": known.params, **self._turns.terms(known)}
        if sitting := self._sittings[known.trial_id]:
            proposal["sitting"] = sitting
        self._sittings[known.trial_id] += 1
        return proposal

    def exhausted(self, why: str) -> Any:
        """What is answered where nothing is left to propose."""
        return self.FINISHED

    def _new(self) -> Trial | None:
        """A point that fulfils the constraints; those that do not are told as infeasible. None after many tries."""
        own = self._asked.sampler
        try:
            for tries in range(_TRIES):
                if tries == _OWN_TRIES:  # some samplers learn nothing of what is refused, and would ask for it for ever
                    self._asked.sampler = samplers.at_random(self._cfg, self._study)
                trial = self._asked.ask()
                params = sample(trial, self._space, self._cfg)
                broken = self._constraints.broken(params)
                if not broken:
                    return Trial(trial_name(trial.number), params)
                refuse(self._asked, trial, broken)
        finally:
            self._asked.sampler = own
        return None

    def _child(self, child: Child) -> Trial:
        """Enter it into the study, where it is not there already; a kill may have come before its start."""
        storage, parent, replaces = self._study._storage, child.parent, child.replaces.trial_id
        names = {PARENT: parent.trial_id, REPLACES: replaces}
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        number, params = next(((t.number, t.params) for t in running if t.user_attrs == names), (None, {}))
        if number is None:
            own = self._study.get_trials(deepcopy=False)[int(parent.trial_id)]
            params = perturbed(own.params, own.distributions, f"{self._cfg.search.seed}/{parent.trial_id}/{replaces}")
            entry = create_trial(
                state=TrialState.RUNNING, params=params, distributions=own.distributions, user_attrs=names
            )
            number = storage.get_trial_number_from_id(storage.create_new_trial(self._study._study_id, entry))
        begun = Trial(trial_name(number), settings(self._space, self._cfg, params), samples_seen=parent.samples_seen)
        begun.parent, begun.born, begun.replaces = parent.trial_id, parent.samples_seen, replaces
        return begun

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """There is room again; the study hears of measures and ends from the journal, by ``report`` and ``tell``."""
        self._out.pop(trial_id, None)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for Tune's own snapshots: a sweep goes on from the study and the journal."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study and the journal are on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study and the journal are on disk."""
