"""The training loop: transformers' Trainer with our order of samples, validation loss and reports.

Trainer rather than TRL's SFTTrainer: the store has tokenized and masked already, and SFTTrainer adds entropy and
accuracy over the whole vocabulary to every step.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from raytune_lora.artifacts import folder_bytes
from raytune_lora.config.schema import Offload, Optimizer, RunConfig
from raytune_lora.errors import DivergedError, QuotaError
from raytune_lora.models.methods import Method
from raytune_lora.models.packed import PackedAttention
from raytune_lora.models.shape_parts import source_of
from raytune_lora.training.batches import Batches, MicroBatch, StepBatches
from raytune_lora.training.checkpoint import Checkpoint, commit, write_parts
from raytune_lora.training.deepspeed import forget_steps, offloaded_adamw, start_afresh
from raytune_lora.training.delivery import Delivery
from raytune_lora.training.gradients import FirstGradients
from raytune_lora.training.metrics import fit_by_rows, validation_loss
from raytune_lora.training.numbers import Numbers
from raytune_lora.training.place import GO_ON, SAVE_AND_STOP, Place
from raytune_lora.training.plan import Plan, stream
from raytune_lora.training.schedule import advance, schedule
from raytune_lora.training.scoring import scoring_of
from raytune_lora.training.sharding import divides
from raytune_lora.training.state import put_optimizer, trained

_OVER_QUOTA = 3  # beside what a place can ask for
_STATE_BYTES = 16  # of a trained parameter in a checkpoint: fp32, as the adapter has it, and AdamW's two states


def _takes_common_loss(model: Any) -> bool:
    """Whether a model's loss is that of transformers' causal language models: of the next token, weighed by the batch.

    That of Bart, Pegasus or XLNet is of the token itself: what they are trained on brings labels that are shifted.
    """
    return "loss_function(" in source_of(type(unwrap_peft_model(model)).forward)


class PlannedTrainer(Trainer):
    """A Trainer that takes its samples from a plan and measures the validation loss of the whole worker group."""

    def __init__(
        self,
        *,
        cfg: RunConfig,
        plan: Plan,
        method: Method[Any],
        train: Any,
        validation: Any,
        pad_id: int,
        checkpoint: Checkpoint | None,
        reporter: Reporter,
        callbacks: list[TrainerCallback],
        **kwargs: Any,
    ) -> None:
        """
        Args:
            cfg: the run.
            plan: its batches.
            method: of the model.
            train: split of the token store.
            validation: split of the token store.
            pad_id: fills short rows.
            checkpoint: whose weights the model has, to go on from.
            reporter: asked and told after each step; one of the callbacks.
            callbacks: of ``Trainer``.
            kwargs: of ``Trainer``.
        """
        super().__init__(callbacks=callbacks, **kwargs)
        self._common_loss = self.model_accepts_loss_kwargs and _takes_common_loss(self.model)
        self.model_accepts_loss_kwargs = True  # the loss is that of ``scoring``
        self._method = method
        self._cfg = cfg
        self._plan = plan
        self._train_split = train
        self._validation_split = validation
        self._pad_id = pad_id
        self._checkpoint = checkpoint
        self._reporter = reporter
        offloads = cfg.deepspeed.offload_optimizer is not Offload.none and cfg.training.optimizer is Optimizer.adamw
        self._offloaded = offloaded_adamw() if offloads else None  # here, where it may take a minute
        self._first = checkpoint.step if checkpoint else 0  # steps done before
        rank, packing = self.args.process_index, cfg.training.packing
        settings: Any = {"first": self._first, "packing": packing, "device": self.args.device}
        self.batches = Batches(train, plan, rank, pad_id, **settings)

    def get_train_dataloader(self) -> Any:
        """This worker's part alone; accelerate must not divide it again."""
        return self.batches

    def num_examples(self, dataloader: Any) -> int:
        return self._plan.total

    def create_optimizer(self, model: Any = None) -> Any:
        """The method's own learning rates where it has some; weight decay is the same for all of them."""
        trained: Any = self.model
        cls, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
        if self._offloaded is not None:
            cls, settings = self._offloaded, {name: settings[name] for name in ("lr", "betas", "eps")}
        self.optimizer_cls_and_kwargs = cls, settings
        groups = self._method.parameter_groups(trained, self.args.learning_rate)
        if self.optimizer is None and groups is not None:
            self.optimizer = cls([group | {"weight_decay": self.args.weight_decay} for group in groups], **settings)
        optimizer = super().create_optimizer(model)
        if hasattr(optimizer, "ds_opt_adam"):
            optimizer.register_step_pre_hook(forget_steps)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Ours: no step is trained at a rate of zero."""
        if self.lr_scheduler is None:
            kind, warmup = self._cfg.training.lr_scheduler, self.args.get_warmup_steps(num_training_steps)
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = schedule(kind, optimizer, warmup=warmup, steps=num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The method's penalty has its gradient in the loss and leaves its value alone, so that losses compare."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and (penalty := self._method.penalty(self.model)) is not None:
            loss = loss + (penalty - penalty.detach()) / self._plan.accumulation
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Transformers' without what is the same at each: the mode of all modules, and work for other machines.

        The loss is scaled by the trained tokens of the whole batch: those of a forward pass are not counted.
        """
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def _micro_step(self, model: Any, batch: MicroBatch, num_items: torch.Tensor) -> Any:
        """Dropout draws by the samples' place in the run: whoever goes on from there, on any worker, draws the same."""
        seed = stream(self._cfg.training.seed, "dropout", batch.position)
        torch.default_generator.manual_seed(seed)  # ``torch.manual_seed`` notes each call's stack where there is no GPU
        if self.args.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        inputs, rows = batch.on(self.args.device)
        apart: Any = self._packed.of(rows) if rows is not None else contextlib.nullcontext({})
        with apart as given:
            return self.training_step(model, inputs | given | {"trained": batch.trained}, num_items)

    def _run_epoch(self, model: Any, epoch: Any, train_dataloader: Batches, *_: Any, **__: Any) -> None:
        """All steps of the sitting. Transformers' own does much at each forward pass, and waits for the GPU often."""
        model.train()
        parameters = [p for _, p in trained(self.model)]
        numbers = Numbers(self.args.device, self._plan.workers)
        gradients: FirstGradients | None = FirstGradients(self.model)
        asked_for = time.perf_counter()
        for batches in train_dataloader:
            data_wait = time.perf_counter() - asked_for
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            loss = self._forward_and_backward(model, batches)
            if gradients is not None:
                gradients.check(self._cfg.method.kind)
                gradients = None
            grad_norm, learning_rate = self._step(model, parameters)
            self.state.global_step += 1
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            measured = {"learning_rate": learning_rate, "data_wait": data_wait}
            numbers.put(self.state.global_step, loss, grad_norm, asked=self._reporter.ask(self.state), **measured)
            self._end_step(model, numbers)
            if self.control.should_training_stop:
                break
            asked_for = time.perf_counter()

    def _forward_and_backward(self, model: Any, batches: StepBatches) -> torch.Tensor:
        """The gradients of a step. Returns this worker's part of its loss, not yet read."""
        device, last = self.args.device, len(batches.micro) - 1
        num_items = torch.full((), float(batches.trained), device=device)
        loss = torch.zeros((), device=device)
        for number, batch in enumerate(batches.micro):
            self.accelerator.gradient_state._set_sync_gradients(number == last)
            waits = number < last and not self.is_deepspeed_enabled
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                loss += self._micro_step(model, batch, num_items)
        return loss

    def _step(self, model: Any, parameters: list[Any]) -> tuple[Any, float]:
        """The optimizer's step. Returns the gradient's norm before clipping, not yet read, and the learning rate."""
        if self.is_deepspeed_enabled:  # whose engine has clipped and stepped in the backward pass
            grad_norm = model.get_global_grad_norm()
        else:
            grad_norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm or math.inf)
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        optimizer: Any = self.optimizer
        optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        learning_rate = self._get_learning_rate()
        if not self.accelerator.optimizer_step_was_skipped:
            scheduler: Any = self.lr_scheduler
            scheduler.step()
        for parameter in parameters:
            parameter.grad = None
        return grad_norm, learning_rate

    def _end_step(self, model: Any, numbers: Numbers) -> None:
        """Log what has been read, do what was asked, validate and save."""
        asked = self._log_steps(numbers, self._plan.evaluates_after(self.state.global_step))
        if asked:
            asked = max(asked, self._log_steps(numbers, everything=True))
        self._reporter.obey(asked, self.state, self.control)
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self._save_checkpoint(model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _log_steps(self, numbers: Numbers, everything: bool) -> int:
        """Returns the most urgent of what was asked."""
        asked = 0
        for read in numbers.read(everything):
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, vars(read))
            asked = max(asked, read.asked)
        return asked

    @cached_property
    def _packed(self) -> PackedAttention:
        model: Any = self.model
        return PackedAttention(model)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        super()._init_training_state(*args, **kwargs)
        self.state.global_step = self._first
        return 0, 0  # the loader begins at the step

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._prepare_scoring()
        if self._checkpoint is not None:
            saved = self._checkpoint
            put_optimizer(self.model, self.optimizer, saved.weights, saved.optimizer, saved.step)
            advance(self.lr_scheduler, saved.step)
        return prepared

    def _prepare_scoring(self) -> None:
        afresh = partial(start_afresh, self.model_wrapped) if divides(self._cfg) else None
        common, split = self._common_loss, self._train_split
        fit_by_rows(self.model_wrapped, split, self._pad_id, takes_common_loss=common, start_afresh=afresh)
        scoring_of(self.model).limit = self._plan.forward_tokens

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        write_parts(folder, self.model, self.optimizer, self._method, rank=self.args.process_index)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        loss = validation_loss(
            self.model_wrapped,
            self._validation_split,
            rows=self._cfg.evaluation.loss_rows,
            batch=self._plan.micro_batch,
            pad_id=self._pad_id,
            rank=self.args.process_index,
            workers=self._plan.workers,
        )
        metrics = {"eval_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Reporter(TrainerCallback):
    """Decides when to validate, ends a run that diverged, was stopped or no longer gains, and reports."""

    def __init__(
        self,
        cfg: RunConfig,
        plan: Plan,
        place: Place,
        method: Method[Any],
        facts: dict[str, Any],
        checkpoint: Checkpoint | None,
    ) -> None:
        """
        Args:
            cfg: says when to give up, how many checkpoints to keep and how much room they may take.
            plan: of the run.
            place: of this worker.
            method: whose model trains.
            facts: constants that go with every report.
            checkpoint: to go on from.
        """
        self._cfg = cfg
        self._plan = plan
        self._place = place
        self._method = method
        self._facts = facts
        self._began = 0.0
        self._next_ask = 0.0
        self._training_seconds: float = checkpoint.report["training_seconds"] if checkpoint else 0.0
        self._losses: list[float] = checkpoint.progress.get("losses", []) if checkpoint else []  # since the validation
        self._eval_loss = math.nan
        self._lowest: float = checkpoint.progress["lowest"] if checkpoint else math.inf
        self._in_vain: int = checkpoint.progress["in_vain"] if checkpoint else 0  # evaluations since the lowest loss
        self._size = _STATE_BYTES * facts["trainable_parameters"]  # of a checkpoint
        self.left = False  # it was saved to go on elsewhere
        self.delivery = Delivery(place, cfg.training.keep_checkpoints)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def ask(self, state: Any) -> int:
        """What the first worker is asked to do, at most a few times a second; the others follow it."""
        if self._place.rank:
            return GO_ON
        due, now = self._plan.evaluates_after(state.global_step), time.perf_counter()
        if due and self._over_quota():
            return _OVER_QUOTA
        if not due and now < self._next_ask:
            return GO_ON
        self._next_ask = now + self._place.ask_every
        return int(self._place.stopped())

    def obey(self, asked: int, state: Any, control: Any) -> None:
        """Say what follows a step: all workers do, at the same one.

        Args:
            asked: the first worker, at this step or one before.
            state: of the trainer.
            control: of the trainer; told whether to validate, save and stop.

        Raises:
            QuotaError: a checkpoint is due and there is no room for it.
        """
        self._training_seconds += time.perf_counter() - self._began
        if asked == _OVER_QUOTA:
            raise QuotaError(
                f"with its next checkpoint, of about {self._size / 1e9:.3g} GB, its folder would take more than "
                f"disk.trial_gb={self._cfg.disk.trial_gb:g}; raise it, or lower training.keep_checkpoints"
            )
        due = self._plan.evaluates_after(state.global_step)
        pauses = due and self._plan.pauses_at(self._plan.samples_seen(state.global_step))
        self.left = asked == SAVE_AND_STOP and state.global_step < self._plan.steps and not pauses
        control.should_evaluate = due
        control.should_save = due or self.left
        control.should_training_stop |= asked != GO_ON or pauses
        self.delivery.look()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._method.after_step(kwargs["model"], state.global_step + 1)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs:  # of the end
            return
        self._losses.append(logs["loss"])
        for value in (logs["loss"], logs["grad_norm"] or 0.0):
            if not math.isfinite(value):
                raise DivergedError(logs["step"], value)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._eval_loss = kwargs["metrics"]["eval_loss"]
        if not math.isfinite(self._eval_loss):
            raise DivergedError(state.global_step, self._eval_loss)
        settled = state.global_step > self._method.settled_from
        self._in_vain = self._in_vain + 1 if settled and self._eval_loss >= self._lowest else 0
        self._lowest = min(self._lowest, self._eval_loss)
        control.should_training_stop |= self._gave_up()

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._place.rank:
            return
        step, parts = state.global_step, Path(str(args.output_dir))
        report = self._facts | {
            "samples_seen": self._plan.samples_seen(step),
            "eval_loss": self._eval_loss if self._plan.evaluates_after(step) else None,
            "train_loss": sum(self._losses) / max(1, len(self._losses)),
            "training_seconds": self._training_seconds,
            "peak_memory_bytes": peak_memory(),
            "last": step == self._plan.steps or self._gave_up(),
        }
        measured = report["eval_loss"] is not None
        if measured:
            self._losses.clear()
        progress = {"lowest": self._lowest, "in_vain": self._in_vain, "losses": self._losses}
        checkpoint = commit(parts, self._place.folder, step, report, progress)
        self._size = folder_bytes(checkpoint)
        self.delivery.send(checkpoint, report if measured else None)

    def _gave_up(self) -> bool:
        patience = self._cfg.training.patience
        return patience is not None and self._in_vain >= patience

    def _over_quota(self) -> bool:
        quota = self._cfg.disk.trial_gb
        return quota is not None and folder_bytes(self._place.folder) + self._size > quota * 1e9


def peak_memory() -> int:
    """Bytes of GPU memory this process has allocated at most; of resident memory where it uses no GPU."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
