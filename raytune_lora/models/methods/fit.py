"""Whether a method fits the rest of a run: known before anything starts."""

from __future__ import annotations

import copy

from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import Offload, Quantization, QuantizationConfig, RunConfig
from raytune_lora.models.methods import method_for
from raytune_lora.models.methods.lora_options import quantized_problems
from raytune_lora.models.methods.peft_method import anywhere, few
from raytune_lora.planning.memory import GB, plan_memory
from raytune_lora.planning.shape import Shape

# what transformers has it quantize
_QUANTIZABLE = (
    "torch.nn.Linear and Conv1D alone, neither subclasses of them nor layers that share weights or whose weights the "
    "model's code reads itself"
)
_SAID_FROM = 0.01  # of the parameters: what stays unquantized below that is of no account


def problems(cfg: RunConfig) -> list[str]:
    """Why the method cannot work with the quantization and the ZeRO stage asked for; empty where it can."""
    method, kind = method_for(cfg.method), cfg.method.kind
    found = []
    if cfg.quantization.kind not in method.bases:
        able = ", ".join(sorted(base.value for base in method.bases))
        found.append(
            f"method={kind} does not work on quantization={cfg.quantization.kind.value} (it does on {able}): "
            f"{method.because}"
        )
    if cfg.deepspeed.enabled and method.needs_deepspeed_off:
        found.append(f"method={kind} does not work with DeepSpeed: {method.because}; set deepspeed=off")
    if cfg.deepspeed.enabled and cfg.deepspeed.stage not in method.stages:
        able = ", ".join(f"zero{stage}" for stage in sorted(method.stages))
        found.append(
            f"method={kind} does not work with deepspeed=zero{cfg.deepspeed.stage} (it does with {able}, off): "
            f"{method.because}"
        )
    elif cfg.deepspeed.enabled and cfg.deepspeed.stage == 3 and cfg.quantization.kind in method.apart[0]:
        found.append(
            f"method={kind} does not work with deepspeed=zero3 on quantization={cfg.quantization.kind.value}: "
            f"{method.apart[1]}; take deepspeed=zero2"
        )
    if getattr(cfg.method, "experts", False) and cfg.deepspeed.enabled and cfg.deepspeed.stage == 3:
        found.append(
            "method.experts=true does not work with deepspeed=zero3: PEFT adds to the experts' weights as they lie in "
            "the model, and ZeRO-3 has divided them among the workers; take deepspeed=zero2"
        )
    if cfg.training.packing and not method.packable:
        found.append(
            f"method={kind} does not work with training.packing=true: what it puts before a row would stand before the "
            "first row alone"
        )
    if kind == "prefix_tuning" and cfg.training.gradient_checkpointing:
        found.append(
            "method=prefix_tuning does not work with training.gradient_checkpointing=true: its keys and values are "
            "handed over in the cache that gradient checkpointing has to leave out"
        )
    return found


def model_problems(cfg: RunConfig, shape: Shape) -> list[str]:
    """Why the method does not fit the model; empty where it does."""
    found = method_for(cfg.method).problems(shape)
    quantizing = cfg.quantization.kind is not Quantization.none
    if quantizing and not any(linear.quantized for linear in shape.linears):
        found.append(
            f"quantization={cfg.quantization.kind.value} would quantize nothing of this model: bitsandbytes takes "
            f"{_QUANTIZABLE}, and it has none of these; set quantization=none"
        )
    if cfg.training.gradient_checkpointing and not shape.checkpointable:
        found.append(
            "training.gradient_checkpointing=true: this model's code has none; set it to false, with a smaller "
            "training.micro_batch or data.max_length where memory is short"
        )
    if shape.rescaled and cfg.deepspeed.enabled and cfg.deepspeed.stage == 3:
        found.append(
            "deepspeed=zero3 does not work with this model: its code divides weights for the evaluation, and ZeRO-3 "
            "has divided them among the workers, so that nothing would be measured right; take deepspeed=zero2"
        )
    if isinstance(cfg.method, LoraMethodConfig) and quantizing:
        found += quantized_problems(cfg.method, shape)
    if cfg.method.kind == "full" and shape.unmet and cfg.deepspeed.enabled and cfg.deepspeed.stage == 3:
        found.append(
            f"method=full does not work with deepspeed=zero3 on this model: {shape.unmet:,} of its parameters do not "
            "train (text does not pass through them), and ZeRO-3 has divided them among the workers, so that no whole "
            "model could be saved; take deepspeed=zero2"
        )
    return found


def _unquantized(shape: Shape) -> list[str]:
    """The weights of products that stay as they are in a quantized model; the head always does."""
    layers = [x for x in shape.linears if not x.quantized and not x.tied and x.name != shape.head]
    found = {"the weights of experts": sum(experts.numel for experts in shape.experts)}
    found |= {few(dict.fromkeys(anywhere(x.name) for x in layers)): sum(x.numel for x in layers)}
    known = {what: count for what, count in found.items() if count >= _SAID_FROM * shape.parameters}
    return [f"{what}, {count:,} of {shape.parameters:,} parameters," for what, count in known.items()]


def _weights(cfg: RunConfig, quantization: QuantizationConfig, shape: Shape) -> float:
    """GB of the base model; PEFT keeps in fp32 what is not quantized of a quantized one."""
    changed = copy.deepcopy(cfg)
    changed.quantization, changed.deepspeed.offload_weights = quantization, Offload.none
    plan = plan_memory(changed, shape, method_for(cfg.method).added(shape), 1)
    return (plan.weights + plan.embeddings) / GB


def notes(cfg: RunConfig, shape: Shape) -> list[str]:
    """What people should know of how the method and the memory plan take the model."""
    left = method_for(cfg.method).left_out(shape)
    found = [f"method={cfg.method.kind} leaves out {'; '.join(left)}"] if left else []
    if cfg.quantization.kind is not Quantization.none and (whole := _unquantized(shape)):
        found.append(
            f"quantization={cfg.quantization.kind.value} leaves {' and '.join(whole)} unquantized: bitsandbytes "
            f"takes {_QUANTIZABLE}; a worker's weights then take {_weights(cfg, cfg.quantization, shape):.3g} GB, and "
            f"{_weights(cfg, QuantizationConfig(), shape):.3g} GB with quantization=none"
        )
    if shape.approximate:
        found.append("the planned memory is approximate: some layers of this model do not attend")
    return found
