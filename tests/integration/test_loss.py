"""What a step minimizes: the mean loss over the answer tokens of its global batch, however the batch is divided."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.encode import IGNORED
from raytune_lora.data.store import TokenStore
from raytune_lora.models.export import ADAPTER
from raytune_lora.training.checkpoint import latest
from raytune_lora.training.driver import Pool
from raytune_lora.training.plan import permutation, plan_run, stream
from tests.integration import tasks
from tests.integration.conftest import Configure
from tests.integration.running import losses, run, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# fp32 on CPU: what is left is the order of sums
TOLERANCE = 2e-6
RATE = 0.5  # of plain gradient descent: an error of a gradient shows in the weights by half of it
TOTAL = 20  # samples, in steps of 8: the last step has 4
DESCENT = (
    "method.dropout=0",
    "training.max_steps=null",
    f"training.learning_rate={RATE}",
    "training.lr_scheduler=constant",
    "training.warmup=0",
    "training.weight_decay=0",
    "training.max_grad_norm=1e9",
)


@dataclass
class Descent:
    """A few steps of plain gradient descent."""

    losses: list[float]
    grad_norms: list[float]
    adapter: dict[str, torch.Tensor]  # after the last step


@pytest.fixture(scope="module")
def descent(store: TokenStore, configure: Configure) -> Callable[..., RunConfig]:
    """The config of a descent, with overrides."""
    epochs = f"training.epochs={TOTAL / store.rows['train']}"
    return lambda *overrides: configure(*DESCENT, epochs, *overrides)


def by_hand(
    cfg: RunConfig, store: TokenStore, folder: Path, mean: Callable[[list[torch.Tensor]], torch.Tensor]
) -> Descent:
    """The descent in torch, a row at a time.

    Args:
        cfg: the run.
        store: the data.
        folder: of the base model.
        mean: from the losses of each row's answer tokens to the loss of the global batch.
    """
    plan = plan_run(cfg, store.rows["train"])
    assert plan.total == TOTAL
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(stream(cfg.training.seed, "weights"))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    rows, order = store.split("train"), permutation(plan.rows, 0, plan.seed)
    found = Descent([], [], {})
    for start in range(0, TOTAL, plan.global_batch):
        tokens: list[torch.Tensor] = []
        for index in order[start : min(start + plan.global_batch, TOTAL)]:
            logprobs_TV = model(input_ids=torch.tensor([rows[index]["input_ids"]])).logits[0].log_softmax(-1)
            answer = [(t, label) for t, label in enumerate(rows[index]["labels"]) if label != IGNORED]
            tokens.append(torch.stack([-logprobs_TV[t - 1, label] for t, label in answer]))
        loss = mean(tokens)
        gradients = torch.autograd.grad(loss, trained)
        found.losses.append(loss.item())
        found.grad_norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= RATE * gradient
    found.adapter = {name: tensor.detach() for name, tensor in get_peft_model_state_dict(model).items()}
    return found


def over_tokens(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows).mean()


def over_rows(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([row.mean() for row in rows]).mean()


@pytest.fixture(scope="module")
def expected(descent: Callable[..., RunConfig], store: TokenStore, tiny_folder: Path) -> Descent:
    return by_hand(descent(), store, tiny_folder, over_tokens)


def test_another_mean_would_be_noticed(
    descent: Callable[..., RunConfig], expected: Descent, store: TokenStore, tiny_folder: Path
) -> None:
    other = by_hand(descent(), store, tiny_folder, over_rows)
    assert min(abs(a - b) for a, b in zip(other.losses, expected.losses, strict=True)) > 100 * TOLERANCE
    assert abs(other.grad_norms[0] - expected.grad_norms[0]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("workers", "micro_batch", "deepspeed"),
    [(1, 8, "zero2"), (1, 8, "off"), (1, 2, "zero2"), (1, 2, "off"), (2, 2, "zero2"), (2, 1, "zero3"), (2, 4, "off")],
)
def test_the_mean_over_the_answer_tokens_of_the_global_batch(
    workers: int,
    micro_batch: int,
    deepspeed: str,
    descent: Callable[..., RunConfig],
    expected: Descent,
    request: pytest.FixtureRequest,
    store: TokenStore,
    tmp_path: Path,
) -> None:
    pool: Pool = request.getfixturevalue("single" if workers == 1 else "pair")
    cfg = descent(f"workers={workers}", f"training.micro_batch={micro_batch}", f"deepspeed={deepspeed}")
    run(pool, store, tmp_path / "trial", cfg, tasks.train_by_plain_descent)
    found = steps(tmp_path / "trial")
    assert [step["loss"] for step in found] == pytest.approx(expected.losses, abs=TOLERANCE)
    assert [step["grad_norm"] for step in found] == pytest.approx(expected.grad_norms, abs=TOLERANCE)
    checkpoint = latest(tmp_path / "trial")
    assert checkpoint is not None
    adapter = load_file(checkpoint.path / ADAPTER / "adapter_model.safetensors")
    torch.testing.assert_close(adapter, expected.adapter, atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------------------------- random streams


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_seed_gives_the_same_losses_to_the_last_bit(
    workers: int, request: pytest.FixtureRequest, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    pool: Pool = request.getfixturevalue("single" if workers == 1 else "pair")
    cfg = configure(f"workers={workers}", "method.dropout=0.2", "training.max_steps=4")
    for name in ("once", "again"):
        run(pool, store, tmp_path / name, cfg)
    assert losses(tmp_path / "again") == losses(tmp_path / "once")


def test_a_change_of_one_random_stream_leaves_the_others(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    def streams(name: str, *overrides: str) -> dict[str, Any]:
        cfg = configure("training.max_steps=2", "deepspeed=off", *overrides)
        run(single, store, tmp_path / name, cfg, tasks.train_and_note_streams)
        return dict(json.loads((tmp_path / name / "streams-0.json").read_text()))

    usual = streams("usual", "method.dropout=0.1")
    assert streams("dropout", "method.dropout=0.4") == usual
    narrow = streams("narrow", "method.dropout=0.1", "method.r=4")  # draws fewer numbers for the adapter's start
    assert narrow["weights"] != usual["weights"]
    assert (narrow["order"], narrow["dropout"]) == (usual["order"], usual["dropout"])
    other = streams("other", "method.dropout=0.1", "training.seed=1")
    assert all(other[name] != usual[name] for name in usual)


def test_workers_start_alike_and_drop_differently(
    pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    cfg = configure("training.max_steps=2", "deepspeed=off", "workers=2", "method.dropout=0.1")
    run(pair, store, tmp_path / "trial", cfg, tasks.train_and_note_streams)
    first, second = (json.loads((tmp_path / "trial" / f"streams-{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert first["dropout"] != second["dropout"]
    assert first["order"] != second["order"]
