"""The checks of ``gpu_check.py``, each a function that yields what it found; as a program, one of them in its process.

python jobs/bench/gpu_checks.py CHECK FOLDER DEVICE OUT
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import real_lengths
from gpu_runs import (
    Bench,
    Run,
    Store,
    freed,
    gpu_in_use,
    hf_trainer,
    median_ratio,
    run,
    run_config,
    store,
    trl_trainer,
)

from raytune_lora.config.methods import FullMethodConfig
from raytune_lora.config.schema import Attention, ModelConfig, Optimizer, Quantization
from raytune_lora.training.precision import compute_in
from raytune_lora.training.scoring import scoring_of

GOAL = 1.7  # times the tokens a second of a plain script of transformers' Trainer
_CLOSE = 0.02  # relative difference of losses that bf16 and another order of sums explain
SWEEPS = {  # under Ray, and the overrides that make them
    "a sweep without GPUs": ["gpus_per_worker=0"],
    "a sweep on a GPU, ZeRO-2": ["gpus_per_worker=1", "search.concurrent=1"],
    "a sweep on a GPU, nf4, packed": [
        "gpus_per_worker=1",
        "search.concurrent=1",
        "quantization=nf4",
        "training.packing=true",
    ],
}
_SPREAD = 0.8  # sigma of the log-normal lengths of rows
_ROUNDS = 2  # of what is timed beside something else


@dataclass
class Line:
    """One line of the table."""

    what: str
    found: str
    passed: bool | None = None  # None: a figure without a goal
    goal: str = ""


def near(one: float, other: float, within: float = _CLOSE) -> bool:
    """Whether two numbers are equal but for rounding; never where one is not a number."""
    return math.isfinite(one) and math.isfinite(other) and abs(one - other) <= within * abs(other)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def losses(found: Run) -> str:
    return ", ".join(f"{loss:.4f}" for loss in found.losses)


# ------------------------------------------------------------------------------------------------ would be wrong


def lora(bench: Bench) -> Iterator[Line]:
    """Four LoRA steps without DeepSpeed and under ZeRO-2: losses, number formats, and the peak beside the plan."""
    from raytune_lora.models.planned import planned_memory
    from raytune_lora.models.shape import shape_of_folder

    rows, length = _rows(bench, "135M", [512] * 64)
    runs: dict[str, Run] = {}
    for name, enabled, stage in (("deepspeed off", False, 0), ("ZeRO-2", True, 2)):
        dtypes: dict[str, set[str]] = {}

        def look(trainer: Any, dtypes: dict[str, set[str]] = dtypes) -> None:
            for parameter in trainer.model.parameters():
                key = "trained" if parameter.requires_grad else "frozen"
                dtypes.setdefault(key, set()).add(str(parameter.dtype).removeprefix("torch."))

        cfg = run_config(bench, "135M", deepspeed__enabled=enabled, deepspeed__stage=stage)
        cfg.training.micro_batch = cfg.training.global_batch = 16
        runs[name] = found = run(bench, cfg, rows, bench.runs / f"lora-{stage}", seen=look)
        yield Line(f"{name}: losses", losses(found), all(map(math.isfinite, found.losses)), "finite")
        shown = "; ".join(f"{key} {'/'.join(sorted(kinds))}" for key, kinds in sorted(dtypes.items()))
        yield Line(f"{name}: number formats", shown, dtypes["trained"] == {"float32"}, "what trains is fp32")
        if bench.gpu:
            planned = planned_memory(cfg, shape_of_folder(bench.model("135M"), ModelConfig()), length)
            ratio = found.peak / (planned.total - planned.runtime)
            told = f"{gib(found.peak)}, {ratio:.2f} of the plan without its constants"
            yield Line(f"{name}: peak", told, 0.7 <= ratio <= 1.05, "0.70 to 1.05")
    off, zero = runs["deepspeed off"], runs["ZeRO-2"]
    gap = max(abs(a - b) / b for a, b in zip(off.losses, zero.losses, strict=True))
    yield Line("ZeRO-2 beside deepspeed off", f"losses differ by {gap:.1e}", gap <= _CLOSE, f"{_CLOSE:.0e}")


def no_gpu(bench: Bench) -> Iterator[Line]:
    """A run without a GPU on a machine that has one."""
    rows, _ = _rows(bench, "135M", [32] * 8)
    before = gpu_in_use() if bench.gpu else 0
    found = run(bench, run_config(bench, "135M", gpus=0, training__max_steps=2), rows, bench.runs / "no-gpu")
    after = gpu_in_use() if bench.gpu else 0
    yield Line("a run of gpus_per_worker=0: losses", losses(found), all(map(math.isfinite, found.losses)), "finite")
    untouched = not torch.cuda.is_initialized() or torch.cuda.max_memory_allocated() == 0
    yield Line("GPU memory that it took", gib(max(0, after - before)), untouched, "none")


def sweeps(bench: Bench) -> Iterator[Line]:
    """Sweeps under Ray, with GPUs and without, as a user starts them."""
    if missing := [name for name in ("ray", "hydra", "optuna", "datasets") if importlib.util.find_spec(name) is None]:
        yield Line("sweeps", f"not tried: {', '.join(missing)} not installed")
        return
    job = str(Path(__file__).parents[1] / "sweep.py")
    for name, changes in SWEEPS.items():
        out = bench.runs / f"sweep-{len(changes)}"
        told = ["experiment=tiny", f"cache={bench.runs}/cache", f"output={out}", *changes]
        if not bench.gpu:
            told.append("gpus_per_worker=0")
        done = subprocess.run([sys.executable, job, *told], capture_output=True, text=True, check=False)
        if done.returncode:
            yield Line(name, (done.stderr.strip().splitlines() or ["no word"])[-1], False, "ends with status 0")
            continue
        found = json.loads((out / "results.json").read_text())
        before, after = found["baseline"]["eval_loss"], found["best"]["eval_loss"]
        told_of = f"{len(found['trials'])} trials, validation loss {before:.3f} -> {after:.3f}"
        yield Line(name, told_of, after < before, "the best is better than the base model")


def full(bench: Bench) -> Iterator[Line]:
    """Full fine-tuning at a small rate: bf16 alone would round most steps away."""
    rows, _ = _rows(bench, "135M", [128] * 16)
    cfg = run_config(bench, "135M", method=FullMethodConfig(), training__learning_rate=2e-6)
    moved: list[float] = []

    def look(trainer: Any) -> None:
        from safetensors import safe_open

        with safe_open(bench.model("135M") / "model.safetensors", "pt") as file:
            name = next(key for key in file.keys() if key.endswith("q_proj.weight"))  # noqa: SIM118
            before = file.get_tensor(name).float()
        now = dict(trainer.model.named_parameters())
        after = next(value for key, value in now.items() if key.endswith(name)).detach().cpu().float()
        moved.append(float((before != after).float().mean()))

    found = run(bench, cfg, rows, bench.runs / "full", seen=look)
    yield Line("full fine-tuning: losses", losses(found), all(map(math.isfinite, found.losses)), "finite")
    yield Line("weights that moved", f"{moved[0]:.0%}", moved[0] > 0.9, "90 %")


def resume(bench: Bench) -> Iterator[Line]:
    """A checkpoint, and the run resumed from it."""
    rows, _ = _rows(bench, "135M", [128] * 32)
    for name, enabled, stage in (("deepspeed off", False, 0), ("ZeRO-2", True, 2)):
        settings: dict[str, Any] = {"training__max_steps": 8, "evaluation__every": 16, "method__dropout": 0.1}
        cfg = run_config(bench, "135M", deepspeed__enabled=enabled, deepspeed__stage=stage, **settings)
        whole = run(bench, cfg, rows, bench.runs / f"whole-{stage}")
        run(bench, cfg, rows, bench.runs / f"halves-{stage}", until=16)
        halves = run(bench, cfg, rows, bench.runs / f"halves-{stage}")
        gap = max(abs(a - b) for a, b in zip(whole.losses[4:], halves.losses[-4:], strict=True))
        passed = near(whole.eval_loss, halves.eval_loss, 2e-3)
        yield Line(
            f"{name}: resumed after half", f"losses differ by {gap:.1e} at most", passed, "validation loss: 0.2 %"
        )


def oom(bench: Bench) -> Iterator[Line]:
    """Memory that does not do: told as such, and given back."""
    from raytune_lora.training.failures import OOM, classify

    if not bench.gpu:
        yield Line("out of memory", "not tried without a GPU")
        return
    rows, _ = _rows(bench, "135M", [2048] * 64)
    before = freed()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 4 * 2**30 / whole))
    status = "it trained"
    try:
        cfg = run_config(bench, "135M", training__micro_batch=64, training__global_batch=64)
        run(bench, cfg, rows, bench.runs / "oom")
    except Exception as error:
        status = classify(error).status
    torch.cuda.set_per_process_memory_fraction(1.0)
    held = freed() - before
    yield Line("out of memory is classed as", status, status == OOM, OOM)
    yield Line("and leaves", gib(held), held < 2**26, "less than 64 MiB")
    few, _ = _rows(bench, "135M", [128] * 8)
    found = run(bench, run_config(bench, "135M"), few, bench.runs / "after-oom")
    yield Line("the next run in the process", losses(found), all(map(math.isfinite, found.losses)), "trains")


def quantized(bench: Bench) -> Iterator[Line]:
    """QLoRA, its paged optimizer twice in one process."""
    rows, _ = _rows(bench, "135M", [256] * 16)
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Line("nf4", "not measured: bitsandbytes is not installed")
        return
    plain = run(bench, run_config(bench, "135M"), rows, bench.runs / "unquantized")
    held = []
    for turn in range(2):
        cfg = run_config(bench, "135M", quantization__kind=Quantization.nf4)
        if bench.gpu:
            cfg.training.optimizer = Optimizer.paged_adamw_8bit
        found = run(bench, cfg, rows, bench.runs / f"nf4-{turn}")
        held.append(gpu_in_use() if bench.gpu else 0)
        passed = near(found.losses[0], plain.losses[0], 0.05)
        yield Line(
            f"nf4, run {turn + 1}: losses", losses(found), passed, f"the first within 5 % of {plain.losses[0]:.4f}"
        )
    if bench.gpu:
        yield Line("GPU memory in use after the second, over the first", gib(held[1] - held[0]), None)


# ------------------------------------------------------------------------------------------------------------- speed


def packing(bench: Bench) -> Iterator[Line]:
    """Packed rows by every attention there is: equal losses, and the time of a step."""
    rows, longest = _rows(bench, "135M", real_lengths(256, 2048, _SPREAD))
    settings: dict[str, Any] = {"training__micro_batch": 16, "training__global_batch": 16, "training__max_steps": 8}
    runs: dict[str, Run] = {}
    kinds = [Attention.auto, Attention.sdpa]
    if bench.gpu and importlib.util.find_spec("flash_attn") is not None:
        kinds.append(Attention.flash_attention_2)
    for packed in (False, True):
        for kind in kinds if packed else kinds[:1]:
            name = f"packed, attention {kind.value}" if packed else "padded"
            cfg = run_config(bench, "135M", **settings, training__packing=packed, model__attention=kind)
            cfg.data.max_length = longest
            runs[name] = run(bench, cfg, rows, bench.runs / f"packing-{name}")
    padded = runs["padded"]
    for name, found in runs.items():
        gap = max(abs(a - b) / b for a, b in zip(found.losses, padded.losses, strict=True))
        told = f"{found.tokens_per_second:,.0f} tokens/s, {gib(found.peak)}, losses differ by {gap:.1e}"
        yield Line(name, told, gap <= _CLOSE, f"losses within {_CLOSE:.0e}")
    if importlib.util.find_spec("flash_attn") is None:
        yield Line("packed, flash attention", "not measured: flash-attn is not installed")


def micro_batch(bench: Bench) -> Iterator[Line]:
    """One micro batch of the large model: what casts and a head that scores trained tokens only are worth."""
    from raytune_lora.training import trainer, worker

    rows, longest = _rows(bench, "8B", [1024] * 24)
    variants: dict[str, Any] = {"as it is": nullcontext()}
    variants["with PEFT's casts to fp32"] = patch.object(worker, "compute_in", _with_casts)
    variants["with all logits at once"] = patch.object(trainer.PlannedTrainer, "_prepare_scoring", _at_once)
    if bench.gpu and importlib.util.find_spec("liger_kernel") is not None:
        variants["with Liger's kernels"] = nullcontext()
    found: dict[str, Run] = {}
    for name, changed in variants.items():
        cfg = run_config(bench, "8B", training__max_steps=6, training__liger="Liger" in name)
        cfg.data.max_length = longest
        with changed:
            found[name] = run(bench, cfg, rows, bench.runs / f"micro-{len(found)}")
        gap = abs(found[name].losses[0] / found["as it is"].losses[0] - 1)
        told = (
            f"{found[name].tokens_per_second:,.0f} tokens/s, {gib(found[name].peak)}, first loss differs by {gap:.1e}"
        )
        yield Line(f"8B, {name}", told, gap <= _CLOSE, f"losses within {_CLOSE:.0e}")
    cfg = run_config(bench, "8B", training__max_steps=6)
    share, table = _idle(bench, lambda: run(bench, cfg, rows, bench.runs / "micro-profiled"))
    (bench.folder / "profile.txt").write_text(table)
    if bench.gpu:
        yield Line("8B, share of a run's steps in which the GPU is idle", f"{share:.1%}", share < 0.1, "10 %")


def _with_casts(model: Any, *arguments: Any, **settings: Any) -> None:
    compute_in(model, *arguments, **settings)
    for layer in model.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = True


def _at_once(trainer: Any) -> None:
    scoring_of(trainer.model).fits = False


def validation(bench: Bench) -> Iterator[Line]:
    """Validation takes no more memory than training."""
    if not bench.gpu:
        yield Line("validation's peak", "not measured without a GPU")
        return
    from raytune_lora.training.metrics import validation_loss

    rows, _ = _rows(bench, "8B", [1024] * 16)
    peaks: list[int] = []

    def look(trainer: Any) -> None:
        peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        split, batch = rows.split("validation"), trainer.args.per_device_train_batch_size
        validation_loss(trainer.model_wrapped, split, rows=0, batch=batch, pad_id=0, rank=0, workers=1)
        peaks.append(torch.cuda.max_memory_allocated())

    run(bench, run_config(bench, "8B", training__max_steps=3), rows, bench.runs / "validation", seen=look)
    told = f"{gib(peaks[1])} beside training's {gib(peaks[0])}"
    yield Line("validation's peak", told, peaks[1] <= peaks[0], "no more")


def equal_lengths(bench: Bench) -> Iterator[Line]:
    """The large model on rows as long as each other, beside plain scripts in the same process."""
    length = 2048 if bench.gpu else 64
    yield from _beside_peers(bench, [length] * 48, length)


def real_lengths_8b(bench: Bench) -> Iterator[Line]:
    """The same on rows whose lengths vary as those of real data do."""
    length = 2048 if bench.gpu else 64
    yield from _beside_peers(bench, real_lengths(96, length, _SPREAD), length)


def _beside_peers(bench: Bench, lengths: list[int], longest: int) -> Iterator[Line]:
    rows, _ = _rows(bench, "8B", lengths)
    batch = 8
    settings = {
        "training__global_batch": batch,
        "training__micro_batch": 4,
        "training__max_steps": len(lengths) // batch,
    }
    ours: list[Run] = []
    theirs: dict[str, list[Any]] = {"transformers' Trainer": [], "TRL": []}
    for turn in range(_ROUNDS):
        cfg = run_config(bench, "8B", **settings, training__packing=True)
        cfg.data.max_length = longest
        ours.append(run(bench, cfg, rows, bench.runs / f"peers-{len(lengths)}-{turn}"))
        theirs["transformers' Trainer"].append(hf_trainer(bench, cfg, rows))
        if importlib.util.find_spec("trl") is not None and importlib.util.find_spec("datasets") is not None:
            theirs["TRL"].append(trl_trainer(bench, cfg, rows))
    speeds = [found.tokens_per_second for found in ours]
    peak = min(found.peak for found in ours)
    yield Line("ours, packed", f"{max(speeds):,.0f} tokens/s, {gib(peak)}", None)
    for name, found in theirs.items():
        if not found:
            yield Line(name, "not measured: trl or datasets is not installed")
            continue
        ratio = median_ratio(speeds, [peer.tokens_per_second for peer in found])
        memory = peak / max(1, min(peer.peak for peer in found))
        told = f"{max(peer.tokens_per_second for peer in found):,.0f} tokens/s, {gib(found[0].peak)}; "
        told += f"ours {ratio:.2f} x with {memory:.2f} x the memory"
        judged = ratio >= GOAL and memory <= 1 if name == "transformers' Trainer" and bench.gpu else None
        yield Line(name, told, judged, f"{GOAL} x, no more memory" if judged is not None else "")
        gap = abs(found[0].losses[0] - ours[0].losses[0]) / found[0].losses[0]
        yield Line(f"{name}: first loss beside ours", f"differs by {gap:.1e}", gap <= _CLOSE, f"{_CLOSE:.0e}")


def _idle(bench: Bench, do: Callable[[], Any]) -> tuple[float, str]:
    """The share of the time between the first kernel and the last in which none runs, and a table of what does."""
    from torch.profiler import ProfilerActivity, profile

    if not bench.gpu:
        do()
        return math.nan, "no GPU"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        do()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type.name == "CUDA" and event.name != "Memcpy HtoD (Pageable -> Device)"
    )
    steps = spans[len(spans) // 3 :]  # of the last steps alone: what came before is loading
    busy, reached = 0.0, steps[0][0]
    for start, end in steps:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - steps[0][0]), found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)


def _rows(bench: Bench, size: str, lengths: list[int]) -> tuple[Store, int]:
    """Rows for the model of a size, and how long the longest is; a CPU takes short ones."""
    from transformers import AutoConfig

    lengths = lengths if bench.gpu else [max(8, length // 8) for length in lengths]
    return store(lengths, AutoConfig.from_pretrained(bench.model(size)).vocab_size), max(lengths)


CHECKS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "lora": lora,
    "no_gpu": no_gpu,
    "sweeps": sweeps,
    "packing": packing,
    "micro_batch": micro_batch,
    "quantized": quantized,
    "oom": oom,
    "resume": resume,
    "full": full,
    "validation": validation,
    "equal_lengths": equal_lengths,
    "real_lengths": real_lengths_8b,
}


def main() -> None:
    check, folder, device, out = sys.argv[1:]
    bench = Bench(Path(folder), gpu=device == "cuda")
    shutil.rmtree(bench.runs, ignore_errors=True)  # or a run would be resumed
    with Path(out).open("a") as file:
        for line in CHECKS[check](bench):
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
