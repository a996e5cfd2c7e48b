"""How a run's samples divide into steps, workers and micro batches: arithmetic only."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from raytune_lora.config.schema import RunConfig

_EVALUATIONS = 10  # a run, where the config names no interval


@dataclass(frozen=True)
class Plan:
    """The steps of one run.

    Position ``p`` counts the samples of the run from 0; it lies in epoch ``p // rows``. Step ``s`` takes the positions
    from ``s * global_batch`` on, whatever the workers and the micro batch are: the same step sees the same samples.
    """

    rows: int  # of the training split
    total: int  # samples of the whole run
    global_batch: int
    micro_batch: int
    workers: int
    every: int  # samples between two validations
    seed: int

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step a worker."""
        return self.global_batch // (self.micro_batch * self.workers)

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may be short of samples."""
        return math.ceil(self.total / self.global_batch)

    def samples_seen(self, step: int) -> int:
        """Samples trained on after ``step`` steps."""
        return min(step * self.global_batch, self.total)

    def evaluates_after(self, step: int) -> bool:
        """Whether a validation falls due: at each multiple of ``every`` that the step reached, and at the end."""
        seen, before = self.samples_seen(step), self.samples_seen(step - 1)
        return seen // self.every > before // self.every or step == self.steps

    def positions(self, rank: int, first: int = 0) -> Iterator[list[int]]:
        """One worker's micro batches from its ``first`` on; positions from ``total`` on pad the last step."""
        for micro in range(first, self.steps * self.accumulation):
            start = (micro * self.workers + rank) * self.micro_batch
            yield list(range(start, start + self.micro_batch))


def plan_run(cfg: RunConfig, rows: int) -> Plan:
    """The plan of a config on a training split of ``rows`` rows."""
    training = cfg.training
    if training.max_steps is not None:
        total = training.max_steps * training.global_batch
    else:
        total = max(1, round(training.epochs * rows))
    every = cfg.evaluation.every or max(training.global_batch, math.ceil(total / _EVALUATIONS))
    return Plan(
        rows, total, training.global_batch, training.micro_batch, cfg.workers, every, stream(training.seed, "order")
    )


def smaller_micro_batch(cfg: RunConfig) -> int | None:
    """The largest micro batch of at most half the config's that divides the global batch; None below one."""
    forward = cfg.training.global_batch // cfg.workers
    return next((size for size in range(cfg.training.micro_batch // 2, 0, -1) if forward % size == 0), None)


@lru_cache(maxsize=2)
def permutation(rows: int, epoch: int, seed: int) -> tuple[int, ...]:
    """The order of the rows in an epoch."""
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def stream(seed: int, name: str, index: int = 0) -> int:
    """The seed of one random stream of a run, so that a change of one stream leaves the others as they are."""
    return random.Random(f"{seed}/{name}/{index}").getrandbits(31)
