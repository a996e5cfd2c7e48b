"""A worker of a group: it takes one task after the other from the board, until it is sent home."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train

from raytune_lora.artifacts import remove_folder
from raytune_lora.cache import Cache
from raytune_lora.config.schema import Optimizer
from raytune_lora.errors import StorageError
from raytune_lora.training.board import Report
from raytune_lora.training.deepspeed import without_mlflow
from raytune_lora.training.failures import DISK, OOM, Ended, classify
from raytune_lora.training.output import output_to
from raytune_lora.training.place import CHECKPOINTS, LOGS, Place, send_files
from raytune_lora.training.task import Task
from raytune_lora.working_copy import WorkingCopy

_LEFT_ON_GPU = 2**28  # bytes that a worker may hold between two tasks: cuBLAS keeps its workspaces
_GROWTH = 2**30  # bytes beyond what there was after the first task: of the GPU's, or without one twice of its own
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def be_worker(config: dict[str, Any]) -> None:
    """One worker of a group: task after task, until it is sent home."""
    os.environ.update(_QUIET)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    board, group = config["board"], config["group"]
    context = ray.train.get_context()
    number, first = 0, None
    while (task := ray.get(board.take.remote(group, number))) is not None:
        _do(task, board, group, context.get_world_rank(), context.get_world_size(), config["slot"])
        number += 1
        if config["once"]:
            return
        first = _keep_memory_free(board, group, first)
        if task.steps and task.cfg.training.optimizer is Optimizer.paged_adamw_8bit:
            ray.get(board.leave.remote(group, "is replaced: bitsandbytes keeps the pages of its optimizer for ever"))


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
    stopped, lives = partial(_asked, board, task.name, group), partial(board.sign.remote, task.name)
    place = Place(rank, workers, copy.path, report, stopped, lives, slot, copy.uri)
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
            clean_up(failed=bool(ended.status) and not ended.everywhere)
    if rank == 0:
        ray.get(board.done.remote(task.key, group, ended))


def _arrive(copy: WorkingCopy, rank: int) -> Path:
    """Make a task's folder, as the store has it where there is one; its checkpoints are the trial's to bring.

    Returns:
        The log of this worker, whose alone it is.
    """
    log = copy.path / LOGS / f"worker-{rank}.log"
    if copy.uri is None and not (home := copy.path.parent.parent).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder is not there any more; was its storage unmounted?", str(home))
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


def _keep_memory_free(board: Any, group: str, first: Any) -> Any:
    """Have a group replaced whose worker does not let go of memory when a task is over.

    Args:
        board: of the pool.
        group: that has done a task.
        first: what this worker held after its first task; None after that one.

    Returns:
        The same, known from now on.
    """
    from raytune_lora.training.worker import held  # here: it brings torch

    now = held()
    first = now if first is None else first
    found = None
    if now.on_gpu and now.own > _LEFT_ON_GPU:
        found = f"{now.own / 1e9:.2f} GB of GPU memory"
    elif now.on_gpu and now.beside > first.beside + _GROWTH:  # such as a paged optimizer's, which torch does not count
        found = f"{now.beside / 1e9:.2f} GB of GPU memory outside of torch, and {first.beside / 1e9:.2f} GB at first"
    elif not now.on_gpu and now.own > 2 * first.own + _GROWTH:
        found = f"{now.own / 1e9:.2f} GB of memory, and {first.own / 1e9:.2f} GB after its first task"
    if found is not None:
        ray.get(board.leave.remote(group, f"is replaced: a worker holds {found}"))
    return first


def _asked(board: Any, name: str, group: str) -> int:
    return int(ray.get(board.asked.remote(name, group)))
