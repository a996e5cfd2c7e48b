"""Real worker groups: Ray Train, DeepSpeed and PEFT on the tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_lora.data.store import TokenStore
from raytune_lora.training.batches import collate
from raytune_lora.training.driver import Pool
from raytune_lora.training.plan import permutation, plan_run, stream
from raytune_lora.training.task import TaskFailed
from tests.integration import tasks
from tests.integration.conftest import Configure
from tests.integration.running import losses, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# fp32 on CPU: what is left is the order of sums between processes
TOLERANCE = 2e-6
NO_DROPOUT = "method.dropout=0"


@pytest.fixture(scope="module")
def one_process(
    single: Pool, store: TokenStore, configure: Configure, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], float]:
    """Losses of each step and the last validation loss of one worker."""
    folder = tmp_path_factory.mktemp("one") / "trial"
    reports = run(single, store, folder, configure(NO_DROPOUT))
    return losses(folder), reports[-1]["eval_loss"]


def test_workers_without_gpus_see_none(pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path) -> None:
    """A machine that has some may run trials on its CPU all the same."""
    (seen,) = run(pair, store, tmp_path / "trial", configure("workers=2"), tasks.report_accelerator)
    assert seen == {"visible": "", "accelerator": "cpu"}


def test_equal_to_a_plain_loop_of_torch_and_peft(
    one_process: tuple[list[float], float], store: TokenStore, configure: Configure, tiny_folder: Path
) -> None:
    cfg = configure(NO_DROPOUT)
    plan = plan_run(cfg, store.rows["train"])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    torch.manual_seed(stream(cfg.training.seed, "weights"))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.training.learning_rate, weight_decay=cfg.training.weight_decay)
    # one step of warm-up, at half the peak, and half a cosine
    last = plan.steps - 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 if step == 0 else 0.5 + 0.5 * math.cos(math.pi * (step - 1) / last)
    )
    rows, order = store.split("train"), permutation(plan.rows, 0, plan.seed)
    found = []
    for step in range(plan.steps):
        batch = collate([rows[order[step * 8 + i]] for i in range(8)], pad_id=0)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg.training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert one_process[0] == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3", "zero0", "off"])
def test_two_workers_equal_one_and_read_different_data(
    deepspeed: str,
    pair: Pool,
    one_process: tuple[list[float], float],
    store: TokenStore,
    configure: Configure,
    tmp_path: Path,
) -> None:
    cfg = configure(NO_DROPOUT, "workers=2", "training.micro_batch=2", f"deepspeed={deepspeed}")
    reports = run(pair, store, tmp_path / "trial", cfg, tasks.train_and_note_positions)
    assert losses(tmp_path / "trial") == pytest.approx(one_process[0], abs=TOLERANCE)
    assert reports[-1]["eval_loss"] == pytest.approx(one_process[1], abs=TOLERANCE)
    seen = [json.loads((tmp_path / "trial" / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == list(range(0, 64, 2)), "the first samples of forward passes of two"


@pytest.mark.parametrize(("workers", "micro_batch", "passes"), [(1, 4, 1), (2, 1, 2)])
def test_packed_rows_give_the_losses_of_padded_ones(
    workers: int,
    micro_batch: int,
    passes: int,
    one_process: tuple[list[float], float],
    request: pytest.FixtureRequest,
    store: TokenStore,
    configure: Configure,
    tmp_path: Path,
) -> None:
    """In fewer forward passes a step, on each worker."""
    pool: Pool = request.getfixturevalue("single" if workers == 1 else "pair")
    cfg = configure(
        NO_DROPOUT,
        "training.packing=true",
        "data.max_length=256",
        f"workers={workers}",
        f"training.micro_batch={micro_batch}",
    )
    assert plan_run(cfg, store.rows["train"]).accumulation == 8 // (workers * micro_batch) > passes
    assert plan_run(cfg, store.rows["train"], store.lengths("train")).accumulation == passes
    run(pool, store, tmp_path / "trial", cfg)
    assert losses(tmp_path / "trial") == pytest.approx(one_process[0], abs=TOLERANCE)


def test_half_the_data_would_be_noticed(
    one_process: tuple[list[float], float], single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    """The losses of a run on half of each batch differ by far more than the tolerance above."""
    run(single, store, tmp_path / "trial", configure(NO_DROPOUT, "training.global_batch=4"))
    halves = losses(tmp_path / "trial")
    assert min(abs(a - b) for a, b in zip(halves, one_process[0], strict=True)) > 100 * TOLERANCE


def test_a_used_group_gives_the_losses_of_a_fresh_one(
    single: Pool, one_process: tuple[list[float], float], store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    run(single, store, tmp_path / "other", configure("method.r=4", "deepspeed=zero3", "training.max_steps=3"))
    run(single, store, tmp_path / "again", configure(NO_DROPOUT))
    assert losses(tmp_path / "again") == one_process[0]


def test_a_group_keeps_one_model_after_each_task(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    for deepspeed in ("zero2", "zero3", "zero0", "off"):
        run(single, store, tmp_path / deepspeed, configure(f"deepspeed={deepspeed}", "training.max_steps=2"))
    (report,) = run(single, store, tmp_path / "count", configure(), tasks.count_models)
    assert report["models"] == 1


def test_divergence_ends_the_task_and_not_the_group(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    with pytest.raises(TaskFailed, match="at step") as caught:
        run(single, store, tmp_path / "wild", configure("training.learning_rate=1e30", "training.max_grad_norm=1e30"))
    assert caught.value.ended.status == "diverged"
    assert run(single, store, tmp_path / "tame", configure("training.max_steps=4"))


def test_a_failing_task_is_told_with_its_reason(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    with pytest.raises(TaskFailed, match="made to fail") as caught:
        run(single, store, tmp_path / "failing", configure(), tasks.fail)
    assert caught.value.ended.status == "failed"
    assert "made to fail" in (tmp_path / "failing" / "logs" / "worker-0.log").read_text()


def test_any_worker_makes_a_whole_model(pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path) -> None:
    run(pair, store, tmp_path, configure("workers=2"), tasks.build_a_model)
    (folder,) = (tmp_path / "models").glob("tiny-*[0-9a-f]")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_four_workers_equal_one(
    ray_instance: None,
    one_process: tuple[list[float], float],
    store: TokenStore,
    configure: Configure,
    tmp_path: Path,
) -> None:
    own = (NO_DROPOUT, "workers=4", "training.micro_batch=1")
    with Pool(configure(*own), tmp_path / "four", groups=1) as four:
        for deepspeed in ("zero2", "zero3"):
            reports = run(four, store, tmp_path / deepspeed, configure(*own, f"deepspeed={deepspeed}"))
            assert losses(tmp_path / deepspeed) == pytest.approx(one_process[0], abs=TOLERANCE)
            assert reports[-1]["eval_loss"] == pytest.approx(one_process[1], abs=TOLERANCE)
