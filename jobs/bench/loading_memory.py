"""What loading a base model under ZeRO-3 takes of memory: ``python jobs/bench/loading_memory.py --json FILE``.

A random Llama is written to a temporary folder and loaded by 1, 2 and 4 processes, by transformers and DeepSpeed alone
(stock) and by our divided loading (ours), in bf16 and quantized to NF4. Memory is resident memory over that of the
process before it loads, mapped files included; stock is measured up to the start of DeepSpeed's engine's division,
which ours has already made. Read is what a process has read of the weight files, each page once. The exit status is 1
where ours on most processes takes more than ``--limit`` times the peak of ours on one.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 0.4
SIZES = {  # of a Llama: hidden, intermediate, layers, vocabulary
    "small": (1024, 2816, 8, 8000),
    "1b": (2048, 5632, 22, 32000),
}
OF_A_GROUP = (1, 2, 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="1b", help="of the model (default: 1b)")
    parser.add_argument("--processes", type=int, nargs="+", default=list(OF_A_GROUP), help="default: 1 2 4")
    parser.add_argument("--how", nargs="+", default=["stock", "ours"], help="default: stock ours")
    parser.add_argument("--kinds", nargs="+", default=["nf4", "bf16"], help="number formats (default: nf4 bf16)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"default: {LIMIT}")
    parser.add_argument("--json", type=Path, help="file for the table")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # how, number format, folder
    args = parser.parse_args()
    if args.worker:
        how, kind, folder = args.worker
        print(json.dumps(load(how, kind, Path(folder))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        size = write_model(model, args.size)
        print(f"a Llama of {size / 1e9:.2f} billion parameters, {size * 2 / 2**30:.2f} GiB in bf16\n")
        todo = itertools.product(args.kinds, args.how, args.processes)
        rows = [measure(how, kind, count, model) for kind, how, count in todo]
    first, most = min(args.processes), max(args.processes)
    peaks = {(row["kind"], row["how"], row["processes"]): row["peak_gib"] for row in rows}
    ratios = {kind: peaks[kind, "ours", most] / peaks[kind, "ours", first] for kind in args.kinds}
    for kind, ratio in ratios.items():
        print(f"{kind}: ours on {most} processes peaks at {ratio:.2f} of ours on {first}, limit {args.limit:g}")
    if args.json:
        args.json.write_text(json.dumps({"parameters": size, "rows": rows, "ratios": ratios}, indent=2) + "\n")
    return int(max(ratios.values()) > args.limit and most > first)


def write_model(folder: Path, size: str) -> int:
    """A random model in bf16; how many parameters it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, vocabulary = SIZES[size]
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def measure(how: str, kind: str, count: int, model: Path) -> dict[str, Any]:
    """The worst of the processes that load together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--worker", how, kind, str(model)]
    common = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_DEEPSPEED": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    outs = [worker.communicate(timeout=1800)[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"{how} {kind} failed on {count} processes")
    found = [json.loads(out.strip().splitlines()[-1]) for out in outs]
    row = {"how": how, "kind": kind, "processes": count}
    row |= {key: max(each[key] for each in found) for key in found[0]}
    took = f"peak {row['peak_gib']:.2f} GiB, kept {row['kept_gib']:.2f} GiB, read {row['read_gib']:.2f} GiB"
    took += f", {row['seconds']:.0f} s"
    print(f"{kind:5} {how:6} {count} processes: {took}", flush=True)
    return row


def load(how: str, kind: str, folder: Path) -> dict[str, float]:
    """Load the model in this process of a group, and say what it took."""
    import contextlib
    import time

    import torch
    from accelerate import PartialState
    from transformers import TrainingArguments

    from raytune_lora.config.schema import HubModelConfig, Precision, Quantization, QuantizationConfig
    from raytune_lora.models.loading import load_model
    from raytune_lora.training.sharding import divided_loading

    torch.set_num_threads(1)
    PartialState(backend="gloo")
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(), deepspeed=settings, accelerator_config={"use_configured_state": True}
    )
    model_cfg = HubModelConfig(path=str(folder), precision=Precision.bf16)
    quantization = QuantizationConfig(kind=Quantization.nf4 if kind == "nf4" else Quantization.none)
    import_all()
    read = MappedReads()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    with divided_loading(args.hf_deepspeed_config) if how == "ours" else contextlib.nullcontext():
        model = load_model(folder, model_cfg, quantization)
    read.look()
    seconds = time.perf_counter() - began
    gc.collect()
    found = {"peak_gib": status("VmHWM") - before, "kept_gib": status("VmRSS") - before, "seconds": seconds}
    found["read_gib"] = read.total / 2**30
    assert any(True for _ in model.parameters())
    return found


class MappedReads:
    """How much of the weight files this process has read through its maps, with what it read and gave back."""

    def __init__(self) -> None:
        from raytune_lora.training import sharding

        self.total = 0
        give_back = sharding._give_memory_back

        def looked() -> None:
            self.look()
            give_back()

        sharding._give_memory_back = looked

    def look(self) -> None:
        """Count what is mapped now; it is given back right after."""
        weights = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first = line.split()[0]
            if not first.endswith(":"):
                weights = line.endswith(".safetensors")
            elif weights and first == "Rss:":
                self.total += int(line.split()[1]) * 1024


def import_all() -> None:
    """What loading would import is not to be counted as memory of the model."""
    import bitsandbytes
    import peft  # noqa: F401
    import torch
    from deepspeed.runtime.zero import partition_parameters  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    bitsandbytes.functional.quantize_4bit(torch.zeros(64, 64), quant_type="nf4", compress_statistics=True)


def status(key: str) -> float:
    """A figure of this process's memory, GiB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
