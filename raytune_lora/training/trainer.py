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
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from raytune_lora.config.schema import RunConfig
from raytune_lora.errors import DivergedError
from raytune_lora.models.export import ADAPTER
from raytune_lora.models.methods import Method
from raytune_lora.training.batches import training_loader
from raytune_lora.training.checkpoint import commit
from raytune_lora.training.metrics import validation_loss
from raytune_lora.training.place import Place
from raytune_lora.training.plan import Plan

TRAINED = "trained.safetensors"  # in a checkpoint: the trained parameters by their names in the model


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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._method = method
        self._cfg = cfg
        self._plan = plan
        self._train_split = train
        self._validation_split = validation
        self._pad_id = pad_id

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This worker's part alone; accelerate must not divide it again."""
        return training_loader(self._train_split, self._plan, self.args.process_index, self._pad_id)

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

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The method's penalty has its gradient in the loss and leaves its value alone, so that losses compare."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and (penalty := self._method.penalty(self.model)) is not None:
            loss = loss + (penalty - penalty.detach()) / self._plan.accumulation
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What was learned, in the method's own files and as it stands in the model."""
        folder = Path(str(output_dir))
        model: Any = self.model
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        whole = state_dict if state_dict is not None else dict(model.named_parameters())
        state = {name: whole[name].detach().cpu() for name in names}
        (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
        self._method.save(model, state, folder / ADAPTER)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trained: Any = self.model
        trained.load_state_dict(load_file(Path(resume_from_checkpoint) / TRAINED), strict=False)

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
    """Decides when to validate, ends a run that diverged or was stopped, and reports."""

    def __init__(self, plan: Plan, place: Place, method: Method[Any], facts: dict[str, Any]) -> None:
        """
        Args:
            plan: of the run.
            method: whose model trains.
            place: of this worker.
            facts: constants that go with every report.
        """
        self._plan = plan
        self._place = place
        self._method = method
        self._facts = facts
        self._began = 0.0
        self._training_seconds = 0.0
        self._losses: list[float] = []
        self._eval_loss = math.nan

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._training_seconds += time.perf_counter() - self._began
        control.should_log = True
        control.should_evaluate = control.should_save = self._plan.evaluates_after(state.global_step)
        control.should_training_stop = self._stopped()

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

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        step, place = state.global_step, self._place
        parts = Path(str(args.output_dir)) / f"checkpoint-{step}"
        report = self._facts | {
            "samples_seen": self._plan.samples_seen(step),
            "eval_loss": self._eval_loss,
            "train_loss": sum(self._losses) / max(1, len(self._losses)),
            "training_seconds": self._training_seconds,
            "peak_memory_bytes": peak_memory(),
        }
        self._losses.clear()
        checkpoint = commit(parts, place.folder, step, report, place.rank, place.workers)
        place.report(report | {"checkpoint": str(checkpoint)})

    def _stopped(self) -> bool:
        """Whether the first worker was told to stop: the others follow it, or they would wait for it for ever."""
        stopped = self._place.rank == 0 and self._place.stopped()
        if self._place.workers == 1:
            return stopped
        flag = torch.tensor([int(stopped)], device="cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.broadcast(flag, src=0)
        return bool(flag.item())


def peak_memory() -> int:
    """Bytes of GPU memory this process has allocated at most; of resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
