"""What Tune spends on a trial that trains elsewhere, brought down, and what it hands on, kept back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.air._internal import usage
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raytune_lora.cluster.connect import ENVIRONMENT

_ALL = 1_000_000  # more than there are trials at a time


@contextlib.contextmanager
def without_trackers() -> Iterator[None]:
    """In which Tune does not count its callbacks by kind, for Ray's usage statistics.

    For that it imports MLflow, Weights & Biases and others, whichever are installed: two seconds.
    """
    counting, usage.tag_callbacks = usage.tag_callbacks, lambda callbacks: False
    try:
        yield
    finally:
        usage.tag_callbacks = counting


@contextlib.contextmanager
def without_credentials() -> Iterator[None]:
    """In which Tune gives the processes of its trials none of the driver's keys.

    It would copy AWS_ACCESS_KEY_ID and its like into their runtime environment, which Ray writes into its logs. Those
    processes have what their node's environment says, as all workers do.
    """
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = names & ENVIRONMENT.keys()
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = names


class Thrifty(TrialScheduler):
    """A scheduler whose trials' processes are kept, and that looks at the trials alive alone.

    With ``reuse_actors`` Tune keeps one idle process. Where two trials end between two of its steps it ends the second
    one's, and starts another for the next trial a moment later, which costs a second of CPU: with 16 trials at a time
    it started 222 for 400 trials. And its schedulers go through all trials there ever were, at each step.
    """

    _keeping = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Have Tune keep all idle processes until the end."""
        if tune_controller is not None and not self._keeping:
            # there is no setting for it, and a scheduler is what Tune lets near its controller
            tune_controller._tune_controller._actor_cache.increase_max(trial.placement_group_factory, _ALL)
            self._keeping = True

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """A paused trial where none is pending; Tune starts those by itself, in their order."""
        waiting = [t for t in tune_controller.get_live_trials() if t.status in (Trial.PENDING, Trial.PAUSED)]
        if any(trial.status == Trial.PENDING for trial in waiting):
            return None
        return min(waiting, key=lambda trial: str(trial.trial_id), default=None)


class Fifo(Thrifty, FIFOScheduler):
    """Stops no trial."""
