"""Imports between the package's rooms run downward, and each heavy library is imported in its own rooms only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "raytune_lora"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}

# From the top down. A room imports from lower lines only: not from above, and not from a neighbour on its line.
LAYERS = [
    {"cli"},
    {"tuning"},
    {"evaluation", "report", "cluster"},
    {"training"},
    {"models", "data"},
    {"planning"},
    {"config"},
    {"cache", "working_copy"},
    {"storage"},
    {"artifacts", "network", "shadows"},
    {"names"},
    {"errors"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# The only places that name a library, be it inside a function.
ONLY_IN = {
    "ray": (
        "training.driver",
        "training.duty",
        "training.entry",
        "training.group",
        "training.task",
        "training.tracking.gauges",
        "tuning",
        "cluster",
    ),
    "optuna": ("tuning",),
    "peft": ("models", "tuning.packed"),
    "bitsandbytes": ("models", "tuning.packed"),
    "deepspeed": ("training",),
}
# Importing these loads no torch, not through another module either, and the first of them no Ray.
NO_RAY = (
    "cli",
    "config",
    "planning",
    "report",
    "errors",
    "names",
    "shadows",
    "network",
    "artifacts",
    "storage",
    "cache",
    "working_copy",
    "tuning.status",
    "tuning.show",
)
LIGHT = (*NO_RAY, "tuning.space", "tuning.study", "tuning.search", "tuning.scheduler", "tuning.trials")
# A run trains, and is measured, where there is nothing but what training itself needs.
BARE = ("training.worker", "evaluation.compare")
LOADS_TORCH = {"torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes"}


def imports(module: str, at_import: bool = False) -> Iterator[str]:
    """Names that a module imports, type-only imports aside; with at_import, those outside functions alone."""
    pending: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        elif not (at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            pending += ast.iter_child_nodes(node)


def loaded(module: str) -> set[str]:
    """Top-level names of the libraries that importing a module of ours loads, directly or through our other modules."""
    found, seen, pending = set(), set(), [module]
    while pending:
        name = pending.pop()
        parts = name.split(".")
        if parts[0] != PACKAGE:
            found.add(parts[0])
            continue
        chain = [".".join(parts[: n + 1]) for n in range(len(parts))]  # a package's __init__ runs before its modules
        fresh = [link for link in chain if link in MODULES and link not in seen]
        seen.update(fresh)
        pending += [target for link in fresh for target in imports(link, at_import=True)]
    return found


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{PACKAGE}.{room}.") for room in rooms)


@pytest.mark.parametrize("module", [name for name in MODULES if name != PACKAGE])
def test_imports_run_downward_and_libraries_stay_in_their_rooms(module: str) -> None:
    room = module.split(".")[1]
    assert room in LEVEL, f"{room} has no place in LAYERS"
    for target in imports(module):
        top, other = f"{target}.".split(".")[:2]
        if top == PACKAGE and other in LEVEL and other != room:
            assert LEVEL[other] > LEVEL[room], f"{module} must not import {target}: {other} is not below {room}"
        assert within(module, ONLY_IN.get(top, (room,))), f"{module} must not import {target}"


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, LIGHT)])
def test_light_modules_load_neither_torch_nor_ray(module: str) -> None:
    forbidden = LOADS_TORCH | ({"ray"} if within(module, NO_RAY) else set())
    named = {target.split(".")[0] for target in imports(module)}
    assert not (loaded(module) | named) & forbidden


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, BARE)])
def test_a_run_needs_neither_ray_nor_hydra(module: str) -> None:
    assert not loaded(module) & {"ray", "hydra", "omegaconf", "optuna", "datasets", "trl"}
