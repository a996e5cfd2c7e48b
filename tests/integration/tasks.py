"""What tests have worker groups do. Pickled by value: the workers cannot import the tests."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from ray import cloudpickle

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def train(cfg: Any, store: Any, place: Any) -> None:
    from raytune_lora.training import worker

    worker.train(cfg, store, place)


def train_unheard(cfg: Any, store: Any, place: Any) -> None:
    """Train while whoever reads the reports is gone."""
    train(cfg, store, dataclasses.replace(place, report=lambda report: False))


def nothing(cfg: Any, store: Any, place: Any) -> None:
    """Do nothing, well."""


def report_accelerator(cfg: Any, store: Any, place: Any) -> None:
    """Report what a worker sees of the machine's GPUs, and what DeepSpeed computes on."""
    from deepspeed.accelerator import get_accelerator

    place.report({"visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "accelerator": get_accelerator()._name})


def train_and_note_positions(cfg: Any, store: Any, place: Any) -> None:
    """Train, and write down which samples this worker read, in order."""
    from raytune_lora.training import batches

    seen: list[int] = []
    original = batches.MicroBatch.on

    def noted(self: Any, device: Any) -> Any:
        seen.append(self.position)
        return original(self, device)

    batches.MicroBatch.on = noted  # type: ignore[method-assign]
    try:
        train(cfg, store, place)
    finally:
        batches.MicroBatch.on = original  # type: ignore[method-assign]
    (place.folder / f"seen-{place.rank}.json").write_text(json.dumps(seen))


def train_by_plain_descent(cfg: Any, store: Any, place: Any) -> None:
    """Train with an optimizer that adds the gradient itself, so that the weights tell what the gradients were."""
    import torch

    from raytune_lora.training.trainer import PlannedTrainer

    descent = staticmethod(lambda args, model=None: (torch.optim.SGD, {"lr": args.learning_rate}))
    PlannedTrainer.get_optimizer_cls_and_kwargs = descent  # type: ignore[method-assign, assignment]
    try:
        train(cfg, store, place)
    finally:
        del PlannedTrainer.get_optimizer_cls_and_kwargs


def train_and_note_streams(cfg: Any, store: Any, place: Any) -> None:
    """Train, and write down what each random stream gave this worker: the data, the adapter, the state of dropout."""
    import hashlib

    import torch

    from raytune_lora.training.trainer import PlannedTrainer

    noted: dict[str, Any] = {"order": []}
    original = PlannedTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *arguments: Any) -> Any:
        if not noted["order"]:
            start = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
            noted["weights"] = hashlib.sha256(b"".join(start)).hexdigest()
            noted["dropout"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        noted["order"].append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *arguments)

    PlannedTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        train(cfg, store, place)
    finally:
        PlannedTrainer.training_step = original  # type: ignore[method-assign]
    (place.folder / f"streams-{place.rank}.json").write_text(json.dumps(noted))


def build_a_model(cfg: Any, store: Any, place: Any) -> None:
    """Have the last worker make a model that is not in the cache; a task ends when the first worker does."""
    import torch

    from raytune_lora.cache import Cache
    from raytune_lora.config.schema import TinyModelConfig
    from raytune_lora.models.sources import materialize

    if place.rank == place.workers - 1:
        materialize(TinyModelConfig(seed=1), Cache(place.folder))
    torch.distributed.barrier()


def train_and_note_parts(cfg: Any, store: Any, place: Any) -> None:
    """Train, and write down what this worker held of the base model once that was loaded: elements."""
    from raytune_lora.training import worker

    original = worker.divided_base

    def divided_base(*arguments: Any, **settings: Any) -> Any:
        model = original(*arguments, **settings)
        parameters = list(model.parameters())
        noted = {
            "whole": sum(p.numel() for p in parameters),
            "part": sum(p.ds_tensor.numel() for p in parameters),
            "all": sum(p.ds_numel for p in parameters),
        }
        (place.folder / f"parts-{place.rank}.json").write_text(json.dumps(noted))
        return model

    worker.divided_base = divided_base
    try:
        train(cfg, store, place)
    finally:
        worker.divided_base = original


def train_until_told(cfg: Any, store: Any, place: Any) -> None:
    """Train up to the step after the first checkpoint."""
    told = dataclasses.replace(place, stopped=lambda: any(place.folder.glob("checkpoint-*")), ask_every=0)
    train(cfg, store, told)


def train_with_a_crash(cfg: Any, store: Any, place: Any) -> None:
    """End the first worker's process as a crash would, where its second checkpoint is written all but the manifest."""
    from raytune_lora.training import checkpoint

    original = checkpoint.write_json

    def crash(path: Any, value: Any) -> None:
        if any(place.folder.glob("checkpoint-*")):
            os._exit(1)
        original(path, value)

    checkpoint.write_json = crash
    train(cfg, store, place)


def train_short_of_memory(cfg: Any, store: Any, place: Any) -> None:
    """Train on a machine whose memory ends, after the first checkpoint, at a micro batch of two."""
    import torch
    from transformers import Trainer

    original = Trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *arguments: Any, **settings: Any) -> Any:
        if len(inputs["input_ids"]) > 1 and model.training and any(place.folder.glob("checkpoint-*")):
            torch.empty(2**60)
        return original(self, model, inputs, *arguments, **settings)

    Trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    try:
        train(cfg, store, place)
    finally:
        Trainer.compute_loss = original  # type: ignore[method-assign]


def never_enough_memory(cfg: Any, store: Any, place: Any) -> None:
    import torch

    torch.empty(2**60)


def train_without_gain(cfg: Any, store: Any, place: Any) -> None:
    """Train where each validation finds a higher loss than the one before, from the second on."""
    from raytune_lora.training import trainer

    original, found = trainer.validation_loss, [1.0]

    def rising(*arguments: Any, **settings: Any) -> float:
        found.append(found[-1] + 1)
        return found[-1]

    trainer.validation_loss = rising
    try:
        train(cfg, store, place)
    finally:
        trainer.validation_loss = original


def fail(cfg: Any, store: Any, place: Any) -> None:
    raise ValueError("made to fail")


def count_models(cfg: Any, store: Any, place: Any) -> None:
    """Report how many base models the process holds; skeletons, which are kept, have no weights."""
    import gc

    from transformers import PreTrainedModel

    gc.unfreeze()  # what is left out of collections is not listed
    gc.collect()
    models = [o for o in gc.get_objects() if isinstance(o, PreTrainedModel)]
    parts = {id(part) for model in models for part in model.modules() if part is not model}
    models = [model for model in models if id(model) not in parts]
    place.report({"models": sum(any(not p.is_meta for p in model.parameters()) for model in models)})


def measure(cfg: Any, store: Any, place: Any, adapter: str | None) -> None:
    from raytune_lora.evaluation import compare

    compare.measure(cfg, store, place, adapter=adapter)


BROKEN = ("start", "log", "close")  # trackers named after where they fail


def train_with_broken_trackers(cfg: Any, store: Any, place: Any) -> None:
    """Train with trackers that fail at each thing a tracker does."""
    from raytune_lora.training.tracking import base

    def tracker(name: str) -> type[base.Tracker]:
        def step(where: str) -> None:
            if where == name:
                raise ConnectionError(f"{name} is away")

        methods = {where: lambda self, *arguments, where=where: step(where) for where in BROKEN}
        return type(name, (base.Tracker,), {"kind": name, **methods})

    try:
        for name in BROKEN:
            tracker(name)
        train(cfg, store, place)
    finally:
        for name in BROKEN:
            del base._REGISTRY[name]
