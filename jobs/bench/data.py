"""How fast data is prepared, beside TRL's own preparation: ``python jobs/bench/data.py --json FILE``.

Both read the same JSONL file of Alpaca rows, tokenize it for the same model, mask the prompts and leave Arrow files
behind, in turns, each turn in a new process and with an empty cache; imports and the tokenizer do not count. The price
of each check is what preparation takes with that check alone. The exit status is 1 where ours, all checks off, gives
fewer rows a second than TRL's, where a worker waits longer than ``--first-batch`` seconds for its first batch, or where
all our processes together take more than ``--memory`` GB, as with a million rows:
``python jobs/bench/data.py --rows 1000000 --processes 2 --repeats 1 --checks``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

THEIRS, OFF, ALL = "TRL", "no checks", "all checks"
CHECKS = (
    "encoding",
    "control_characters",
    "leftovers",
    "exact_duplicates",
    "near_duplicates",
    "contradictions",
    "harmful",
    "outliers",
    "pii",
)
UNUSABLE = ("unreadable", "missing_fields", "wrong_types", "empty_fields")  # cannot be switched off
SYLLABLES = [consonant + vowel for consonant in "bdklmnr" for vowel in "aeiou"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer; a choice of the group model")
    parser.add_argument("--first-batch", type=float, default=0.5, help="seconds, at most")
    parser.add_argument("--memory", type=float, default=2.0, help="GB, at most, of ours")
    parser.add_argument("--checks", nargs="*", default=CHECKS, help="to be priced one by one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)  # what one process does
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(*args.side)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", args.rows)
        found = {n: measure(rows, args.model, n, args.repeats, args.checks) for n in args.processes}
        waits = [turn(rows, args.model, "first batch", 1)["seconds"] for _ in range(args.repeats)]
    ratios = {n: show(n, of) for n, of in found.items()}
    first = statistics.median(waits)
    print(f"\nfirst batch of a worker: {first:.3f} s after its store is ready (at most {args.first_batch:g})")
    peak = max(one["peak_memory"] for of in found.values() for side in of if side != THEIRS for one in of[side]) / 1e9
    print(f"memory of all our processes: {peak:.2f} GB (at most {args.memory:g})")
    within = min(ratios.values()) >= 1 and first <= args.first_batch and peak <= args.memory
    print(f"{'within' if within else 'ABOVE'} the limits: TRL's rows/s without checks, the first batch, memory")
    if args.json:
        answer = {
            "rows": args.rows,
            "turns": found,
            "ratios": ratios,
            "first_batch": waits,
            "memory": peak,
            "within": within,
        }
        args.json.write_text(json.dumps(answer | {"within": within}, indent=2) + "\n")
    return 0 if within else 1


def write_rows(path: Path, count: int) -> Path:
    """Rows of about 300 characters of made-up words, frequent and rare ones as in a language."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with path.open("w") as file:
        for _ in range(count):
            text = draw.choices(words, weights, k=52)
            row = {"instruction": " ".join(text[:8]), "input": " ".join(text[8:32]), "output": " ".join(text[32:])}
            file.write(json.dumps(row) + "\n")
    return path


def measure(rows: Path, model: str, processes: int, repeats: int, checks: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Turn by turn, what each side took."""
    sides = [THEIRS, OFF, *checks, ALL]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(repeats):
        for side in sides if number % 2 == 0 else sides[::-1]:
            found[side].append(turn(rows, model, side, processes))
        print(f"{processes} processes, turn {number + 1}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return found


def turn(rows: Path, model: str, side: str, processes: int) -> dict[str, Any]:
    """One side, in a process and a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--side", side, str(rows), model, str(processes), cache]
        environment = os.environ | {
            "HF_DATASETS_CACHE": f"{cache}/datasets",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer


def run_side(side: str, rows: str, model: str, processes: str, cache: str) -> dict[str, Any]:
    """What a process of its own does; seconds, tokens and the peak memory of it and its children, in bytes."""
    from raytune_lora.cache import Cache
    from raytune_lora.config.compose import compose
    from raytune_lora.models.sources import materialize
    from raytune_lora.models.tokenizer import load_tokenizer

    cfg = compose([f"model={model}", f"data.path={rows}", f"data.processes={processes}"])
    tokenizer = load_tokenizer(materialize(cfg.model, Cache(Path(cfg.cache).expanduser())), cfg.model)
    with watched_memory() as samples:
        if side == THEIRS:
            seconds, tokens = prepare_with_trl(rows, tokenizer, int(processes), cache)
        else:
            seconds, tokens = prepare_with_ours(side, cfg, tokenizer, cache)
    return {"seconds": seconds, "tokens": tokens, "peak_memory": max(samples)}


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Samples of the memory of this process and its children, in bytes; what they share counts once (PSS)."""
    samples, done = [0], threading.Event()

    def taken() -> int:
        children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
        family = ["self", *(child for some in children for child in some)]
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text().split() for pid in family]
        return sum(int(words[words.index("Pss:") + 1]) for words in rollups) * 1024

    def watch() -> None:
        while not done.wait(0.5):
            with suppress(OSError):  # a child has just ended
                samples.append(taken())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def prepare_with_ours(side: str, cfg: Any, tokenizer: Any, cache: str) -> tuple[float, int]:
    import datasets  # noqa: F401  # imports do not count

    from raytune_lora.cache import Cache
    from raytune_lora.config.data import Action
    from raytune_lora.data.prepare import prepare
    from raytune_lora.training.batches import Batches
    from raytune_lora.training.plan import plan_run

    for name, action in vars(cfg.data.quality).items():
        if isinstance(action, Action) and name not in UNUSABLE and side not in (name, ALL):
            setattr(cfg.data.quality, name, Action.off)
    if side not in ("pii", ALL):
        cfg.data.pii.action = Action.off
    began = time.perf_counter()
    store = prepare(cfg.data, lambda: tokenizer, "bench", Cache(Path(cache)))
    if side == "first batch":
        began = time.perf_counter()
        plan = plan_run(cfg, store.rows["train"], store.lengths("train"))
        Batches(store.split("train"), plan, 0, tokenizer.pad_token_id).step(0)
    return time.perf_counter() - began, sum(store.manifest["tokens"].values())


def prepare_with_trl(rows: str, tokenizer: Any, processes: int, cache: str) -> tuple[float, int]:
    """Format with ``datasets.map``; SFTTrainer tokenizes and masks as it is made. Its model is as small as can be."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    trl: Any = importlib.import_module("trl")
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    settings: Any = {"output_dir": cache, "max_length": 512, "dataset_num_proc": processes, "report_to": "none"}
    args = trl.SFTConfig(**settings, use_cpu=True, bf16=False)
    began = time.perf_counter()
    data = load_dataset("json", data_files=rows, split="train")
    data = data.map(as_prompt, num_proc=processes, remove_columns=data.column_names)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    prepared: Any = trainer.train_dataset
    return seconds, sum(len(ids) for ids in prepared["input_ids"])


def as_prompt(row: dict[str, str]) -> dict[str, str]:
    prompt = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
    return {"prompt": prompt, "completion": row["output"]}


def show(processes: int, found: dict[str, list[dict[str, Any]]]) -> float:
    """Print a table; the ratio of rows a second, ours without checks to TRL's, as the median over the turns."""
    print(f"\n{processes} processes{'seconds':>16}{'tokens/s':>12}{'to TRL':>9}{'to no checks':>14}{'peak GiB':>10}")
    for side, turns in found.items():
        seconds = statistics.median(one["seconds"] for one in turns)
        pairs = {base: zip(found[base], turns, strict=True) for base in (THEIRS, OFF)}
        to = {base: statistics.median(a["seconds"] / b["seconds"] for a, b in pair) for base, pair in pairs.items()}
        peak = max(one["peak_memory"] for one in turns) / 2**30
        speed = turns[0]["tokens"] / seconds
        print(f"{side:20}{seconds:7.1f}{speed:12.0f}{to[THEIRS]:9.2f}{1 / to[OFF]:13.2f}x{peak:10.2f}")
    return statistics.median(
        theirs["seconds"] / ours["seconds"] for theirs, ours in zip(found[THEIRS], found[OFF], strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
