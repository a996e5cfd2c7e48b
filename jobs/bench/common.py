"""Both sides of the training benchmarks: our trial in a worker group, and a plain script of TRL's SFTTrainer.

Each runs in new processes, on the same rows in the same order, with as many threads at the same priority. As a program
(``python common.py CASE OUT``) this is one worker group of ours.
"""

import time

STARTED = time.time()

import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "tests" / "reference" / "sft.py"
REFERENCE = "SFTTrainer"
_SHORTEST = 8  # tokens of a row


@dataclass
class Case:
    """What is trained; the same for both sides."""

    overrides: list[str]  # of the config: the model above all
    length: int  # tokens of the longest rows; of each row, a quarter is the prompt
    steps: int
    global_batch: int
    micro_batch: int
    threads: int
    gpus: int  # 0 or 1
    folder: str  # of rows, store, caches and what runs leave
    spread: float = 0.0  # sigma of the log-normal lengths, whose median is a quarter of the longest; 0: all as long
    quantization: str = "none"  # of the base model: none or nf4
    gradient_checkpointing: bool = False
    trials: list[list[str]] = field(default_factory=list)  # further overrides of each trial that one group does in turn


@dataclass
class Measured:
    """One training run."""

    marks: dict[str, float]  # Unix times
    ends: list[float]  # Unix time of the end of each step
    cpu: list[float]  # CPU seconds of the process, at the same moments
    peak_memory: int = 0  # bytes up to the end of the last step: of the GPU allocated, or else resident
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


class OutOfMemory(Exception):
    """A side does not fit into memory."""


# ------------------------------------------------------------------------------------------------------------- the data


def write_data(case: Case) -> Path:
    """Random tokens, for both sides; the model's folder."""
    import pyarrow as pa

    from raytune_lora.cache import Cache
    from raytune_lora.models.sources import materialize
    from raytune_lora.models.tokenizer import load_tokenizer
    from raytune_lora.training.plan import permutation, plan_run

    cfg, store = config(case), token_store(case)
    model = materialize(cfg.model, Cache(Path(cfg.cache)))
    store.folder.mkdir()
    vocabulary, draw = len(load_tokenizer(model, cfg.model)), random.Random(0)
    for split, count in store.rows.items():
        ids = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in row_lengths(case, count)]
        rows = [{"input_ids": row, "labels": [-100] * (len(row) // 4) + row[len(row) // 4 :]} for row in ids]
        table = pa.Table.from_pylist(rows)
        path = str(store.folder / f"{split}.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        if split == "train":
            order = permutation(count, 0, plan_run(cfg, count).seed)
            lines = (json.dumps(rows[index]) + "\n" for index in order)
            rows_file(case).write_text("".join(lines))
    return model


def row_lengths(case: Case, count: int) -> list[int]:
    """Tokens of each row."""
    return real_lengths(count, case.length, case.spread) if case.spread else [case.length] * count


def real_lengths(count: int, longest: int, spread: float) -> list[int]:
    """Tokens of rows whose lengths vary as those of real data do: log-normal, the median a quarter of the longest.

    Args:
        count: of rows.
        longest: tokens of a row at most.
        spread: sigma of the lengths' logarithm.
    """
    draw, median = random.Random(0), longest / 4
    drawn = [round(median * math.exp(draw.gauss(0, spread))) for _ in range(count)]
    return [max(_SHORTEST, min(longest, length)) for length in drawn]


def rows_file(case: Case) -> Path:
    """JSONL of the training rows in the order in which both sides see them."""
    return Path(case.folder) / "rows.jsonl"


def token_store(case: Case) -> Any:
    """The rows as trials read them."""
    from raytune_lora.data.store import TokenStore

    batch = case.global_batch
    return TokenStore(Path(case.folder) / "store", {"rows": {"train": batch * case.steps, "validation": batch}})


# ----------------------------------------------------------------------------------------------------------------- ours


def config(case: Case, trial: list[str] | None = None) -> Any:
    """Of one trial."""
    from raytune_lora.config.compose import compose
    from raytune_lora.tuning.job import plain_run

    values = {
        "cache": f"{case.folder}/cache",
        "cpus_per_worker": case.threads,
        "gpus_per_worker": case.gpus,
        "quantization": case.quantization,
        "method.dropout": 0,
        "data": "fake",
        "data.max_length": case.length,
        "training.global_batch": case.global_batch,
        "training.micro_batch": case.micro_batch,
        "training.max_steps": case.steps,
        "training.gradient_checkpointing": str(case.gradient_checkpointing).lower(),
        "evaluation.every": case.global_batch * case.steps,
        "evaluation.loss_rows": 1,
        "evaluation.final_rows": 1,
    }
    common = [f"{key}={value}" for key, value in values.items()]
    return plain_run(compose([*case.overrides, *common, *(trial or [])]))


class TimedTraining:
    """The function of a trial's task, with the time of what happens in the worker; unpickled when it gets there."""

    def __init__(self) -> None:
        self.received = 0.0

    def __setstate__(self, state: Any) -> None:
        self.received = time.time()

    def keep(self, measured: Measured, place: Any) -> None:
        """Called when the training has returned or failed; what a trial that was stopped reports, nobody hears."""

    def __call__(self, cfg: Any, store: Any, place: Any) -> None:
        import torch

        from raytune_lora.training import resident, sharding, trainer, worker

        measured = Measured({"received": self.received, "function": time.time()}, [], [])
        marks = measured.marks
        train, begin = trainer.PlannedTrainer.train, trainer.Reporter.on_step_begin
        end = trainer.Reporter.obey
        build = trainer.PlannedTrainer.__init__

        def timed(load: Any) -> Any:
            def timed_load(*arguments: Any, **options: Any) -> Any:
                marks["load"] = time.time()
                model = load(*arguments, **options)
                marks["loaded"] = time.time()
                return model

            return timed_load

        def timed_build(*arguments: Any, **options: Any) -> None:
            marks["adapted"] = time.time()
            build(*arguments, **options)

        def timed_train(*arguments: Any, **options: Any) -> Any:
            marks["train"] = time.time()
            return train(*arguments, **options)

        def timed_begin(*arguments: Any, **options: Any) -> None:
            marks.setdefault("begin", time.time())
            begin(*arguments, **options)

        def timed_end(*arguments: Any, **options: Any) -> None:  # called at the end of each step
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            measured.ends.append(time.time())
            measured.cpu.append(time.process_time())
            measured.peak_memory = trainer.peak_memory()
            end(*arguments, **options)

        with (
            patch.object(worker, "base_model", timed(resident.base_model)),
            patch.object(worker, "divided_base", timed(sharding.divided_base)),
            patch.object(trainer.PlannedTrainer, "__init__", timed_build),
            patch.object(trainer.PlannedTrainer, "train", timed_train),
            patch.object(trainer.Reporter, "on_step_begin", timed_begin),
            patch.object(trainer.Reporter, "obey", timed_end),
        ):
            try:
                worker.train(cfg, store, place)
            finally:
                marks["returned"] = time.time()
                self.keep(measured, place)
        place.report({"measured": asdict(measured)})


def run_group(case: Case) -> list[Measured]:
    """One worker group, from nothing, and its trials. To be called in a process of its own."""
    from raytune_lora.cache import Cache
    from raytune_lora.cluster.connect import connected
    from raytune_lora.models.sources import materialize
    from raytune_lora.models.tokenizer import load_tokenizer
    from raytune_lora.training.driver import Pool
    from raytune_lora.training.failures import OOM
    from raytune_lora.training.task import Task, TaskFailed

    marks = {"process": STARTED, "imports": time.time()}
    cfg, store, folder = config(case, case.trials[0]), token_store(case), Path(case.folder)
    load_tokenizer(materialize(cfg.model, Cache(Path(cfg.cache))), cfg.model)
    marks["inputs"] = time.time()
    found = []
    with connected(cfg.cluster):
        marks["ray"] = time.time()
        with Pool(cfg, Path(tempfile.mkdtemp(dir=folder)), groups=1) as pool:
            for number, trial in enumerate(case.trials):
                marks["submitted"] = time.time()
                where = Path(tempfile.mkdtemp(dir=folder))
                task = Task(f"t{number}", TimedTraining(), config(case, trial), store, where)
                try:
                    measured = Measured(**list(pool.stream(task))[-1]["measured"])
                except TaskFailed as failure:
                    raise (MemoryError("out of memory") if failure.ended.status == OOM else failure) from failure
                measured.marks |= marks
                measured.fresh = number == 0
                found.append(measured)
    return found


# ------------------------------------------------------------------------------------------------------------ processes


def run_ours(case: Case) -> list[Measured]:
    """A worker group in a process of its own.

    Raises:
        OutOfMemory: a trial does not fit.
    """
    spec, out = Path(case.folder) / "case.json", Path(case.folder) / "ours.json"
    spec.write_text(json.dumps(asdict(case)))
    finish([sys.executable, __file__, str(spec), str(out)], case)
    return [Measured(**found) for found in json.loads(out.read_text())]


def run_reference(case: Case, model: Path) -> Measured:
    """The script in its process.

    Raises:
        OutOfMemory: it does not fit.
    """
    cfg, out = config(case), Path(case.folder) / "reference.json"
    values = {
        "model": model,
        "rows": rows_file(case),
        "out": out,
        "r": cfg.method.r,
        "alpha": cfg.method.alpha,
        "quantize": case.quantization,
        "steps": case.steps,
        "global-batch": case.global_batch,
        "micro-batch": case.micro_batch,
        "learning-rate": cfg.training.learning_rate,
        "weight-decay": cfg.training.weight_decay,
        "threads": case.threads,
    }
    flags = ["--gradient-checkpointing"] if case.gradient_checkpointing else []
    finish([sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in values.items()), *flags], case)
    found = json.loads(out.read_text())
    return Measured(found["marks"], found["ends"], found["cpu"], found["peak_memory"])


def environment(case: Case) -> dict[str, str]:
    """Of both sides: the same device, number of threads and priority."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if case.gpus else ""  # one: Trainer takes all
    own = {"OMP_NUM_THREADS": str(case.threads), "RAY_worker_niceness": "0", "CUDA_VISIBLE_DEVICES": visible}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | own | quiet


def finish(command: list[str], case: Case) -> None:
    """Run a command; what it says is shown only if it fails.

    Raises:
        OutOfMemory: it failed for want of memory.
    """
    from raytune_lora.training.failures import OOM, classify

    done = subprocess.run(command, env=environment(case), capture_output=True, text=True, check=False)
    if done.returncode and classify(RuntimeError(done.stderr)).status == OOM:
        raise OutOfMemory
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    runs = run_group(Case(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps([asdict(run) for run in runs]))
