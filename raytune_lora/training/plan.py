"""How a run's samples divide into steps, workers and micro batches: arithmetic only. N: rows of the training split."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from raytune_lora.config.schema import RunConfig

_EVALUATIONS = 10  # a run, where the config names no interval
_FEW = 20  # optimizer steps: fewer leave the schedule no room, and most methods about where they began
_WINDOW = 64  # steps whose samples are sorted by length together

Rows = NDArray[np.int64]


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
    lengths: Rows | None = field(default=None, compare=False, repr=False)  # (N,) tokens of each row
    capacity: int | None = None  # packing: tokens that a forward pass holds at most
    grouped: bool = False  # samples of like length in one step
    until: int | None = None  # samples from which on the first validation ends the sitting; the run can go on later

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step a worker."""
        return self._forwards // self.workers

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may be short of samples."""
        return math.ceil(self.total / self.global_batch)

    @property
    def forward_tokens(self) -> int:
        """Tokens of the largest forward pass; needs the lengths of the rows."""
        assert self.lengths is not None
        return self.capacity or self.micro_batch * int(self.lengths.max())

    def samples_seen(self, step: int) -> int:
        """Samples trained on after ``step`` steps."""
        return min(step * self.global_batch, self.total)

    def evaluates_after(self, step: int) -> bool:
        """Whether a validation falls due: at each multiple of ``every`` that the step reached, and at the end."""
        seen, before = self.samples_seen(step), self.samples_seen(step - 1)
        return seen // self.every > before // self.every or step == self.steps

    def pauses_at(self, samples_seen: int) -> bool:
        """Whether a validation after that many samples ends the sitting."""
        return self.until is not None and samples_seen >= self.until

    def rows_at(self, start: int, stop: int) -> Rows:
        """The rows of the training split at the positions from ``start`` up to ``stop``."""
        found = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, index = divmod(start, self.rows)
            found.append(self._order(epoch)[index : index + stop - start])
            start += len(found[-1])
        return np.concatenate(found)

    def positions(self, rank: int, first: int = 0) -> Iterator[list[int]]:
        """One worker's micro batches from its ``first`` on; positions from ``total`` on pad the last step."""
        step, skipped = divmod(first, self.accumulation)
        for number in range(step, self.steps):
            mine = self.micro_batches(number, rank)
            yield from mine[skipped:] if number == step else mine

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """One worker's micro batches of a step, counted from 0."""
        return self._micro_batches(step)[rank :: self.workers]

    def _order(self, epoch: int) -> Rows:
        order = permutation(self.rows, epoch, self.seed)
        if not self.grouped or self.lengths is None:
            return order
        found = self._orders.get(epoch)
        if found is None:
            found = _grouped(order, self.lengths, self.global_batch)
            for old in sorted(self._orders)[:-1]:  # one thread may read the end of an epoch, another the next
                self._orders.pop(old, None)
            self._orders[epoch] = found
        return found

    @cached_property
    def _orders(self) -> dict[int, Rows]:
        return {}

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Of all workers, in turn."""
        start = step * self.global_batch
        if self.capacity is None:
            firsts = range(start, start + self.global_batch, self.micro_batch)
            return [list(range(first, first + self.micro_batch)) for first in firsts]
        packed = pack_rows(self._step_lengths(step).tolist(), self._forwards, self.capacity)
        if packed is None:
            raise RuntimeError(f"step {step} does not fit {self._forwards} forward passes of {self.capacity} tokens")
        return [[start + index for index in forward] for forward in packed]

    def _step_lengths(self, step: int) -> Rows:
        assert self.lengths is not None
        return self.lengths[self.rows_at(step * self.global_batch, (step + 1) * self.global_batch)]

    @cached_property
    def _forwards(self) -> int:
        """Forward passes an optimizer step, of all workers together; with packing, as few as do for every step."""
        most = self.global_batch // self.micro_batch
        if self.capacity is None:
            return most
        fewest = self.workers
        for step in range(self.steps):
            lengths = self._step_lengths(step)
            if lengths.sum() / fewest + lengths.max() > self.capacity:  # else it fits, whatever they are
                while fewest < most and pack_rows(lengths.tolist(), fewest, self.capacity) is None:
                    fewest += self.workers
        return fewest


def plan_run(cfg: RunConfig, rows: int, lengths: Rows | None = None) -> Plan:
    """The plan of a config on a training split of ``rows`` rows.

    Args:
        cfg: the run.
        rows: of the training split.
        lengths: (N,) tokens of each; without them, packing and grouping are left aside: enough to count steps.
    """
    training = cfg.training
    if training.max_steps is not None:
        total = training.max_steps * training.global_batch
    else:
        total = max(1, round(training.epochs * rows))
    return Plan(
        rows=rows,
        total=total,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        workers=cfg.workers,
        every=cfg.evaluation.every or max(training.global_batch, math.ceil(total / _EVALUATIONS)),
        seed=stream(training.seed, "order"),
        lengths=lengths,
        capacity=training.micro_batch * cfg.data.max_length if training.packing and lengths is not None else None,
        grouped=training.group_by_length,
    )


def remarks(cfg: RunConfig, rows: int) -> list[str]:
    """What is unusual about the number of steps, and what to type instead; empty where nothing is.

    Args:
        cfg: the run.
        rows: of the training split.
    """
    training, plan = cfg.training, plan_run(cfg, rows)
    found = []
    if training.max_steps is None and plan.steps < _FEW:
        more = [_batches(cfg, plan.total // _FEW)] if plan.total >= _FEW * cfg.workers else []
        more.append(f"training.epochs={math.ceil(_FEW * training.global_batch / rows)}")
        found.append(
            f"{rows} training rows x training.epochs={training.epochs:g} in steps of training.global_batch="
            f"{training.global_batch} are {plan.steps} optimizer step{'s' * (plan.steps > 1)}, too few to move a "
            f"model much: {' or '.join(more)} makes {_FEW} or more"
        )
    if rows < training.global_batch and plan.total > rows:
        found.append(
            f"training.global_batch={training.global_batch} is more than the {rows} training rows: a step takes rows "
            f"more than once, and epochs flow together; {_batches(cfg, rows)} keeps them apart"
        )
    return found


def _batches(cfg: RunConfig, most: int) -> str:
    """The largest global batch of at most so many sequences, as it is typed; no less than one a worker."""
    micro = min(cfg.training.micro_batch, max(1, most // cfg.workers))
    batch = max(1, most // (micro * cfg.workers)) * micro * cfg.workers
    return f"training.global_batch={batch}" + (
        f" training.micro_batch={micro}" if micro != cfg.training.micro_batch else ""
    )


def pack_rows(lengths: Sequence[int], bins: int, capacity: int) -> list[list[int]] | None:
    """Divide rows among bins so that their sums are even: the longest first, each into the emptiest bin.

    Best-fit decreasing would fill some bins and leave others short; here all workers wait for the fullest, so even is
    best (Graham 1969, longest processing time first).

    Args:
        lengths: tokens of each row.
        bins: how many.
        capacity: tokens of a bin.

    Returns:
        The rows of each bin, in order; None where they do not fit, or a bin would stay empty.
    """
    if len(lengths) < bins or sum(lengths) > bins * capacity:
        return None
    heap = [(0, number) for number in range(bins)]
    packed: list[list[int]] = [[] for _ in range(bins)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, number = heapq.heappop(heap)
        if load + lengths[index] > capacity:
            return None
        packed[number].append(index)
        heapq.heappush(heap, (load + lengths[index], number))
    return [sorted(forward) for forward in packed]


def smaller_micro_batch(cfg: RunConfig) -> int | None:
    """The largest micro batch of at most half the config's that divides the global batch; None below one."""
    forward = cfg.training.global_batch // cfg.workers
    return next((size for size in range(cfg.training.micro_batch // 2, 0, -1) if forward % size == 0), None)


@lru_cache(maxsize=2)
def permutation(rows: int, epoch: int, seed: int) -> Rows:
    """The order of the rows in an epoch, (N,): sorted by a hash (splitmix64), the same on every machine for ever."""
    key = np.uint64(random.Random(f"{seed}/{epoch}").getrandbits(64))
    order: Rows = np.argsort(_mixed(np.arange(rows, dtype=np.uint64) + key), kind="stable")
    order.flags.writeable = False
    return order


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood 2014: the output function of splitmix64."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _grouped(order: Rows, lengths: Rows, batch: int) -> Rows:
    """Within each window of the order, rows of like length side by side, and the batches of them in the old order."""
    found = []
    for start in range(0, len(order), _WINDOW * batch):
        window = order[start : start + _WINDOW * batch]
        by_length = np.argsort(lengths[window], kind="stable")
        batches = [by_length[i : i + batch] for i in range(0, len(window), batch)]
        batches.sort(key=lambda members: int(members.min()) if len(members) == batch else len(window))
        found.append(window[np.concatenate(batches)])
    return np.concatenate(found)


def stream(seed: int, name: str, index: int = 0) -> int:
    """The seed of one random stream of a run, so that a change of one stream leaves the others as they are."""
    return random.Random(f"{seed}/{name}/{index}").getrandbits(31)
