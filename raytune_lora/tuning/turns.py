"""Whose turn it is when there is room for one more trial.

What is decided follows from the record alone, so a sweep that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from raytune_lora.training.failures import STOPPED
from raytune_lora.tuning.trials import Record, Trial

TERMS = ("parent", "born", "replaces", "until")  # of a proposal, that its trial's start puts on record


class Turn(Enum):
    """What happens where no known trial goes on."""

    NEW = auto()  # the sampler proposes a trial
    WAIT = auto()  # what runs now may let another go on
    END = auto()  # the search is over


@dataclass(frozen=True)
class Child:
    """A trial that begins from another's weights, in the place of a third."""

    parent: Trial
    replaces: Trial


class Turns:
    """A new trial each time, until there are as many as were asked for."""

    def __init__(self, record: Record | None = None, trials: float = math.inf) -> None:
        """
        Args:
            record: of the sweep, as it grows.
            trials: that the search may propose.
        """
        self._record = Record() if record is None else record
        self._trials = trials

    def next(self, out: Mapping[str, Trial]) -> Trial | Child | Turn:
        """Whose turn it is; a trial that is known goes on from its checkpoint.

        Args:
            out: by name, the trials that are being run or are about to be, those that the record does not know yet too.
        """
        if len(self._known(out)) < self._trials:
            return Turn.NEW
        return self._nothing_new(out)

    def terms(self, trial: Trial) -> dict[str, Any]:
        """What a proposal of the trial says beside its name and parameters."""
        return {}

    def _known(self, out: Mapping[str, Trial]) -> dict[str, Trial]:
        return {**out, **{trial.trial_id: trial for trial in self._record.searched}}

    def _nothing_new(self, out: Mapping[str, Trial]) -> Turn:
        return Turn.END


class Promotions(Turns):
    """A stopped trial that has risen among the best of its rung goes on; where there is none, a new one begins.

    That is ASHA as it was published (Li et al. 2020, arXiv:1810.05934, algorithm 2), where stopping alone lets a trial
    that was too early at its rung never come back.
    """

    def __init__(self, record: Record, trials: int, promotable: Callable[[Collection[str]], str | None]) -> None:
        """
        Args:
            record: of the sweep, as it grows.
            trials: that the search may propose; one that goes on is none of them.
            promotable: picks, of stopped trials, the one to go on.
        """
        super().__init__(record, trials)
        self._promotable = promotable

    def next(self, out: Mapping[str, Trial]) -> Trial | Child | Turn:
        stopped = {t.trial_id for t in self._record.searched if t.status == STOPPED and t.trial_id not in out}
        name = self._promotable(stopped)
        return super().next(out) if name is None else self._record.trials[name]

    def _nothing_new(self, out: Mapping[str, Trial]) -> Turn:
        return Turn.WAIT if out else Turn.END
