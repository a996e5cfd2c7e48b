"""The board that hands tasks to worker groups, without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.board import Board
from raytune_lora.training.failures import DISK, DIVERGED, FAILED, LOST, MOVED, OOM, STOPPED, Ended
from raytune_lora.training.place import GO_ON, SAVE_AND_STOP, STOP
from raytune_lora.training.task import Task


def task(name: str, attempt: int = 0) -> Task:
    return Task(name, print, RunConfig(), TokenStore(Path(name), {}), Path(name), attempt=attempt)


def within(name: str, folder: str) -> Task:
    return dataclasses.replace(task(name), folder=Path(folder))


def run(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(steps, 5))


def test_each_worker_of_a_group_gets_the_same_task_and_each_group_another() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.submit(task("b"))
        first = [await board.take("one", 0), await board.take("one", 0)]
        assert [each.name for each in first if each] == ["a", "a"]
        other = await board.take("two", 0)
        assert other is not None
        assert other.name == "b"

    run(steps())


def test_reports_come_in_order_and_the_first_end_counts() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.post(("a", 0), {"step": 1})
        await board.post(("a", 0), {"step": 2})
        await board.end(("a", 0), Ended(DIVERGED, "first"))
        await board.end(("a", 0), Ended(FAILED, "second"))
        await board.post(("a", 0), {"step": 3})
        assert [await board.next(("a", 0), number) for number in range(3)] == [
            {"step": 1},
            {"step": 2},
            Ended(DIVERGED, "first"),
        ]

    run(steps())


def test_a_stopped_task_ends_for_its_reader_at_once() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        assert await board.asked("a") == GO_ON
        await board.stop("a")
        assert await board.asked("a") == STOP
        assert await board.next(("a", 0), 0) == Ended(STOPPED)

    run(steps())


def test_a_failed_group_ends_its_task_and_one_that_waited_takes_none_with_it() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.take("busy", 0)
        waiting = asyncio.create_task(board.take("idle", 0))
        await asyncio.sleep(0)
        assert await board.group_failed("busy", Ended(FAILED, "crash"))
        assert await board.next(("a", 0), 0) == Ended(FAILED, "crash")
        assert not await board.group_failed("idle", Ended(FAILED, "crash"))
        await board.submit(task("b"))
        assert await waiting is None
        taken = await board.take("fresh", 0)
        assert taken is not None
        assert taken.name == "b"

    run(steps())


def test_when_no_group_can_start_all_tasks_end() -> None:
    async def steps() -> None:
        board, ended = Board(), Ended(FAILED, "no group")
        await board.submit(task("before"))
        await board.give_up(ended)
        await board.submit(task("after"))
        assert [await board.next((name, 0), 0) for name in ("before", "after")] == [ended, ended]

    run(steps())


def test_closing_stops_what_is_at_work_and_sends_the_groups_home() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.take("one", 0)
        waiting = asyncio.create_task(board.take("two", 0))
        await asyncio.sleep(0)
        await board.close()
        assert await board.asked("a") == SAVE_AND_STOP
        assert await board.next(("a", 0), 0) == Ended(STOPPED)
        assert await board.take("one", 1) is None
        assert await waiting is None
        await board.submit(task("late"))
        assert await board.next(("late", 0), 0) == Ended(STOPPED)

    run(steps())


def test_a_name_and_attempt_is_used_once() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.post(("a", 0), {"step": 1})
        assert await board.next(("a", 0), 0) == {"step": 1}
        with pytest.raises(ValueError, match="before"):
            await board.submit(task("a"))
        await board.submit(task("a"), again=True)
        assert await board.next(("a", 0), 0) == {"step": 1}, "a reader that takes over reads all of it"
        assert await board.take("one", 0) is not None
        await board.close()
        assert await board.take("two", 0) is None, "it was put there once"

    run(steps())


def test_what_is_late_from_a_failed_attempt_does_not_reach_the_next_and_a_stop_ends_both() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.end(("a", 0), Ended(OOM, "full"))
        await board.submit(task("a", attempt=1))
        await board.post(("a", 0), {"step": 1})
        await board.post(("a", 1), {"step": 2})
        assert await board.next(("a", 0), 0) == Ended(OOM, "full")
        await board.stop("a")
        assert [await board.next(("a", 1), number) for number in range(2)] == [{"step": 2}, Ended(STOPPED)]

    run(steps())


def test_a_group_on_a_machine_that_goes_saves_its_task_and_takes_no_other() -> None:
    async def steps() -> None:
        board = Board()
        await board.placed("here", ["worker"], {"node"})
        await board.placed("there", ["worker"], {"other"})
        await board.submit(task("a"))
        await board.take("here", 0)
        await board.clear({"node"})
        assert await board.notes() == ["here leaves a machine that is about to be taken away"]
        await board.clear({"node"})
        assert await board.notes() == [], "it is said once"
        assert await board.asked("a", "here") == SAVE_AND_STOP
        await board.submit(task("b"))
        assert await board.take("here", 1) is None
        assert await board.asked("b", "there") == GO_ON
        taken = await board.take("there", 0)
        assert taken is not None
        assert taken.name == "b"

    run(steps())


def test_an_idle_group_on_a_machine_that_goes_is_sent_home_at_once() -> None:
    async def steps() -> None:
        board = Board()
        await board.placed("here", ["worker"], {"node"})
        waiting = asyncio.create_task(board.take("here", 0))
        await asyncio.sleep(0)
        await board.clear({"node"})
        assert await waiting is None

    run(steps())


def test_what_dies_while_it_leaves_has_moved_and_an_error_of_its_own_is_one() -> None:
    async def steps() -> None:
        board = Board()
        for name, ended in (("a", Ended(LOST, "gone")), ("b", Ended(FAILED, "bad"))):
            await board.placed(name, ["worker"], {"node"})
            await board.submit(task(name))
            await board.take(name, 0)
            await board.clear({"node"})
            await board.group_failed(name, ended)
        assert await board.next(("a", 0), 0) == Ended(MOVED, "gone")
        assert await board.next(("b", 0), 0) == Ended(FAILED, "bad")

    run(steps())


def test_what_fails_on_a_node_that_has_lost_its_storage_is_lost_and_a_full_disk_is_one() -> None:
    async def steps() -> None:
        board = Board()
        for name, ended in (("a", Ended(FAILED, "no such file")), ("b", Ended(DISK, "full"))):
            await board.placed(name, ["worker"], {"node"})
            await board.submit(task(name))
            await board.take(name, 0)
            await board.leave_out("node", name, "the node does not see it")
            await board.group_failed(name, ended)
        assert await board.next(("a", 0), 0) == Ended(LOST, "no such file")
        assert await board.next(("b", 0), 0) == Ended(DISK, "full")
        assert await board.left_out() == ["node"]

    run(steps())


def test_groups_wait_for_room_until_they_are_placed() -> None:
    async def steps() -> None:
        board = Board()
        await board.begin("one", "controller")
        assert [controller for controller, _ in (await board.unplaced()).values()] == ["controller"]
        await board.placed("one", ["worker"], {"node"})
        assert await board.unplaced() == {}
        await board.begin("two", "controller")
        await board.gone("two")
        assert await board.unplaced() == {}

    run(steps())


def test_a_task_that_hangs_ends_and_its_workers_are_named() -> None:
    async def steps() -> None:
        board = Board()
        await board.placed("one", ["worker"], {"node"})
        await board.submit(dataclasses.replace(task("a"), steps=True))
        await board.take("one", 0)
        assert await board.end_stalled(60) == []
        assert await board.end_stalled(-1) == ["worker"]
        assert await board.next(("a", 0), 0) == Ended(LOST, "no sign of life for -1 s")
        assert await board.end_stalled(-1) == [], "it is at nothing now"

    run(steps())


def test_a_task_waits_until_the_group_that_was_told_to_stop_has_left_its_folder() -> None:
    async def steps() -> None:
        board = Board()
        stopped, again, third = (within(name, "trial") for name in ("a", "a+1", "a+2"))
        await board.submit(stopped)
        assert await board.take("one", 0) == stopped
        await board.stop("a")
        await board.submit(again)
        taken = asyncio.create_task(board.take("two", 0))
        await asyncio.sleep(0.05)
        assert not taken.done()
        await board.submit(elsewhere := within("b", "other"))
        assert await taken == elsewhere
        taken = asyncio.create_task(board.take("three", 0))
        await asyncio.sleep(0.05)
        assert not taken.done()
        await board.done(stopped.key, "one", Ended())
        assert await taken == again
        assert await board.asked("a+1") == GO_ON
        await board.submit(third)
        taken = asyncio.create_task(board.take("two", 1))
        await asyncio.sleep(0.05)
        assert not taken.done()
        await board.group_failed("three", Ended(FAILED, "it was killed"))
        assert await taken == third

    run(steps())
