"""Host time of a step beside its arithmetic: ``python jobs/bench/host_time.py --json FILE``.

CPU time of the training loop's own thread from step to step, without what it takes to compute the loss, its gradients
and the optimizer's step: on a GPU, that much the kernels have to run ahead. A tiny model of many layers trains in this
process, without DeepSpeed and without Ray. Other programs on the machine change it little, as waiting is not counted.
The exit status is 1 where the median is above ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from raytune_lora.config.compose import compose
from raytune_lora.training.place import Place
from raytune_lora.training.trainer import PlannedTrainer, Reporter
from raytune_lora.training.worker import set_up, train
from raytune_lora.tuning.job import plain_run, prepare_inputs

ARITHMETIC = (
    *((PlannedTrainer, "compute_loss"), (Accelerator, "backward")),
    *((Accelerator, "clip_grad_norm_"), (AcceleratedOptimizer, "step")),
)
SKIPPED = 2  # first steps


class Clock:
    """Seconds of this thread, all of them and those of the arithmetic."""

    def __init__(self) -> None:
        self.arithmetic = 0.0
        self.begun: list[tuple[float, float]] = []  # at each step's begin

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **settings)
            finally:
                self.arithmetic += time.thread_time() - began

        return call

    def beginning(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            self.begun.append((time.thread_time(), self.arithmetic))
            return function(*arguments, **settings)

        return call

    def beside(self) -> list[float]:
        """Of each step."""
        pairs = zip(self.begun[SKIPPED:], self.begun[SKIPPED + 1 :], strict=False)
        return [(end[0] - start[0]) - (end[1] - start[1]) for start, end in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of the config")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--passes", type=int, default=4, help="forward passes a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=0.02, help="seconds")
    args = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        own = ["model=tiny", "data=fake", "deepspeed=off", f"model.layers={args.layers}", "model.hidden=32"]
        own += ["training.micro_batch=2", f"training.global_batch={2 * args.passes}", f"cache={folder}/cache"]
        own += [f"training.max_steps={args.steps}", "evaluation.every=1000000", "evaluation.loss_rows=1"]
        cfg = compose([*own, *args.overrides])
        store, where = prepare_inputs(cfg).store, Path(folder) / "trial"
        where.mkdir()
        set_up(1)
        begin = patch.object(Reporter, "on_step_begin", clock.beginning(Reporter.on_step_begin))
        patches = [patch.object(owner, name, clock.timed(getattr(owner, name))) for owner, name in ARITHMETIC]
        for each in (begin, *patches):
            each.start()
        train(plain_run(cfg), store, Place(0, 1, where, lambda _: True, lambda: 0))
    found = clock.beside()
    median = statistics.median(found)
    print(f"{1e3 * median:.1f} ms a step of {args.passes} forward passes (least {1e3 * min(found):.1f} ms)")
    if args.json:
        args.json.write_text(json.dumps({"case": vars(args) | {"json": None}, "seconds": found}, indent=2) + "\n")
    return 0 if median <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
