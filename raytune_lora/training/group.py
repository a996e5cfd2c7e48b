"""Ray Train's trainer, without its placement group cleaner, and telling where its workers are."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback


class GroupTrainer(TorchTrainer):
    """A TorchTrainer that ends as soon as its workers have.

    The cleaner, an actor beside each group, asks every second whether the controller lives. For that it searches all
    processes of the machine for a Ray address, may ask another cluster than its own and then take the group's
    resources away, and delays the end of each group by twelve seconds (Ray 2.60). Ray itself takes a placement group
    back when the controller or the driver that made it dies.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # of the class that TorchTrainer stands for
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


class Whereabouts(ControllerCallback, WorkerGroupCallback):
    """Tells the board that a group asks for room, and when it has found some, where."""

    def __init__(self, board: Any, group: str) -> None:
        self._board = board
        self._group = group

    def after_controller_start(self, train_run_context: Any) -> None:
        self._board.begin.remote(self._group, ray.get_runtime_context().current_actor)

    def after_worker_group_start(self, worker_group: Any) -> None:
        workers = worker_group.get_workers()
        nodes = {worker.metadata.node_id for worker in workers}
        self._board.placed.remote(self._group, [worker.actor for worker in workers], nodes)
