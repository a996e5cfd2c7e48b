"""From the token store to padded tensors. B: batch, T: time (tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from raytune_lora.data.encode import IGNORED
from raytune_lora.training.plan import Plan


class Samples(Dataset[dict[str, list[int]]]):
    """The samples of a run by position; a padding position has no trained token."""

    def __init__(self, split: Any, plan: Plan) -> None:
        self._split = split.select_columns(["input_ids", "labels"])
        self._plan = plan

    def __len__(self) -> int:
        return self._plan.steps * self._plan.global_batch

    def __getitem__(self, position: int) -> dict[str, list[int]]:
        row: dict[str, list[int]] = self._split[int(self._plan.rows_at(position, position + 1)[0])]
        if position >= self._plan.total:
            return {"input_ids": row["input_ids"], "labels": [IGNORED] * len(row["labels"])}
        return row


class _RankBatches:
    """The batch sampler of one worker."""

    def __init__(self, plan: Plan, rank: int, first: int) -> None:
        self._plan, self._rank, self._first = plan, rank, first

    def __iter__(self) -> Any:
        return self._plan.positions(self._rank, self._first * self._plan.accumulation)

    def __len__(self) -> int:
        return (self._plan.steps - self._first) * self._plan.accumulation


def training_loader(
    split: Any, plan: Plan, rank: int, pad_id: int, *, first: int = 0, packing: bool = False
) -> DataLoader[Any]:
    """One worker's micro batches from step ``first`` on, as ``collate`` or ``pack`` makes them."""
    return DataLoader(
        Samples(split, plan),
        batch_sampler=_RankBatches(plan, rank, first),
        collate_fn=pack if packing else lambda rows: collate(rows, pad_id),
    )


def collate(rows: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right: input_ids, attention_mask and labels, each (B, T)."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows], dtype=torch.long)

    lengths_B = torch.tensor([len(row["input_ids"]) for row in rows])
    mask_BT = (torch.arange(length) < lengths_B[:, None]).long()
    return {"input_ids": padded("input_ids", pad_id), "attention_mask": mask_BT, "labels": padded("labels", IGNORED)}


def pack(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """One row after the other instead of padding: input_ids, position_ids and labels, each (1, sum of T).

    Beside them stand ``starts`` and ``lengths``, as ``Rows`` has them. Positions begin anew with each row. A row's
    first token follows from nothing, as where rows lie side by side.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    labels = [label for row in rows for label in [IGNORED, *row["labels"][1:]]]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "position_ids": torch.tensor([[position for length in lengths for position in range(length)]]),
        "labels": torch.tensor([labels]),
        "starts": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "lengths": lengths,
    }
