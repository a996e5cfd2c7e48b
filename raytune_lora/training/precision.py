"""Mixed precision, the same without DeepSpeed and under each of its stages: what trains is in fp32, arithmetic is not.

What is frozen is in the run's precision. Autocast computes in it, and rounds what trains for each product: AdamW steps
fp32 weights by fp32 gradients, which add up, over micro batches and workers, in fp32 (Micikevicius et al. 2018,
arXiv:1710.03740). DeepSpeed's own bf16 mode, which rounds the weights of some stages and not of others, is off.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from raytune_lora.errors import UserError
from raytune_lora.training.state import trained


def hold_in_fp32(model: Any) -> None:
    """Have what trains in fp32, before an optimizer or DeepSpeed's engine sees it.

    Where the bias of a normalization trains, so is its weight: kernels on the CPU take both in one format.

    Raises:
        UserError: DeepSpeed has put it on a disk already.
    """
    for name, parameter in trained(model):
        _put_in_fp32(name, parameter)
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if any(p.requires_grad for p in parameters) and all(len(_shape(p)) == 1 for p in parameters):
            for parameter in parameters:
                _put_in_fp32(name, parameter)


def _shape(parameter: Any) -> Any:
    """Of a parameter, also where ZeRO-3 has divided it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _put_in_fp32(name: str, parameter: Any) -> None:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return
    parameter.data = parameter.data.float()
    if hasattr(parameter, "ds_id"):  # what is above has no elements: its parts are with the workers
        part = parameter.ds_tensor
        if not part.numel():
            raise UserError(
                f"deepspeed.offload_weights=nvme keeps weights in the model's precision, and {name} is to train in "
                "fp32; take deepspeed.offload_weights=cpu, or a method that adds what it trains (method=lora)"
            )
        part.data = part.data.float()


def compute_in(model: Any, dtype: torch.dtype, *, on_gpu: bool) -> None:
    """Have each forward pass of a model compute in a precision, whoever calls it; in fp32 it is left alone.

    PEFT's layers take their inputs as they come, where they would make an fp32 copy of each, only to have autocast
    round it again. Not DoRA's: it takes the norm of a weight in the format of its input.

    Args:
        model: its trained parameters in fp32.
        dtype: of the arithmetic.
        on_gpu: whether it is on this process's GPU.
    """
    if dtype is torch.float32:
        return
    forward, device = model.forward, "cuda" if on_gpu else "cpu"

    @functools.wraps(forward)
    def autocast(*inputs: Any, **settings: Any) -> Any:
        # no cache: each weight is used once, and ZeRO-3 would have rounded copies of all of them stay
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            return forward(*inputs, **settings)

    model.forward = autocast
    for layer in model.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = len(getattr(layer, "lora_magnitude_vector", ())) > 0
