"""Ray Train's trainer, without its placement group cleaner."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


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
