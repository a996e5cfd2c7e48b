"""Curves of real trainings, for a task of ``search_quality.py``: ``python jobs/bench/quickstart_curves.py``.

Trains the quickstart, or what the overrides say, that often with parameters at random, which takes an hour or two of
two cores and goes on where it was ended, and stores the losses at each validation.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from surrogates import QUICKSTART

from raytune_lora.config.compose import compose
from raytune_lora.config.plain import to_plain
from raytune_lora.tuning.sweep import run_sweep
from raytune_lora.tuning.trials import Journal


def collect(args: argparse.Namespace) -> int:
    """Train, and store the curves; the exit status."""
    overrides = args.overrides or ["experiment=quickstart", "evaluation.every=4"]
    folder = args.folder.expanduser().absolute()
    settings = ["search=random", f"search.trials={args.trainings}", "scheduler=none", "evaluation.generate_rows=0"]
    seed = "+space.seed={key: training.seed, kind: int, low: 0, high: 100000}"  # so that the noise can be told
    going_on = (folder / "config.yaml").exists()
    where = f"resume={folder}" if going_on else f"output={folder}"
    cfg = compose([*overrides, *settings, seed, "training.patience=null", "training.keep_checkpoints=1", where])
    run_sweep(cfg, ["search.trials"] if going_on else [])
    record = Journal(folder / "journal.jsonl").record
    runs = [
        {
            "params": {key: value for key, value in trial.params.items() if key != "training.seed"},
            "status": trial.status,
            "losses": [point["eval_loss"] for point in trial.curve],
        }
        for trial in record.searched
        if trial.curve or trial.status == "diverged"
    ]
    whole = [trial for trial in record.searched if trial.last]
    if not whole:
        print(f"no trial of {folder} was trained to its end", file=sys.stderr)
        return 1
    seen = [int(point["samples_seen"]) for point in whole[0].curve]
    stored = {
        "experiment": " ".join(overrides),
        "total": seen[-1],
        "every": seen[0],
        "space": {name: to_plain(asdict(d)) for name, d in cfg.space.items() if name != "seed"},
        "runs": runs,
    }
    args.curves.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{len(runs)} curves of {len(seen)} validations in {args.curves}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the trainings' config; default: the quickstart's")
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("sweeps/quickstart-curves"), help="of the trainings")
    parser.add_argument("--curves", type=Path, default=QUICKSTART, help="file that is written")
    return collect(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
