"""The board that hands tasks to worker groups, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Board, Task
from raytune_lora.training.failures import DIVERGED, FAILED, OOM, STOPPED, Ended


def task(name: str, attempt: int = 0) -> Task:
    return Task(name, print, RunConfig(), TokenStore(Path(name), {}), Path(name), attempt=attempt)


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
        assert [await board.next(("a", 0)) for _ in range(3)] == [{"step": 1}, {"step": 2}, Ended(DIVERGED, "first")]

    run(steps())


def test_a_stopped_task_ends_for_its_reader_at_once() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        assert not await board.is_stopped("a")
        await board.stop("a")
        assert await board.is_stopped("a")
        assert await board.next(("a", 0)) == Ended(STOPPED)

    run(steps())


def test_a_failed_group_ends_its_task_and_one_that_waited_takes_none_with_it() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.take("busy", 0)
        waiting = asyncio.create_task(board.take("idle", 0))
        await asyncio.sleep(0)
        assert await board.group_failed("busy", Ended(FAILED, "crash"))
        assert await board.next(("a", 0)) == Ended(FAILED, "crash")
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
        assert [await board.next((name, 0)) for name in ("before", "after")] == [ended, ended]

    run(steps())


def test_closing_stops_what_is_at_work_and_sends_the_groups_home() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.take("one", 0)
        await board.close(1)
        assert await board.is_stopped("a")
        assert await board.take("one", 1) is None

    run(steps())


def test_a_name_and_attempt_is_used_once() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        with pytest.raises(ValueError, match="before"):
            await board.submit(task("a"))

    run(steps())


def test_what_is_late_from_a_failed_attempt_does_not_reach_the_next_and_a_stop_ends_both() -> None:
    async def steps() -> None:
        board = Board()
        await board.submit(task("a"))
        await board.end(("a", 0), Ended(OOM, "full"))
        await board.submit(task("a", attempt=1))
        await board.post(("a", 0), {"step": 1})
        await board.post(("a", 1), {"step": 2})
        assert await board.next(("a", 0)) == Ended(OOM, "full")
        await board.stop("a")
        assert [await board.next(("a", 1)) for _ in range(2)] == [{"step": 2}, Ended(STOPPED)]

    run(steps())


def test_a_task_waits_until_the_group_that_was_told_to_stop_has_left_its_folder() -> None:
    async def steps() -> None:
        board = Board()
        stopped = Task("a", print, RunConfig(), TokenStore(Path("a"), {}), Path("trial"))
        again = Task("a+1", print, RunConfig(), TokenStore(Path("a"), {}), Path("trial"))
        await board.submit(stopped)
        assert await board.take("one", 0) == stopped
        await board.stop("a")
        submitted = asyncio.create_task(board.submit(again))
        taken = asyncio.create_task(board.take("two", 0))
        await asyncio.sleep(0.05)
        assert not submitted.done()
        assert not taken.done()
        await board.leave(stopped.key, stopped.folder, Ended())
        assert await taken == again
        assert not await board.is_stopped("a+1")
        third = asyncio.create_task(
            board.submit(Task("a+2", *(getattr(again, f) for f in ("function", "cfg", "store", "folder"))))
        )
        await asyncio.sleep(0.05)
        assert not third.done()
        await board.group_failed("two", Ended(FAILED, "it was killed"))
        await third

    run(steps())
