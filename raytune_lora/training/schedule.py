"""The learning rate of each step: transformers' schedules, whose warm-up begins with a step that trains."""

from __future__ import annotations

import math
import warnings
from typing import Any

from transformers import get_scheduler

_TIMESCALE = 10_000  # of inverse_sqrt without a warm-up, as in transformers


def warmup_steps(share: float, steps: int) -> int:
    """Steps that the learning rate rises for."""
    return math.ceil(share * steps)


def schedule(name: str, optimizer: Any, *, warmup: int, steps: int) -> Any:
    """A schedule in which step s, from 0, has (s + 1) / (warmup + 1) of the peak while s < warmup.

    transformers begins with a rate of zero, at which a step moves no weight: a run of one step would train nothing. So
    its schedule is one step longer, all of it in the warm-up, and begins at its second. From the peak on it is the one
    that ``warmup`` and ``steps`` give there.

    Args:
        name: of ``config.validate.LR_SCHEDULERS``.
        optimizer: whose groups' rates are the peaks.
        warmup: steps before the first at the peak.
        steps: of the run.
    """
    settings = (
        {"timescale": warmup or _TIMESCALE} if name == "inverse_sqrt" else {}
    )  # by default it follows the warm-up
    found: Any = get_scheduler(name, optimizer, warmup + 1, steps + 1, scheduler_specific_kwargs=settings)
    advance(found, 1)
    return found


def advance(scheduler: Any, steps: int) -> None:
    """Go on with a schedule as if so many steps had been done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have the optimizer step first
        for _ in range(steps):
            scheduler.step()
