"""What only a GPU can say, in about ten minutes on one GPU without a network: ``python jobs/bench/gpu_check.py``.

It makes its own random models, in the shapes of SmolLM2-135M and Llama 3.1 8B. Each check runs in a process of its own,
so that none can take the others with it, and what one finds is shown at once: pass, fall short, or a figure without a
goal. Needed are torch, transformers, PEFT, accelerate and pyarrow; what needs bitsandbytes, DeepSpeed, flash-attn,
Liger or TRL says so where it is not there. The exit status is 1 where anything falls short or fails. With
``--device cpu`` the code can be tried on tiny models.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKS = (  # in this order: what would never start comes first
    "lora",
    "no_gpu",
    "sweeps",
    "packing",
    "micro_batch",
    "quantized",
    "oom",
    "resume",
    "full",
    "validation",
    "equal_lengths",
    "real_lengths",
)
VERSIONS = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "trl",
    "flash-attn",
    "liger-kernel",
)
WORDS = {True: "pass", False: "FALL SHORT", None: ""}
_ABOUT = """
import json, torch
found = {"device": "CPU", "memory_bytes": 0}
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    found = {"device": device.name, "memory_bytes": device.total_memory}
print(json.dumps(found))
"""


def check(name: str, folder: Path, device: str, limit: float) -> list[dict[str, Any]]:
    """The lines of one check; a last one says why it did not get to its end."""
    out = folder / f"{name}.jsonl"
    program = str(Path(__file__).with_name("gpu_checks.py"))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    env = os.environ | quiet | {"PYTHONPATH": path}
    why = ""
    try:
        command = [sys.executable, program, name, str(folder), device, str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=limit)
        (folder / f"{name}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            why = f"failed: {said[-1]}"
    except subprocess.TimeoutExpired:
        why = f"not done after {limit:.0f} s"
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if why:
        lines.append({"what": name, "found": why, "passed": False, "goal": "gets to its end"})
    return lines


def show(line: dict[str, Any]) -> None:
    goal = f"  ({line['goal']})" if line["goal"] else ""
    print(f"  {WORDS[line['passed']]:11}{line['what']}: {line['found']}{goal}", flush=True)


def about() -> dict[str, Any]:
    """The device, and the versions of what decides; asked in another process, which gives the GPU's memory back."""
    found = json.loads(subprocess.run([sys.executable, "-c", _ABOUT], capture_output=True, check=True).stdout)
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = {package: installed.get(package) for package in VERSIONS}
    return found | {"date": time.strftime("%Y-%m-%d %H:%M %z"), "versions": versions}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}; else all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--keep", type=Path, help="folder for models and logs, which stay there for the next call")
    parser.add_argument("--seconds", type=float, default=600, help="after which no further check begins")
    parser.add_argument("--limit", type=float, default=240, help="seconds of one check")
    args = parser.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    return args


def main() -> int:
    args, began = arguments(), time.monotonic()
    machine = about()
    if args.device == "cuda" and machine["device"] == "CPU":
        raise SystemExit("there is no GPU here; --device cpu tries the code on tiny models")
    print(f"{machine['device']}, {machine['date']}, {machine['versions']}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(args.keep or folder)
        where.mkdir(parents=True, exist_ok=True)
        for name in args.checks or CHECKS:
            (where / f"{name}.jsonl").unlink(missing_ok=True)
            start = time.monotonic()
            if start - began > args.seconds:
                print(f"{name}: not begun, {args.seconds:.0f} s are over", flush=True)
                found[name] = [{"what": name, "found": "not begun: no time", "passed": False, "goal": "is measured"}]
                continue
            found[name] = check(name, where, args.device, args.limit)
            print(f"{name} ({time.monotonic() - start:.0f} s)", flush=True)
            for line in found[name]:
                show(line)
            if args.json:  # as far as it got
                args.json.write_text(json.dumps(machine | {"checks": found}, indent=2) + "\n")
    short = sum(line["passed"] is False for lines in found.values() for line in lines)
    print(f"{short} fall short, after {time.monotonic() - began:.0f} s")
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main())
