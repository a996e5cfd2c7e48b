"""The DeepSpeed configuration of a run, and the end of its engine."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from raytune_lora.config.schema import Offload, RunConfig
from raytune_lora.training.plan import Plan

_logger = logging.getLogger(__name__)
_NEVER = 10**9  # steps between DeepSpeed's own progress lines
_BUCKET = 25_000_000  # elements of gradients sent at once; DeepSpeed's default would take 4 GB of the GPU by itself
_GATHERED = 50_000_000  # elements of weights, likewise
_LIVE = 1_000_000_000  # elements kept whole for a second use


def deepspeed_config(cfg: RunConfig, plan: Plan) -> dict[str, Any] | None:
    """DeepSpeed's JSON with every key that matters spelled out; None where DeepSpeed is off.

    Its own bf16 mode is always off: it would round what trains to bf16, and accumulate gradients so, in some stages and
    not in others. What trains is in fp32, and the model computes in bf16 by itself (``precision.py``).

    Args:
        cfg: the run.
        plan: its batches.
    """
    if not cfg.deepspeed.enabled:
        return None
    return {
        # the three must agree; with packing, a forward pass has other numbers of rows, of which DeepSpeed knows nothing
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.workers,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": cfg.training.max_grad_norm,
        "bf16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # of gradients
        "zero_optimization": _zero(cfg),
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW, as without DeepSpeed, or bitsandbytes'
        "zero_force_ds_cpu_optimizer": False,  # nor need it be DeepSpeed's where it is offloaded
        "steps_per_print": _NEVER,
    }


def inference_config(cfg: RunConfig) -> dict[str, Any]:
    """The same of a run that is measured: ZeRO-3 without an optimizer, with the weights where training keeps them."""
    zero = _zero(cfg)
    zero.pop("offload_optimizer", None)
    return {
        "train_micro_batch_size_per_gpu": 1,  # it has to be named, and means nothing
        "bf16": {"enabled": False},
        "zero_optimization": zero,
        "steps_per_print": _NEVER,
    }


def _zero(cfg: RunConfig) -> dict[str, Any]:
    on_gpu, asked = cfg.gpus_per_worker > 0, cfg.deepspeed
    zero: dict[str, Any] = {"stage": asked.stage}
    if asked.stage == 0:
        return zero
    zero |= {
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _GATHERED,
    }
    if asked.stage == 3:
        zero |= {
            "zero_hpz_partition_size": asked.hpz,
            "stage3_prefetch_bucket_size": _GATHERED,
            "stage3_param_persistence_threshold": asked.persistent,
            "stage3_max_live_parameters": _LIVE,
            "stage3_max_reuse_distance": _LIVE,
            "stage3_gather_16bit_weights_on_model_save": False,  # checkpoints gather what trains by themselves
        }
    for key, where in (("offload_optimizer", asked.offload_optimizer), ("offload_param", asked.offload_weights)):
        if where is not Offload.none:
            zero[key] = {"device": where.value, "pin_memory": on_gpu}
        if where is Offload.nvme:
            zero[key]["nvme_path"] = asked.nvme_path
    return zero


def forget_steps(optimizer: Any, *_: Any) -> None:
    """Before a step of DeepSpeed's AdamW for the CPU: have it take the bias correction from the number of the step.

    Left to itself it multiplies that of the step before, and one that goes on from a checkpoint rounds otherwise.
    """
    import torch

    one, group = torch.zeros(1), optimizer.param_groups[0]
    betas, settings = group["betas"], (group["eps"], group["weight_decay"], group["bias_correction"])
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, *betas, *settings, one, one, one, one)


def offloaded_adamw() -> Any:
    """The class of AdamW that steps on the CPU: DeepSpeed's, or torch's where that one cannot be built.

    DeepSpeed's uses the widest instructions of the CPU and all its threads. All workers of the group call this.
    """
    from raytune_lora.training.warmup import build_cpu_optimizer

    reason = build_cpu_optimizer()
    if reason is not None:
        import torch

        _logger.warning(
            "deepspeed.offload_optimizer: DeepSpeed's AdamW for the CPU cannot be built here (%s); torch's takes its "
            "place, with the same numbers and several times slower",
            reason,
        )
        return torch.optim.AdamW
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam  # its default is AdamW's decay, and fp32 states


def share_among(workers: int) -> Any | None:
    """The process group of the workers that keep all weights among them a second time; None for one worker.

    DeepSpeed keeps one for as long as the process lives, whatever the next config says.

    Args:
        workers: ``zero_hpz_partition_size``.
    """
    from deepspeed import comm
    from deepspeed.utils import groups

    known = groups._get_zero_param_intra_parallel_group()
    if known is not None and comm.get_world_size(group=known) != workers:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if workers > 1 and groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(workers)
    return groups._get_zero_param_intra_parallel_group()


@contextlib.contextmanager
def without_mlflow() -> Iterator[None]:
    """Hide MLflow while DeepSpeed is imported: its autotuner would import it, which takes seconds in each worker."""
    hide = "mlflow" not in sys.modules
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's own sign for what cannot be imported
    try:
        yield
    finally:
        if hide:
            del sys.modules["mlflow"]


def start_afresh(engine: Any) -> None:
    """Forget a forward pass under ZeRO-3 that an error ended on all workers: what was gathered, and where it was."""
    from deepspeed.runtime.zero import parameter_offload

    del parameter_offload.FWD_MODULE_STACK[1:]
    engine._forward_epilogue()
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)  # an optimizer's, or alone
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload.partition_all_parameters()


def release(engine: Any) -> None:
    """Let go of an engine and its weights, in a process that lives on.

    Hooks on the parameters hold the engine until it is destroyed; ZeRO-3 also keeps the model in a global list and in
    the cache of a method.
    """
    if not hasattr(engine, "destroy"):  # training never began
        return
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        parameter_offload.FWD_MODULE_STACK.clear()
        wrapped = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        for cell in wrapped.__closure__ or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
