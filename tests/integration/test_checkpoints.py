"""Runs that end in the middle and go on: killed, on other workers, under another ZeRO stage, with less memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.checkpoint import latest
from raytune_lora.training.driver import Pool
from raytune_lora.training.task import TaskFailed
from raytune_lora.tuning import isolated
from tests.integration import tasks
from tests.integration.conftest import Configure
from tests.integration.running import losses, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# fp32 on CPU: what is left is the order of sums between processes
TOLERANCE = 2e-6
STEPS, CUT = 6, 2
RUN = ("method.dropout=0.1", "training.micro_batch=2", f"training.max_steps={STEPS}", "evaluation.every=16")


@pytest.fixture(scope="module")
def cut(
    single: Pool, pair: Pool, store: TokenStore, configure: Configure, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The losses of a whole run, and the folder of one that was cut after two steps; each is run once."""
    known: dict[tuple[str, ...], tuple[list[float], Path]] = {}

    def cut_of(workers: int, *overrides: str) -> tuple[list[float], Path]:
        key = (f"workers={workers}", *RUN, *overrides)
        if key not in known:
            pool, folder = (single, pair)[workers - 1], tmp_path_factory.mktemp("cut")
            run(pool, store, folder / "whole", configure(*key))
            run(pool, store, folder / "cut", configure(*key), tasks.train_until_told)
            known[key] = losses(folder / "whole"), folder / "cut"
        return known[key]

    return cut_of


def gone_on(
    folder: Path, to: Path, pool: Pool, store: TokenStore, cfg: RunConfig, function: Any = tasks.train
) -> list[float]:
    """The losses of a run that goes on from the newest checkpoint of a folder, from the step after it."""
    shutil.copytree(folder, to)
    (to / "steps.jsonl").unlink()
    run(pool, store, to, cfg, function)
    return losses(to)


@pytest.mark.parametrize(
    ("workers", "deepspeed"),
    [(1, "zero2"), (1, "off"), (1, "zero0"), (2, "zero2"), (2, "zero3"), (1, "zero2_offload"), (2, "zero3_offload")],
)
def test_goes_on_as_if_never_stopped_to_the_last_bit(
    workers: int,
    deepspeed: str,
    cut: Any,
    single: Pool,
    pair: Pool,
    store: TokenStore,
    configure: Configure,
    tmp_path: Path,
) -> None:
    whole, folder = cut(workers, f"deepspeed={deepspeed}")
    assert latest(folder).step == CUT  # type: ignore[union-attr]
    cfg = configure(*RUN, f"workers={workers}", f"deepspeed={deepspeed}")
    assert gone_on(folder, tmp_path / "on", (single, pair)[workers - 1], store, cfg) == whole[CUT:]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "zero3"), (1, "off")),
        ((1, "off"), (2, "zero3")),
        ((2, "zero2"), (1, "zero3")),
        ((1, "zero2"), (2, "zero0")),
        ((2, "zero3"), (2, "zero1")),
        ((2, "zero3_offload"), (1, "off")),  # DeepSpeed's AdamW for the CPU, and torch's
    ],
)
def test_goes_on_with_other_workers_under_another_stage(
    before: tuple[int, str],
    after: tuple[int, str],
    cut: Any,
    single: Pool,
    pair: Pool,
    store: TokenStore,
    configure: Configure,
    tmp_path: Path,
) -> None:
    """Dropout and all: what a micro batch drops follows from its place in the run."""
    whole, folder = cut(before[0], f"deepspeed={before[1]}")
    cfg = configure(*RUN, f"workers={after[0]}", f"deepspeed={after[1]}")
    found = gone_on(folder, tmp_path / "on", (single, pair)[after[0] - 1], store, cfg)
    assert found == pytest.approx(whole[CUT:], abs=TOLERANCE)


def test_modules_trained_whole_go_on_under_another_stage(
    cut: Any, single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    saved = "method.modules_to_save=lm_head,norm"
    whole, folder = cut(2, "deepspeed=zero3", saved)
    cfg = configure(*RUN, "deepspeed=off", saved)
    found = gone_on(folder, tmp_path / "on", single, store, cfg)
    assert found == pytest.approx(whole[CUT:], abs=TOLERANCE)


@pytest.mark.parametrize(
    "method",
    [
        ["method=adalora", "method.start=0.1", "method.settle=0.2"],
        ["method=pissa"],
        ["method=ir_qlora", "method.r=8"],
        ["method=lora_plus"],
        ["method=diff_pruning"],
        ["method=full"],
    ],
    ids=lambda method: method[0].partition("=")[2],
)
def test_a_method_keeps_what_it_needs_beside_its_parameters(
    method: list[str], cut: Any, single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    run_without_dropout = RUN[1:]
    own = ["deepspeed=off", *method] if method[0] != "method=full" else ["deepspeed=zero3", *method]
    cfg = configure(*own, *run_without_dropout)
    run(single, store, tmp_path / "whole", cfg)
    run(single, store, tmp_path / "cut", cfg, tasks.train_until_told)
    assert gone_on(tmp_path / "cut", tmp_path / "on", single, store, cfg) == losses(tmp_path / "whole")[CUT:]


def test_a_checkpoint_holds_no_frozen_weight_and_says_what_it_holds(cut: Any) -> None:
    _, folder = cut(2, "deepspeed=zero3")
    checkpoint = latest(folder)
    assert checkpoint is not None
    names = checkpoint.weights.names
    assert all("lora_" in name for name in names)
    assert sorted(checkpoint.optimizer.names) == sorted(
        f"{key}/{n}" for key in ("exp_avg", "exp_avg_sq") for n in names
    )
    files = {str(path.relative_to(checkpoint.path)) for path in checkpoint.path.rglob("*") if path.is_file()}
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    assert files - {"manifest.json"} == set(manifest["files"]) == set(manifest["sha256"])
    with safe_open(checkpoint.path / "adapter" / "adapter_model.safetensors", framework="pt") as adapter:
        assert len(adapter.keys()) == len(names)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    cfg = configure(*RUN)
    run(single, store, tmp_path / "trial", cfg)
    whole = losses(tmp_path / "trial")
    newest = latest(tmp_path / "trial")
    assert newest is not None
    assert newest.step == STEPS
    victim = newest.path / "optimizer-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1  # the size stays
    victim.write_bytes(data)
    assert gone_on(tmp_path / "trial", tmp_path / "on", single, store, cfg) == whole[STEPS - 2 :]
    log = (tmp_path / "on" / "logs" / "worker-0.log").read_text()
    assert f"checkpoint-{STEPS:08d} is damaged (optimizer-00000.safetensors)" in log


def test_what_nobody_heard_is_said_again(single: Pool, store: TokenStore, configure: Configure, tmp_path: Path) -> None:
    """A trial whose driver is killed trains on until Ray notices: none of its losses is lost, nor its best model."""
    cfg = configure(*RUN)
    heard = run(single, store, tmp_path / "heard", cfg)
    assert len(heard) > 1
    assert run(single, store, tmp_path / "unheard", cfg, tasks.train_unheard) == []
    again = run(single, store, tmp_path / "unheard", cfg)
    assert [report["eval_loss"] for report in again] == [report["eval_loss"] for report in heard]
    assert all(Path(report["checkpoint"]).is_dir() for report in again)


def test_killed_while_it_saves_it_goes_on_to_the_last_bit(
    pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    """The group is replaced; nobody waits for the worker that is gone."""
    cfg = configure(*RUN, "workers=2")
    run(pair, store, tmp_path / "whole", cfg)
    with pytest.raises(TaskFailed) as caught:
        run(pair, store, tmp_path / "killed", cfg, tasks.train_with_a_crash)
    assert caught.value.ended.status == "lost"
    assert [p.name for p in (tmp_path / "killed").glob("checkpoint-*")] == [f"checkpoint-{CUT:08d}"]
    reports = run(pair, store, tmp_path / "killed", cfg)
    assert losses(tmp_path / "killed")[-(STEPS - CUT) :] == losses(tmp_path / "whole")[CUT:]
    assert [report["samples_seen"] for report in reports] == [16, 32, 48], "the one that was cut short came again"


def test_out_of_memory_goes_on_with_a_smaller_micro_batch(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configure(*RUN, "method.dropout=0", "training.micro_batch=4", "training.global_batch=8")
    run(single, store, tmp_path / "whole", cfg)
    monkeypatch.setattr(isolated, "_train", tasks.train_short_of_memory)
    reports = list(isolated.train(single.board, "short", cfg, store, tmp_path))
    measured = [(r["samples_seen"], r["micro_batch"]) for r in reports if "attempt" not in r]
    assert measured == [(16, 4), (16, 4), (16, 4), (32, 1), (48, 1)]
    assert [r["kind"] for r in reports if "attempt" in r] == ["oom", "oom"]
    assert losses(tmp_path / "short")[-(STEPS - CUT) :] == pytest.approx(
        losses(tmp_path / "whole")[CUT:], abs=TOLERANCE
    )
    nowhere = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, micro_batch=1))
    monkeypatch.setattr(isolated, "_train", tasks.never_enough_memory)
    with pytest.raises(TaskFailed) as caught:
        list(isolated.train(single.board, "never", nowhere, store, tmp_path))
    assert caught.value.ended.status == "oom"


def test_ends_after_validations_without_gain(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    cfg = configure(*RUN, "evaluation.every=8", "training.patience=3", "training.keep_checkpoints=1")
    reports = run(single, store, tmp_path / "trial", cfg, tasks.train_without_gain)
    assert [report["last"] for report in reports] == [False, False, False, True]
    kept = sorted(path.name for path in (tmp_path / "trial").glob("checkpoint-*"))
    assert kept == ["checkpoint-00000001", "checkpoint-00000004"], "the best and the newest"
    again = run(single, store, tmp_path / "trial", cfg)
    assert again == [reports[0], reports[-1]], "there is nothing left to do"
