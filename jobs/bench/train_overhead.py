"""What our trial costs beside a plain script of TRL's SFTTrainer: ``python jobs/bench/train_overhead.py --json FILE``.

Both train the same adapter on the same rows with as many threads at the same priority, in turns, each turn in new
processes: once the script, then a worker group that does three trials, the first of them fresh and the others warm. The
exit status is 1 where a step of ours takes more than ``--limit`` times a step of the script's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import REFERENCE, Case, Measured, run_ours, run_reference, write_data

VARIANTS = ("zero2", "off")  # of ``deepspeed``
MID_SIZE = (
    "model=tiny",
    "model.layers=4",
    "model.hidden=512",
    "model.heads=8",
)  # about a second a step on a core

# The parts of the time up to the first step, from which mark to which.
SCRIPT_PARTS = {
    "imports": ("process", "imports"),
    "tokenizer and rows": ("imports", "load"),
    "model load": ("load", "loaded"),
    "adapter and trainer": ("loaded", "train"),
    "engine start": ("train", "begin"),
    "first step": ("begin", "first"),
}
FRESH_PARTS = {
    "imports of the job": ("process", "imports"),
    "tokenizer and rows": ("imports", "inputs"),
    "Ray start": ("inputs", "ray"),
    "worker group start": ("ray", "received"),
}
WARM_PARTS = {"task to the worker": ("submitted", "received")}
WORKER_PARTS = {
    "imports of the worker": ("received", "function"),
    "process group and DeepSpeed's import": ("function", "load"),
    "model load": ("load", "loaded"),
    "adapter and trainer": ("loaded", "train"),
    "engine start": ("train", "begin"),
    "first step": ("begin", "first"),
}


# ------------------------------------------------------------------------------------------------------------ the turns


def compare(case: Case, repeats: int) -> dict[str, list[list[Measured]]]:
    """Turn by turn. Each side's runs of each turn, the fresh one first."""
    model = write_data(case)
    found: dict[str, list[list[Measured]]] = {name: [] for name in (REFERENCE, *VARIANTS)}
    for turn in range(repeats):
        found[REFERENCE].append([run_reference(case, model)])
        first, second = VARIANTS if turn % 2 == 0 else VARIANTS[::-1]
        trials = [[f"deepspeed={variant}"] for variant in (first, second, first)]
        runs = run_ours(replace(case, trials=trials))
        found[first].append([runs[0], runs[2]])
        found[second].append([runs[1]])
        print(f"turn {turn + 1} of {repeats}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------- the answer


def summarize(found: dict[str, list[list[Measured]]]) -> dict[str, Any]:
    """Medians of the step times, and ratios to the script's in the same turn."""
    answer: dict[str, Any] = {}
    for name, turns in found.items():
        wall = [statistics.median([t for run in runs for t in run.step_times()]) for runs in turns]
        cpu = [statistics.median([t for run in runs for t in run.step_cpu()]) for runs in turns]
        answer[name] = {"seconds": wall, "cpu_seconds": cpu}
        for kind in ("seconds", "cpu_seconds"):
            pairs = zip(answer[name][kind], answer[REFERENCE][kind], strict=True)
            answer[name][f"{kind}_ratios"] = [ours / theirs for ours, theirs in pairs]
        answer[name]["ratio"] = statistics.median(answer[name]["seconds_ratios"])
        answer[name]["cpu_ratio"] = statistics.median(answer[name]["cpu_seconds_ratios"])
        # other tenants of a machine only ever add time: where medians scatter, the fastest step tells more
        fastest = answer[name]["fastest"] = min(t for runs in turns for run in runs for t in run.step_times())
        answer[name]["fastest_ratio"] = fastest / answer[REFERENCE]["fastest"]
    return answer


def launches(found: dict[str, list[list[Measured]]]) -> dict[str, dict[str, float]]:
    """Seconds of each part up to the end of the first step, medians over the runs of a kind."""
    runs: dict[str, list[dict[str, float]]] = {REFERENCE: [turn[0].parts(SCRIPT_PARTS) for turn in found[REFERENCE]]}
    for name in VARIANTS:
        for run in (run for turn in found[name] for run in turn):
            kind, parts = ("fresh", FRESH_PARTS) if run.fresh else ("warm", WARM_PARTS)
            runs.setdefault(f"{kind} trial, deepspeed {name}", []).append(run.parts(parts | WORKER_PARTS))
    return {
        name: {part: statistics.median(parts[part] for parts in of_kind) for part in of_kind[0]}
        for name, of_kind in runs.items()
    }


def show(steps: dict[str, Any], launch: dict[str, dict[str, float]]) -> None:
    """Print both tables."""
    titles = f"{'median':>8}{'ratio':>8}  {'(least to most)':18}{'CPU':>8}{'ratio':>8}{'fastest':>9}{'ratio':>8}"
    print(f"\n{'seconds a step':24}{titles}")
    for name, of in steps.items():
        least, most = min(of["seconds_ratios"]), max(of["seconds_ratios"])
        wall = f"{statistics.median(of['seconds']):8.4f}{of['ratio']:8.3f}  {f'({least:.3f} to {most:.3f})':18}"
        cpu = f"{statistics.median(of['cpu_seconds']):8.4f}{of['cpu_ratio']:8.3f}"
        print(f"{label(name):24}{wall}{cpu}{of['fastest']:9.4f}{of['fastest_ratio']:8.3f}")
    print("\nfrom launch to the end of the first step, in seconds")
    for name, parts in launch.items():
        print(f"{name}: {sum(parts.values()):.1f}")
        print("".join(f"{seconds:10.2f}  {part}\n" for part, seconds in parts.items()), end="")


def label(name: str) -> str:
    return name if name == REFERENCE else f"ours, deepspeed {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help=f"of the config, the model above all; else {' '.join(MID_SIZE)}")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--limit", type=float, default=1.02, help="most that a step may take, of the script's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.overrides or list(MID_SIZE), args.length, args.steps, 8, 4, args.threads, 0, folder)
        found = compare(case, args.repeats)
    steps, launch = summarize(found), launches(found)
    show(steps, launch)
    ratios = {name: steps[name]["ratio"] for name in VARIANTS}
    within = max(ratios.values()) <= args.limit
    print(f"\n{'within' if within else 'ABOVE'} the limit of {args.limit} x the script's step")
    if args.json:
        answer = {"case": asdict(case), "limit": args.limit, "within": within, "steps": steps, "launch": launch}
        args.json.write_text(json.dumps(answer, indent=2) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
