"""Ray Train's trainer without what is not needed, with names for its workers, and telling where they are."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raytune_lora.training import entry

_NOT_NEEDED = (PlacementGroupCleanerCallback, DatasetsCallback)
_LEAVING = 30.0  # seconds for workers to leave their process group, as in Ray itself


class GroupTrainer(DataParallelTrainer):
    """A trainer that ends as soon as its workers have.

    The cleaner, an actor beside each group, asks every second whether the controller lives. For that it searches all
    processes of the machine for a Ray address, may ask another cluster than its own and then take the group's
    resources away, and delays the end of each group by twelve seconds (Ray 2.60). Ray itself takes a placement group
    back when the controller or the driver that made it dies. The other process that is left out would divide Ray data
    sets among the workers, and there are none.
    """

    def __init__(self, title: str, *arguments: Any, **settings: Any) -> None:
        """
        Args:
            title: of the group.
            arguments: of ``DataParallelTrainer``.
            settings: of ``DataParallelTrainer``.
        """
        super().__init__(*arguments, **settings)
        self._title = title

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [callback for callback in callbacks if not isinstance(callback, _NOT_NEEDED)]
        return [*kept, _NamedWorkers(self._title)]


@dataclass
class ProcessGroup(BackendConfig):
    """Torch's process group over the workers, set up in their processes alone."""

    backend: str  # of torch.distributed

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend

    @property
    def train_func_context(self) -> Any:
        return entry.on_its_device

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        cloudpickle.register_pickle_by_value(entry)
        address, port = worker_group.execute_single(0, get_address_and_port)
        workers, backend = len(worker_group), backend_config.backend
        ray.get(
            [
                worker_group.execute_single_async(rank, entry.join, address, port, rank, workers, backend)
                for rank in range(workers)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with contextlib.suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(entry.leave, len(worker_group) > 1), timeout=_LEAVING)


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


class _NamedWorkers(ControllerCallback):
    """Has the workers of a group shown with its title: the column Repr of the dashboard's actors, and process titles.

    Not as named actors: a name may be taken still by what a killed driver left behind.
    """

    def __init__(self, title: str) -> None:
        self._title = title

    def after_controller_start(self, *_: Any, **__: Any) -> None:
        WorkerGroup._worker_cls = _named(self._title)  # in the controller's process, which has no other group


def _named(title: str) -> type[RayTrainWorker]:
    class Worker(RayTrainWorker):
        def __repr__(self) -> str:
            gpus = ray.get_gpu_ids()
            return title + (f" GPU {', '.join(map(str, gpus))}" if gpus else "")

    Worker.__name__ = Worker.__qualname__ = RayTrainWorker.__name__
    return Worker
