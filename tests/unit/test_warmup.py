"""A build of DeepSpeed's op that is killed half-way, really, and what comes after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from raytune_lora.training import warmup

ANOTHER_OP = """
from raytune_lora.training.warmup import prepare_builds
prepare_builds()
from deepspeed.ops.op_builder import PinMemoryBuilder
try:
    PinMemoryBuilder().load()
except Exception as error:
    print("cannot be built", error)
"""
SLOW = '#!/bin/sh\ncase "$*" in *-MF*) touch {mark}; exec sleep 60;; esac\nexec c++ "$@"\n'
BROKEN = '#!/bin/sh\ncase "$*" in *-MF*) exit 1;; esac\nexec c++ "$@"\n'


def build(folder: Path, compiler: str, program: tuple[str, str]) -> subprocess.Popen[str]:
    """A process that builds an op with a compiler of ours, as a worker does."""
    path = folder / "cxx"
    path.write_text(compiler)
    path.chmod(0o755)
    settings = {"CXX": str(path), "TORCH_EXTENSIONS_DIR": str(folder / "ops"), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, *program],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("deepspeed_shm_comm", ("-m", "raytune_lora.training.warmup")),
        ("pin_memory", ("-c", ANOTHER_OP)),  # which ``zero3_nvme`` builds before its own
    ],
)
def test_a_process_that_was_killed_while_it_built_is_not_waited_for(
    name: str, program: tuple[str, str], tmp_path: Path
) -> None:
    mark, op = tmp_path / "compiling", tmp_path / "ops" / name
    killed = build(tmp_path, SLOW.format(mark=mark), program)
    while not mark.exists():
        assert killed.poll() is None
        time.sleep(0.1)
    assert (op / "lock").exists()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    said, _ = build(tmp_path, BROKEN, program).communicate(timeout=120)
    assert "cannot be built" in said, "it came to the compiler, which fails"
    assert not (op / "lock").exists()


def test_a_build_of_a_program_that_is_not_ours_is_waited_for(tmp_path: Path) -> None:
    """It knows torch's lock alone; what it leaves behind when it is done is taken up."""
    op = tmp_path / "op"
    op.mkdir()
    theirs, ours = FileBaton(str(op / "lock")), warmup.Baton(str(op / "lock"))
    assert theirs.try_acquire()
    ending = threading.Timer(1.0, theirs.release)
    ending.start()
    assert ours.try_acquire()
    assert not ending.is_alive() or ending.finished.is_set()
    assert op.is_dir()
    ours.release()
    assert not list(op.iterdir())


def test_a_build_of_another_machine_is_waited_for_as_long_as_one_takes(tmp_path: Path) -> None:
    op = tmp_path / "op"
    op.mkdir()
    (op / "lock").touch()
    began = time.time() - warmup._BUILD
    os.utime(op / "lock", (began + 1, began + 1))
    warmup.take_away(op)
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
    warmup.take_away(op)
    assert not op.exists()
    assert 0.5 < time.monotonic() - began < 10


def test_a_build_that_ends_is_left_as_it_is(tmp_path: Path) -> None:
    op = tmp_path / "op"
    op.mkdir()
    warmup.take_away(op)
    assert op.is_dir()
