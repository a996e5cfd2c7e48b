"""Whether a method fits the rest of a run: known before anything starts."""

from __future__ import annotations

from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import Quantization, RunConfig
from raytune_lora.models.methods import method_for
from raytune_lora.models.methods.lora_options import quantized_problems
from raytune_lora.planning.shape import Shape


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
    if isinstance(cfg.method, LoraMethodConfig) and cfg.quantization.kind is not Quantization.none:
        found += quantized_problems(cfg.method, shape)
    if cfg.method.kind == "full" and shape.unmet and cfg.deepspeed.enabled and cfg.deepspeed.stage == 3:
        found.append(
            f"method=full does not work with deepspeed=zero3 on this model: {shape.unmet:,} of its parameters do not "
            "train (text does not pass through them), and ZeRO-3 has divided them among the workers, so that no whole "
            "model could be saved; take deepspeed=zero2"
        )
    return found


def notes(cfg: RunConfig, shape: Shape) -> list[str]:
    """What people should know of how the method and the memory plan take the model."""
    left, experts = method_for(cfg.method).left_out(shape), sum(e.numel for e in shape.experts)
    found = [f"method={cfg.method.kind} leaves out {'; '.join(left)}"] if left else []
    if experts and cfg.quantization.kind is not Quantization.none:
        found.append(
            f"quantization={cfg.quantization.kind.value} leaves the weights of experts, {experts:,} parameters, "
            "unquantized: bitsandbytes quantizes linear layers alone"
        )
    if shape.approximate:
        found.append("the planned memory is approximate: some layers of this model do not attend")
    return found
