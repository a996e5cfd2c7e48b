"""Where a study is kept: in memory to be read, in a database to last.

Optuna reads the study at each ask and writes a trial value by value, each in a transaction. Over a database that is
what a search waits for: 0.6 s a trial with SQLite and 64 trials at a time. In a sweep one process alone asks and tells,
so it reads its own memory, and writes a trial with all that came to be known of it since it was last written.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

_SHARE = 0.25  # of the time, at most, goes into writing while a search runs


class KeptStorage(InMemoryStorage):
    """One study in memory, of which a database gets every change: of its trials by ``keep``, of itself at once.

    After a kill the database lacks what came after the last ``keep``; the sweep's journal has it. Nobody else may write
    to the study, anybody may read it in the database.
    """

    def __init__(self, lasting: BaseStorage, name: str, directions: Sequence[StudyDirection]) -> None:
        """
        Args:
            lasting: the database; the study is made there where it is missing, else read.
            name: of the study.
            directions: of its objectives, where it is made.
        """
        super().__init__()
        self._lasting = lasting
        try:
            self._there = lasting.create_new_study(directions, name)
        except DuplicatedStudyError:
            self._there = lasting.get_study_id_from_name(name)
        study = super().create_new_study(lasting.get_study_directions(self._there), name)
        for key, value in lasting.get_study_user_attrs(self._there).items():
            super().set_study_user_attr(study, key, value)
        for key, value in lasting.get_study_system_attrs(self._there).items():
            super().set_study_system_attr(study, key, value)
        self._ids: list[int] = []  # in the database, of the trials in the order of their numbers, their ids here
        self._written: dict[int, FrozenTrial] = {}  # unfinished trials as the database has them
        for trial in lasting.get_all_trials(self._there, deepcopy=False):
            self._note(super().create_new_trial(study, trial), trial._trial_id)
        self._changed: set[int] = set()
        self._next = 0.0  # time before which a sparing ``keep`` does nothing

    def keep(self, sparing: bool = False) -> None:
        """Write what has changed.

        Args:
            sparing: not so soon that the writing would take more than a quarter of all time. A trial that ends within
                that is written once.
        """
        began = time.monotonic()
        if sparing and began < self._next:
            return
        for trial_id in sorted(self._changed):
            now, before = self._get_trial(trial_id), self._written.get(trial_id)
            if before is not None:
                self._write(self._ids[trial_id], before, now)
                self._note(trial_id, self._ids[trial_id])
            else:  # numbers follow from the order; all earlier trials are there
                self._note(trial_id, self._lasting.create_new_trial(self._there, now))
            self._changed.discard(trial_id)
        ended = time.monotonic()
        self._next = ended + (ended - began) / _SHARE

    def _write(self, there: int, before: FrozenTrial, now: FrozenTrial) -> None:
        """What has changed of a trial that the database has."""
        if before.state is TrialState.WAITING and now.state is not TrialState.WAITING:
            self._lasting.set_trial_state_values(there, TrialState.RUNNING)
        for name, value in now.params.items():
            if name not in before.params:
                own = now.distributions[name]
                self._lasting.set_trial_param(there, name, own.to_internal_repr(value), own)
        for key, value in now.system_attrs.items():
            if key not in before.system_attrs or before.system_attrs[key] != value:
                self._lasting.set_trial_system_attr(there, key, value)
        for key, value in now.user_attrs.items():
            if key not in before.user_attrs or before.user_attrs[key] != value:
                self._lasting.set_trial_user_attr(there, key, value)
        for step, value in now.intermediate_values.items():
            if step not in before.intermediate_values:
                self._lasting.set_trial_intermediate_value(there, step, value)
        if now.state.is_finished():
            self._lasting.set_trial_state_values(there, now.state, now.values)

    def _note(self, trial_id: int, there: int) -> None:
        """That the database has a trial as it is here; a copy, as Optuna's trials write into what they are given."""
        if trial_id == len(self._ids):
            self._ids.append(there)
        if (trial := self._get_trial(trial_id)).state.is_finished():
            self._written.pop(trial_id, None)
        else:
            self._written[trial_id] = copy.deepcopy(trial)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._lasting.set_study_user_attr(self._there, key, value)
        super().set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._lasting.set_study_system_attr(self._there, key, value)
        super().set_study_system_attr(study_id, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self._changed.add(trial_id)
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._changed.add(trial_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self._changed.add(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._changed.add(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_user_attr(trial_id, key, value)
        self._changed.add(trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_system_attr(trial_id, key, value)
        self._changed.add(trial_id)
