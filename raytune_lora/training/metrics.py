"""The validation loss, the same for every number of workers and every micro batch."""

from __future__ import annotations

import math
from typing import Any

import torch

from raytune_lora.data.encode import IGNORED
from raytune_lora.training.batches import collate


@torch.no_grad()
def validation_loss(model: Any, split: Any, *, rows: int, batch: int, pad_id: int, rank: int, workers: int) -> float:
    """Mean loss over the answer tokens of the split's first rows.

    Args:
        model: takes input_ids, attention_mask and labels; it may be sharded, so every worker calls it equally often.
        split: of the token store.
        rows: how many to take; 0 takes all.
        batch: rows a forward pass.
        pad_id: fills short rows.
        rank: of this worker.
        workers: how many share the rows.
    """
    count = min(rows, len(split)) if rows else len(split)
    chosen = split.select_columns(["input_ids", "labels"]).select(range(count))
    by_length = sorted(range(count), key=lambda i: len(chosen[i]["input_ids"]))
    batches = [by_length[i : i + batch] for i in range(0, count, batch)]
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for turn in range(math.ceil(len(batches) / workers)):
        number = turn * workers + rank
        mine = number < len(batches)  # a worker without a batch of its own computes one that does not count
        inputs = collate([chosen[i] for i in batches[number if mine else 0]], pad_id)
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss
        if mine:
            totals += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64, device=device)
    model.train(was_training)
    if workers > 1:
        torch.distributed.all_reduce(totals)
    return float(totals[0] / totals[1])
