"""Tokens a second and memory of our trial beside a plain script of SFTTrainer: ``python jobs/bench/gpu_speed.py``.

LoRA and QLoRA at several lengths, on rows whose lengths vary as those of real data do: log-normal, the median a quarter
of the longest. Tokens are counted without padding. The script pads; ours runs plain, packed, and packed with Liger's
kernels or flash attention. All take the same rows in the same order in the same batches, in turns, each in new
processes, in bf16. The exit status is 1 where none of ours does ``--goal`` times the script's tokens a second with no
more memory. With ``--device cpu`` the code can be tried on a tiny model: in fp32, with resident memory, and not judged.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import REFERENCE, Case, Measured, OutOfMemory, environment, rows_file, run_ours, run_reference, write_data

ADAPTERS = {"lora": "none", "qlora": "nf4"}  # and the quantization of the base model
PACKED = "training.packing=true"
VARIANTS = {  # of ours, and the overrides that make them
    "plain": [],
    "packing": [PACKED],
    "packing + liger": [PACKED, "training.liger=true"],
    "packing + flash attention": [PACKED, "model.attention=flash_attention_2"],
}
NEEDS = {"packing + liger": "liger_kernel", "packing + flash attention": "flash_attn"}  # and a GPU
ON_GPU, ON_CPU = 32768, 512  # tokens of a forward pass at most, padding included, where --tokens does not say
PASSES = 4  # forward passes a step, of the script; packed rows may do with fewer
WARM_UP = 2  # steps that do not count: kernels are compiled in them
SPREAD = 0.8  # sigma of the log-normal lengths
GOAL = 1.7
OUT_OF_MEMORY = "out of memory"
VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "deepspeed", "liger-kernel", "flash-attn")


@dataclass
class Side:
    """What was measured of the script, or of one variant of ours."""

    why_not: str = ""  # nothing was measured, or memory ran out
    tokens_per_second: list[float] = field(default_factory=list)  # one a turn
    ratios: list[float] = field(default_factory=list)  # to the script's in the same turn
    peak_memory_bytes: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def memory(self) -> float:
        """Bytes."""
        return statistics.median(self.peak_memory_bytes)


@dataclass
class Cell:
    """One adapter at one length."""

    adapter: str
    length: int
    micro_batch: int
    global_batch: int
    tokens: list[int]  # of each step
    padding: float  # share of what the script computes
    sides: dict[str, Side]
    verdict: str = ""
    missed: bool = False


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(adapter: str, case: Case, repeats: int, deepspeed: str) -> Cell:
    """The sides turn by turn, every other turn backwards; memory that ran out once is not tried again."""
    with tempfile.TemporaryDirectory() as folder:
        case = replace(case, folder=folder, quantization=ADAPTERS[adapter])
        model = write_data(case)
        tokens, padding = count_tokens(case)
        cell = Cell(adapter, case.length, case.micro_batch, case.global_batch, tokens, padding, {REFERENCE: Side()})
        cell.sides |= {name: Side(why_not(name, case)) for name in VARIANTS}
        for turn in range(repeats):
            names = [name for name, side in cell.sides.items() if not side.why_not]
            for name in names if turn % 2 == 0 else names[::-1]:
                run_side(name, cell.sides[name], case, model, tokens, deepspeed)
            done = f"{adapter}, {case.length} tokens, turn {turn + 1} of {repeats}"
            print(done, file=sys.stderr, flush=True)
    theirs = cell.sides[REFERENCE].tokens_per_second
    for side in cell.sides.values():
        side.ratios = [a / b for a, b in zip(side.tokens_per_second, theirs, strict=False)]
    return cell


def run_side(name: str, side: Side, case: Case, model: Path, tokens: list[int], deepspeed: str) -> None:
    """One run of a side in processes of its own."""
    try:
        if name == REFERENCE:
            run = run_reference(case, model)
        else:
            (run,) = run_ours(replace(case, trials=[[f"deepspeed={deepspeed}", *VARIANTS[name]]]))
    except OutOfMemory:
        side.why_not = OUT_OF_MEMORY
    else:
        side.tokens_per_second.append(speed(run, tokens))
        side.peak_memory_bytes.append(run.peak_memory)


def speed(run: Measured, tokens: list[int]) -> float:
    """Tokens a second after the warm-up: of all steps together, as they differ in length."""
    return sum(tokens[WARM_UP:]) / (run.ends[-1] - run.ends[WARM_UP - 1])


def count_tokens(case: Case) -> tuple[list[int], float]:
    """Tokens of each step, and the share of padding in what the script computes."""
    lengths = [len(json.loads(line)["input_ids"]) for line in rows_file(case).read_text().splitlines()]
    steps = [sum(part) for part in parts(lengths, case.global_batch)]
    padded = sum(max(part) * len(part) for part in parts(lengths, case.micro_batch))
    return steps, 1 - sum(lengths) / padded


def parts(lengths: list[int], size: int) -> list[list[int]]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


def why_not(name: str, case: Case) -> str:
    """Why a variant cannot be measured here; empty where it can."""
    package = NEEDS.get(name)
    if package is None:
        return ""
    if not case.gpus:
        return "not measured: needs a GPU"
    missing = importlib.util.find_spec(package) is None
    return f"not measured: package {package} is not installed" if missing else ""


# ------------------------------------------------------------------------------------------------------------ answering


def judge(cell: Cell, goal: float) -> None:
    """Whether the best of ours that takes no more memory than the script reaches the goal."""
    script = cell.sides[REFERENCE]
    ran = {name: side for name, side in cell.sides.items() if name != REFERENCE and not side.why_not}
    if script.why_not:
        cell.missed = not ran
        ours = f"not ours ({', '.join(ran)})" if ran else "ours too: take fewer --tokens"
        cell.verdict = f"{'MISSED' if cell.missed else 'met'}: the script runs out of memory, {ours}"
        return
    able = [side for side in ran.values() if side.memory <= script.memory]
    best = max(able, key=lambda side: side.ratio, default=None)
    cell.missed = best is None or best.ratio < goal
    if best is not None:
        name = next(name for name, side in ran.items() if side is best)
        found = f"{best.ratio:.2f} x by {name}, with {best.memory / script.memory:.2f} x the memory"
    else:
        found = "all of ours take more memory than the script" if ran else "ours runs out of memory in every variant"
    cell.verdict = f"{'MISSED' if cell.missed else 'met'}: {found}"


def show(cell: Cell) -> None:
    """Print the table of a cell."""
    batches = f"{cell.micro_batch} rows a forward pass, {cell.global_batch} a step"
    title = f"{cell.adapter}, up to {cell.length} tokens a row"
    print(f"\n{title}: {batches}; {cell.padding:.0%} of what the script computes is padding")
    print(f"{'':34}{'tokens/s':>10}{'ratio':>8}  {'(least to most)':18}{'peak GiB':>9}{'ratio':>8}")
    script = cell.sides[REFERENCE]
    for name, side in cell.sides.items():
        label = name if name == REFERENCE else f"ours, {name}"
        print(f"{label:34}{side.why_not or figures(side, script)}")
    print(f"goal: {cell.verdict}", flush=True)


def figures(side: Side, script: Side) -> str:
    """Of a side that ran."""
    speed, memory = f"{statistics.median(side.tokens_per_second):10.0f}", f"{side.memory / 2**30:9.2f}"
    if script.why_not:  # no ratios
        return f"{speed}{'':28}{memory}"
    spread = f"({min(side.ratios):.3f} to {max(side.ratios):.3f})"
    return f"{speed}{side.ratio:8.3f}  {spread:18}{memory}{side.memory / script.memory:8.3f}"


def machine(case: Case) -> dict[str, Any]:
    """The device and its memory, and the versions of what decides the speed."""
    code = "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps([p.name, p.total_memory]))"
    if case.gpus:  # in another process: this one would keep a part of the GPU's memory
        command, env = [sys.executable, "-c", code], environment(case)
        name, memory = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    else:
        cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"CPU, {cpus[0].partition(':')[2].strip() if cpus else platform.machine()}"
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = {package: installed.get(package) for package in VERSIONS}
    return {"device": name, "memory_bytes": memory, "date": time.strftime("%Y-%m-%d %H:%M %z"), "versions": versions}


def arguments(gpus: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", help="of the config, the model above all; else smollm2, on the CPU tiny"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if gpus else "cpu")
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of the longest rows")
    parser.add_argument("--tokens", type=int, help="of a forward pass at most, padding included")
    parser.add_argument("--steps", type=int, default=10, help=f"of a run; the first {WARM_UP} do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--deepspeed", default="off", help="of ours: one GPU has nothing to divide (default: off)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--goal", type=float, default=GOAL, help="least ratio of tokens a second")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not gpus:
        parser.error("--device cuda: there is no GPU here; --device cpu tries the code on a tiny model")
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, which do not count")
    return args


def main() -> int:
    from raytune_lora.cluster.connect import local_node

    args = arguments(int(local_node().gpus))
    gpus = int(args.device == "cuda")
    overrides = args.overrides or ["model=smollm2" if gpus else "model=tiny"]
    cells: list[Cell] = []
    case = Case(overrides, 0, args.steps, 0, 0, args.threads, gpus, "", SPREAD)
    case.gradient_checkpointing = args.gradient_checkpointing
    about = machine(case)
    print(f"{about['device']}, {about['date']}, {' '.join(overrides)}, deepspeed {args.deepspeed}", flush=True)
    for adapter in args.adapters:
        for length in args.lengths:
            micro = max(1, (args.tokens or (ON_GPU if gpus else ON_CPU)) // length)
            sized = replace(case, length=length, micro_batch=micro, global_batch=PASSES * micro)
            cell = measure(adapter, sized, args.repeats, args.deepspeed)
            if gpus:
                judge(cell, args.goal)
            else:
                cell.verdict = "not judged without a GPU"
            show(cell)
            cells.append(cell)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"} | {"overrides": overrides}
        answer = about | {"settings": settings, "cells": [asdict(cell) for cell in cells]}
        args.json.write_text(json.dumps(answer, indent=2) + "\n")
    return int(any(cell.missed for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
