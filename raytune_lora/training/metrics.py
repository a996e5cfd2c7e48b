"""The validation loss, the same for every number of workers and every micro batch. N: rows, B: batch, T: time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raytune_lora.training.batches import Tokens, collate
from raytune_lora.training.scoring import scoring_of

_PROBED = 16  # tokens of a row by which it is found out how a model is scored


def validation_loss(model: Any, split: Any, *, rows: int, batch: int, pad_id: int, rank: int, workers: int) -> float:
    """Mean loss over the trained tokens of the split's first rows, which the store has in an order that is chance's.

    Args:
        model: as for ``row_losses``.
        split: of the token store.
        rows: how many to take; 0 takes all.
        batch: rows a forward pass.
        pad_id: fills short rows.
        rank: of this worker.
        workers: how many share the rows.
    """
    count = rows_measured(rows, len(split))
    return mean_loss(row_losses(model, split, range(count), batch=batch, pad_id=pad_id, rank=rank, workers=workers))


def rows_measured(asked: int, there: int) -> int:
    """How many rows are measured: 0 asks for all, and no more can be than there are."""
    return min(asked, there) if asked else there


def mean_loss(losses_N2: torch.Tensor) -> float:
    """Nats a token of rows as ``row_losses`` gives them."""
    nats, tokens = losses_N2.sum(0).tolist()
    return float(nats / tokens) if tokens else math.nan


def fit_by_rows(
    model: Any,
    split: Any,
    pad_id: int,
    *,
    takes_common_loss: bool = False,
    start_afresh: Callable[[], None] | None = None,
) -> None:
    """Have a model's scoring fit it, by the first rows of a split, unless it does already.

    Args:
        model: takes input_ids and attention_mask; it may be sharded, so every worker calls this.
        split: of the token store.
        pad_id: fills short rows.
        takes_common_loss: as ``Scoring.fit`` has it.
        start_afresh: likewise.
    """
    scoring = scoring_of(model)
    if scoring.fits is not None:
        return
    rows = [row["input_ids"][:_PROBED] for row in split.select(range(min(2, len(split))))]
    inputs = collate([{"input_ids": ids, "labels": ids} for ids in rows], pad_id)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    scoring.fit(model, inputs, takes_common_loss=takes_common_loss, start_afresh=start_afresh)
    model.train(was_training)


@torch.no_grad()
def row_losses(
    model: Any, split: Any, rows: Sequence[int], *, batch: int, pad_id: int, rank: int, workers: int
) -> torch.Tensor:
    """Each row's cross-entropy over its trained tokens in nats, and how many these are, (N, 2) in float64 on the CPU.

    It is that of ``scoring`` and not the model's own loss, which may hold more than that (a router's balance).

    Args:
        model: takes input_ids and attention_mask; it may be sharded, so every worker calls it equally often.
        split: of the token store.
        rows: their numbers in it.
        batch: rows a forward pass.
        pad_id: fills short rows.
        rank: of this worker.
        workers: how many share the rows.
    """
    tokens = Tokens(split)
    lengths = [len(tokens[row]["input_ids"]) for row in rows]
    by_length = sorted(range(len(rows)), key=lengths.__getitem__)
    batches = [by_length[i : i + batch] for i in range(0, len(rows), batch)]
    device = next(model.parameters()).device
    found_N2 = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
    fit_by_rows(model, split, pad_id)
    scoring = scoring_of(model)
    was_training, limit = model.training, scoring.limit
    model.eval()
    scoring.limit = batch * max(lengths)
    for turn in range(math.ceil(len(batches) / workers)):
        number = turn * workers + rank
        mine = number < len(batches)  # a worker without a batch of its own computes one that does not count
        members = batches[number if mine else 0]
        padded = collate([tokens[rows[i]] for i in members], pad_id)
        rows_B2 = model(**{name: tensor.to(device) for name, tensor in padded.items()})["rows"]
        if mine:
            found_N2[members] = rows_B2
    model.train(was_training)
    scoring.limit = limit
    if workers > 1:
        torch.distributed.all_reduce(found_N2)
    return found_N2.cpu()
