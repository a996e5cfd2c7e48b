"""Attention of packed rows: each attends to itself alone, and no mask of the whole pack is ever made.

transformers keeps packed rows apart by a mask of all tokens of the pack times all tokens: quadratic in its length, and
no flash kernel takes one. Here the mask that a model asks for becomes a note of where the rows begin and of what a
token sees within its row. The note goes through the model's layers in the mask's place, to one of three kernels:
torch's attention of variable length or flash-attn's on a GPU in 16 bits, or a loop over the rows.

N: rows, T: tokens of the pack, L: of a row, H: heads, K: heads of keys and values, D: width of a head.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

_NAME = "packed_rows"  # of the implementation, as transformers' registries have it
_HALF = (torch.float16, torch.bfloat16)
_WIDEST = 256  # head that flash kernels take
_MULTIPLE = 8  # of a head's width, likewise
_AMPERE = (8, 0)  # the compute capability that they need


@dataclass(frozen=True)
class Rows:
    """Where packed rows lie."""

    starts: torch.Tensor  # (N + 1,) int32, on the model's device: each row's first token, and the end of the pack
    lengths: Sequence[int]  # (N,) tokens of each, on the host, so that nothing waits for the device to learn them

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def on(self, device: torch.device) -> Rows:
        """The same there; nothing waits for the copy."""
        return Rows(self.starts.to(device, non_blocking=True), self.lengths)


@dataclass(frozen=True)
class _Sees:
    """What stands for the mask: which tokens of its own row a token sees."""

    rows: Rows
    function: Callable[..., Any]  # of transformers: of batch, head, and places of query and key within their row
    window: int | None  # tokens back that are seen, the own one counted; None: all
    regular: bool  # whether ``window`` says all that ``function`` does
    flash: bool  # whether flash-attn was asked for

    @property
    def back(self) -> int:
        """The same as kernels have it: tokens before the own one; -1: all."""
        return -1 if self.window is None else self.window - 1

    def mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """(L, L), true where the key is seen; None where all up to the own token are."""
        if self.regular and (self.window is None or length <= self.window):
            return None
        place, zero = torch.arange(length, device=device), torch.zeros((), dtype=torch.long, device=device)
        seen: torch.Tensor = self.function(zero, zero, place[:, None], place[None, :])
        return seen.expand(1, 1, length, length)[0, 0]


_current: tuple[Rows, bool] | None = None  # what is in a forward pass now, and whether by flash-attn


class PackedAttention:
    """The attention of one model, which packed rows change for a while."""

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: of transformers, with or without adapters; attention of its own code, which transformers' registry
                does not reach, stays as it is.
        """
        reached = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m._can_set_attn_implementation()]
        owners = [owner for each in reached for owner in each.modules()]
        configs = [owner.config for owner in owners if hasattr(getattr(owner, "config", None), _SET)]
        self._configs: list[Any] = list({id(config): config for config in configs}.values())
        base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
        taken = inspect.signature(type(base).forward).parameters.values()  # not of what may be wrapped around it
        self._takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)

    @contextlib.contextmanager
    def of(self, rows: Rows) -> Iterator[dict[str, Any]]:
        """Keep rows apart in the forward passes within, and in what their backward passes compute again.

        Returns:
            What the model is to be given beside input_ids and position_ids. A mask that hides nothing spares it to look
            for rows among the positions, for which it would wait for the GPU. By the bounds, some layers that do not
            attend keep rows apart, too.
        """
        global _current
        given: dict[str, Any] = {"attention_mask": rows.starts.new_ones((1, sum(rows.lengths)), dtype=torch.long)}
        if self._takes_more:
            given |= {"cu_seq_lens_q": rows.starts, "cu_seq_lens_k": rows.starts}
            given |= {"max_length_q": rows.longest, "max_length_k": rows.longest}
        before = [config._attn_implementation_internal for config in self._configs]
        _current = rows, any("flash" in (name or "") for name in before)
        for config in self._configs:
            config._attn_implementation_internal = _NAME
        try:
            yield given
        finally:
            _current = None
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name


_SET = "_attn_implementation_internal"  # of a config: what its model's layers look up


def _note(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> _Sees:
    """In place of a mask, for transformers' registry of them."""
    if _current is None:
        raise RuntimeError("a model has the attention of packed rows, and no rows are packed")
    rows, flash = _current
    if (batch_size, q_length, kv_length) != (1, sum(rows.lengths), sum(rows.lengths)):
        raise ValueError(f"a mask of {batch_size} x {q_length} x {kv_length} for packed rows of {list(rows.lengths)}")
    held = list(_held(mask_function))
    if use_vmap or any(tensor.dim() > 1 for tensor in held):
        raise NotImplementedError("a mask that depends on more than where tokens stand in their row")
    return _Sees(rows, mask_function, local_size, not held and _is_window(mask_function, local_size), flash)


def _held(function: Any) -> Iterator[torch.Tensor]:
    """The tensors that a function and those it is made of have been given."""
    for cell in getattr(function, "__closure__", None) or ():
        for part in cell.cell_contents if isinstance(cell.cell_contents, tuple | list) else (cell.cell_contents,):
            if isinstance(part, torch.Tensor):
                yield part
            elif callable(part):
                yield from _held(part)


def _is_window(function: Callable[..., Any], window: int | None) -> bool:
    """Whether a mask is of all tokens up to the own one, or of the last ``window`` of them: asked at its edges."""
    size = 64 if window is None else window
    at = sorted({max(0, multiple * size // 2 + step) for multiple in range(5) for step in (-1, 0, 1)})
    edges, zero = torch.tensor(at, device="cpu"), torch.zeros((), dtype=torch.long, device="cpu")
    seen = function(zero, zero, edges[:, None], edges[None, :]).expand(len(at), len(at)).tolist()
    return bool(seen == [[key <= query and (window is None or query - key < window) for key in at] for query in at])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """For transformers' registry of attention.

    Args:
        module: whose attention it is.
        query: (1, H, T, D).
        key: (1, K, T, D).
        value: (1, K, T, D or other).
        attention_mask: what ``_note`` made.
        scaling: of the scores; None: D ** -0.5.
        dropout: of the weights.
        softcap: of the scores, as Gemma 2 has it.
        s_aux: (H,) sinks, as gpt-oss has them: logits of a key that gives nothing.
        position_bias: refused: it is of all tokens of the pack times all.
        is_causal: whether a token sees none after it, where the module does not say.

    Returns:
        (1, T, H, width of a value).
    """
    if not isinstance(attention_mask, _Sees):
        raise NotImplementedError("attention that was given no causal mask, or has changed it")
    if position_bias is not None:
        raise NotImplementedError("a bias by the distance of tokens")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise NotImplementedError("attention to what comes after a token")
    sees = attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _computed_in(query, key, value)
    kernel = _kernel(sees, query, value, dropout, softcap, s_aux)
    if kernel is None:
        found = _row_by_row(sees, query, key, value, scale, dropout, softcap, s_aux)
    else:
        found = kernel(sees, query, key, value, scale, dropout, softcap)
    return found.unsqueeze(0), None


def _computed_in(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In autocast's precision, which does not know of these kernels; else in that of the values."""
    kind = tensors[-1].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[-1].dtype
    return [tensor.to(dtype) for tensor in tensors]


# -------------------------------------------------------------------------------------------------------------- kernels


def _kernel(
    sees: _Sees,
    query: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> Callable[..., torch.Tensor] | None:
    """What computes all rows at once; None where nothing here does."""
    widest = max(query.shape[-1], value.shape[-1])
    fits = query.is_cuda and query.dtype in _HALF and widest <= _WIDEST and _has_flash_kernels(query.device)
    if not fits or not sees.regular or sinks is not None:
        return None
    plain = dropout == 0.0 and softcap is None and _varlen() is not None
    if plain and not sees.flash:
        return _by_torch
    if importlib.util.find_spec("flash_attn") is not None:
        return _by_flash_attn
    return _by_torch if plain else None


@lru_cache
def _has_flash_kernels(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _AMPERE


@lru_cache
def _varlen() -> Any:
    """torch's own kernel, from the release on that has windows and heads that share keys; None before."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _by_torch(
    sees: _Sees, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *_: Any
) -> torch.Tensor:
    """(T, H, D)"""
    rows, width = sees.rows, value.shape[-1]
    q_THD, k_TKD, v_TKD = _flat(query, key, value)
    found_THD: torch.Tensor = _varlen()(
        *(q_THD, k_TKD, v_TKD, rows.starts, rows.starts, rows.longest, rows.longest),
        scale=scale,
        window_size=(sees.back, 0),
        enable_gqa=q_THD.shape[1] != k_TKD.shape[1],
    )
    return found_THD.narrow(-1, 0, width)


def _by_flash_attn(
    sees: _Sees,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """(T, H, D)"""
    from flash_attn import flash_attn_varlen_func

    rows, width = sees.rows, value.shape[-1]
    found_THD: torch.Tensor = flash_attn_varlen_func(
        *(*_flat(query, key, value), rows.starts, rows.starts, rows.longest, rows.longest),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(sees.back, 0),
        softcap=softcap or 0.0,
    )
    return found_THD.narrow(-1, 0, width)


def _flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(1, H, T, D) to (T, H, D), all of the same width, of which the kernels take multiples of 8: zeros add nothing."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    width = -(-widest // _MULTIPLE) * _MULTIPLE
    wide = [F.pad(tensor, (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor for tensor in tensors]
    found = [tensor.squeeze(0).transpose(0, 1) for tensor in wide]
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in found]


def _row_by_row(
    sees: _Sees,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(T, H, D); nothing of it is larger than a row's own scores."""
    bounds = [0]
    for length in sees.rows.lengths:
        bounds.append(bounds[-1] + length)
    found, masks = [], dict[int, torch.Tensor | None]()
    for start, end in pairwise(bounds):
        length = end - start
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        if length not in masks:
            masks[length] = sees.mask(length, query.device)
        mask = masks[length]
        if softcap is not None or sinks is not None:
            found.append(_spelled_out(q, k, v, mask, scale, dropout, softcap, sinks))
            continue
        shared = q.shape[1] != k.shape[1]
        found.append(
            F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=scale, enable_gqa=shared)
        )
    return torch.cat(found, dim=2)[0].transpose(0, 1)


def _spelled_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_LL: torch.Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """A row's attention, (1, H, L, D), with what ``scaled_dot_product_attention`` does not know."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask_LL is None:
        mask_LL = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask_LL, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, dropout) @ value


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _note)
