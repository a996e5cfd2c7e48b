"""What a model lets a token see that it must not: the tokens after it, and rows that are packed beside its own.

A model whose tokens see those after them is trained on answers that it is shown. Packed rows are told apart by nothing
but their positions, which begin anew with each row, and many models do not look there: they count positions by
themselves, mask by the attention mask alone, or carry a state or a convolution from one token to the next whatever its
position (OPT, BLOOM, Falcon, Mamba, LFM2 in transformers 5.23). So the model itself is asked, with the attention and in
the number format that it trains with. T: time (tokens), V: vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from raytune_lora.cache import Cache
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError
from raytune_lora.models.packed import PackedAttention
from raytune_lora.models.sources import materialize
from raytune_lora.models.tokenizer import load_tokenizer
from raytune_lora.training.batches import collate, pack
from raytune_lora.training.place import Place
from raytune_lora.training.sharding import divides, measured_model

_LENGTHS = (9, 14, 6)  # tokens of the rows that are packed
_SEEN_PART, _END = 8, 8  # tokens of a row that stay, and of its ends
_VERSIONS = 4  # of what the others must not see
_ROWS = 64  # of the training split, from whose tokens the rows are drawn
_BEYOND = 10.0  # times the noise of a batch that counts as a difference
# The least differences that count, as shares of the logits' norm, by what the model computes in. Of other words in
# another row: they change nothing at all, but for kernels that round by what else is in the batch (experts, int8).
_SEEN = {torch.float32: 2e-6, torch.float16: 2e-5, torch.bfloat16: 1e-4}
# Of packing itself, which sums in another order.
_MOVED = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def check_causal(model: Any, store: TokenStore, pad_id: int) -> None:
    """Raise where the tokens of a base model see those after them, whatever its config says.

    Raises:
        UserError: they do.
    """
    seen = sees_ahead(model, _tokens(store), pad_id)
    if seen is not None:
        raise UserError(
            f"model: its tokens see those after them (other ends of a row change the logits before them by {seen:.2g} "
            "of their norm), so that it would be trained on answers that it is shown; name a decoder"
        )


def probe_packing(cfg: RunConfig, store: TokenStore, place: Place) -> None:
    """Report ``leak``: why packed rows of the data do not train on this model as they do alone; None where they do.

    The first worker asks, or all of them where the model is divided among them. It is asked of the base model: no
    method that can pack adds anything that joins tokens.
    """
    if place.rank and not divides(cfg):
        return
    folder = materialize(cfg.model, Cache.of(cfg.cache, cfg.cluster.node_cache))
    tokenizer = load_tokenizer(folder, cfg.model)
    with measured_model(cfg, folder) as (model, _):
        leak = packed_leak(model, _tokens(store), tokenizer.pad_token_id)
    place.report({"leak": leak})


def _tokens(store: TokenStore) -> list[int]:
    rows = store.split("train").select(range(min(_ROWS, store.rows["train"])))
    return sorted({token for row in rows["input_ids"] for token in row})


@torch.no_grad()
def sees_ahead(model: Any, tokens: Sequence[int], pad_id: int) -> float | None:
    """How far a row's logits change with the tokens after them, as a share of their norm; None where they do not.

    Args:
        model: takes input_ids and attention_mask; in evaluation mode.
        tokens: to make rows of.
        pad_id: fills short rows.
    """
    draw = random.Random(0)
    (start,) = _rows(draw, tokens, _SEEN_PART)
    rows = [start + end for end in _rows(draw, tokens, *[_END] * _VERSIONS)]
    others = _rows(draw, tokens, *[_SEEN_PART + _END] * _VERSIONS)

    def changes(pairs: list[list[list[int]]]) -> float:
        logits = [next(_side_by_side(model, pair, pad_id))[:_SEEN_PART] for pair in pairs]
        return max(_difference(each, logits[0]) for each in logits[1:])

    seen, noise = changes([[row, others[0]] for row in rows]), changes([[rows[0], other] for other in others])
    return None if seen <= max(_SEEN[_computes_in(model)], _BEYOND * noise) else seen


@torch.no_grad()
def packed_leak(model: Any, tokens: Sequence[int], pad_id: int) -> str | None:
    """How the logits of packed rows differ from what they are without the other rows; None where they do not.

    Args:
        model: takes input_ids, position_ids and attention_mask; in evaluation mode.
        tokens: to make rows of.
        pad_id: fills short rows.
    """
    draw = random.Random(0)
    firsts, later = _rows(draw, tokens, *[_LENGTHS[0]] * _VERSIONS), _rows(draw, tokens, *_LENGTHS[1:])
    alone = torch.cat([row for each in (firsts[0], *later) for row in _side_by_side(model, [each], pad_id)])
    side = [list(_side_by_side(model, [first, *later], pad_id)) for first in firsts]
    together = torch.cat(list(_side_by_side(model, firsts, pad_id)))
    one_by_one = torch.cat([row for first in firsts for row in _side_by_side(model, [first], pad_id)])
    try:
        packed = [_packed(model, [first, *later]) for first in firsts]
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model says of one sequence with several beginnings, having taken each
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return f"it cannot take them: {why}"
    dtype, start = _computes_in(model), _LENGTHS[0]
    batch = max(_difference(torch.cat(rows[1:]), torch.cat(side[0][1:])) for rows in side[1:])
    seen = max(_difference(logits[start:], packed[0][start:]) for logits in packed[1:])
    if not seen <= max(_SEEN[dtype], _BEYOND * batch):
        return f"other words in one row change the logits of the next by {seen:.2g} of their norm"
    moved = _difference(packed[0], alone)
    if not moved <= max(_MOVED[dtype], _BEYOND * _difference(together, one_by_one)):
        return f"a row's logits differ by {moved:.2g} of their norm from those of the row alone"
    return None


def _rows(draw: random.Random, tokens: Sequence[int], *lengths: int) -> list[list[int]]:
    return [[draw.choice(tokens) for _ in range(length)] for length in lengths]


def _packed(model: Any, rows: Sequence[list[int]]) -> torch.Tensor:
    """Logits of packed rows, (sum of T, V)."""
    inputs, packed = pack([{"input_ids": row, "labels": row} for row in rows])
    with PackedAttention(model).of(packed.on(next(model.parameters()).device)) as given:
        return _logits(model, inputs | given)[0]


def _side_by_side(model: Any, rows: Sequence[list[int]], pad_id: int) -> Iterator[torch.Tensor]:
    """Logits of each row of a padded batch, (T, V)."""
    logits_BTV = _logits(model, collate([{"input_ids": row, "labels": row} for row in rows], pad_id))
    for row, logits_TV in zip(rows, logits_BTV, strict=True):
        yield logits_TV[: len(row)]


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    device = next(model.parameters()).device
    tensors = {name: value.to(device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return model(**{name: value for name, value in (inputs | tensors).items() if name != "labels"}).logits.float()


def _computes_in(model: Any) -> torch.dtype:
    """Of a quantized model, its layers' format rather than that of the weights beside them."""
    quantized = getattr(model.config, "quantization_config", None)
    if quantized is None:
        return model.dtype
    return quantized.bnb_4bit_compute_dtype if getattr(quantized, "load_in_4bit", False) else torch.float16


def _difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference of what softmax sees of the logits, as a share of the reference's."""
    reference = reference - reference.mean(-1, keepdim=True)
    return float((logits - logits.mean(-1, keepdim=True) - reference).norm() / reference.norm())
