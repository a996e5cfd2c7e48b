"""Runs for ``gpu_check.py``: random models made on the spot, rows in memory, our training and the peers' beside it.

Nothing here needs Ray, Hydra or a network.
"""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from raytune_lora.config.data import FakeDataConfig
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import DeepSpeedConfig, HubModelConfig, RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.models.sources import byte_tokenizer
from raytune_lora.training.place import Place

IGNORED = -100
_WARM_UP = 2  # steps that do not count: kernels are compiled in them

LLAMAS: dict[str, dict[str, Any]] = {  # the shapes of SmolLM2-135M and of Llama 3.1 8B, and small ones for the CPU
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY = {name: shape | _TINY | {"vocab_size": 1024} for name, shape in LLAMAS.items()}


# --------------------------------------------------------------------------------------------------- models and rows


@dataclass(frozen=True)
class Bench:
    """Where the checks run, and on what."""

    folder: Path
    gpu: bool

    @property
    def runs(self) -> Path:
        """Folder of what runs leave."""
        return self.folder / "runs"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")

    def model(self, size: str) -> Path:
        """Folder of a random Llama of that size, with a tokenizer of bytes; made once."""
        folder = self.folder / f"model-{size}"
        if (folder / "done").exists():
            return folder
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = (LLAMAS if self.gpu else TINY)[size]
        config = LlamaConfig(**shape, max_position_embeddings=16384, pad_token_id=0, bos_token_id=None, eos_token_id=1)
        torch.manual_seed(0)
        with torch.device(self.device):
            torch.set_default_dtype(torch.bfloat16 if self.gpu else torch.float32)
            model = LlamaForCausalLM(config)
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        (folder / "done").touch()
        del model
        freed()
        return folder


class Rows:
    """A split of a token store in memory: as much of ``datasets.Dataset`` as training and measuring use."""

    def __init__(self, table: pa.Table) -> None:
        self.data = table

    def __len__(self) -> int:
        return int(self.data.num_rows)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if isinstance(key, str):
            return self.data.column(key).to_pylist()
        if isinstance(key, int):
            return dict(self.data.slice(key, 1).to_pylist()[0])
        return dict(self.select(range(len(self))[key] if isinstance(key, slice) else key).data.to_pydict())

    def select(self, rows: Sequence[int]) -> Rows:
        return Rows(self.data.take(pa.array(list(rows), pa.int64())))

    def select_columns(self, names: list[str]) -> Rows:
        return Rows(self.data.select(names))


@dataclass(frozen=True)
class Store(TokenStore):
    """Random tokens, of each row a quarter as the prompt."""

    splits: dict[str, Rows] = field(default_factory=dict)

    def split(self, name: str) -> Any:
        return self.splits[name]


def store(lengths: Sequence[int], vocabulary: int, validation: int = 8) -> Store:
    """Rows of these lengths to train, and of the first of them to validate."""
    draw = random.Random(0)

    def rows(chosen: Sequence[int]) -> Rows:
        ids = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in chosen]
        labels = [[IGNORED] * (len(row) // 4) + row[len(row) // 4 :] for row in ids]
        return Rows(
            pa.table(
                {"input_ids": pa.array(ids, pa.list_(pa.int32())), "labels": pa.array(labels, pa.list_(pa.int32()))}
            )
        )

    splits = {"train": rows(lengths), "validation": rows(lengths[:validation])}
    return Store(Path(), {"rows": {name: len(split) for name, split in splits.items()}, "stop_ids": [1]}, splits)


# ---------------------------------------------------------------------------------------------------------- our runs


def run_config(bench: Bench, model: str, *, gpus: int | None = None, **changes: Any) -> RunConfig:
    """A LoRA run of all linear layers without DeepSpeed.

    Args:
        bench: where it runs.
        model: its size.
        gpus: of the worker; None takes what the bench has.
        changes: of the run's fields, and by ``training__micro_batch`` of those of its parts.
    """
    cfg = RunConfig(
        model=HubModelConfig(path=str(bench.model(model))),
        data=FakeDataConfig(),
        method=LoraMethodConfig(dropout=0.0),
        deepspeed=DeepSpeedConfig(enabled=False, stage=0),
        gpus_per_worker=int(bench.gpu) if gpus is None else gpus,
        cache=str(bench.folder / "cache"),
    )
    cfg.training.patience = None
    cfg.training.max_steps = 4
    cfg.training.global_batch = cfg.training.micro_batch = 4
    cfg.training.learning_rate = 1e-3
    cfg.evaluation.loss_rows = 8
    cfg.evaluation.every = 10**9
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        part: Any = cfg
        for parent in parents:
            part = getattr(part, parent)
        assert hasattr(part, leaf), key
        setattr(part, leaf, value)
    return cfg


@dataclass
class Run:
    """What a run of ours left."""

    reports: list[dict[str, Any]]
    steps: list[dict[str, Any]]  # as in steps.jsonl
    peak: int  # bytes of the GPU allocated at most
    folder: Path

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]

    @property
    def eval_loss(self) -> float:
        return float(self.reports[-1]["eval_loss"])

    @property
    def tokens_per_second(self) -> float:
        """Of tokens that are not padding, after the warm-up."""
        counted = self.steps[_WARM_UP:]
        tokens = sum(step["tokens_per_second"] * step["step_seconds"] for step in counted)
        return float(tokens / sum(step["step_seconds"] for step in counted))


def run(
    bench: Bench,
    cfg: RunConfig,
    rows: Store,
    folder: Path,
    *,
    seen: Callable[[Any], None] | None = None,
    until: int | None = None,
) -> Run:
    """Train a config in this process, as the only worker of a group.

    Args:
        bench: where it runs.
        cfg: the run.
        rows: the data.
        folder: of the run; one that holds checkpoints is gone on with.
        seen: is handed the trainer when the training has ended, while its model is still there.
        until: samples after which the run pauses.
    """
    from raytune_lora.training import resident, trainer, worker

    folder.mkdir(parents=True, exist_ok=True)
    reports: list[dict[str, Any]] = []

    def report(values: dict[str, Any]) -> bool:
        reports.append(values)
        return True

    train = trainer.PlannedTrainer.train

    def train_and_look(self: Any, *arguments: Any, **settings: Any) -> Any:
        found = train(self, *arguments, **settings)
        if seen is not None:
            seen(self)
        return found

    freed()
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.PlannedTrainer.train = train_and_look  # type: ignore[method-assign]
    try:
        join(cfg.gpus_per_worker > 0)
        worker.set_up(os.cpu_count() or 1)
        worker.train(cfg, rows, Place(0, 1, folder, report, lambda: 0), until)
        peak = trainer.peak_memory()
    finally:
        trainer.PlannedTrainer.train = train  # type: ignore[method-assign]
        worker.clean_up()
        resident.let_go()  # or it would be counted as the next run's
        freed()
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return Run(reports, [json.loads(line) for line in lines], peak, folder)


def join(gpu: bool) -> None:
    """Be a process group of one, as a worker under Ray is one of some; DeepSpeed wants it, and never another one."""
    if torch.distributed.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)
    torch.distributed.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1)


def freed() -> int:
    """Bytes of the GPU that are still allocated when what can go has gone."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_allocated())


def gpu_in_use() -> int:
    """Bytes of the GPU in use, by whoever: what PyTorch's own allocator does not know of is in it, too."""
    free, whole = torch.cuda.mem_get_info()
    return int(whole - free)


# -------------------------------------------------------------------------------------------------------- the peers'


@dataclass
class Peer:
    """What a run of a peer's showed."""

    losses: list[float]
    tokens_per_second: float
    peak: int


def in_our_order(cfg: RunConfig, rows: Store) -> Rows:
    """The training rows as our run takes them: the peers take them as they lie."""
    from raytune_lora.training.plan import permutation, plan_run

    split = rows.splits["train"]
    return split.select(permutation(len(split), 0, plan_run(cfg, len(split)).seed).tolist())


def hf_trainer(bench: Bench, cfg: RunConfig, rows: Store) -> Peer:
    """A plain script: transformers' Trainer, PEFT's LoRA, rows padded to the longest of a forward pass."""
    from transformers import DataCollatorForSeq2Seq, Trainer

    return _peer(bench, cfg, in_our_order(cfg, rows), Trainer, lambda tokenizer: DataCollatorForSeq2Seq(tokenizer))


def trl_trainer(bench: Bench, cfg: RunConfig, rows: Store) -> Peer:
    """TRL's SFTTrainer in its fastest form: without padding, by flash attention where that is installed.

    Raises:
        ImportError: TRL or its data library is not installed.
    """
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    return _peer(bench, cfg, Dataset(in_our_order(cfg, rows).data), SFTTrainer, None, SFTConfig)


def _peer(
    bench: Bench, cfg: RunConfig, rows: Any, trainer_class: Any, collator: Any, arguments_class: Any = None
) -> Peer:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
    from transformers.utils.import_utils import is_flash_attn_2_available

    freed()
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    padding_free = arguments_class is not None
    steps = cfg.training.max_steps
    assert steps is not None
    ends: list[float] = []
    losses: list[float] = []

    class Notes(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if bench.gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    folder = Path(cfg.model.path)  # type: ignore[attr-defined]
    attention = "flash_attention_2" if padding_free and bench.gpu and is_flash_attn_2_available() else "sdpa"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if bench.gpu else torch.float32, attn_implementation=attention
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.method.r,  # type: ignore[attr-defined]
        lora_alpha=cfg.method.alpha,  # type: ignore[attr-defined]
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings: dict[str, Any] = {
        "output_dir": str(bench.runs / "peer"),
        "max_steps": steps,
        "per_device_train_batch_size": cfg.training.micro_batch,
        "gradient_accumulation_steps": cfg.training.global_batch // cfg.training.micro_batch,
        "learning_rate": cfg.training.learning_rate,
        "weight_decay": cfg.training.weight_decay,
        "train_sampling_strategy": "sequential",
        "bf16": bench.gpu,
        "use_cpu": not bench.gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if padding_free:
        settings |= {"padding_free": attention == "flash_attention_2", "max_length": None, "packing": False}
        given = {"peft_config": lora, "processing_class": tokenizer}
    else:
        model, given = get_peft_model(model, lora), {"data_collator": collator(tokenizer)}
        settings["remove_unused_columns"] = False
    trainer = trainer_class(
        model=model,
        args=(arguments_class or TrainingArguments)(**settings),
        train_dataset=rows,
        callbacks=[Notes()],
        **given,
    )
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if bench.gpu else 0
    lengths = [len(row) for row in rows.data.column("input_ids").to_pylist()]
    batch = cfg.training.global_batch
    tokens = [sum(lengths[start : start + batch]) for start in range(0, len(lengths), batch)][:steps]
    del trainer, model
    freed()
    return Peer(losses, sum(tokens[_WARM_UP:]) / (ends[-1] - ends[_WARM_UP - 1]), peak)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios turn by turn: what slows a machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
