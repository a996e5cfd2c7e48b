"""What a forward pass keeps for the backward pass.

The parts are those of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), for today's decoders and frozen weights:
a linear layer keeps its input only where a weight that meets it trains, so a frozen one keeps nothing; an elementwise
product keeps both factors; a normalization, its input; attention that never makes the matrix of weights keeps queries,
keys, values, output and one number for each query (FlashAttention, arXiv:2205.14135). B: rows, T: tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_lora.config.schema import Attention, RunConfig
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

_FP32, _BF16 = 4, 2
_LOSS = 12  # bytes an element: log-probabilities, and twice their gradient, in fp32
LOGITS = 2**25  # elements that are scored at once; 128 MiB in fp32
_BACKWARD = 2  # gradients of the feed-forward network's width that are there at once


@dataclass(frozen=True)
class Formats:
    """Bytes of an element, and what decides which copies are made."""

    compute: int  # of products
    stream: int  # of the residual stream
    rest: int  # of embeddings, head, norms and biases
    trained: int  # of what trains
    fixed: int  # of what the method keeps fixed
    autocast: bool  # whether inputs are cast for each product
    on_gpu: bool
    attention: Attention


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass."""

    rows: int
    length: int
    masked: bool  # rows of several lengths, padded or end to end

    @classmethod
    def of(cls, cfg: RunConfig, longest: int) -> Batch:
        """The largest that a run has; ``longest`` in tokens."""
        micro = cfg.training.micro_batch
        if cfg.training.packing:
            return cls(1, micro * cfg.data.max_length, True)
        return cls(micro, longest, micro > 1)


@dataclass(frozen=True)
class Pass:
    """Bytes."""

    layers: int
    kept: int  # by all layers
    inputs: int  # of all layers: what gradient checkpointing keeps
    again: int  # gradients inside one layer while its backward pass runs
    logits: int  # the loss, its gradient, and the logits


def passes(shape: Shape, added: Added, formats: Formats, batch: Batch, *, liger: bool) -> Pass:
    """What one forward and backward pass keeps.

    Args:
        shape: of the base model.
        added: by the method.
        formats: of the tensors.
        batch: the tokens.
        liger: whether Liger computes the loss, in chunks of its own.
    """
    block, length = shape.block, batch.length + added.prefix
    tokens = batch.rows * length
    per_layer = tokens * (_stream(shape, formats) + _feed_forward(shape, formats))
    per_layer += _attention(shape, formats, batch.rows, length, length + added.keys, batch.masked)
    kept = (shape.layers - added.untouched) * per_layer - tokens * _unneeded(shape, added, formats)
    kept += tokens * (_inputs(shape, added, formats) + added.per_token * formats.compute)
    kept += added.weights * formats.compute + tokens * shape.hidden * _FP32  # the last normalization
    return Pass(
        layers=shape.layers,
        kept=kept,
        inputs=shape.layers * tokens * shape.hidden * formats.stream,
        again=_BACKWARD * tokens * block.feed_forward * formats.stream,
        logits=_logits(shape, formats, tokens, liger),
    )


def _stream(shape: Shape, formats: Formats) -> int:
    """Bytes a token of a layer's normalizations: RMSNorm computes on a copy in fp32."""
    block = shape.block
    width = _FP32 if block.rms or formats.autocast else formats.stream
    masks = block.thinned * (1 if formats.on_gpu else formats.stream)
    return block.norm_width * width + 2 * _FP32 + masks


def _feed_forward(shape: Shape, formats: Formats) -> int:
    block = shape.block
    routed = 2 * block.experts * shape.hidden  # each expert's input and output, as its weight is multiplied in
    return (block.feed_forward_kept * block.feed_forward + routed) * formats.stream


def _attention(shape: Shape, formats: Formats, rows: int, length: int, keys: int, masked: bool) -> int:
    """Bytes of one layer; keys and values are repeated for each head unless the kernel shares them."""
    block, tokens = shape.block, rows * length
    flash = formats.attention is Attention.flash_attention_2
    eager = _eager(shape, formats)
    grouped = block.kv_width < block.query_width
    repeated = grouped and (eager or (masked and not flash))
    kv = block.query_width if repeated else block.kv_width
    total = (tokens * block.query_width + 2 * rows * keys * kv) * formats.compute
    if block.fused and not repeated:  # values are a part of what one layer gave, and keep the whole
        total += tokens * (block.query_width + block.kv_width) * formats.compute
    if eager:
        copies = _FP32 + (_BF16 if formats.compute == _BF16 else 0)  # softmax is in fp32
        copies += formats.compute if block.softcap else 0
        copies += (1 if formats.on_gpu else formats.compute) + formats.compute if block.dropout else 0  # mask, product
        return total + rows * block.heads * length * keys * copies
    total += tokens * (block.query_width * formats.compute + block.heads * _FP32)
    if masked and not flash:
        total += rows * length * keys * formats.compute  # the mask, made a number in each layer
    return total


def _eager(shape: Shape, formats: Formats) -> bool:
    """Whether the matrix of attention's weights is made."""
    asked = formats.attention
    block = shape.block
    alone = block.softcap or block.eager or (block.dropout and not formats.on_gpu)  # the CPU's kernel has no dropout
    return asked is Attention.eager or (alone and asked is not Attention.flash_attention_2)


def _inputs(shape: Shape, added: Added, formats: Formats) -> int:
    """Bytes a token of the inputs kept for weights that train, and of dropout's masks."""
    width = formats.compute
    if added.dropout or formats.stream != formats.compute:  # each layer rounds or thins its own
        kept = sum(linear.d_in for linear in added.inputs)
    else:
        sources = {linear.source: linear.d_in for linear in added.inputs}
        eager = _eager(shape, formats)
        # what attention gives, it keeps itself
        kept = sum(d for source, d in sources.items() if eager or not _is_attention_output(source))
    masks = 0
    if added.dropout:
        unneeded = None if added.from_start else shape.linears[0].source
        masked = sum(linear.d_in for linear in added.inputs if linear.source != unneeded)
        masks = masked * (1 if formats.on_gpu else formats.trained)
    return kept * width + masks


def _is_attention_output(source: str) -> bool:
    return source.endswith("inside") and "att" in source


def _unneeded(shape: Shape, added: Added, formats: Formats) -> int:
    """Bytes a token: the first layer's input needs no gradient where nothing before it trains."""
    return 0 if added.from_start else shape.hidden * (_FP32 if shape.block.rms else formats.stream) + _FP32


def _logits(shape: Shape, formats: Formats, tokens: int, liger: bool) -> int:
    picked = 2 * tokens * shape.hidden * formats.compute  # hidden states, at most of all tokens, and their gradient
    if not liger:
        rounded = formats.compute if formats.compute < _FP32 else 0
        each = _LOSS + rounded + (_FP32 if shape.softcap else 0)
        return picked + min(tokens, max(1, LOGITS // shape.vocab)) * shape.vocab * each
    # Liger's loss goes over as many tokens at once as make the logits no larger than the hidden states
    chunk = -(-tokens // max(1, -(-shape.vocab // shape.hidden)))
    return picked // 2 + chunk * shape.vocab * (_FP32 + formats.compute)
