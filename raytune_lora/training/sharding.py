"""Loading a base model under ZeRO-3 so that no worker ever holds the whole of it, quantized or not.

Left to themselves, transformers loads a quantized model whole on every worker and DeepSpeed divides it when its engine
starts; of one that is not quantized, it reads all weights into each worker before it hands them out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raytune_lora.training.deepspeed import without_mlflow

_DONTNEED = 4  # of madvise(2)
_LARGE = 2**20  # bytes of a parameter after which memory is given back


@contextlib.contextmanager
def divided_loading(hf_config: Any) -> Iterator[None]:
    """Divide each parameter among the workers as soon as it is there, quantized if it is to be; for ZeRO-3.

    Every worker reads every weight, one after the other, and keeps its part of it. All of them must load the same.

    Args:
        hf_config: transformers' view of DeepSpeed's config, as ``TrainingArguments`` makes it.
    """
    from transformers import core_model_loading
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    with without_mlflow():
        from deepspeed.runtime.zero.partition_parameters import Init

    init = Init(config_dict_or_path=hf_config.config)
    original = core_model_loading.set_param_for_module

    def set_and_divide(model: Any, name: str, *arguments: Any) -> None:
        original(model, name, *arguments)
        module, _, leaf = name.rpartition(".")
        parameter = model.get_submodule(module)._parameters.get(leaf)
        if parameter is None or hasattr(parameter, "ds_id"):
            return
        large = parameter.nbytes >= _LARGE
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        if large:
            _give_memory_back()

    one_by_one = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    core_model_loading.set_param_for_module = set_and_divide  # type: ignore[assignment]
    unset_hf_deepspeed_config()  # or transformers would divide the parameters before they have values
    try:
        with without_warmup():
            yield
    finally:
        set_hf_deepspeed_config(hf_config)
        core_model_loading.set_param_for_module = original
        if one_by_one is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = one_by_one
        _give_memory_back()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # what training takes is told, and planned, apart


@contextlib.contextmanager
def without_warmup() -> Iterator[None]:
    """Keep transformers from taking memory for the whole model on the GPU before it loads what is to be a part."""
    from transformers import modeling_utils

    original = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = original


def _give_memory_back() -> None:
    """Forget the pages of weight files read through a map, to be read again where they are needed, and what is free."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux
        return
    libc = ctypes.CDLL(None)
    for line in maps.read_text().splitlines():
        if line.endswith(".safetensors"):
            first, _, last = line.split()[0].partition("-")
            start, end = int(first, 16), int(last, 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_DONTNEED))
    libc.malloc_trim(0)
