"""Which method works with which ZeRO stage and quantization: ``python jobs/bench/method_matrix.py --json FILE``.

Every combination of method, quantization and stage trains the tiny model for three steps on two workers, gradient
checkpointing on, unless it is refused before launch. A cell is

- ``pass``: its losses are those of the row's first stage to within the tolerance,
- ``refused``: the config is refused, with the reason in the JSON file,
- ``differs`` or ``fails``: neither; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import uuid
from pathlib import Path
from typing import Any

METHODS_ON = {  # what a method needs of the model or of its own config on the tiny one
    "bitfit": ("model=tiny_bias",),
    "ir_qlora": ("method.r=8",),
    "adalora": ("method.start=0.1", "method.settle=0.3"),
}
STAGES = ("off", "zero0", "zero1", "zero2", "zero3")
QUANTIZATIONS = ("none", "int8", "nf4")
TOLERANCE = 1e-5
COMMON = (
    "model=tiny",
    "data=fake",
    "workers=2",
    "training.max_steps=3",
    "training.global_batch=8",
    "training.micro_batch=2",
    "training.learning_rate=3e-3",
    "evaluation.loss_rows=8",
)


def main() -> int:
    from raytune_lora.config.groups import groups

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=groups()["method"], help="default: all")
    parser.add_argument("--gpus", type=int, default=0, help="a worker; the default is none")
    parser.add_argument("--json", type=Path, help="file for the table with reasons")
    args = parser.parse_args()
    cells = run_all(args.methods, args.gpus)
    print(table(cells))
    counts = {state: sum(cell["state"] == state for cell in cells) for state in ("pass", "refused", "differs", "fails")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    for cell in cells:
        if cell["state"] in ("differs", "fails"):
            print(f"{cell['method']} {cell['quantization']} {cell['stage']}: {cell['why']}")
    if args.json:
        args.json.write_text(json.dumps({"tolerance": TOLERANCE, "cells": cells}, indent=2) + "\n")
    return int(counts["differs"] + counts["fails"] > 0)


def run_all(methods: list[str], gpus: int) -> list[dict[str, Any]]:
    """Each cell: method, quantization, stage, state, why, losses."""
    import os

    import ray

    from raytune_lora.cluster import connect
    from raytune_lora.config.compose import compose
    from raytune_lora.training.driver import Pool
    from raytune_lora.tuning.job import plain_run, prepare_inputs

    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = (*COMMON, f"gpus_per_worker={gpus}", f"cache={folder / 'cache'}")
        store = prepare_inputs(compose([*common])).store
        os.environ.update(connect.ENVIRONMENT)
        settings: Any = {"object_store_memory": 128 * 2**20, "include_dashboard": False, "log_to_driver": False}
        ray.init(address="local", num_cpus=4, **settings)
        try:
            with Pool(plain_run(compose([*common])), folder / "pool", groups=1) as pool:
                for method in methods:
                    for quantization in QUANTIZATIONS:
                        cells += row(pool, store, folder, common, method, quantization)
        finally:
            ray.shutdown()
    return cells


def row(
    pool: Any, store: Any, folder: Path, common: tuple[str, ...], method: str, quantization: str
) -> list[dict[str, Any]]:
    """The cells of a method on a quantization."""
    cells: list[dict[str, Any]] = []
    known: list[float] | None = None
    for stage in STAGES:
        checkpointing = f"training.gradient_checkpointing={str(method != 'prefix_tuning').lower()}"
        own = (f"method={method}", f"quantization={quantization}", f"deepspeed={stage}", checkpointing)
        cell = one(pool, store, folder / uuid.uuid4().hex, [*common, *own, *METHODS_ON.get(method, ())])
        cell = {"method": method, "quantization": quantization, "stage": stage, **cell}
        if cell["state"] == "pass":
            known = known or cell["losses"]
            difference = max(abs(a - b) for a, b in zip(known, cell["losses"], strict=True))
            cell["difference"] = difference
            if not difference <= TOLERANCE:
                cell |= {"state": "differs", "why": f"by {difference:.2e}: {cell['losses']} and {known}"}
        cells.append(cell)
        print(f"{method:14} {quantization:5} {stage:6} {cell['state']}", flush=True)
    return cells


def one(pool: Any, store: Any, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train a combination, or say why not."""
    from raytune_lora.config.compose import compose
    from raytune_lora.config.validate import problems
    from raytune_lora.models.methods import fit
    from raytune_lora.training.task import TaskFailed
    from raytune_lora.tuning.isolated import train
    from raytune_lora.tuning.job import plain_run

    cfg = plain_run(compose(overrides))
    refused = problems(cfg) + fit.problems(cfg)
    if refused:
        return {"state": "refused", "why": "; ".join(refused)}
    folder.mkdir()
    try:
        list(train(pool.board, folder.name, cfg, store, folder.parent))
    except TaskFailed as failure:
        return {"state": "fails", "why": str(failure)}
    losses = [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
    if len(losses) != cfg.training.max_steps or not all(map(math.isfinite, losses)):
        return {"state": "fails", "why": f"losses {losses}"}
    return {"state": "pass", "why": "", "losses": losses}


def table(cells: list[dict[str, Any]]) -> str:
    """Methods down; for each quantization, the stages across."""
    marks = {"pass": "yes", "refused": "-", "differs": "DIFF", "fails": "FAIL"}
    head = "method        " + "".join(f" | {q}: " + " ".join(f"{s:5}" for s in STAGES) for q in QUANTIZATIONS)
    lines = [head, "-" * len(head)]
    for method in dict.fromkeys(cell["method"] for cell in cells):
        line = f"{method:14}"
        for quantization in QUANTIZATIONS:
            mine = [c for c in cells if (c["method"], c["quantization"]) == (method, quantization)]
            found = {cell["stage"]: marks[cell["state"]] for cell in mine}
            line += " | " + " " * (len(quantization) + 2) + " ".join(f"{found[stage]:5}" for stage in STAGES)
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
