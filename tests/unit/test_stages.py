"""Two processes train in bf16 without DeepSpeed and under each ZeRO stage: the losses are those of a plain loop."""

from __future__ import annotations

import json
import os
from contextlib import closing
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.models.export import ADAPTER
from raytune_lora.models.methods.peft_method import WEIGHTS
from raytune_lora.training.checkpoint import latest
from raytune_lora.training.plan import permutation, plan_run, stream
from raytune_lora.tuning.job import plain_run, prepare_inputs
from tests.unit.test_exported import heard

pytestmark = pytest.mark.timeout(900)

STAGES = ("off", "zero0", "zero1", "zero2", "zero3")
RESUMED, CHUNKED, DIVIDED_HEAD = "zero2 and zero3", "zero3 in chunks", "zero3 with a head that trains"
ROUNDING = 2e-3  # nats: what order sums come in decides, now and then, to which bf16 number a weight is rounded
STEPS = 6
COMMON = (
    *("model=tiny", "model.precision=bf16", "data=fake", "method.dropout=0", "deepspeed.persistent=0"),
    *("training.global_batch=8", "training.micro_batch=2", f"training.max_steps={STEPS}", "training.warmup=0"),
    *("training.learning_rate=3e-3", "training.lr_scheduler=constant", "training.weight_decay=0", "workers=2"),
    *("evaluation.every=24", "evaluation.loss_rows=16"),
)


def composed(cache: Path, *overrides: str) -> tuple[RunConfig, TokenStore]:
    cfg = compose([*COMMON, f"cache={cache}", *overrides])
    return plain_run(cfg), prepare_inputs(cfg).store


def work(rank: int, cache: Path, folder: Path, port: int) -> None:
    """What each process does: one run after the other, as a worker of a resident group."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from raytune_lora.training import scoring
    from raytune_lora.training.place import Place
    from raytune_lora.training.worker import clean_up, train

    def run(name: str, *overrides: str, until: int | None = None) -> None:
        (folder / name).mkdir(exist_ok=True)
        cfg, store = composed(cache, *overrides)
        reports: list[Any] = []
        place = Place(rank, 2, folder / name, partial(heard, reports), lambda: 0)
        train(cfg, store, place, until)
        clean_up()
        if rank == 0:
            (folder / name / "last.json").write_text(json.dumps(reports[-1]))

    for stage in STAGES:
        run(stage, f"deepspeed={stage}")
    run(RESUMED, "deepspeed=zero2", until=24)
    run(RESUMED, "deepspeed=zero3")
    scoring.LOGITS = 20 * 272  # 20 tokens' worth
    run(CHUNKED, "deepspeed=zero3", "training.gradient_checkpointing=true")
    for stage in ("off", "zero3"):
        run(f"{stage} with a head that trains", f"deepspeed={stage}", "method.modules_to_save=[lm_head]")


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    composed(cache)
    folder = tmp_path_factory.mktemp("stages")
    with closing(socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(work, (cache, folder, port), nprocs=2)  # type: ignore[no-untyped-call]
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


def plain_losses(cfg: RunConfig, store: TokenStore, folder: Path) -> list[float]:
    """Each step's loss by transformers, PEFT and accelerate alone, in bf16, in one process."""
    plan, rows = plan_run(cfg, store.rows["train"]), store.split("train")
    order = permutation(plan.rows, 0, plan.seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(stream(cfg.training.seed, "weights"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    optimizer = torch.optim.AdamW(trained, lr=cfg.training.learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    found = []
    for start in range(0, plan.total, plan.global_batch):
        chosen = [rows[index] for index in order[start : start + plan.global_batch]]
        count = sum(label != -100 for row in chosen for label in row["labels"][1:])
        loss = torch.zeros(())
        for row in chosen:
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            with disable_input_dtype_casting(model):
                part = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(count)).loss
            accelerator.backward(part)
            loss += part.detach()
        accelerator.clip_grad_norm_(trained, cfg.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def test_every_stage_trains_as_a_plain_loop_does(trained: Path, cache: Path, tiny_folder: Path) -> None:
    expected = plain_losses(*composed(cache), tiny_folder)
    assert expected[-1] < expected[0] - 0.2
    for stage in STAGES:
        assert losses(trained / stage) == pytest.approx(expected, abs=ROUNDING), stage


def test_validations_agree(trained: Path) -> None:
    found = [json.loads((trained / stage / "last.json").read_text())["eval_loss"] for stage in STAGES]
    assert found == pytest.approx([found[0]] * len(found), abs=ROUNDING)


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_keep_what_trains_in_fp32(stage: str, trained: Path) -> None:
    checkpoint = latest(trained / stage)
    assert checkpoint is not None
    adapter = load_file(checkpoint.path / ADAPTER / WEIGHTS)
    tensors = [*checkpoint.weights.all().values(), *checkpoint.optimizer.all().values(), *adapter.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    finer = [t for t in adapter.values() if not torch.equal(t, t.bfloat16().float())]
    assert len(finer) == len(adapter), "they are no rounded ones"


def test_a_run_goes_on_under_another_stage(trained: Path) -> None:
    assert losses(trained / RESUMED) == pytest.approx(losses(trained / "zero2"), abs=ROUNDING)


def test_the_head_of_a_divided_model_scores_in_chunks(trained: Path) -> None:
    assert losses(trained / CHUNKED) == pytest.approx(losses(trained / "zero3"), abs=ROUNDING)
    assert losses(trained / DIVIDED_HEAD) == pytest.approx(losses(trained / "off with a head that trains"), abs=5e-3)
