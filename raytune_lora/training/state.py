"""The trained weights and the optimizer's states, whole and by name, whatever ZeRO made of them.

What one number of workers under one ZeRO stage gathered, any other number under any other stage takes up again. Under
ZeRO 1-3 every function here is called by all workers at once, for each parameter in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raytune_lora.errors import UserError

_SHARD = 2 * 2**30  # bytes of a file

Named = Iterator[tuple[str, torch.Tensor]]


def trained(model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters that train, by their names in the model."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def gathered_weights(model: Any, optimizer: Any) -> Named:
    """Each trained parameter whole and on the CPU."""
    for name, p in trained(model):
        yield name, _whole(p) if _is_shared(p) else p.detach().cpu()


def gathered_optimizer(model: Any, optimizer: Any) -> Named:
    """Each state of each trained parameter whole and on the CPU, as ``<state>/<parameter>``."""
    named = list(trained(model))
    if any(_is_shared(p) for _, p in named):
        _link_states(optimizer.optimizer)
    for name, p in named:
        if _is_shared(p):
            for key in _keys(optimizer):
                yield f"{key}/{name}", _whole(p, key)
        else:
            for key, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value) and value.dim():
                    yield f"{key}/{name}", value.detach().cpu()


def put_weights(model: Any, saved: Saved) -> None:
    """Set the trained parameters of a model, before an optimizer is made for them."""
    for name, p in trained(model):
        whole: Any = contextlib.nullcontext()
        if hasattr(p, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            whole = GatheredParameters([p], modifier_rank=0)
        with whole, torch.no_grad():
            p.copy_(saved.get(name))


def put_optimizer(model: Any, optimizer: Any, weights: Saved, saved: Saved, step: int) -> None:
    """Give an optimizer that has not made a step yet the states of one that has.

    Args:
        model: with the weights of ``weights`` already.
        optimizer: as accelerate wraps it.
        weights: the trained parameters.
        saved: its states.
        step: optimizer steps made.

    Raises:
        UserError: the states lie on a disk that DeepSpeed alone writes to.
    """
    named = list(trained(model))
    shared = [(name, p) for name, p in named if _is_shared(p)]
    if shared:
        if getattr(optimizer.optimizer, "swap_optimizer", False):
            raise UserError(
                "deepspeed.offload_optimizer=nvme cannot take up a checkpoint: go on with deepspeed=zero3_offload"
            )
        keys = sorted({name.partition("/")[0] for name in saved.names})
        _make_states(optimizer.optimizer, keys, step)
        _put_shared(shared, keys, weights, saved)
        return
    for name, p in named:
        states = {key: saved.get(n) for n in saved.names for key, _, owner in [n.partition("/")] if owner == name}
        if states:  # none of a parameter that never had a gradient
            _put_own(optimizer.optimizer, p, states, step)


def _put_own(inner: Any, p: Any, states: dict[str, torch.Tensor], step: int) -> None:
    """The states of a parameter that an optimizer keeps whole."""
    if not hasattr(inner, "init_state"):
        own = {key: value.to(p.device, p.dtype) for key, value in states.items()}
        inner.state[p] = {"step": torch.tensor(float(step))} | own
        return
    # bitsandbytes: in its own buffers, which may be paged, and with steps counted as a plain number
    groups = enumerate(inner.param_groups)
    g, i = next((g, i) for g, group in groups for i, other in enumerate(group["params"]) if other is p)
    inner.init_state(inner.param_groups[g], p, g, i)
    for key, value in states.items():
        inner.state[p][key].copy_(value)
    inner.state[p]["step"] = step


def _put_shared(named: list[tuple[str, Any]], keys: list[str], weights: Saved, saved: Saved) -> None:
    for name, p in named:
        _put_part(p, weights.get(name))
        for key in keys:
            _put_part(p, saved.get(f"{key}/{name}"), key)


def _whole(p: Any, key: str | None = None) -> torch.Tensor:
    """A parameter in the optimizer's precision, or one of its states, put together from all workers' parts."""
    three = getattr(p, "_z3_optimizer", None)
    whole: Any = three.get_full_hp_param(p, key) if three is not None else p.get_full_hp_param(key)
    return whole.reshape(getattr(p, "ds_shape", p.shape)).cpu()


def _put_part(p: Any, whole: torch.Tensor, key: str | None = None) -> None:
    """Set this worker's part of a parameter in the optimizer's precision, or of one of its states."""
    whole = whole.float().to(p.device)
    if not hasattr(p, "_z3_optimizer"):
        p.set_full_hp_param(whole, key)
        return
    # by this worker's part: DeepSpeed's own division of a whole fails where the workers do not divide it evenly
    part = p.ds_tensor.numel()
    padded = torch.zeros(part * torch.distributed.get_world_size(), device=whole.device)
    padded[: whole.numel()] = whole.flatten()
    p._z3_optimizer.set_local_hp_param(padded.narrow(0, part * torch.distributed.get_rank(), part), p, key)


def _make_states(zero: Any, keys: list[str], step: int) -> None:
    """States full of zeros for the flat tensors that ZeRO's inner optimizer really steps, and the links to them."""
    inner = zero.optimizer
    flat = getattr(zero, "fp32_partitioned_groups_flat", None)  # stage 3 hands its inner optimizer one at a time
    if flat is None:
        flat = [p for group in inner.param_groups for p in group["params"]]
    for p in flat:
        inner.state[p] = {"step": torch.tensor(float(step))} | {key: torch.zeros_like(p.data) for key in keys}
    _link_states(zero)


def _link_states(zero: Any) -> None:
    """Have each parameter find its states; DeepSpeed does so too early for all groups of parameters but the first."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _keys(optimizer: Any) -> list[str]:
    states = [state for state in optimizer.optimizer.optimizer.state.values() if state]
    return sorted(key for key, value in states[0].items() if torch.is_tensor(value) and value.dim()) if states else []


def _is_shared(p: Any) -> bool:
    """Whether DeepSpeed keeps the parameter's optimizer states, divided among the workers."""
    return hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping")


# ---------------------------------------------------------------------------------------------------------------- files


def write(folder: Path, stem: str, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors into ``<stem>-<number>.safetensors``, never holding more than a file's worth of them."""
    shard: dict[str, torch.Tensor] = {}
    size, number = 0, 0
    for name, tensor in named:
        shard[name] = tensor.contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= _SHARD:
            save_file(shard, folder / f"{stem}-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
    if shard:
        save_file(shard, folder / f"{stem}-{number:05d}.safetensors")


class Saved:
    """The tensors of the files that ``write`` made, read one at a time."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob(f"{stem}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name.

        Raises:
            ValueError: there is none: the checkpoint is of another method or model.
        """
        if name not in self._files:
            raise ValueError(f"the checkpoint has no {name}: it was written for another method or model")
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def all(self) -> dict[str, torch.Tensor]:
        """All of them."""
        return {name: self.get(name) for name in self.names}
