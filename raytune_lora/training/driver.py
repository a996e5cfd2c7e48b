"""The one place where training meets Ray Train: resident worker groups, and the board that gives them their tasks.

A group is a Ray Train worker group that outlives its tasks: imports, process group and memory stay warm from one trial
to the next. Tasks and reports go over the board, an actor: a trial puts its task there and reads its reports from
there, whichever group takes it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray._private.state import state as ray_state
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.util import placement_group_table

from raytune_lora.artifacts import remove_folder
from raytune_lora.cache import Cache
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import StorageError
from raytune_lora.training import entry
from raytune_lora.training.board import Board, Report
from raytune_lora.training.deepspeed import without_mlflow
from raytune_lora.training.failures import DISK, FAILED, LOST, OOM, Ended, classify
from raytune_lora.training.group import GroupTrainer, ProcessGroup, Whereabouts
from raytune_lora.training.output import output_to
from raytune_lora.training.place import CHECKPOINTS, LOGS, Place, send_files
from raytune_lora.working_copy import WorkingCopy

_MORE_STARTS = 1  # at least, after one that failed, before a pool goes on with a group less
_WATCH = 1.0  # seconds between two looks at the groups
_LEFT_ON_GPU = 2**28  # bytes that a worker may hold between two tasks: cuBLAS keeps its workspaces
_GROWTH = 2**30  # bytes of resident memory beyond twice those after the first task, without a GPU
_PATIENCE = 15.0  # seconds that a group waits for room before that is said
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Task:
    """Something for a worker group to do."""

    name: str  # what it is stopped by
    function: Callable[..., None]  # called in each worker with cfg, store, its place, and extra
    cfg: RunConfig
    store: TokenStore
    folder: Path  # logs and checkpoints; on storage that all nodes share, or in a working copy of this one
    cpus: int = 0  # a worker's threads; 0: as many as the config gives it
    extra: dict[str, Any] = field(default_factory=dict)
    attempt: int = 0  # at the same thing; no other task of the pool has the same name and attempt
    steps: bool = False  # it asks at each step whether to stop, so that silence means something

    @property
    def key(self) -> tuple[str, int]:
        """Its stream of reports."""
        return self.name, self.attempt


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
    ) -> None:
        """
        Args:
            cfg: says how many workers a group has and what each needs.
            folder: for what Ray Train keeps of the groups.
            groups: how many.
            stalled: seconds without a step after which a task that has steps fails and its group is replaced; None
                waits for ever.
            tell: called with what people should know: that groups wait for room, or leave a machine.
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
        self._versions = entry.versions()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._threads = [threading.Thread(target=self._keep, args=(n,), daemon=True) for n in range(groups)]

    def __enter__(self) -> Pool:
        self._folder.mkdir(parents=True, exist_ok=True)
        cloudpickle.register_pickle_by_value(entry)  # a node that joins later may have another version of it, or none
        for thread in self._threads:
            thread.start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        try:
            for worker in ray.get(self.board.close.remote()):
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
        with contextlib.suppress(RayActorError):
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
                had_task = ray.get(self.board.group_failed.remote(group, ended))
                failed_starts = 0 if had_task else failed_starts + 1
                if failed_starts and not self._closing.is_set():
                    self._tell(f"{group} could not start: {ended.error}")
                more = self._cfg.cluster.retries if ended.status == LOST else 0
                if failed_starts > max(more, _MORE_STARTS):
                    kind = DISK if ended.status == DISK else FAILED
                    self._abandon(Ended(kind, f"no worker group could start: {ended.error}"))
                    return
                self._closing.wait(2.0**failed_starts - 1)

    def _watch(self) -> None:
        with contextlib.suppress(RayActorError):
            self._look_after_groups()

    def _look_after_groups(self) -> None:
        """Look after the groups until the pool is closed.

        Those that hang are killed: their workers' end is a failure like any other, and ``_keep`` replaces them. Those
        on a machine that is about to be taken away (Ray calls it draining) are asked to leave it.
        """
        said = _PATIENCE
        while not self._closed.wait(_WATCH):
            if self._stalled is not None:
                for worker in ray.get(self.board.end_stalled.remote(self._stalled)):
                    ray.kill(worker)
            if draining := list(ray_state.get_draining_nodes()):
                ray.get(self.board.clear.remote(draining))
            for note in ray.get(self.board.notes.remote()):
                self._tell(note)
            waiting = [seconds for _, seconds in ray.get(self.board.unplaced.remote()).values()]
            if waiting and max(waiting) > said and _wait_for_room():
                self._tell(f"waiting for {self._needs()} since {max(waiting):.0f} s, {len(waiting)} times: {_offer()}")
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
        cfg = self._cfg
        gpus = {"GPU": float(cfg.gpus_per_worker)} if cfg.gpus_per_worker else {}
        GroupTrainer(
            f"{self._title} group {slot}",
            entry.work,
            train_loop_config={
                "versions": self._versions,
                "node": ray.get_runtime_context().get_node_id(),
                "function": (_workers.__module__, _workers.__name__),
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
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _wait_for_room() -> bool:
    """Whether Ray knows of something that it has no room for."""
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())


def _offer() -> str:
    """What the machines have, and how much of it is free."""
    there, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(key, 0):g} of {there[key]:g} {key}s free" for key in ("CPU", "GPU") if key in there]
    return f"the cluster has {' and '.join(parts) or 'no CPU'}"


class TaskFailed(Exception):
    """A task ended in another way than by being done."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended
        super().__init__(ended.error or ended.status)


def stream(board: Any, task: Task, again: bool = False) -> Iterator[Report]:
    """Put a task on the board and yield its reports.

    Args:
        board: of the pool whose groups are to do it.
        task: to do.
        again: a reader that was lost may have put it there before: all its reports come once more.

    Raises:
        TaskFailed: it did not end well.
    """
    ray.get(board.submit.remote(task, again))
    for number in itertools.count():
        item = ray.get(board.next.remote(task.key, number))
        if isinstance(item, Ended):
            if item.status:
                raise TaskFailed(item)
            return
        yield item


def _workers(config: dict[str, Any]) -> None:
    """One worker of a group: task after task, until it is sent home."""
    os.environ.update(_QUIET)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    board, group = config["board"], config["group"]
    context = ray.train.get_context()
    number, held = 0, None
    while (task := ray.get(board.take.remote(group, number))) is not None:
        _do(task, board, group, context.get_world_rank(), context.get_world_size(), config["slot"])
        number += 1
        if config["once"]:
            return
        held = _keep_memory_free(board, group, held)


def _do(task: Task, board: Any, group: str, rank: int, workers: int, slot: int) -> None:
    """Do a task.

    A failure that all workers have at the same step ends the task, and so does the want of memory where there is one
    worker; any other ends the group.
    """
    with without_mlflow():
        from raytune_lora.training.worker import clean_up, set_up  # here: it brings torch and transformers

    def report(metrics: Report) -> bool:
        return rank == 0 and bool(ray.get(board.post.remote(task.key, metrics)))

    copy = WorkingCopy.at(task.cfg.output, task.cfg.cluster.node_cache, task.folder)
    log = _arrive(copy, rank)
    place = Place(rank, workers, copy.path, report, partial(_asked, board, task.name, group), slot, copy.uri)
    ended = Ended()
    with output_to(log):
        print(f"worker {rank} of {workers}, process {os.getpid()}")  # by which Ray's dashboard shows the actor
        set_up(task.cpus or task.cfg.cpus_per_worker)
        try:
            store = task.store.here(Cache.of(task.cfg.cache, task.cfg.cluster.node_cache))
            task.function(task.cfg, store, place, **task.extra)
            _leave(copy, rank, log)
        except Exception as error:
            ended = classify(error)
            logging.getLogger(__name__).exception("task %s failed", task.name)
            if ended.status != DISK:
                with contextlib.suppress(StorageError):
                    copy.send(log)
            if not ended.everywhere and not (ended.status == OOM and workers == 1):
                raise
        finally:
            _collect_garbage()
            clean_up()
    if rank == 0:
        ray.get(board.done.remote(task.key, group, ended))


def _arrive(copy: WorkingCopy, rank: int) -> Path:
    """Make a task's folder, as the store has it where there is one; its checkpoints are the trial's to bring.

    Returns:
        The log of this worker, whose alone it is.
    """
    log = copy.path / LOGS / f"worker-{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if copy.uri is not None:
        log.unlink(missing_ok=True)
        copy.bring(f"{LOGS}/{log.name}")
    if rank == 0:
        copy.clear(keep=(CHECKPOINTS, LOGS))
        copy.bring("*", but=(f"{CHECKPOINTS}/*", f"{LOGS}/*"))
    return log


def _leave(copy: WorkingCopy, rank: int, log: Path) -> None:
    """Have a task's files in the store, where there is one, and its checkpoints there alone: a node's disk is small."""
    if copy.uri is None:
        return
    if rank:
        copy.send(log)
        return
    send_files(copy)
    for path in copy.path.glob(CHECKPOINTS):
        remove_folder(path)


def _collect_garbage() -> None:
    """Collect, and after the first task leave what stays (libraries, above all) out of later collections.

    With transformers, PEFT and DeepSpeed loaded a full collection takes half a second, and a trial asks for three.
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()


def _keep_memory_free(board: Any, group: str, first: int | None) -> int:
    """Have a group replaced whose worker does not let go of memory when a task is over.

    Args:
        board: of the pool.
        group: that has done a task.
        first: bytes that this worker held after its first task; None after that one.

    Returns:
        The same, known from now on.
    """
    from raytune_lora.training.worker import held_bytes  # here: it brings torch

    held, on_gpu = held_bytes()
    first = held if first is None else first
    if held > (_LEFT_ON_GPU if on_gpu else 2 * first + _GROWTH):
        where = "of GPU memory" if on_gpu else f"of memory, and {first / 1e9:.2f} GB after its first task"
        ray.get(board.leave.remote(group, f"is replaced: a worker holds {held / 1e9:.2f} GB {where}"))
    return first


def _asked(board: Any, name: str, group: str) -> int:
    return int(ray.get(board.asked.remote(name, group)))
