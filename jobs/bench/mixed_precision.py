"""Losses of a run in bf16 beside the same run in fp32: ``python jobs/bench/mixed_precision.py``.

The same LoRA on the same rows, in fp32, and in bf16 as runs are: what trains in fp32, all else in bf16. The validation
loss is that of the end. The exit status is 1 where the two end further apart than ``--within``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from raytune_lora.config.compose import compose
from raytune_lora.training.place import Place
from raytune_lora.training.worker import clean_up, train
from raytune_lora.tuning.job import plain_run, prepare_inputs

COMMON = (
    *("data=fake", "deepspeed=off", "training.global_batch=8", "training.learning_rate=1e-3", "method.dropout=0"),
    *("evaluation.loss_rows=16", "evaluation.every=1000000", "training.patience=null"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the config, as method=dora")
    parser.add_argument("--model", default="smollm2", help="of conf/model (default: smollm2)")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps (default: 16)")
    parser.add_argument("--within", type=float, default=0.02, help="nats a token (default: 0.02)")
    parser.add_argument("--json", type=Path, help="file for the losses")
    args = parser.parse_args()
    own = [f"model={args.model}", f"training.max_steps={args.steps}", *args.overrides]
    found = {precision: losses([*COMMON, *own, f"model.precision={precision}"]) for precision in ("fp32", "bf16")}
    print(f"{'step':>10}{'fp32':>10}{'bf16':>10}{'apart':>10}")
    for step, pair in enumerate(zip(*(each["train"] for each in found.values()), strict=True), 1):
        print(f"{step:>10}{pair[0]:>10.4f}{pair[1]:>10.4f}{abs(pair[0] - pair[1]):>10.4f}")
    ends = [each["validation"] for each in found.values()]
    print(f"{'validation':>10}{ends[0]:>10.4f}{ends[1]:>10.4f}{abs(ends[0] - ends[1]):>10.4f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(abs(ends[0] - ends[1]) > args.within)


def losses(overrides: list[str]) -> dict[str, Any]:
    """Of each step, and of the validation at the end."""
    cfg = compose(overrides)
    store, reports = prepare_inputs(cfg).store, list[dict[str, Any]]()

    def hear(report: dict[str, Any]) -> bool:
        reports.append(report)
        return True

    with tempfile.TemporaryDirectory() as folder:
        train(plain_run(cfg), store, Place(0, 1, Path(folder), hear, lambda: 0))
        clean_up()
        lines = (Path(folder) / "steps.jsonl").read_text().splitlines()
    return {"train": [json.loads(line)["loss"] for line in lines], "validation": reports[-1]["eval_loss"]}


if __name__ == "__main__":
    raise SystemExit(main())
