"""The one place where training meets Ray Train: resident worker groups, and the board that gives them their tasks.

A group is a Ray Train worker group that outlives its tasks: imports, process group and memory stay warm from one trial
to the next. Tasks and reports go over the board, an actor: a trial puts its task there and reads its reports from
there, whichever group takes it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray._private.state import state as ray_state
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import FailureConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.v2.api.config import ScalingConfig
from ray.util import placement_group_table

from raytune_lora.config.schema import RunConfig
from raytune_lora.errors import StorageError
from raytune_lora.training import duty, entry
from raytune_lora.training.board import Board, Report
from raytune_lora.training.failures import DISK, LOST, UNPLACED, Ended, classify
from raytune_lora.training.group import GroupTrainer, ProcessGroup, Whereabouts
from raytune_lora.training.task import Task, stream

_NODE = "ray.io/node-id"  # label of a node
_MORE_STARTS = 1  # at least, after one that failed, before a pool goes on with a group less
_WATCH = 1.0  # seconds between two looks at the groups
_PATIENCE = 15.0  # seconds that a group waits for room before that is said
PROCESS_ENDED = (
    RayActorError,
    OutOfMemoryError,
)  # what Ray raises of an actor; the other where its own guard of memory ended it


class Pool:
    """Worker groups of one size, each taking one task after the other.

    Use it as a context manager. Groups start when it is entered; a group that fails is replaced.
    """

    def __init__(
        self,
        cfg: RunConfig,
        folder: Path,
        groups: int,
        stalled: float | None = None,
        tell: Callable[[str], None] = lambda _line: None,
        leave: Callable[[], None] = lambda: None,
        marks: Sequence[Path] = (),
    ) -> None:
        """
        Args:
            cfg: says how many workers a group has and what each needs.
            folder: for what Ray Train keeps of the groups.
            groups: how many.
            stalled: seconds without a sign of life after which a task that has steps is lost and its group replaced;
                None waits for ever.
            tell: called with what people should know: that groups wait for room, or leave a machine.
            leave: called when this machine is about to be taken away, and with it all that is started here.
            marks: files of the job, by which a node that joins later is asked whether it has the same storage.
        """
        self._cfg = cfg
        self._folder = folder
        self._title = Path(cfg.output).name if cfg.output else folder.parent.name
        self.board: Any = ray.remote(num_cpus=0, label_selector=this_node())(Board).remote(self._title)
        self._closing, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._groups = groups
        self._stalled = stalled
        self._tell = tell
        self._leave = leave
        self._versions = entry.versions()
        self._marks = [(str(path), path.read_text()) for path in marks]
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._threads = [threading.Thread(target=self._keep, args=(n,), daemon=True) for n in range(groups)]

    def __enter__(self) -> Pool:
        self._folder.mkdir(parents=True, exist_ok=True)
        cloudpickle.register_pickle_by_value(entry)  # a node that joins later may have another version of it, or none
        for thread in self._threads:
            thread.start()
        self._watcher.start()
        return self

    def __exit__(self, _kind: object, why: object, _where: object) -> None:
        self._closing.set()
        try:  # where storage is gone, nothing can be saved, and to try it takes minutes
            for worker in ray.get(self.board.close.remote(at_once=isinstance(why, StorageError))):
                ray.kill(worker)
            while any(thread.is_alive() for thread in self._threads):
                for controller, _ in ray.get(self.board.unplaced.remote()).values():
                    ray.kill(controller)  # it would wait for room until there is some
                self._threads[0].join(_WATCH)
                self._threads.sort(key=threading.Thread.is_alive, reverse=True)
        finally:
            self._closed.set()
        self._watcher.join()

    def stream(self, task: Task) -> Iterator[Report]:
        """Do a task and yield its reports.

        Raises:
            TaskFailed: it did not end well.
        """
        return stream(self.board, task)

    def _keep(self, number: int) -> None:
        """Keep one group at work until the pool closes, or its board is gone: then whoever reads hears of it too."""
        with contextlib.suppress(*PROCESS_ENDED):
            self._keep_group(number)

    def _keep_group(self, number: int) -> None:
        generation, failed_starts = 0, 0
        while not self._closing.is_set():
            group = f"group-{number}-{os.getpid()}-{generation}"
            generation += 1
            try:
                self._run_group(group, number)
                ray.get(self.board.gone.remote(group))
            except Exception as error:  # whatever ended it, the reader of its task must not wait for ever
                ended = classify(error)
                excused = ray.get(self.board.group_failed.remote(group, ended))
                failed_starts = 0 if excused else failed_starts + 1
                if failed_starts and not self._closing.is_set():
                    self._tell(f"{group} could not start: {ended.error}")
                more = self._cfg.cluster.retries if ended.status == LOST else 0
                if failed_starts > max(more, _MORE_STARTS):
                    kind = DISK if ended.status == DISK else UNPLACED
                    self._abandon(Ended(kind, f"no worker group could start: {ended.error}"))
                    return
                self._closing.wait(2.0**failed_starts - 1)

    def _watch(self) -> None:
        with contextlib.suppress(*PROCESS_ENDED):
            self._look_after_groups()

    def _look_after_groups(self) -> None:
        """Look after the groups until the pool is closed.

        Those that hang are killed: their workers' end is a failure like any other, and ``_keep`` replaces them. Those
        on a machine that is about to be taken away (Ray calls it draining) are asked to leave it; where it is this one,
        no other can serve, as the groups' controllers and their readers are here.
        """
        said, here = _PATIENCE, ray.get_runtime_context().get_node_id()
        while not self._closed.wait(_WATCH):
            if self._stalled is not None:
                for worker in ray.get(self.board.end_stalled.remote(self._stalled)):
                    ray.kill(worker)
            if draining := list(ray_state.get_draining_nodes()):
                if here in draining:
                    self._leave()
                    return
                ray.get(self.board.clear.remote(draining))
            for note in ray.get(self.board.notes.remote()):
                self._tell(note)
            waiting = [seconds for _, seconds in ray.get(self.board.unplaced.remote()).values()]
            if waiting and max(waiting) > said and _wait_for_room():
                offer = _offer(ray.get(self.board.left_out.remote()))
                self._tell(f"waiting for {self._needs()} since {max(waiting):.0f} s, {len(waiting)} times: {offer}")
                said *= 2
            elif not waiting:
                said = _PATIENCE

    def _needs(self) -> str:
        cfg = self._cfg
        gpus = f", GPU: {cfg.gpus_per_worker}" if cfg.gpus_per_worker else ""
        return f"{cfg.workers} x {{CPU: {cfg.cpus_per_worker}{gpus}}}"

    def _abandon(self, ended: Ended) -> None:
        """Go on with a group less; without any, end all tasks."""
        with self._lock:
            self._groups -= 1
            if self._groups == 0:
                ray.get(self.board.give_up.remote(ended))

    def _run_group(self, group: str, slot: int) -> None:
        cfg, left_out = self._cfg, ray.get(self.board.left_out.remote())
        gpus = {"GPU": float(cfg.gpus_per_worker)} if cfg.gpus_per_worker else {}
        GroupTrainer(
            f"{self._title} group {slot}",
            entry.work,
            train_loop_config={
                "versions": self._versions,
                "marks": self._marks,
                "node": ray.get_runtime_context().get_node_id(),
                "function": (duty.be_worker.__module__, duty.be_worker.__name__),
                "config": {
                    "board": self.board,
                    "group": group,
                    "slot": slot,
                    "once": not cfg.cluster.reuse_workers,
                },
            },
            backend_config=ProcessGroup("nccl" if cfg.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cfg.workers,
                use_gpu=cfg.gpus_per_worker > 0,
                resources_per_worker={"CPU": float(cfg.cpus_per_worker), **gpus},
                label_selector={_NODE: f"!in({','.join(left_out)})"} if left_out else None,
            ),
            run_config=RayRunConfig(
                name=group,
                storage_path=str(self._folder),
                failure_config=FailureConfig(max_failures=0),
                callbacks=[Whereabouts(self.board, group)],  # type: ignore[list-item]  # Ray takes its own kinds too
            ),
        ).fit()


def this_node() -> dict[str, str]:
    """Selects the machine of this process, so that no other takes along what is put there when it goes."""
    return {_NODE: ray.get_runtime_context().get_node_id()}


def _wait_for_room() -> bool:
    """Whether Ray knows of something that it has no room for."""
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())


def _offer(left_out: Sequence[str]) -> str:
    """What the machines have, and how much of it is free, but for those that groups are not placed on."""
    whole, free = Counter[str](), Counter[str]()
    for sums, by_node in (
        (whole, ray_state.total_resources_per_node()),
        (free, ray_state.available_resources_per_node()),
    ):
        for node, resources in by_node.items():
            sums.update(resources if node not in left_out else {})
    parts = [f"{free[key]:g} of {whole[key]:g} {key}s free" for key in ("CPU", "GPU") if whole[key]]
    but = f" (without {len(left_out)} that are left out)" if left_out else ""
    return f"the cluster{but} has {' and '.join(parts) or 'no CPU'}"
