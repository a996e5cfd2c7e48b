"""The one place where training meets Ray Train: resident worker groups, and the board that gives them their tasks.

A group is a Ray Train worker group that outlives its tasks: imports, process group and memory stay warm from one trial
to the next. Tasks and reports go over the board, an actor: a trial puts its task there and reads its reports from
there, whichever group takes it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.deepspeed import without_mlflow
from raytune_lora.training.failures import FAILED, OOM, STOPPED, Ended, classify
from raytune_lora.training.output import output_to
from raytune_lora.training.place import Place

LOGS = "logs"
_FAILED_STARTS = 2  # in a row, before a pool goes on with a group less
_WATCHES = 10  # looks at the groups in the time that a task may be without a step
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

Report = dict[str, Any]
Key = tuple[str, int]  # name and attempt of a task


@dataclass(frozen=True)
class Task:
    """Something for a worker group to do."""

    name: str  # what it is stopped by
    function: Callable[..., None]  # called in each worker with cfg, store, its place, and extra
    cfg: RunConfig
    store: TokenStore
    folder: Path  # logs and checkpoints; on storage that all nodes share
    cpus: int = 0  # a worker's threads; 0: as many as the config gives it
    extra: dict[str, Any] = field(default_factory=dict)
    attempt: int = 0  # at the same thing; no other task of the pool has the same name and attempt
    steps: bool = False  # it asks at each step whether to stop, so that silence means something

    @property
    def key(self) -> tuple[str, int]:
        """Its stream of reports."""
        return self.name, self.attempt


class Board:
    """Tasks wait here for a group, and reports for their reader. An asyncio actor: each method yields to the others."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Task | None] = asyncio.Queue()
        self._taken: dict[str, list[Task | None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._streams: dict[Key, asyncio.Queue[Report | Ended]] = {}
        self._ended: set[Key] = set()
        self._stopped: set[str] = set()
        self._dead: set[str] = set()
        self._idle: set[str] = set()  # groups that wait for a task
        self._left: dict[Path, asyncio.Event] = {}  # whether the group that took a task in a folder has left it
        self._workers: dict[str, list[Any]] = {}  # of each group
        self._signs: dict[str, float] = {}  # when a task last showed that it lives, by name
        self._broken: Ended | None = None

    async def submit(self, task: Task) -> None:
        """Let a group have the task, once no group is at work in its folder: one that was told to stop ends later.

        Raises:
            ValueError: a task of that name and attempt was there before.
        """
        if task.key in self._streams:
            raise ValueError(f"there was a task {task.key} before: its reports would be mixed up")
        self._streams[task.key] = asyncio.Queue()
        if task.folder in self._left:
            await self._left[task.folder].wait()
        if self._broken is not None:
            await self.end(task.key, self._broken)
        elif task.name in self._stopped:
            await self.end(task.key, Ended(STOPPED))
        else:
            await self._waiting.put(task)

    async def join(self, group: str, worker: Any) -> None:
        """Make a group's worker, an actor, known."""
        self._workers.setdefault(group, []).append(worker)

    async def take(self, group: str, number: int) -> Task | None:
        """The group's task of that number, the same for each of its workers; None sends the group home."""
        taken = self._taken.setdefault(group, [])
        async with self._locks.setdefault(group, asyncio.Lock()):
            if number == len(taken):
                self._idle.add(group)
                task = await self._waiting.get()
                if group in self._dead:  # it died while it waited: the task is for another
                    await self._waiting.put(task)
                    return None
                if task is not None:
                    self._idle.discard(group)
                    self._signs[task.name] = time.monotonic()
                    self._left[task.folder] = asyncio.Event()
                taken.append(task)
        return taken[number]

    async def post(self, key: Key, report: Report) -> None:
        """Add to a task's stream."""
        if key not in self._ended:
            await self._streams[key].put(report)

    async def end(self, key: Key, ended: Ended) -> None:
        """Close a task's stream; the first to close it says how it ended."""
        if key not in self._ended:
            self._ended.add(key)
            await self._streams[key].put(ended)

    async def leave(self, key: Key, folder: Path, ended: Ended) -> None:
        """Close a task's stream; its group does nothing more in its folder."""
        await self.end(key, ended)
        self._left[folder].set()

    async def next(self, key: Key) -> Report | Ended:
        """The next item of a task's stream."""
        return await self._streams[key].get()

    async def stop(self, name: str) -> None:
        """Ask for the end of a task, all attempts at it; its reader need not wait for it."""
        self._stopped.add(name)
        for key in [key for key in self._streams if key[0] == name]:
            await self.end(key, Ended(STOPPED))

    async def is_stopped(self, name: str) -> bool:
        """Whether the task's end was asked for; the asking is a sign of life."""
        self._signs[name] = time.monotonic()
        return name in self._stopped

    async def end_stalled(self, seconds: float) -> list[Any]:
        """End the tasks that have finished no step for that long.

        Returns:
            The workers of the groups that were at them, which are good for nothing more.
        """
        found: list[Any] = []
        for group, taken in self._taken.items():
            task = taken[-1] if taken and group not in self._idle else None
            if task is not None and task.steps and time.monotonic() - self._signs[task.name] > seconds:
                await self.end(task.key, Ended(FAILED, f"no progress for {seconds:g} s"))
                found += self._workers.pop(group, [])
        return found

    async def group_failed(self, group: str, ended: Ended) -> bool:
        """End what the group was at; whether it had got as far as a task."""
        self._dead.add(group)
        self._workers.pop(group, None)
        taken = [task for task in self._taken.pop(group, []) if task is not None]
        if taken:
            await self.leave(taken[-1].key, taken[-1].folder, ended)
        return bool(taken)

    async def close(self, groups: int) -> None:
        """Stop what is at work and send that many groups home."""
        for name, _ in list(self._streams):
            await self.stop(name)
        for _ in range(groups):
            await self._waiting.put(None)

    async def give_up(self, ended: Ended) -> None:
        """No group can be started: end all that waits, and all that will."""
        self._broken = ended
        while not self._waiting.empty():
            task = self._waiting.get_nowait()
            if task is not None:
                await self.end(task.key, ended)


class Pool:
    """Worker groups of one size, each taking one task after the other.

    Use it as a context manager. Groups start when it is entered; a group that fails is replaced.
    """

    def __init__(self, cfg: RunConfig, folder: Path, groups: int, stalled: float | None = None) -> None:
        """
        Args:
            cfg: says how many workers a group has and what each needs.
            folder: for what Ray Train keeps of the groups.
            groups: how many.
            stalled: seconds without a step after which a task that has steps fails and its group is replaced; None
                waits for ever.
        """
        self._cfg = cfg
        self._folder = folder
        self.board: Any = ray.remote(num_cpus=0)(Board).remote()
        self._closing, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._groups = groups
        self._stalled = stalled
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._threads = [threading.Thread(target=self._keep, args=(n,), daemon=True) for n in range(groups)]

    def __enter__(self) -> Pool:
        self._folder.mkdir(parents=True, exist_ok=True)
        for thread in self._threads:
            thread.start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        ray.get(self.board.close.remote(len(self._threads)))
        for thread in self._threads:
            thread.join()
        self._closed.set()
        self._watcher.join()

    def stream(self, task: Task) -> Iterator[Report]:
        """Do a task and yield its reports.

        Raises:
            TaskFailed: it did not end well.
        """
        return stream(self.board, task)

    def _keep(self, number: int) -> None:
        """Keep one group at work until the pool closes."""
        generation, failed_starts = 0, 0
        while not self._closing.is_set():
            group = f"group-{number}-{os.getpid()}-{generation}"
            generation += 1
            try:
                self._run_group(group)
            except Exception as error:  # whatever ended it, the reader of its task must not wait for ever
                ended = classify(error)
                had_task = ray.get(self.board.group_failed.remote(group, ended))
                failed_starts = 0 if had_task else failed_starts + 1
                if failed_starts >= _FAILED_STARTS:
                    self._abandon(Ended(FAILED, f"no worker group could start: {ended.error}"))
                    return

    def _watch(self) -> None:
        """Kill the groups that hang: their workers' end is a failure like any other, and ``_keep`` replaces them."""
        while self._stalled is not None and not self._closed.wait(self._stalled / _WATCHES):
            for worker in ray.get(self.board.end_stalled.remote(self._stalled)):
                ray.kill(worker)

    def _abandon(self, ended: Ended) -> None:
        """Go on with a group less; without any, end all tasks."""
        with self._lock:
            self._groups -= 1
            if self._groups == 0:
                ray.get(self.board.give_up.remote(ended))

    def _run_group(self, group: str) -> None:
        from ray.train.torch import TorchConfig  # here: it brings torch

        from raytune_lora.training.group import GroupTrainer

        cfg = self._cfg
        gpus = {"GPU": float(cfg.gpus_per_worker)} if cfg.gpus_per_worker else {}
        GroupTrainer(
            _workers,
            train_loop_config={
                "board": self.board,
                "group": group,
                "once": not cfg.cluster.reuse_workers,
                "watched": self._stalled is not None,
            },
            torch_config=TorchConfig(backend="nccl" if cfg.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cfg.workers,
                use_gpu=cfg.gpus_per_worker > 0,
                resources_per_worker={"CPU": float(cfg.cpus_per_worker), **gpus},
            ),
            run_config=RayRunConfig(
                name=group, storage_path=str(self._folder), failure_config=FailureConfig(max_failures=0)
            ),
        ).fit()


class TaskFailed(Exception):
    """A task ended in another way than by being done."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended
        super().__init__(ended.error or ended.status)


def stream(board: Any, task: Task) -> Iterator[Report]:
    """Put a task on the board and yield its reports.

    Raises:
        TaskFailed: it did not end well.
    """
    ray.get(board.submit.remote(task))
    while True:
        item = ray.get(board.next.remote(task.key))
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
    if config["watched"]:
        ray.get(board.join.remote(group, ray.get_runtime_context().current_actor))
    number = 0
    while (task := ray.get(board.take.remote(group, number))) is not None:
        _do(task, board, context.get_world_rank(), context.get_world_size())
        number += 1
        if config["once"]:
            return


def _do(task: Task, board: Any, rank: int, workers: int) -> None:
    """Do a task.

    A failure that all workers have at the same step ends the task, and so does the want of memory where there is one
    worker; any other ends the group.
    """
    with without_mlflow():
        from raytune_lora.training.worker import clean_up, set_up  # here: it brings torch and transformers

    def report(metrics: Report) -> None:
        if rank == 0:
            ray.get(board.post.remote(task.key, metrics))

    log = task.folder / LOGS / f"worker-{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    place = Place(rank, workers, task.folder, report, partial(_is_stopped, board, task.name))
    ended = Ended()
    with output_to(log):
        set_up(task.cpus or task.cfg.cpus_per_worker)
        try:
            task.function(task.cfg, task.store, place, **task.extra)
        except Exception as error:
            ended = classify(error)
            logging.getLogger(__name__).exception("task %s failed", task.name)
            if not ended.everywhere and not (ended.status == OOM and workers == 1):
                raise
        finally:
            _collect_garbage()
            clean_up()
    if rank == 0:
        ray.get(board.leave.remote(task.key, task.folder, ended))


def _collect_garbage() -> None:
    """Collect, and after the first task leave what stays (libraries, above all) out of later collections.

    With transformers, PEFT and DeepSpeed loaded a full collection takes half a second, and a trial asks for three.
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()


def _is_stopped(board: Any, name: str) -> bool:
    return bool(ray.get(board.is_stopped.remote(name)))
