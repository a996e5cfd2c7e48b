"""What one worker of a group does. It knows nothing of Ray: the driver hands it where it stands and how to report."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from raytune_lora.artifacts import fingerprint
from raytune_lora.cache import Cache
from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import Optimizer, Quantization, RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import MovedError
from raytune_lora.models.loading import precision
from raytune_lora.models.methods import Start, method_for
from raytune_lora.models.sources import materialize
from raytune_lora.models.tokenizer import load_tokenizer
from raytune_lora.training.batches import Tokens, collate
from raytune_lora.training.checkpoint import Checkpoint, bring_latest, latest, reports
from raytune_lora.training.deepspeed import deepspeed_config, release
from raytune_lora.training.place import SAVING, Place
from raytune_lora.training.plan import Plan, plan_run, stream
from raytune_lora.training.precision import compute_in, hold_in_fp32
from raytune_lora.training.resident import base_model, kept_bytes, let_go, put_back
from raytune_lora.training.schedule import warmup_steps
from raytune_lora.training.sharding import divided_base, divides, join_group
from raytune_lora.training.signs import Signs
from raytune_lora.training.state import put_weights, trained
from raytune_lora.training.tracking.watch import AfterSave, watchers
from raytune_lora.training.trainer import PlannedTrainer, Reporter

_OPTIMIZERS = {  # as transformers calls them
    Optimizer.adamw: "adamw_torch",
    Optimizer.adamw_8bit: "adamw_8bit",
    Optimizer.paged_adamw_8bit: "paged_adamw_8bit",
}


def train(cfg: RunConfig, store: TokenStore, place: Place, until: int | None = None) -> None:
    """Train one configuration on the store, reporting at each validation.

    Args:
        cfg: the run.
        store: the data.
        place: of this worker.
        until: samples from which on the first validation ends this sitting; None: train to the end.

    Raises:
        DivergedError: the loss or the gradient is no longer a number; on every worker at the same step.
        MovedError: it was asked to leave its workers, and is saved; likewise.
        QuotaError: its checkpoints take more room than the config gives it; likewise.
        RuntimeError: the worker group is not what the config says.
    """
    plan = replace(plan_run(cfg, store.rows["train"], store.lengths("train")), until=until)
    with (signs := Signs(place.lives)).preparing():
        found = _prepared(cfg, plan, store, place)
    if found is None:
        return
    trainer, watching, reporter = found
    assert trainer.model is not None
    hook = trainer.model.register_forward_pre_hook(signs.forward)  # of validations, too
    try:
        trainer.train()
        reporter.delivery.settle()
    finally:
        hook.remove()
        trainer.batches.close()
        reporter.delivery.close()
        for watcher in watching:
            watcher.close()
        _release(trainer)
        if place.rank == 0:
            shutil.rmtree(place.folder / SAVING, ignore_errors=True)
    if reporter.left:
        raise MovedError(f"saved at step {trainer.state.global_step} to go on elsewhere")


def _prepared(
    cfg: RunConfig, plan: Plan, store: TokenStore, place: Place
) -> tuple[PlannedTrainer, list[Any], Reporter] | None:
    """All that is needed to train on; None where that was done before."""
    join_group(cfg)
    _same_everywhere(cfg, place)
    checkpoint = _agreed_checkpoint(place)
    for known in reports(place.copy, checkpoint) if checkpoint is not None and place.rank == 0 else ():
        place.report(known)  # whoever reads them may have been killed before it read this one
    if checkpoint is not None and (checkpoint.report["last"] or plan.pauses_at(checkpoint.report["samples_seen"])):
        return None
    return _trainer(cfg, plan, store, place, checkpoint)


def _trainer(
    cfg: RunConfig, plan: Plan, store: TokenStore, place: Place, checkpoint: Checkpoint | None
) -> tuple[PlannedTrainer, list[Any], Reporter]:
    """All that trains, those who watch it, and who reports."""
    folder = materialize(cfg.model, Cache.of(cfg.cache, cfg.cluster.node_cache))
    tokenizer = load_tokenizer(folder, cfg.model)
    args = _arguments(cfg, plan, place.folder / SAVING)
    base = divided_base(cfg, folder, args.hf_deepspeed_config) if divides(cfg) else base_model(cfg, folder)
    on_gpu = cfg.gpus_per_worker > 0
    method = method_for(cfg.method)
    torch.manual_seed(stream(cfg.training.seed, "weights"))
    start = _start(cfg, plan, store, folder, tokenizer.pad_token_id, checkpoint)
    model = method.apply(base, start)
    hold_in_fp32(model)
    if checkpoint is not None:
        put_weights(model, checkpoint.weights)
    compute_in(model, precision(cfg.model.precision, on_gpu=on_gpu), on_gpu=on_gpu)
    if cfg.quantization.kind is not Quantization.none:
        model._hf_peft_config_loaded = True  # transformers trains on a quantized base only what PEFT has seen
    rows = store.split("train")
    watching = watchers(cfg, plan, place, rows, model)
    reporter = Reporter(cfg, plan, place, method, _facts(model, plan), checkpoint)
    trainer = PlannedTrainer(
        cfg=cfg,
        plan=plan,
        method=method,
        train=rows,
        validation=store.split("validation"),
        pad_id=tokenizer.pad_token_id,
        checkpoint=checkpoint,
        model=model,
        args=args,
        reporter=reporter,
        callbacks=[*watching, reporter, *(AfterSave(watcher) for watcher in watching)],
    )
    trainer.remove_callback(PrinterCallback)
    if (trainer.accelerator.num_processes, args.process_index) != (place.workers, place.rank):
        raise RuntimeError(
            f"accelerate sees {trainer.accelerator.num_processes} processes and rank {args.process_index}; "
            f"the group has {place.workers} workers and this is rank {place.rank}"
        )
    return trainer, watching, reporter


def _same_everywhere(cfg: RunConfig, place: Place) -> None:
    """See that all workers of the group train the same trial.

    Raises:
        RuntimeError: they do not.
    """
    if place.workers == 1:
        return
    mine = fingerprint(to_plain(cfg))
    theirs = [""] * place.workers
    torch.distributed.all_gather_object(theirs, mine)
    if set(theirs) != {mine}:
        raise RuntimeError(f"the workers of a group were given different trials: {theirs}; this is rank {place.rank}")


def _agreed_checkpoint(place: Place) -> Checkpoint | None:
    """The checkpoint to go on from; the first worker looks for it, so that all of them take the same one."""
    checkpoint = None
    if place.rank == 0:
        bring_latest(place.copy)
        checkpoint = latest(place.folder)
    if place.workers == 1:
        return checkpoint
    found: list[Any] = [checkpoint]
    torch.distributed.broadcast_object_list(found, src=0)
    first: Checkpoint | None = found[0]
    return first if first is None or place.uri is None else first.at(place.copy.bring_whole(first.path.name))


def _start(
    cfg: RunConfig, plan: Plan, store: TokenStore, folder: Path, pad_id: int, checkpoint: Checkpoint | None
) -> Start:
    def samples(count: int) -> Iterator[dict[str, Any]]:
        """The run's first samples, the same on every worker."""
        rows = Tokens(store.split("train"))
        for first in range(0, min(count, plan.total), plan.micro_batch):
            chosen = range(first, min(first + plan.micro_batch, count, plan.total))
            yield collate([rows[int(row)] for row in plan.rows_at(chosen.start, chosen.stop)], pad_id)

    return Start(plan.steps, folder, samples, checkpoint.extra() if checkpoint else None)


def _release(trainer: PlannedTrainer) -> None:
    """Let go of the model in a worker that lives on."""
    if trainer.is_deepspeed_enabled:
        release(trainer.model_wrapped)
    trainer.accelerator.free_memory()


def set_up(threads: int) -> None:
    """Make a worker ready for a task; it never gets more threads than the machine has cores."""
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    transformers_logging.disable_progress_bar()


def clean_up(*, failed: bool = False) -> None:
    """Leave nothing of a task behind in a worker that lives on, but the base model as it was loaded.

    Args:
        failed: whether the task did not end well; then the base model goes, too.
    """
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    let_go() if failed else put_back()
    _collect_garbage()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _collect_garbage() -> None:
    """Collect, and after the first task leave what stays (libraries, above all) out of later collections.

    With transformers, PEFT and DeepSpeed loaded a full collection takes half a second, and a trial asks for three.
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()


@dataclass(frozen=True)
class Held:
    """What a process holds beside the base model that it keeps, in bytes."""

    own: int  # of GPU memory, by torch's count; resident memory where it uses no GPU
    beside: int = 0  # of its GPU's memory, what is not torch's: CUDA's context, libraries, pages of an optimizer
    on_gpu: bool = False


def held() -> Held:
    """What this process holds, and what else lies on its GPU, by whomever."""
    if not torch.cuda.is_initialized():
        return Held(psutil.Process().memory_info().rss - kept_bytes())
    free, total = torch.cuda.mem_get_info()
    return Held(torch.cuda.memory_allocated() - kept_bytes(), total - free - torch.cuda.memory_reserved(), True)


def _arguments(cfg: RunConfig, plan: Plan, saving: Path) -> TrainingArguments:
    training = cfg.training
    return TrainingArguments(
        output_dir=str(saving),
        deepspeed=deepspeed_config(cfg, plan),
        accelerator_config={"use_configured_state": True},
        use_cpu=cfg.gpus_per_worker == 0 and not cfg.deepspeed.enabled,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        optim=_OPTIMIZERS[training.optimizer],
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=warmup_steps(training.warmup, plan.steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        use_liger_kernel=training.liger,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=stream(training.seed, "trainer"),
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=cfg.gpus_per_worker > 0,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # there are none, and looking for them takes a pass over the graph a step
    )


def _facts(model: Any, plan: Plan) -> dict[str, int]:
    """What every report says: how many parameters train, a partitioned one counted whole, and the micro batch."""
    count = sum(getattr(p, "ds_numel", p.numel()) for _, p in trained(model))
    return {"trainable_parameters": count, "micro_batch": plan.micro_batch}
