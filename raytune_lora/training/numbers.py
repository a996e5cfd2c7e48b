"""What a step measures, read with one transfer from the GPU, and there one step late, so that neither waits.

Every worker reads the same: the losses of all, and what the first one was asked to do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_UNKNOWN = -1.0  # stands for a gradient norm that nobody computed; none is negative


@dataclass(frozen=True)
class StepNumbers:
    """Of one step."""

    step: int  # from 1
    loss: float  # nats a trained token, of the whole group
    grad_norm: float | None  # before clipping
    learning_rate: float
    asked: int  # of all workers, by whoever sees the first one
    data_wait: float  # seconds that this worker waited for the step's data
    ended: float  # when the step was done, on the clock of ``time.perf_counter``


@dataclass(frozen=True)
class _OnTheWay:
    numbers_W3: torch.Tensor  # on the CPU, or about to be: loss, gradient norm and what was asked, of each worker
    copied: Any  # event of the GPU after which they are there; None where they are
    step: int
    learning_rate: float
    data_wait: float
    put: float  # when


class Numbers:
    """Gathers the numbers of each step, and gives them in order, as soon as they are there."""

    def __init__(self, device: torch.device, workers: int, late: bool | None = None) -> None:
        """
        Args:
            device: that computes.
            workers: of the group.
            late: whether a step's numbers are read after the next one has begun; None: on a GPU.
        """
        self._workers = workers
        self._on_gpu = device.type == "cuda"
        self._late = self._on_gpu if late is None else late
        self._waiting: deque[_OnTheWay] = deque()
        self._last: tuple[Any, float] | None = None  # event of the step read last, and when it ended

    def put(
        self,
        step: int,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        *,
        asked: int,
        learning_rate: float,
        data_wait: float,
    ) -> None:
        """Send a step's numbers on their way; all workers at once.

        Args:
            step: from 1.
            loss: of this worker, summed over its forward passes; its value may change afterwards.
            grad_norm: of the whole group; None where it is not known.
            asked: what this worker has been asked to do; that of the first one counts.
            learning_rate: of the step.
            data_wait: seconds.
        """
        loss = loss.detach().double().reshape(())
        norm = _UNKNOWN if grad_norm is None else grad_norm
        norm = norm.detach().to(loss).reshape(()) if isinstance(norm, torch.Tensor) else loss.new_full((), norm)
        mine_3 = torch.stack([loss, norm, loss.new_full((), float(asked))])
        all_W3 = mine_3[None]
        if self._workers > 1:
            all_W3 = mine_3.new_empty(self._workers * 3)
            torch.distributed.all_gather_into_tensor(all_W3, mine_3)
            all_W3 = all_W3.view(self._workers, 3)
        copied = None
        if self._on_gpu:
            there = torch.empty(all_W3.shape, dtype=all_W3.dtype, pin_memory=True)
            all_W3 = there.copy_(all_W3, non_blocking=True)
            copied = torch.cuda.Event(enable_timing=True)
            copied.record()
        self._waiting.append(_OnTheWay(all_W3, copied, step, learning_rate, data_wait, time.perf_counter()))

    def read(self, everything: bool = False) -> Iterator[StepNumbers]:
        """The numbers of steps that have not been read.

        Args:
            everything: of the last step, too, though it may have to be waited for.
        """
        while len(self._waiting) > int(self._late and not everything):
            yield self._read(self._waiting.popleft())
        if everything:
            self._last = None  # what comes between two steps now is no part of one

    def _read(self, one: _OnTheWay) -> StepNumbers:
        ended = one.put
        if one.copied is not None:
            one.copied.synchronize()
            now = time.perf_counter()
            ended = now if self._last is None else self._last[1] + self._last[0].elapsed_time(one.copied) / 1000
            self._last = one.copied, ended
        losses, norms, asked = one.numbers_W3.T.tolist()
        (loss,) = torch.tensor(losses, dtype=torch.float32).mean(0, keepdim=True).tolist()
        norm = None if norms[0] == _UNKNOWN else norms[0]
        return StepNumbers(one.step, loss, norm, one.learning_rate, int(asked[0]), one.data_wait, ended)
