"""The memory of one worker, by part, from the config and the model's shape alone.

What is counted is what lies in the GPU's memory at the worst moment of a step, on the CPU in the process's. The parts
that do not depend on the data (weights, gradients, the optimizer's states) are exact; activations come from
``activations``; what the libraries take beside it are the constants below, as measured or as the code says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from raytune_lora.config.schema import Offload, Optimizer, Precision, Quantization, RunConfig
from raytune_lora.planning.activations import Batch, Formats, Pass, passes
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Linear, Shape

GB = 10**9

ZERO_BUCKET = 50_000_000  # elements that ZeRO sends at once
_FP32, _BF16 = 4, 2  # bytes
_BLOCK, _NESTED = 64, 256  # bitsandbytes: weights a scale, scales a scale of scales
_TABLE, _NESTED_TABLE = 16 * _FP32, 256 * _FP32 + _FP32  # bytes a layer: its code; that of the scales, and their offset
_EIGHT_BIT_BLOCK = 256  # weights that share a scale in an 8-bit optimizer state
_CONTEXT = 600_000_000  # bytes: CUDA's context, its kernels, cuBLAS's workspaces
_NCCL = 300_000_000  # bytes: its channels between workers
_PROCESS = 550_000_000  # bytes of a process on the CPU that has imported torch, transformers, PEFT and DeepSpeed
_LOST = 0.05  # share of what comes and goes within a step that the allocator cannot use


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker."""

    weights: int  # of the base model's linear layers, quantized where they are
    embeddings: int  # and all else of the base model: the head, norms, biases, experts in one parameter
    adapter: int  # what the method adds, trained or fixed
    gradients: int
    optimizer: int  # its states, and the weights it keeps in fp32
    activations: int  # kept from the forward pass for the backward pass
    logits: int  # and their loss; with gradient checkpointing, as far as they exceed the layer computed again
    working: int  # weights unpacked or gathered for their turn, and what waits to be sent
    runtime: int  # constants: CUDA, the libraries, what the allocator loses
    host: int = 0  # what is offloaded: it lies in the machine's memory or on its disk, and is not part of the total

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")

    @property
    def gb(self) -> float:
        """The total in GB of 10^9 bytes."""
        return self.total / GB

    def table(self) -> str:
        """One line a part, in GB, the total last."""
        rows = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "host"]
        return "\n".join(f"  {name:12} {size / GB:9.3f} GB" for name, size in [*rows, ("total", self.total)])


def plan_memory(cfg: RunConfig, shape: Shape, added: Added, length: int) -> Memory:
    """The memory of each worker of a run.

    Args:
        cfg: the run.
        shape: of its base model.
        added: what its method adds.
        length: tokens of the longest row.
    """
    formats, workers = formats_of(cfg, added), cfg.workers
    stage = cfg.deepspeed.stage if cfg.deepspeed.enabled else 0
    layers = [linear for linear in shape.linears if not linear.tied and (linear.name != shape.head or linear.quantized)]
    frozen_rest = shape.parameters - sum(linear.numel for linear in layers)
    weights = sum(stored(linear, cfg, formats.rest) for linear in layers)
    embeddings = frozen_rest * formats.rest
    if added.own:  # they are the adapter
        weights = 0 if added.trained == shape.parameters else weights
        embeddings = 0 if not weights else embeddings - added.trained * formats.rest
    divided = workers if stage == 3 else 1
    again = 1 / cfg.deepspeed.hpz if stage == 3 and cfg.deepspeed.hpz > 1 else 0.0  # a second time, within a node
    weights, embeddings = (math.ceil(size / divided + size * again) for size in (weights, embeddings))
    adapter = -(-added.trained // (divided if added.own else 1)) * formats.trained + added.fixed * formats.fixed
    state = _training_state(cfg, added.trained, formats, stage)
    one = passes(shape, added, formats, Batch.of(cfg, length), liger=cfg.training.liger)
    working = _working(cfg, layers, formats, stage, added, shape)
    activations, logits = _peak(one, cfg.training.gradient_checkpointing)
    free = activations + logits + working
    host = 0
    if stage == 3 and cfg.deepspeed.offload_weights is not Offload.none and cfg.gpus_per_worker:
        host, weights, embeddings = weights + embeddings, 0, 0
    if cfg.deepspeed.offload_optimizer is not Offload.none and stage and cfg.gpus_per_worker:
        host, state = host + state.optimizer + state.gradients, _State(0, 0, 0)
    return Memory(
        weights=weights,
        embeddings=embeddings,
        adapter=adapter,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=activations,
        logits=logits,
        working=working + max(0, state.step - free),
        runtime=_runtime(cfg, free),
        host=host,
    )


def plan_measuring(cfg: RunConfig, shape: Shape, added: Added, length: int) -> Memory:
    """The memory of each worker while the base model or an adapter answers prompts, as after the baseline's loss.

    The loss itself takes no more than in training. What answers keep is keys and values of each token, and what one
    layer computes of all prompts at once.

    Args:
        cfg: as for ``plan_memory``.
        shape: likewise.
        added: likewise.
        length: tokens of the longest row, of which a prompt is a part.
    """
    training, formats, block = plan_memory(cfg, shape, added, length), formats_of(cfg, added), shape.block
    rows = min(cfg.evaluation.generate_batch, cfg.evaluation.generate_rows)
    prompts = rows * (length + added.prefix + added.keys)
    tokens = prompts + rows * cfg.evaluation.max_new_tokens
    kept = 2 * tokens * shape.layers * block.kv_width * formats.compute
    once = prompts * (4 * shape.hidden + 3 * block.feed_forward) * formats.stream
    return replace(training, gradients=0, optimizer=0, activations=kept + once, logits=rows * shape.vocab * _FP32)


def stored(linear: Linear, cfg: RunConfig, width: int) -> int:
    """Bytes of a frozen layer's weight, ``width`` an element where not quantized, with what quantization keeps beside.

    4 bits: a scale in fp32 for 64 weights; doubly quantized, in 8 bits, with one in fp32 for 256 of them (QLoRA,
    arXiv:2305.14314, section 3). 8 bits: a scale in fp32 for each output (LLM.int8(), arXiv:2208.07339).
    """
    count, kind = linear.numel, cfg.quantization.kind
    if kind is Quantization.none or not linear.quantized:
        return count * width
    if kind is Quantization.int8:
        return count + linear.d_out * _FP32
    scales = -(-count // _BLOCK)
    if not cfg.quantization.double:
        return count // 2 + scales * _FP32 + _TABLE
    return count // 2 + scales + -(-scales // _NESTED) * _FP32 + _TABLE + _NESTED_TABLE


@dataclass(frozen=True)
class _State:
    gradients: int
    optimizer: int
    step: int  # at the optimizer's step, when activations are gone


def _training_state(cfg: RunConfig, count: int, formats: Formats, stage: int) -> _State:
    """Gradients and states; ZeRO divides the states from stage 1 on, the gradients from 2 on (arXiv:1910.02054)."""
    width = formats.trained
    if not cfg.deepspeed.enabled:
        copies = 2 if cfg.workers > 1 else 1  # DistributedDataParallel's buckets hold them once more
        if cfg.training.optimizer is not Optimizer.adamw:
            return _State(copies * count * width, 2 * (count + -(-count // _EIGHT_BIT_BLOCK) * _FP32), 0)
        return _State(copies * count * width, 2 * count * width, count * width)
    part = -(-count // (cfg.workers if stage else 1))
    master = part * _FP32 if stage in (1, 2) else 0  # these step a copy of their own, also of fp32 parameters
    gradients = count * width if stage < 2 else part * width
    return _State(gradients, master + 2 * part * _FP32, part * _FP32)


def formats_of(cfg: RunConfig, added: Added) -> Formats:
    """Bytes of an element of each kind of tensor of a run."""
    on_gpu = cfg.gpus_per_worker > 0
    asked = cfg.model.precision
    bf16 = asked is Precision.bf16 or (asked is Precision.auto and on_gpu)
    compute = _BF16 if bf16 else _FP32
    return Formats(
        compute=compute,
        stream=_FP32 if added.own and added.from_start else compute,  # as the embedding is
        rest=compute,
        trained=_FP32,
        fixed=compute,
        autocast=bf16,
        on_gpu=on_gpu,
        attention=cfg.model.attention,
    )


def _peak(one: Pass, checkpointing: bool) -> tuple[int, int]:
    """Activations and logits at the worst moment: with checkpointing, the loss or one layer computed again."""
    if not checkpointing:
        return one.kept, one.logits
    again = one.kept // one.layers + one.again
    return one.inputs + again, max(0, one.logits - again)


def _working(cfg: RunConfig, layers: list[Linear], formats: Formats, stage: int, added: Added, shape: Shape) -> int:
    total = 0
    if cfg.quantization.kind is not Quantization.none:
        total += _largest(linear for linear in layers if linear.quantized) * formats.compute  # unpacked for its product
    if formats.autocast:  # what trains is in fp32, and rounded for its products
        at_once = shape.layers if cfg.training.gradient_checkpointing else 1
        total += -(-added.trained // at_once) * _BF16
    if stage >= 1 and added.trained:
        total += ZERO_BUCKET * formats.trained * (2 if formats.on_gpu and stage < 3 else 1)
    if stage == 3:
        total += min(ZERO_BUCKET, sum(linear.numel for linear in layers)) * formats.compute
        total += _largest(layers) * formats.compute
    return total


def _largest(layers: Iterable[Linear]) -> int:
    return max((linear.numel for linear in layers), default=0)


def _runtime(cfg: RunConfig, free: int) -> int:
    if not cfg.gpus_per_worker:
        return _PROCESS
    return _CONTEXT + (_NCCL if cfg.workers > 1 else 0) + round(_LOST * free)
