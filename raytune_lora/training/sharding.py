"""A base model under ZeRO-3, of which no worker ever holds the whole: loaded, and measured without being trained.

Left to themselves, transformers loads a quantized model whole on every worker and DeepSpeed divides it when its engine
starts; of one that is not quantized, it reads all weights into each worker before it hands them out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from raytune_lora.config.schema import RunConfig
from raytune_lora.models.loading import load_model
from raytune_lora.training.deepspeed import inference_config, release, share_among, start_afresh, without_mlflow
from raytune_lora.training.resident import base_model, let_go
from raytune_lora.training.warmup import build_shared_memory_op, prepare_builds

_DONTNEED = 4  # of madvise(2)
_LARGE = 2**20  # bytes of a parameter after which memory is given back


def divides(cfg: RunConfig) -> bool:
    """Whether the base model lies in parts on the workers: under ZeRO-3."""
    return cfg.deepspeed.enabled and cfg.deepspeed.stage == 3


def join_group(cfg: RunConfig) -> None:
    """Tell accelerate of the process group that is there already.

    Left to itself, on CPU it sees one process wherever it is told of DeepSpeed, and each worker trains on all the data.
    """
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(cfg.deepspeed.enabled).lower()
    if cfg.gpus_per_worker:
        prepare_builds()  # what is on disk is read and written by an op
        PartialState()
    elif cfg.deepspeed.enabled:
        build_shared_memory_op()
        PartialState(backend="gloo")
    else:
        PartialState(cpu=True)


@contextlib.contextmanager
def measured_model(
    cfg: RunConfig, folder: Path, adapt: Callable[[Any], Any] = lambda base: base
) -> Iterator[tuple[Any, Callable[[], None] | None]]:
    """A base model as training has it, divided or whole, to be measured and not trained.

    Args:
        cfg: the run.
        folder: of the model.
        adapt: gives the base model an adapter; of one that is divided, on all workers at once.

    Yields:
        The model, and of a divided one what all workers call after a forward pass that failed on all of them, so that
        the next one starts afresh. A divided one's forward passes are made by all workers at once, equally often.
    """
    on_gpu = cfg.gpus_per_worker > 0
    if not divides(cfg):
        model = adapt(base_model(cfg, folder))
        yield model.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else model, None
        return
    join_group(cfg)
    hf_config = HfDeepSpeedConfig(inference_config(cfg))  # known while it is held
    base = divided_base(cfg, folder, hf_config)
    with divided_loading(hf_config) if cfg.method.kind == "full" else contextlib.nullcontext():  # a model of its own
        model = adapt(base)
    with without_mlflow():
        import deepspeed

    # not PEFT's model around it: generate() calls the base model alone
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    engine = deepspeed.initialize(model=base, config=hf_config.config)[0]
    try:
        yield model, partial(start_afresh, engine)
    finally:
        release(engine)


def divided_base(cfg: RunConfig, folder: Path, hf_config: Any) -> Any:
    """The base model of a run under ZeRO-3, a part of it on each worker.

    Args:
        cfg: of the run.
        folder: of the model.
        hf_config: as for ``divided_loading``.
    """
    let_go()
    on_gpu = cfg.gpus_per_worker > 0
    with divided_loading(hf_config):
        model = load_model(folder, cfg.model, cfg.quantization, on_gpu=on_gpu, mapped=True)
    for module in model.modules() if on_gpu else ():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(torch.cuda.current_device())
    return model


@contextlib.contextmanager
def divided_loading(hf_config: Any) -> Iterator[None]:
    """Divide each parameter among the workers as soon as it is there, quantized if it is to be; for ZeRO-3.

    All workers load the same weights, one after the other, and keep their parts of them. Of a weight that lies in its
    file as it is used, and is not quantized, a worker reads no more than its part: the file is mapped.

    Args:
        hf_config: transformers' view of DeepSpeed's config, as ``TrainingArguments`` makes it.
    """
    from transformers import core_model_loading
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    with without_mlflow():
        from deepspeed.runtime.zero.partition_parameters import Init

    among = hf_config.config["zero_optimization"].get("zero_hpz_partition_size", 1)
    init = Init(config_dict_or_path=hf_config.config, zero_param_parallel_group=share_among(among))
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
        parameter.data = parameter.data.to(init.local_device)  # it is empty, and tells where the model computes
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
