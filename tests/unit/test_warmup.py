"""A build of DeepSpeed's op that is killed half-way, really, and what comes after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_lora.training import warmup

SLOW = '#!/bin/sh\ncase "$*" in *-MF*) touch {mark}; exec sleep 60;; esac\nexec c++ "$@"\n'
BROKEN = '#!/bin/sh\ncase "$*" in *-MF*) exit 1;; esac\nexec c++ "$@"\n'


def build(folder: Path, compiler: str) -> subprocess.Popen[str]:
    """A process that builds the op with a compiler of ours, as a worker does."""
    path = folder / "cxx"
    path.write_text(compiler)
    path.chmod(0o755)
    settings = {"CXX": str(path), "TORCH_EXTENSIONS_DIR": str(folder / "ops"), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "raytune_lora.training.warmup"]
    return subprocess.Popen(
        command,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_was_killed_while_it_built_is_not_waited_for(tmp_path: Path) -> None:
    mark, op = tmp_path / "compiling", tmp_path / "ops" / "deepspeed_shm_comm"
    killed = build(tmp_path, SLOW.format(mark=mark))
    while not mark.exists():
        assert killed.poll() is None
        time.sleep(0.1)
    assert (op / "lock").exists()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    said, _ = build(tmp_path, BROKEN).communicate(timeout=120)
    assert "DeepSpeed's shared-memory op cannot be built here" in said, "it came to the compiler, which fails"
    assert not (op / "lock").exists()


def test_a_build_of_another_machine_is_waited_for_as_long_as_one_takes(tmp_path: Path) -> None:
    op = tmp_path / "op"
    op.mkdir()
    (op / "lock").touch()
    began = time.time() - warmup._BUILD
    os.utime(op / "lock", (began + 1, began + 1))
    warmup._take_away(op, "another-machine")
    assert time.time() - began > warmup._BUILD + 1
    assert not op.exists()


def test_a_build_of_a_machine_whose_clock_is_ahead_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "_BUILD", 0.5)
    monkeypatch.setattr(warmup, "_LOOK", 0.1)
    op = tmp_path / "op"
    op.mkdir()
    (op / "lock").touch()
    later = time.time() + 3600
    os.utime(op / "lock", (later, later))
    began = time.monotonic()
    warmup._take_away(op, "another-machine")
    assert not op.exists()
    assert 0.5 < time.monotonic() - began < 10


def test_a_build_that_ends_is_left_as_it_is(tmp_path: Path) -> None:
    op = tmp_path / "op"
    op.mkdir()
    warmup._take_away(op, "another-machine")
    assert op.is_dir()
