"""The base model that a worker keeps from one task to the next, loaded and quantized once.

A method puts modules, hooks and attributes into a base model, and the trainer more of them; some change its weights.
What is not a weight is put back as it was when the model was loaded, whatever changed it. Weights are not put back:
a model of which one has trained, or has other bits than before, is let go and loaded anew.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from raytune_lora.artifacts import fingerprint
from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import RunConfig
from raytune_lora.models.loading import load_model

_THEIRS = ("transformers", "transformers_modules", "bitsandbytes")  # whose objects, in a model's attributes, hold state


class Snapshot:
    """All of a model but the values of its weights, and of these a checksum."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._owners: list[tuple[Any, type, dict[str, Any]]] = []  # modules, tensors and other objects
        self._tensors: list[tuple[torch.Tensor, bool, torch.dtype, torch.device]] = []
        self._known: set[int] = set()
        self._take(model)
        self._bits = self._checksums()

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor, *_ in self._tensors)

    def restore(self) -> bool:
        """Put all back that is not a weight; whether the weights are what they were, too."""
        trained = any(tensor.requires_grad and not asked for tensor, asked, *_ in self._tensors)
        self.forget()
        for tensor, asked, dtype, _ in self._tensors:
            tensor.grad = None
            tensor.requires_grad_(asked)
            if tensor.dtype is not dtype:  # DeepSpeed casts what is in another precision than its own
                tensor.data = tensor.data.to(dtype)
        if trained or any(tensor.device != device for tensor, *_, device in self._tensors):
            return False
        return self._checksums() == self._bits

    def forget(self) -> None:
        """Put back what refers to what the model had not when it was loaded."""
        for owner, cls, attributes in self._owners:
            if type(owner) is not cls:
                owner.__class__ = cls
            owner.__dict__.clear()
            owner.__dict__.update({name: _copied(value) for name, value in attributes.items()})

    def _checksums(self) -> list[int]:
        return checksums(tensor for tensor, *_ in self._tensors)

    def _take(self, value: Any) -> None:
        """Note a value, and what it refers to, where it has state."""
        if isinstance(value, (dict, list, tuple, set)):
            for each in value.values() if isinstance(value, dict) else value:
                self._take(each)
            return
        if not _has_state(value) or id(value) in self._known:
            return
        self._known.add(id(value))
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, value.requires_grad, value.dtype, value.device))
        attributes = dict(value.__dict__)
        self._owners.append((value, type(value), {name: _copied(each) for name, each in attributes.items()}))
        self._take(attributes)


def _has_state(value: Any) -> bool:
    if isinstance(value, (torch.nn.Module, torch.Tensor)):
        return True
    own = type(value).__module__.partition(".")[0] in _THEIRS
    return own and hasattr(value, "__dict__") and not isinstance(value, (type, Enum)) and not callable(value)


def _copied(value: Any) -> Any:
    """Containers anew, and what is in them as it is."""
    if isinstance(value, dict):
        copy = value.copy()
        copy.update({key: _copied(each) for key, each in value.items()})
        return copy
    if isinstance(value, (list, set)):
        return type(value)(map(_copied, value)) if type(value) in (list, set) else value
    return value


def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Of each tensor the sum of its bits as whole numbers, modulo 2 to the 64th."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(_sum(tensor))
    return [number for sums in by_device.values() for number in torch.stack(sums).tolist()]


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return torch.zeros((), dtype=torch.int64)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    numbers = flat[:whole] if flat.storage_offset() % 8 == 0 else flat[:whole].clone()
    return numbers.view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)


@dataclass
class _Kept:
    key: str
    model: Any
    snapshot: Snapshot
    in_use: bool = True


_kept: list[_Kept] = []  # one at most


def base_model(cfg: RunConfig, folder: Path) -> Any:
    """The base model of a run, as ``load_model`` gives it; it stays the worker's, and one task at a time has it.

    Args:
        cfg: of the run.
        folder: of the model.
    """
    key = _key(cfg, folder)
    if _kept and _kept[0].key != key:
        let_go()
    put_back()
    if not _kept:
        model = load_model(folder, cfg.model, cfg.quantization, on_gpu=cfg.gpus_per_worker > 0)
        if cfg.method.kind == "full":  # it trains all of it, and loads another one beside it
            return model
        _kept.append(_Kept(key, model, Snapshot(model)))
    _kept[0].in_use = True
    return _kept[0].model


def put_back() -> None:
    """Make the model ready for the next task when one is over; let it go where its weights are no longer the base's."""
    for kept in _kept:
        if kept.in_use and not kept.snapshot.restore():
            let_go()
        kept.in_use = False


def let_go() -> None:
    """Keep no model."""
    if not _kept:
        return
    _kept.pop().snapshot.forget()
    gc.unfreeze()  # what a worker keeps is left out of collections
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # counting references has freed it


def kept_bytes() -> int:
    """Bytes of the model that is kept."""
    return sum(kept.snapshot.nbytes for kept in _kept)


def _key(cfg: RunConfig, folder: Path) -> str:
    """By all that loading depends on."""
    return fingerprint(
        to_plain(cfg.model), to_plain(cfg.quantization), cfg.gpus_per_worker, cfg.method.kind == "full", *_files(folder)
    )


def _files(folder: Path) -> Iterator[list[Any]]:
    for path in sorted(folder.rglob("*")):
        found = path.stat()
        yield [str(path), found.st_size, found.st_mtime_ns]
