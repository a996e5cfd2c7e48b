"""From the token store to the batches of each step, made ahead of their turn. B: batch, T: time (tokens)."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raytune_lora.data.encode import IGNORED
from raytune_lora.models.packed import Rows
from raytune_lora.training.plan import Plan

_AHEAD = 2  # steps whose batches wait, made; a disk may be slow for as long
_PADDED = ("input_ids", "attention_mask", "labels")
_PACKED = ("input_ids", "position_ids", "labels")

Row = dict[str, Any]  # its input_ids and labels, (T,) each


class Tokens:
    """The rows of a split by number, read from its memory map as they lie there."""

    def __init__(self, split: Any) -> None:
        """
        Args:
            split: of the token store.
        """
        self._columns = {name: _Column(split.data.column(name)) for name in ("input_ids", "labels")}

    def __getitem__(self, row: int) -> Row:
        return {name: column.row(row) for name, column in self._columns.items()}

    def trained(self, row: int) -> int:
        """Tokens of a row that are trained; its first follows from nothing, and is not."""
        return int(np.count_nonzero(self._columns["labels"].row(row)[1:] != IGNORED))


class _Column:
    """A column of lists."""

    def __init__(self, column: Any) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._firsts = [0, *accumulate(len(chunk) for chunk in chunks)]
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]

    def row(self, number: int) -> NDArray[Any]:
        chunk = bisect_right(self._firsts, number) - 1
        offsets, values = self._chunks[chunk]
        start = number - self._firsts[chunk]
        return values[offsets[start] : offsets[start + 1]]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, in one piece of memory, so that one copy brings it to the GPU."""

    position: int  # of its first sample in the run
    names: tuple[str, ...]
    whole: torch.Tensor  # (names, B, T), page-locked where a GPU is to have it
    trained: int  # tokens; known here, so that nothing waits for the GPU to count them
    rows: Rows | None = None  # that are packed

    def on(self, device: torch.device) -> tuple[dict[str, torch.Tensor], Rows | None]:
        """The tensors, (B, T) each, and where rows lie that are packed; nothing waits for the copies."""
        inputs = dict(zip(self.names, self.whole.to(device, non_blocking=True), strict=True))
        return inputs, self.rows.on(device) if self.rows is not None else None


@dataclass(frozen=True)
class StepBatches:
    """What one worker computes in an optimizer step."""

    micro: list[MicroBatch]
    trained: int  # tokens that all workers train in the step


class Batches:
    """One worker's batches, step after step. A thread makes them a few steps before their turn; order is the plan's."""

    def __init__(
        self,
        split: Any,
        plan: Plan,
        rank: int,
        pad_id: int,
        *,
        first: int = 0,
        packing: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            split: of the token store.
            plan: of the run.
            rank: of the worker.
            pad_id: fills short rows.
            first: step to begin with.
            packing: rows end to end, and not padded.
            device: that is to have them; page-locked memory serves a GPU.
        """
        self._tokens = Tokens(split)
        self._plan = plan
        self._rank = rank
        self._pad_id = pad_id
        self._packing = packing
        self._pin = device is not None and device.type == "cuda"
        self._steps = range(first, plan.steps)
        # a thread has a current GPU of its own, and page-locked memory belongs to one
        on_its_gpu = partial(torch.cuda.set_device, device) if self._pin else None
        self._thread = ThreadPoolExecutor(1, "batches", on_its_gpu)

    def __len__(self) -> int:
        """Forward passes."""
        return len(self._steps) * self._plan.accumulation

    def __iter__(self) -> Iterator[StepBatches]:
        waiting: deque[Future[StepBatches]] = deque()
        for step in self._steps:
            for later in range(step + len(waiting), min(step + _AHEAD + 1, self._steps.stop)):
                waiting.append(self._thread.submit(self.step, later))
            yield waiting.popleft().result()

    def step(self, number: int) -> StepBatches:
        """The batches of a step, counted from 0; a position behind the run's last trains no token."""
        plan = self._plan
        start, end = plan.samples_seen(number), plan.samples_seen(number + 1)
        rows = plan.rows_at(number * plan.global_batch, (number + 1) * plan.global_batch).tolist()
        trained = sum(self._tokens.trained(row) for row in rows[: end - start])
        micro = [self._micro_batch(positions, rows, start, end) for positions in plan.micro_batches(number, self._rank)]
        return StepBatches(micro, trained)

    def _micro_batch(self, positions: Sequence[int], numbers: Sequence[int], start: int, end: int) -> MicroBatch:
        rows = [self._tokens[numbers[position - start]] for position in positions]
        for row, position in zip(rows, positions, strict=True):
            if position >= end:
                row["labels"] = np.full_like(row["labels"], IGNORED)
        if self._packing:
            return _packed(rows, positions[0], self._pin)
        return _padded(rows, positions[0], self._pad_id, self._pin)

    def close(self) -> None:
        """End the thread, however the training ended."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right: input_ids, attention_mask and labels, each (B, T)."""
    batch = _padded(rows, 0, pad_id, pin=False)
    return dict(zip(batch.names, batch.whole, strict=True))


def pack(rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], Rows]:
    """One row after the other instead of padding: input_ids, position_ids and labels, each (1, sum of T), and where.

    Positions begin anew with each row. A row's first token follows from nothing, as where rows lie side by side.
    """
    batch = _packed(rows, 0, pin=False)
    assert batch.rows is not None
    return dict(zip(batch.names, batch.whole, strict=True)), batch.rows


def _padded(rows: Sequence[Row], position: int, pad_id: int, pin: bool) -> MicroBatch:
    lengths = [len(row["input_ids"]) for row in rows]
    whole = torch.empty(len(_PADDED), len(rows), max(lengths), dtype=torch.long, pin_memory=pin)
    ids_BT, mask_BT, labels_BT = whole.numpy()
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for values_BT, values, fill in ((ids_BT, row["input_ids"], pad_id), (labels_BT, row["labels"], IGNORED)):
            values_BT[number, :length] = values
            values_BT[number, length:] = fill
        mask_BT[number, :length], mask_BT[number, length:] = 1, 0
    labels_BT[:, 0] = IGNORED  # it follows from nothing, or from learned vectors
    return MicroBatch(position, _PADDED, whole, int(np.count_nonzero(labels_BT != IGNORED)))


def _packed(rows: Sequence[Row], position: int, pin: bool) -> MicroBatch:
    lengths = [len(row["input_ids"]) for row in rows]
    bounds = [0, *accumulate(lengths)]
    whole = torch.empty(len(_PACKED), 1, bounds[-1], dtype=torch.long, pin_memory=pin)
    ids_T, positions_T, labels_T = whole.numpy()[:, 0]
    for row, length, start in zip(rows, lengths, bounds, strict=False):
        ids_T[start : start + length] = row["input_ids"]
        positions_T[start : start + length] = np.arange(length)
        labels_T[start : start + length] = row["labels"]
        labels_T[start] = IGNORED
    starts = torch.tensor(bounds, dtype=torch.int32)
    trained = int(np.count_nonzero(labels_T != IGNORED))
    return MicroBatch(position, _PACKED, whole, trained, Rows(starts.pin_memory() if pin else starts, lengths))
