"""The board: tasks wait on it for a worker group, and reports for their reader.

It runs as an actor, and knows nothing of Ray itself: what it is given of workers and controllers it only hands back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_lora.training.failures import FAILED, LOST, MOVED, STOPPED, Ended
from raytune_lora.training.place import GO_ON, SAVE_AND_STOP, STOP

if TYPE_CHECKING:
    from raytune_lora.training.task import Task

Report = dict[str, Any]
Key = tuple[str, int]  # name and attempt of a task


@dataclass
class _Group:
    """What is known of a worker group."""

    taken: list[Task | None] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    idle: bool = True  # it has no task
    leaves: bool = False  # it is to take no other task
    misplaced: bool = False  # its node is left out
    controller: Any = None
    workers: list[Any] = field(default_factory=list)  # none before it is placed
    nodes: set[str] = field(default_factory=set)  # where they are
    asked: float = field(default_factory=time.monotonic)  # when it asked for room

    @property
    def task(self) -> Task | None:
        """What it is at."""
        return self.taken[-1] if self.taken and not self.idle else None


class Board:
    """Hands tasks to groups and reports to readers. An asyncio actor: each method yields to the others."""

    def __init__(self, title: str = "") -> None:
        """
        Args:
            title: of the sweep or run; Ray's dashboard shows it beside the actor.
        """
        self._title = title
        self._waiting: deque[Task] = deque()
        self._news = asyncio.Condition()  # a task to take, or a reason to take none; an item to read
        self._closed = False
        self._groups: dict[str, _Group] = {}
        self._streams: dict[Key, list[Report | Ended]] = {}
        self._ended: set[Key] = set()
        self._stopped: dict[str, int] = {}  # by name: how
        self._signs: dict[str, float] = {}  # when a task last showed that it lives, by name
        self._at: dict[Path, str] = {}  # folders that a group is at work in
        self._broken: Ended | None = None
        self._notes: list[str] = []
        self._left_out: list[str] = []  # nodes

    def __repr__(self) -> str:
        return f"{self._title} board"

    # ------------------------------------------------------------------------------------------- for readers of tasks

    async def submit(self, task: Task, again: bool = False) -> None:
        """Let a group have the task, once no group is at work in its folder: one that was told to stop ends later.

        Args:
            task: to do.
            again: a reader that was lost may have submitted it before; its stream is then read from the start.

        Raises:
            ValueError: a task of that name and attempt was there before.
        """
        if task.key in self._streams:
            if again:
                return
            raise ValueError(f"there was a task {task.key} before: its reports would be mixed up")
        self._streams[task.key] = []
        if self._broken is not None:
            await self.end(task.key, self._broken)
        elif task.name in self._stopped or self._closed:
            await self.end(task.key, Ended(STOPPED))
        else:
            self._waiting.append(task)
            await self._tell()

    async def next(self, key: Key, number: int) -> Report | Ended:
        """The item of that number of a task's stream, once it is there."""
        stream = self._streams[key]
        async with self._news:
            await self._news.wait_for(lambda: number < len(stream))
        return stream[number]

    async def stop(self, name: str, how: int = STOP) -> None:
        """Ask for the end of a task, all attempts at it; its reader need not wait for it."""
        self._stopped.setdefault(name, how)
        for key in [key for key in self._streams if key[0] == name]:
            await self.end(key, Ended(STOPPED))

    # --------------------------------------------------------------------------------------------- for groups at work

    async def take(self, group: str, number: int) -> Task | None:
        """The group's task of that number, the same for each of its workers; None sends the group home."""
        state = self._group(group)
        async with state.lock:
            if number == len(state.taken):
                state.idle = True
                task = await self._next_task(state)
                if task is not None:
                    state.idle = False
                    self._at[task.folder] = group
                    self._signs[task.name] = time.monotonic()
                state.taken.append(task)
        return state.taken[number]

    async def post(self, key: Key, report: Report) -> bool:
        """Add to a task's stream; whether it was open."""
        if key in self._ended:
            return False
        self._streams[key].append(report)
        await self._tell()
        return True

    async def end(self, key: Key, ended: Ended) -> None:
        """Close a task's stream; the first to close it says how it ended."""
        if key not in self._ended:
            self._ended.add(key)
            self._streams[key].append(ended)
            await self._tell()

    async def done(self, key: Key, group: str, ended: Ended) -> None:
        """Close a task's stream; the group does nothing more in its folder."""
        await self.end(key, ended)
        await self._leave_folder(group)

    async def asked(self, name: str, group: str = "") -> int:
        """What a task's workers are asked to do, as ``place`` has it; the asking is a sign of life."""
        self._signs[name] = time.monotonic()
        leaves = group in self._groups and self._groups[group].leaves
        return max(self._stopped.get(name, GO_ON), SAVE_AND_STOP if leaves else GO_ON)

    async def sign(self, name: str) -> None:
        """A sign of life of a task between two steps."""
        self._signs[name] = time.monotonic()

    async def leave(self, group: str, why: str) -> None:
        """Let a group take no other task; what it is at is saved, and goes on elsewhere."""
        state = self._group(group)
        if not state.leaves:
            state.leaves = True
            self._notes.append(f"{group} {why}")
            await self._tell()

    # ------------------------------------------------------------------------------------- for who keeps groups alive

    async def begin(self, group: str, controller: Any) -> None:
        """A group asks for room."""
        state = self._group(group)
        state.controller, state.asked = controller, time.monotonic()

    async def placed(self, group: str, workers: list[Any], nodes: Collection[str]) -> None:
        """A group has found room.

        Args:
            group: its name.
            workers: actors.
            nodes: where they are.
        """
        state = self._group(group)
        state.workers, state.nodes = list(workers), set(nodes)

    async def unplaced(self) -> dict[str, tuple[Any, float]]:
        """The groups that wait for room: the controller of each, and for how many seconds."""
        now = time.monotonic()
        return {
            name: (state.controller, now - state.asked)
            for name, state in self._groups.items()
            if state.controller is not None and not state.workers
        }

    async def clear(self, nodes: Collection[str]) -> None:
        """Let the groups that have workers on some nodes leave them."""
        for name, state in self._groups.items():
            if state.nodes.intersection(nodes):
                await self.leave(name, "leaves a machine that is about to be taken away")

    async def leave_out(self, node: str, group: str, why: str) -> None:
        """Let no group be placed on a node from now on: one that was says why."""
        self._group(group).misplaced = True
        if node not in self._left_out:
            self._left_out.append(node)
            self._notes.append(f"{why}; it is left out")

    async def left_out(self) -> list[str]:
        """The nodes that are to have no group."""
        return list(self._left_out)

    async def notes(self) -> list[str]:
        """What people should know and have not been told: once each."""
        notes, self._notes = self._notes, []
        return notes

    async def end_stalled(self, seconds: float) -> list[Any]:
        """End the tasks that have shown no sign of life for that long: what hangs is tried again elsewhere.

        Returns:
            The workers of the groups that were at them, which are good for nothing more.
        """
        found: list[Any] = []
        for state in self._groups.values():
            task = state.task
            if task is not None and task.steps and time.monotonic() - self._signs[task.name] > seconds:
                await self.end(task.key, Ended(LOST, f"no sign of life for {seconds:g} s"))
                state.idle = True
                found += state.workers
        return found

    async def group_failed(self, group: str, ended: Ended) -> bool:
        """End what the group was at; whether another may do better: it had a task, or its node has been left out."""
        state = self._group(group)
        if state.task is not None:
            left = state.leaves and ended.status == LOST  # it was leaving a machine that was about to go
            blind = state.misplaced and ended.status == FAILED  # its node has lost the storage of the others
            status = MOVED if left else LOST if blind else ended.status
            await self.end(state.task.key, replace(ended, status=status))
        await self.gone(group)
        return state.misplaced or any(task is not None for task in state.taken)

    async def gone(self, group: str) -> None:
        """A group has ended; a worker of it that still asks for a task gets none."""
        state = self._group(group)
        state.idle = state.leaves = True
        state.controller, state.workers, state.nodes = None, [], set()
        await self._leave_folder(group)

    async def close(self, at_once: bool = False) -> list[Any]:
        """Have what is at work saved and stopped, and send all groups home.

        Args:
            at_once: nothing is to be saved.

        Returns:
            The workers of the groups that are not to be waited for: at something that has nothing to save, and does not
            ask either.
        """
        self._closed = True
        busy = [state for state in self._groups.values() if state.task is not None]
        left = [state.workers for state in busy if at_once or not (state.task and state.task.steps)]
        for name, _ in list(self._streams):
            await self.stop(name, SAVE_AND_STOP)
        await self._tell()
        return [worker for workers in left for worker in workers]

    async def give_up(self, ended: Ended) -> None:
        """No group can be started: end all that waits, and all that will."""
        self._broken = ended
        while self._waiting:
            await self.end(self._waiting.popleft().key, ended)

    # ----------------------------------------------------------------------------------------------------------------

    def _group(self, name: str) -> _Group:
        return self._groups.setdefault(name, _Group())

    async def _next_task(self, state: _Group) -> Task | None:
        async with self._news:
            await self._news.wait_for(lambda: self._first() is not None or self._closed or state.leaves)
            task = None if state.leaves else self._first()
            if task is not None:
                self._waiting.remove(task)
            return task

    def _first(self) -> Task | None:
        """The first task that waits and whose folder is free."""
        return next((task for task in self._waiting if task.folder not in self._at), None)

    async def _leave_folder(self, group: str) -> None:
        self._at = {folder: other for folder, other in self._at.items() if other != group}
        await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
