"""What our trial costs beside a plain script of TRL's SFTTrainer: ``python jobs/bench/train_overhead.py --json FILE``.

Both train the same adapter on the same rows with as many threads at the same priority, in turns, each turn in new
processes: once the script, then a worker group that does three trials, the first of them fresh and the others warm. The
exit status is 1 where a step of ours takes more than ``--limit`` times a step of the script's.
"""

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import asdict, dataclass, field, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "tests" / "reference" / "sft.py"
REFERENCE, VARIANTS = "SFTTrainer", ("zero2", "off")
MID_SIZE = (
    "model=tiny",
    "model.layers=4",
    "model.hidden=512",
    "model.heads=8",
)  # about a second a step on a core
LENGTHS_ON_GPU = (512, 2048, 8192)

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


@dataclass
class Case:
    """What is trained; the same for both sides."""

    overrides: list[str]  # of the config: the model above all
    length: int  # tokens a row, a quarter of them the prompt
    steps: int
    global_batch: int
    micro_batch: int
    threads: int
    gpus: int
    folder: str  # of rows, store, caches and what runs leave
    trials: list[str] = field(default_factory=list)  # the values of ``deepspeed`` that one worker group tries in turn


@dataclass
class Measured:
    """One training run."""

    marks: dict[str, float]  # Unix times
    ends: list[float]  # Unix time of the end of each step
    cpu: list[float]  # CPU seconds of the process, at the same moments
    peak_memory: int | None = None  # bytes
    fresh: bool = False  # the first trial of its worker group

    def step_times(self) -> list[float]:
        """Seconds from the end of a step to the end of the next."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def step_cpu(self) -> list[float]:
        """CPU seconds of the same."""
        return [b - a for a, b in zip(self.cpu, self.cpu[1:], strict=False)]

    def parts(self, names: dict[str, tuple[str, str]]) -> dict[str, float]:
        """Seconds of each part of the launch."""
        marks = self.marks | {"first": self.ends[0]}
        return {name: marks[end] - marks[start] for name, (start, end) in names.items()}


# ----------------------------------------------------------------------------------------------------------------- ours


class TimedTraining:
    """The function of a trial's task, with the time of what happens in the worker; unpickled when it gets there."""

    def __init__(self) -> None:
        self.received = 0.0

    def __setstate__(self, state: Any) -> None:
        self.received = time.time()

    def __call__(self, cfg: Any, store: Any, place: Any) -> None:
        from raytune_lora.models.loading import load_model
        from raytune_lora.training import trainer, worker

        measured = Measured({"received": self.received, "function": time.time()}, [], [])
        marks = measured.marks
        train, begin = trainer.PlannedTrainer.train, trainer.Reporter.on_step_begin

        def timed_load(*arguments: Any) -> Any:
            marks["load"] = time.time()
            model = load_model(*arguments)
            marks["loaded"] = time.time()
            return model

        def timed_train(*arguments: Any, **options: Any) -> Any:
            marks["train"] = time.time()
            return train(*arguments, **options)

        def timed_begin(*arguments: Any, **options: Any) -> None:
            marks.setdefault("begin", time.time())
            begin(*arguments, **options)

        def timed_stopped() -> bool:  # asked for at the end of each step
            measured.ends.append(time.time())
            measured.cpu.append(time.process_time())
            return bool(place.stopped())

        with (
            patch.object(worker, "load_model", timed_load),
            patch.object(trainer.PlannedTrainer, "train", timed_train),
            patch.object(trainer.Reporter, "on_step_begin", timed_begin),
        ):
            worker.train(cfg, store, replace(place, stopped=timed_stopped))
        place.report({"measured": asdict(measured)})


def run_group(case: Case) -> list[Measured]:
    """One worker group, from nothing, and its trials. To be called in a process of its own."""
    from raytune_lora.cluster.connect import connected
    from raytune_lora.models.sources import materialize
    from raytune_lora.models.tokenizer import load_tokenizer
    from raytune_lora.training.driver import Pool, Task

    marks = {"process": STARTED, "imports": time.time()}
    cfg, store, folder = config(case, case.trials[0]), token_store(case), Path(case.folder)
    load_tokenizer(materialize(cfg.model, Path(cfg.cache)), cfg.model)
    marks["inputs"] = time.time()
    found = []
    with connected(cfg.cluster):
        marks["ray"] = time.time()
        with Pool(cfg, Path(tempfile.mkdtemp(dir=folder)), groups=1) as pool:
            for number, deepspeed in enumerate(case.trials):
                marks["submitted"] = time.time()
                where = Path(tempfile.mkdtemp(dir=folder))
                reports = list(pool.stream(Task(f"t{number}", TimedTraining(), config(case, deepspeed), store, where)))
                measured = Measured(**reports[-1]["measured"])
                measured.marks |= marks
                measured.fresh = number == 0
                measured.peak_memory = next(r["peak_memory_bytes"] for r in reports if "peak_memory_bytes" in r)
                found.append(measured)
    return found


def config(case: Case, deepspeed: str) -> Any:
    """Of one trial."""
    from raytune_lora.config.compose import compose
    from raytune_lora.tuning.job import plain_run

    batch = case.global_batch
    values = {
        "cache": f"{case.folder}/cache",
        "cpus_per_worker": case.threads,
        "gpus_per_worker": case.gpus,
        "deepspeed": deepspeed,
        "method.dropout": 0,
        "data": "fake",
        "training.global_batch": batch,
        "training.micro_batch": case.micro_batch,
        "training.max_steps": case.steps,
        "evaluation.every": batch * case.steps,
        "evaluation.loss_rows": case.micro_batch,
    }
    return plain_run(compose([*case.overrides, *(f"{key}={value}" for key, value in values.items())]))


# ------------------------------------------------------------------------------------------------------------- the data


def token_store(case: Case) -> Any:
    """The rows as trials read them."""
    from raytune_lora.data.store import TokenStore

    batch = case.global_batch
    return TokenStore(Path(case.folder) / "store", {"rows": {"train": batch * case.steps, "validation": batch}})


def write_data(case: Case) -> Path:
    """Random tokens, for both sides; the model's folder."""
    from datasets import Dataset

    from raytune_lora.models.sources import materialize
    from raytune_lora.models.tokenizer import load_tokenizer
    from raytune_lora.training.plan import permutation, plan_run

    cfg, store = config(case, VARIANTS[0]), token_store(case)
    model = materialize(cfg.model, Path(cfg.cache))
    vocabulary, draw = len(load_tokenizer(model, cfg.model)), random.Random(0)
    prompt = case.length // 4
    for split, count in store.rows.items():
        ids = [[draw.randrange(3, vocabulary) for _ in range(case.length)] for _ in range(count)]
        rows = [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]
        Dataset.from_list(rows).save_to_disk(str(store.folder / split))
        if split == "train":
            order = permutation(count, 0, plan_run(cfg, count).seed)
            lines = (json.dumps(rows[index]) + "\n" for index in order)
            (Path(case.folder) / "rows.jsonl").write_text("".join(lines))
    return model


# ------------------------------------------------------------------------------------------------------------ the turns


def environment(case: Case) -> dict[str, str]:
    """Of both sides: the same device, number of threads and priority."""
    own = {"OMP_NUM_THREADS": str(case.threads), "RAY_worker_niceness": "0", "HF_HUB_OFFLINE": "1"}
    device = {} if case.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | own | device | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run_reference(case: Case, model: Path) -> Measured:
    """The script in its process."""
    folder, cfg = Path(case.folder), config(case, VARIANTS[0])
    out = folder / "reference.json"
    values = {
        "model": model,
        "rows": folder / "rows.jsonl",
        "out": out,
        "r": cfg.method.r,
        "alpha": cfg.method.alpha,
        "steps": case.steps,
        "global-batch": case.global_batch,
        "micro-batch": case.micro_batch,
        "learning-rate": cfg.training.learning_rate,
        "weight-decay": cfg.training.weight_decay,
        "threads": case.threads,
    }
    command = [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in values.items())]
    finish(command, case)
    found = json.loads(out.read_text())
    return Measured(found["marks"], found["ends"], found["cpu"], found["peak_memory"])


def run_ours(case: Case) -> list[Measured]:
    """A worker group in a process of its own."""
    spec, out = Path(case.folder) / "case.json", Path(case.folder) / "ours.json"
    spec.write_text(json.dumps(asdict(case)))
    finish([sys.executable, __file__, "--group", str(spec), "--json", str(out)], case)
    return [Measured(**found) for found in json.loads(out.read_text())]


def finish(command: list[str], case: Case) -> None:
    """Run a command; what it says is shown only if it fails."""
    done = subprocess.run(command, env=environment(case), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def compare(case: Case, repeats: int) -> dict[str, list[list[Measured]]]:
    """Turn by turn. Each side's runs of each turn, the fresh one first."""
    model = write_data(case)
    found: dict[str, list[list[Measured]]] = {name: [] for name in (REFERENCE, *VARIANTS)}
    for turn in range(repeats):
        found[REFERENCE].append([run_reference(case, model)])
        first, second = VARIANTS if turn % 2 == 0 else VARIANTS[::-1]
        runs = run_ours(replace(case, trials=[first, second, first]))
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


def measure_gpu(case: Case) -> list[dict[str, Any]]:
    """Tokens a second and peak memory at several sequence lengths, by transformers' own attention (sdpa)."""
    rows = []
    for length in LENGTHS_ON_GPU:
        batch = max(1, max(LENGTHS_ON_GPU) // length)
        with tempfile.TemporaryDirectory() as folder:
            sized = replace(case, length=length, global_batch=batch, micro_batch=batch, gpus=1, folder=folder)
            found = compare(sized, repeats=1)
        for name, (runs,) in found.items():
            seconds = statistics.median(runs[-1].step_times())
            row = {"length": length, "side": name, "tokens_per_second": batch * length / seconds}
            rows.append(row | {"peak_memory_bytes": runs[-1].peak_memory})
            print(f"{length:6} {label(name):24}{row['tokens_per_second']:12.0f} tokens/s, {runs[-1].peak_memory} bytes")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help=f"of the config, the model above all; else {' '.join(MID_SIZE)}")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--limit", type=float, default=1.02, help="most that a step may take, of the script's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)  # the case of one worker group
    args = parser.parse_args()
    if args.group:
        runs = run_group(Case(**json.loads(args.group.read_text())))
        args.json.write_text(json.dumps([asdict(run) for run in runs]))
        return 0
    from raytune_lora.cluster.connect import local_node

    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.overrides or list(MID_SIZE), args.length, args.steps, 8, 4, args.threads, 0, folder)
        found = compare(case, args.repeats)
    steps, launch = summarize(found), launches(found)
    show(steps, launch)
    if local_node().gpus:
        gpu = measure_gpu(replace(case, overrides=args.overrides or ["model=smollm2"]))
    else:
        gpu = []
        print("\nno GPU here: tokens/s and peak memory at long sequences were not measured")
    ratios = {name: steps[name]["ratio"] for name in VARIANTS}
    within = max(ratios.values()) <= args.limit
    print(f"\n{'within' if within else 'ABOVE'} the limit of {args.limit} x the script's step")
    if args.json:
        answer = {"case": asdict(case), "limit": args.limit, "within": within, "steps": steps, "launch": launch}
        args.json.write_text(json.dumps(answer | {"gpu": gpu}, indent=2) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
