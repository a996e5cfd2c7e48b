"""A worker that computes, reads or waits for what it has started shows that it lives; one that hangs shows nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from raytune_lora.training import signs
from raytune_lora.training.signs import Signs


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(signs, "_EVERY", 0.5)
    return []


def spin(seconds: float) -> None:
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        pass


def compile_something() -> None:
    code = "import time\nended = time.monotonic() + 1.5\nwhile time.monotonic() < ended: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("work", [lambda: spin(1.5), compile_something])
def test_what_prepares_lives(work: object, shown: list[float]) -> None:
    with Signs(lambda: shown.append(time.monotonic())).preparing():
        assert callable(work)
        work()
    assert shown


def test_what_waits_for_a_lock_shows_nothing(shown: list[float]) -> None:
    with Signs(lambda: shown.append(time.monotonic())).preparing():
        time.sleep(1.5)
    assert not shown


def test_each_forward_pass_is_a_sign_but_not_too_often(shown: list[float]) -> None:
    model = torch.nn.Linear(1, 1)
    model.register_forward_pre_hook(Signs(lambda: shown.append(time.monotonic())).forward)
    for _ in range(5):
        model(torch.ones(1))
    assert len(shown) == 1
    time.sleep(0.6)
    model(torch.ones(1))
    assert len(shown) == 2
