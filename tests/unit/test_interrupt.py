"""Ctrl-C once and twice, on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

WAITING = """
import subprocess, sys, time
from raytune_lora.tuning.interrupt import Interrupts
with Interrupts(lambda line: print(line, flush=True)) as interrupts:
    interrupts.awaited = sys.argv[1] == "awaited"
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        print(child.pid, flush=True)
        while interrupts.why is None:
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("raised", flush=True)
        time.sleep(60)
"""


@pytest.fixture(params=["awaited", "raised"])
def waiting(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A process that waits, the one that it has started, and how it hears of a signal."""
    command = [sys.executable, "-c", WAITING, request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline()), {"awaited": "asked"}.get(request.param, "raised")
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_it_ends_in_order_and_twice_at_once_with_all_it_started(
    number: signal.Signals, waiting: tuple[subprocess.Popen[str], int, str]
) -> None:
    process, child, heard = waiting
    assert process.stdout is not None
    process.send_signal(number)
    assert "ends at once" in process.stdout.readline()
    assert process.stdout.readline() == f"{heard}\n"
    assert psutil.pid_exists(child)
    os.kill(process.pid, signal.SIGTERM)  # a supervisor may ask again: what runs is being saved
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - began < 2
    deadline = time.monotonic() + 2
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "what it had started is still there"
        time.sleep(0.01)


ASKING = """
import threading, time
from raytune_lora.tuning.interrupt import Interrupts
with Interrupts(lambda line: print(line, flush=True)) as interrupts:
    threading.Timer(0.2, interrupts.ask, [RuntimeError("the store is gone")]).start()
    try:
        time.sleep(60)
    except RuntimeError as error:
        print("raised:", error, flush=True)
"""


def test_a_thread_that_finds_a_reason_ends_the_job_in_order() -> None:
    done = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "ending in order: Ctrl-C ends at once\nraised: the store is gone\n"
