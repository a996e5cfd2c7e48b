"""What a model is made of, as far as text meets it: linear layers, experts, norms and biases, by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from raytune_lora.models.weights import is_transposed, saved_names
from raytune_lora.planning.shape import BYPASSED, IDLE, ROUTER, UNLIKE, UNMET, Experts, Linear

if TYPE_CHECKING:
    from raytune_lora.models.skeleton import Skeleton

# linear layers that are fed what their sublayer has computed, rather than the sublayer's input
_LAST = {"o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "wo", "w2"}
_ROUTERS = {"router", "gate", "shared_expert_gate"}
_STACKED = 3  # dimensions of a weight that gives each expert a matrix
_WEIGHT_READ = re.compile(r"self\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|ndim|dim|size|numel)\b)")


def norms(model: Any) -> list[tuple[str, Any]]:
    """Normalization layers that text passes through, by name; not the sublayers that are named after theirs."""
    from raytune_lora.models.skeleton import skeleton_of

    called = skeleton_of(model).called
    named = [(name, m) for name, m in model.named_modules() if "norm" in type(m).__name__.lower()]
    return [(name, m) for name, m in named if name in called and not list(m.children())]


def scales(model: Any) -> list[tuple[str, Any]]:
    """Of these, those with weights of their own, as OLMo's have none, that train where they lie, by name."""
    from raytune_lora.models.skeleton import skeleton_of

    skeleton, found = skeleton_of(model), []
    for name, norm in norms(model):
        own = [f"{name}.{leaf}" for leaf, _ in norm.named_parameters()]
        if own and skeleton.trains.issuperset(own) and not _bypassed(name, skeleton):
            found.append((name, norm))
    return found


def norms_apart(model: Any) -> tuple[str, ...]:
    """The names of those whose weights are handed to a kernel past them, as gated ones' are (Mamba2's)."""
    from raytune_lora.models.skeleton import skeleton_of

    skeleton = skeleton_of(model)
    return tuple(name for name, norm in norms(model) if _bypassed(name, skeleton) and list(norm.parameters()))


def _bypassed(name: str, skeleton: Skeleton) -> bool:
    """Whether other code reads a layer's weight past its forward, here or on a GPU."""
    parent, _, leaf = name.rpartition(".")
    owner: Any = type(skeleton.model.get_submodule(parent))
    return f"{name}.weight" in skeleton.read or leaf in _weights_read(owner)


def biases(model: Any) -> list[tuple[str, Any]]:
    """Parameters called bias that text meets, by name."""
    from raytune_lora.models.skeleton import skeleton_of

    trains = skeleton_of(model).trains
    return [(name, p) for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias" and name in trains]


def modules(skeleton: Skeleton) -> tuple[tuple[str, int], ...]:
    """Those whose forward runs, with parameters that could all train, each with the number of these."""
    named = [(name, m) for name, m in skeleton.model.named_modules() if name and name in skeleton.called]
    able = (
        (name, m) for name, m in named if all(f"{name}.{leaf}" in skeleton.trains for leaf, _ in m.named_parameters())
    )
    sizes = ((name, sum(p.numel() for p in m.parameters())) for name, m in able)
    return tuple((name, size) for name, size in sizes if size)


def linears(skeleton: Skeleton, *, mixture: bool) -> Iterator[Linear]:
    """All of them, also those that no adapter goes to.

    Args:
        skeleton: of the model.
        mixture: whether it has experts, and so layers that route tokens to them.
    """
    from raytune_lora.models.skeleton import is_linear, quantized

    packed, seen = quantized(skeleton), set()
    met = {id(m.weight) for n, m in skeleton.model.named_modules() if n in skeleton.called and is_linear(m)}
    saved = saved_names(skeleton.model, [n for n, m in skeleton.model.named_modules() if is_linear(m)])
    for name, module in skeleton.model.named_modules():
        tied = id(getattr(module, "weight", None)) in seen
        seen.add(id(getattr(module, "weight", None)))
        if not is_linear(module):
            continue
        parent, _, leaf = name.rpartition(".")
        source = f"{parent}.{'inside' if leaf in _LAST else 'input'}"
        transposed = is_transposed(module)
        d_in, d_out = module.weight.shape if transposed else module.weight.shape[::-1]
        bias, apart = module.bias is not None, _apart(name, skeleton, met, mixture=mixture)
        saved_as = "" if saved.get(name) == name else saved.get(name)
        yield Linear(name, d_in, d_out, source, transposed, bias, apart, name in packed, tied, saved_as)


def _apart(name: str, skeleton: Skeleton, met: set[int], *, mixture: bool) -> str:
    """Why no adapter goes to a linear layer; empty where one may.

    Args:
        name: of the layer.
        skeleton: of the model.
        met: ids of the weights of layers that run: one that shares its weight may rest while another runs (Zamba2's).
        mixture: as for ``linears``.
    """
    trains = f"{name}.weight" in skeleton.trains
    if _bypassed(name, skeleton):
        return BYPASSED
    if name not in skeleton.called:
        return BYPASSED if trains and id(skeleton.model.get_submodule(name).weight) not in met else UNMET
    if not trains:
        return IDLE
    if mixture and _ROUTERS & set(name.split(".")[-2:]):
        return ROUTER
    return UNLIKE if name in skeleton.unlike else ""


@cache
def _weights_read(cls: Hashable) -> set[str]:
    """Layers of a module whose weights its own code reads, as it hands them to a kernel: Mamba's on a GPU alone."""
    found: set[str] = set()
    for owner in inspect.getmro(cls):  # type: ignore[arg-type]  # a class, which mypy does not take for hashable
        if owner.__module__.startswith("torch"):
            continue
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and "init" not in name:
                found |= set(_WEIGHT_READ.findall(source_of(inspect.unwrap(method))))
    return found


def source_of(code: Any) -> str:
    """The source of a function or module; empty where it has none."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


def experts(model: Any) -> Iterator[Experts]:
    """Weights of all experts together.

    They have three dimensions, the outputs before the inputs or behind them; or two, one expert's below another's.
    """
    from torch import nn

    inside: dict[str, int] = {}  # number of experts whose weights a module, or one around it, holds
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        directly = "experts" in f"{own} {type(module).__name__}".lower()
        if not (directly or parent in inside) or isinstance(module, nn.Linear):
            continue
        count = inside[name] = _number_of_experts(module) or inside.get(parent, 0)
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.dim() == _STACKED and directly:
                number, first, second = weight.shape
                d_in, d_out = (first, second) if getattr(module, "is_transposed", False) else (second, first)
                yield Experts(f"{name}.{leaf}", number, d_in, d_out)
            elif weight.dim() == _STACKED - 1 and count and weight.shape[0] % count == 0 and weight.shape[0] > count:
                yield Experts(f"{name}.{leaf}", count, weight.shape[1], weight.shape[0] // count, below=True)


def _number_of_experts(module: Any) -> int:
    return next((n for key, n in vars(module).items() if "num_experts" in key and isinstance(n, int)), 0)
