"""The training loop: transformers' Trainer with our order of samples, validation loss and reports.

Trainer rather than TRL's SFTTrainer: the store has tokenized and masked already, and SFTTrainer adds entropy and
accuracy over the whole vocabulary to every step.
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from raytune_lora.artifacts import folder_bytes
from raytune_lora.config.schema import RunConfig
from raytune_lora.errors import DivergedError, QuotaError
from raytune_lora.models.methods import Method
from raytune_lora.models.shape_parts import source_of
from raytune_lora.training.batches import training_loader
from raytune_lora.training.checkpoint import Checkpoint, commit, write_parts
from raytune_lora.training.delivery import Delivery
from raytune_lora.training.gradients import FirstGradients
from raytune_lora.training.metrics import fit_by_rows, validation_loss
from raytune_lora.training.place import GO_ON, SAVE_AND_STOP, Place
from raytune_lora.training.plan import Plan, stream
from raytune_lora.training.schedule import advance, schedule
from raytune_lora.training.scoring import scoring_of
from raytune_lora.training.state import put_optimizer

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
            kwargs: of ``Trainer``.
        """
        super().__init__(**kwargs)
        self._common_loss = self.model_accepts_loss_kwargs and _takes_common_loss(self.model)
        self.model_accepts_loss_kwargs = True  # the loss is that of ``scoring``
        self._method = method
        self._cfg = cfg
        self._plan = plan
        self._train_split = train
        self._validation_split = validation
        self._pad_id = pad_id
        self._checkpoint = checkpoint
        self._first = checkpoint.step if checkpoint else 0  # steps done before
        self._micro = self._first * plan.accumulation  # forward passes done by this worker
        self._gradients: FirstGradients | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This worker's part alone; accelerate must not divide it again."""
        packing, rank = self._cfg.training.packing, self.args.process_index
        return training_loader(self._train_split, self._plan, rank, self._pad_id, first=self._first, packing=packing)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        return self._plan.total

    def create_optimizer(self, model: Any = None) -> Any:
        """The method's own learning rates where it has some; weight decay is the same for all of them."""
        trained: Any = self.model
        groups = self._method.parameter_groups(trained, self.args.learning_rate)
        if groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        cls, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = cls([group | {"weight_decay": self.args.weight_decay} for group in groups], **settings)
        return self.optimizer

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

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Dropout draws by the samples' place in the run: whoever goes on from there, on any worker, draws the same."""
        position = next(self._plan.positions(self.args.process_index, self._micro))[0]
        torch.manual_seed(stream(self._cfg.training.seed, "dropout", position))
        self._micro += 1
        if self._gradients is None:
            self._gradients = FirstGradients(self.model)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._micro == (self._first + 1) * self._plan.accumulation:
            self._gradients.check(self._cfg.method.kind)
        return loss

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
        fit_by_rows(self.model_wrapped, self._train_split, self._pad_id, takes_common_loss=self._common_loss)
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

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._training_seconds += time.perf_counter() - self._began
        control.should_log = True
        due = self._plan.evaluates_after(state.global_step)
        pauses = due and self._plan.pauses_at(self._plan.samples_seen(state.global_step))
        asked = self._asked(due)
        self.left = asked == SAVE_AND_STOP and state.global_step < self._plan.steps and not pauses
        control.should_evaluate = due
        control.should_save = due or self.left
        control.should_training_stop |= asked != GO_ON or pauses
        self.delivery.look()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._method.after_step(kwargs["model"], state.global_step + 1)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        self._losses.append(logs["loss"])
        for value in (logs["loss"], logs.get("grad_norm", 0.0)):
            if not math.isfinite(value):
                raise DivergedError(state.global_step, value)

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

    def _asked(self, saves: bool) -> int:
        """What the first worker was asked to do: the others follow it, or they would wait for it for ever.

        Raises:
            QuotaError: a checkpoint is due and there is no room for it; on every worker.
        """
        asked = 0
        if self._place.rank == 0:
            asked = _OVER_QUOTA if saves and self._over_quota() else int(self._place.stopped())
        if self._place.workers > 1:
            flag = torch.tensor([asked], device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
            torch.distributed.broadcast(flag, src=0)
            asked = int(flag.item())
        if asked == _OVER_QUOTA:
            raise QuotaError(
                f"with its next checkpoint, of about {self._size / 1e9:.3g} GB, its folder would take more than "
                f"disk.trial_gb={self._cfg.disk.trial_gb:g}; raise it, or lower training.keep_checkpoints"
            )
        return asked

    def _over_quota(self) -> bool:
        quota = self._cfg.disk.trial_gb
        return quota is not None and folder_bytes(self._place.folder) + self._size > quota * 1e9


def peak_memory() -> int:
    """Bytes of GPU memory this process has allocated at most; of resident memory where it uses no GPU."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
