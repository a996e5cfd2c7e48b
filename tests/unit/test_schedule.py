"""The learning rates of a run's steps, against transformers' own schedules."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from raytune_lora.config.validate import LR_SCHEDULERS
from raytune_lora.training.schedule import advance, schedule, warmup_steps

PEAKS = (1e-3, 1.6e-2)  # of two groups of parameters, as LoRA+ has them


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in PEAKS])


def rates(scheduler: Any, steps: int) -> list[list[float]]:
    """Of each step and group, as shares of the peak."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            found.append([rate / peak for rate, peak in zip(scheduler.get_last_lr(), PEAKS, strict=True)])
            scheduler.step()
    return found


@pytest.mark.parametrize("steps", [1, 2, 9, 40])
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_the_warm_up_begins_above_zero_and_the_rest_is_transformers(name: str, warmup: int, steps: int) -> None:
    found = rates(schedule(name, optimizer(), warmup=warmup, steps=steps), steps)
    theirs = rates(get_scheduler(name, optimizer(), warmup, steps), steps)
    rising = 0 if name == "constant" else warmup
    for step in range(min(rising, steps)):
        assert found[step] == pytest.approx([(step + 1) / (warmup + 1)] * 2, rel=1e-12)
    for ours, plain in zip(found[rising:], theirs[rising:], strict=True):
        assert ours == pytest.approx(plain, rel=1e-9, abs=1e-15)
    assert found[0][0] > 0, "the first step trains"


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_a_run_that_is_resumed_goes_on_at_the_rate_it_was(name: str) -> None:
    whole = rates(schedule(name, optimizer(), warmup=3, steps=12), 12)
    for done in (1, 3, 7):
        again = schedule(name, optimizer(), warmup=3, steps=12)
        advance(again, done)
        assert rates(again, 12 - done) == whole[done:]


def test_a_run_of_one_step_has_half_the_peak() -> None:
    warmup = warmup_steps(0.03, 1)
    assert warmup == 1
    assert rates(schedule("cosine", optimizer(), warmup=warmup, steps=1), 1) == [[0.5, 0.5]]
    assert warmup_steps(0.0, 1) == 0
    assert warmup_steps(0.03, 100) == math.ceil(3.0)
