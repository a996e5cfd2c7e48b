"""Base models from their folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune_lora.config.schema import Attention, ModelConfig, Precision, Quantization, QuantizationConfig
from raytune_lora.models.tokenizer import trusted

_SLICE = 2**20  # weights quantized at once; a multiple of every block size, so that the result is the same


def load_model(
    folder: Path, cfg: ModelConfig, quantization: QuantizationConfig, *, where_it_computes: bool = False
) -> Any:
    """The base model in evaluation mode, all its weights frozen, in the precision and number format asked for.

    Args:
        folder: of the model.
        cfg: its precision and attention.
        quantization: its number format.
        where_it_computes: load each weight onto the GPU, if there is one; a quantized model always is.
    """
    settings: dict[str, Any] = {}
    if cfg.attention is not Attention.auto:
        settings["attn_implementation"] = cfg.attention.value
    quantized = quantization.kind is not Quantization.none
    if quantized:
        settings["quantization_config"] = _bitsandbytes(quantization, precision(cfg.precision))
    if (quantized or where_it_computes) and torch.cuda.is_available():  # weights are quantized where they go
        settings["device_map"] = {"": torch.cuda.current_device()}
    with _quantizing_in_slices() if quantized else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=precision(cfg.precision), trust_remote_code=trusted(cfg), use_safetensors=True, **settings
        )
    if quantized:
        _stay_trainable(model)
    model.config.use_cache = False
    divided = any(hasattr(p, "ds_id") for p in model.parameters())  # DeepSpeed's engine decides their precision
    if quantized and not divided:
        from peft import prepare_model_for_kbit_training

        # gradient checkpointing is the Trainer's
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model.requires_grad_(False).eval()


def precision(asked: Precision) -> torch.dtype:
    """The dtype of weights and arithmetic on this machine."""
    if asked is Precision.auto:
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[asked]


@contextlib.contextmanager
def _quantizing_in_slices() -> Iterator[None]:
    """Have bitsandbytes quantize a weight on the CPU a slice at a time: all at once takes ten times the weight."""
    import bitsandbytes  # noqa: F401  # it registers the operator

    operator: Any = torch.ops.bitsandbytes.quantize_4bit
    original = operator.default

    def in_slices(weight: torch.Tensor, *how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.is_cuda or weight.numel() <= _SLICE:
            quantized, scales = original(weight, *how)
            return quantized, scales
        parts = [original(part, *how) for part in weight.reshape(-1).split(_SLICE)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    operator.default = in_slices
    try:
        yield
    finally:
        operator.default = original


def _stay_trainable(model: Any) -> None:
    """Keep 4-bit layers from changing for good at the first forward pass in evaluation mode.

    On CPUs with AVX512-BF16, bitsandbytes then packs the weights for a kernel that computes in bf16 and has no
    gradient: after the first validation, the training would go on without that of all but the last layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _bitsandbytes(cfg: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if cfg.kind is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=cfg.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=cfg.kind.value,
        bnb_4bit_use_double_quant=cfg.double,
        bnb_4bit_compute_dtype=dtype if cfg.compute is Precision.auto else precision(cfg.compute),
        bnb_4bit_quant_storage=dtype,  # ZeRO-3 gathers the weights as the model's dtype
    )
