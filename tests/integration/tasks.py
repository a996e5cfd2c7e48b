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


def train_and_note_positions(cfg: Any, store: Any, place: Any) -> None:
    """Train, and write down which samples this worker read, in order."""
    from raytune_lora.training import batches

    seen: list[int] = []
    original = batches.Samples.__getitem__

    def noted(self: Any, position: int) -> Any:
        seen.append(position)
        return original(self, position)

    batches.Samples.__getitem__ = noted  # type: ignore[method-assign]
    try:
        train(cfg, store, place)
    finally:
        batches.Samples.__getitem__ = original  # type: ignore[method-assign]
    (place.folder / f"seen-{place.rank}.json").write_text(json.dumps(seen))


def train_until_told(cfg: Any, store: Any, place: Any) -> None:
    """Train up to the step after the first checkpoint."""
    train(cfg, store, dataclasses.replace(place, stopped=lambda: any(place.folder.glob("checkpoint-*"))))


def train_with_a_crash(cfg: Any, store: Any, place: Any) -> None:
    """End the last worker's process as a crash would, while the others train and wait for it."""
    if place.rank == place.workers - 1:
        os._exit(1)
    train(cfg, store, place)


def fail(cfg: Any, store: Any, place: Any) -> None:
    raise ValueError("made to fail")


def count_models(cfg: Any, store: Any, place: Any) -> None:
    """Report how many base models the process still holds."""
    import gc

    from transformers import PreTrainedModel

    gc.collect()
    place.report({"models": sum(isinstance(o, PreTrainedModel) for o in gc.get_objects())})


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
