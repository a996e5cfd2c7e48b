"""The validation loss, the same for every number of workers and every micro batch. N: rows, B: batch, T: time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from raytune_lora.data.encode import IGNORED
from raytune_lora.training.batches import Tokens, collate


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


@torch.no_grad()
def row_losses(
    model: Any, split: Any, rows: Sequence[int], *, batch: int, pad_id: int, rank: int, workers: int
) -> torch.Tensor:
    """Each row's cross-entropy over its trained tokens in nats, and how many these are, (N, 2) in float64 on the CPU.

    It is taken from the logits and not from the model's own loss, which may hold more than that (a router's balance).

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
    by_length = sorted(range(len(rows)), key=lambda i: len(tokens[rows[i]]["input_ids"]))
    batches = [by_length[i : i + batch] for i in range(0, len(rows), batch)]
    device = next(model.parameters()).device
    found_N2 = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for turn in range(math.ceil(len(batches) / workers)):
        number = turn * workers + rank
        mine = number < len(batches)  # a worker without a batch of its own computes one that does not count
        members = batches[number if mine else 0]
        inputs = {
            name: tensor.to(device) for name, tensor in collate([tokens[rows[i]] for i in members], pad_id).items()
        }
        labels_BT = inputs.pop("labels")
        logits_BTV = model(**inputs).logits[:, -labels_BT.shape[1] :]  # virtual tokens come before a row's own
        if mine:
            found_N2[members] = _batch_losses(logits_BTV, labels_BT)
    model.train(was_training)
    if workers > 1:
        torch.distributed.all_reduce(found_N2)
    return found_N2.cpu()


def _batch_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B, 2); the trained tokens' logits alone are brought to fp32, which for all of a vocabulary takes room."""
    targets_BT = labels_BT[:, 1:]
    trained_BT = targets_BT != IGNORED
    nats = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1][trained_BT].float(), targets_BT[trained_BT], reduction="none"
    )
    row = trained_BT.nonzero()[:, 0]
    sums_B = torch.zeros(len(labels_BT), dtype=torch.float64, device=nats.device).index_add_(0, row, nats.double())
    return torch.stack([sums_B, trained_BT.sum(1).double()], dim=1)
