"""What is reported of a model: on which rows, how sure it is, and whether it is of the model that was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy import stats  # type: ignore[import-untyped]
from torch.nn import functional
from transformers import AutoModelForCausalLM

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import RunConfig, TinyModelConfig
from raytune_lora.data.encode import IGNORED
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import JobFailed, UserError
from raytune_lora.evaluation import ANSWERS
from raytune_lora.evaluation.compare import measure
from raytune_lora.evaluation.figures import disagreement, loss_interval, wilson
from raytune_lora.models.loading import load_model
from raytune_lora.training.metrics import mean_loss, row_losses, validation_loss
from raytune_lora.training.place import Place
from raytune_lora.tuning.folder import SweepFolder
from raytune_lora.tuning.job import SWEEP, Job, plain_run, prepare_inputs
from raytune_lora.tuning.results import write_results
from raytune_lora.tuning.trials import BASELINE, BEST, Journal
from tests.unit.zoo import ZOO, build

ROWS = 40  # of the validation split: a tenth asks for something else, at the end of the file


def content() -> list[dict[str, str]]:
    common = [{"instruction": "Say it.", "input": f"item {n}", "output": f"item {n}"} for n in range(ROWS * 9 // 10)]
    rare = [{"instruction": "거꾸로", "input": f"물건 {n}", "output": f"{n} 건물"} for n in range(ROWS // 10)]
    return common + rare


@pytest.fixture(scope="module")
def configured(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[RunConfig, TokenStore]]:
    """A run on rows sorted by kind, and its store."""
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("validation", content()), ("train", [{"prompt": "1", "completion": str(n)} for n in range(9)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = (
        f"data.path={folder}/train.jsonl",
        *(f"data.{x}_path={folder}/validation.jsonl" for x in ("test", "validation")),
    )
    common = ("model=tiny", "data=file", *keys, "data.quality.leakage=off", "evaluation.max_new_tokens=4")

    def composed(*overrides: str) -> tuple[RunConfig, TokenStore]:
        cfg = compose([*common, f"cache={cache}", *overrides])
        return plain_run(cfg), prepare_inputs(cfg).store

    return composed


def measured(cfg: RunConfig, store: TokenStore, folder: Path, adapter: Path | None = None) -> dict[str, Any]:
    reports: list[dict[str, Any]] = []

    def report(said: dict[str, Any]) -> bool:
        reports.append(said)
        return True

    place = Place(0, 1, folder, report, lambda: 0)
    measure(cfg, store, place, adapter=None if adapter is None else str(adapter))
    return reports[0]


def by_hand(model: Any, rows: Any) -> float:
    """The loss a row at a time, by transformers' own mean."""
    nats = tokens = 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != IGNORED).sum())
        nats += count * float(model(input_ids=ids, labels=labels).loss)
        tokens += count
    return nats / tokens


# ------------------------------------------------------------------------------------------------- on which rows


@torch.no_grad()
def test_final_figures_are_of_all_rows_and_say_which_the_trials_had(
    configured: Callable[..., tuple[RunConfig, TokenStore]], tiny_folder: Path, tmp_path: Path
) -> None:
    cfg, store = configured("evaluation.loss_rows=10", "evaluation.generate_rows=6")
    found = measured(cfg, store, tmp_path)
    split = list(store.split("validation"))
    assert len(split) == found["eval_loss_rows"] == ROWS
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert found["eval_loss"] == pytest.approx(by_hand(model, split), abs=1e-6)
    assert found["trial_loss"] == pytest.approx(by_hand(model, split[:10]), abs=1e-6)
    low, high = found["eval_loss_interval"]
    assert low < found["eval_loss"] < high
    assert (found["exact_match_rows"], found["exact_match_interval"][0]) == (6, 0.0)
    assert found["arithmetic"] == "float32"


@pytest.mark.parametrize(
    ("loss_rows", "final_rows", "count"), [(10, 25, 25), (30, 20, 30), (0, 5, ROWS), (5, 999, ROWS)]
)
def test_a_cap_says_how_many(
    loss_rows: int,
    final_rows: int,
    count: int,
    configured: Callable[..., tuple[RunConfig, TokenStore]],
    tmp_path: Path,
) -> None:
    rows = (f"evaluation.loss_rows={loss_rows}", f"evaluation.final_rows={final_rows}", "evaluation.generate_rows=0")
    found = measured(*configured(*rows), tmp_path)
    assert found["eval_loss_rows"] == count
    assert found["exact_match"] is found["exact_match_interval"] is None
    if count == (loss_rows or ROWS):
        assert found["trial_loss"] == found["eval_loss"]


def test_a_trial_is_measured_on_rows_of_all_kinds(configured: Callable[..., tuple[RunConfig, TokenStore]]) -> None:
    _, store = configured()
    assert any("건물" in answer for answer in store.split("validation")["answer"][: ROWS // 2])


# ------------------------------------------------------------------------------------------------------ the loss


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_each_row_has_its_own_loss_whatever_the_batch(
    batch: int, configured: Callable[..., tuple[RunConfig, TokenStore]], tiny_folder: Path
) -> None:
    _, store = configured()
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    split = store.split("validation")
    together = by_hand(model, split.select(range(5, 12)))
    found = row_losses(model, split, range(5, 12), batch=batch, pad_id=0, rank=0, workers=1)
    for (nats, tokens), row in zip(found.tolist(), split.select(range(5, 12)), strict=True):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = model(input_ids=ids[None]).logits[0, :-1]
        assert tokens == int((labels[1:] != IGNORED).sum())
        expected = functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
        assert nats == pytest.approx(float(expected), rel=1e-5)
    assert mean_loss(found) == pytest.approx(together, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ZOO)
def test_it_is_transformers_own_of_every_architecture(
    architecture: str, configured: Callable[..., tuple[RunConfig, TokenStore]]
) -> None:
    _, store = configured()
    split, model = store.split("validation").select(range(4)), build(architecture)
    expected = by_hand(model, split)
    assert validation_loss(model, split, rows=0, batch=4, pad_id=0, rank=0, workers=1) == pytest.approx(
        expected, abs=1e-5
    )


def test_virtual_tokens_shift_nothing(
    configured: Callable[..., tuple[RunConfig, TokenStore]], tiny_folder: Path
) -> None:
    _, store = configured()
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    split = store.split("validation").select(range(8))
    with torch.no_grad():
        expected = by_hand(model, split)
    assert validation_loss(model, split, rows=0, batch=3, pad_id=0, rank=0, workers=1) == pytest.approx(
        expected, abs=1e-6
    )


# ----------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("right", "asked"), [(0, 24), (12, 24), (24, 24), (1, 1), (3, 1000)])
def test_the_interval_of_a_share_is_wilsons(right: int, asked: int) -> None:
    expected = stats.binomtest(right, asked).proportion_ci(method="wilson")
    assert wilson(right, asked) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 0) is None


def test_the_interval_of_a_loss_is_the_bootstraps() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 40, 300).astype(float)
    nats = tokens * draw.gamma(2.0, 0.2, 300)
    found = loss_interval(nats, tokens)
    resampled = stats.bootstrap(
        (nats, tokens), lambda y, x, axis: y.sum(axis) / x.sum(axis), paired=True, method="basic", rng=1
    ).confidence_interval
    assert found == pytest.approx((resampled.low, resampled.high), rel=0.02)
    same = np.full(300, 7.0)  # rows of the same length: a mean, whose interval is Student's
    student = stats.t.interval(0.95, 299, nats.mean() / 7, stats.sem(nats / 7))
    assert loss_interval(nats, same) == pytest.approx(student)


def test_the_interval_of_a_loss_holds_it_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        tokens = draw.integers(5, 40, 60).astype(float)
        interval = loss_interval(tokens * draw.gamma(2.0, 0.2, 60), tokens)
        assert interval is not None
        held.append(interval[0] < 0.4 < interval[1])
    assert np.mean(held) == pytest.approx(0.95, abs=0.025)


def test_an_interval_needs_two_rows_and_a_number() -> None:
    assert loss_interval(np.array([1.0]), np.array([2.0])) is None
    assert loss_interval(np.array([1.0, math.nan]), np.array([2.0, 3.0])) is None
    assert loss_interval(np.zeros(3), np.zeros(3)) is None
    assert loss_interval(np.array([0.1, 3.0]), np.array([2.0, 2.0]))[0] == 0.0  # type: ignore[index]


# ------------------------------------------------------------------------------------------ what was trained or not


@pytest.mark.parametrize(
    ("arithmetic", "trial", "again", "agrees"),
    [
        ("float32", 0.5, 0.50001, True),
        ("float32", 0.5, 0.5003, False),
        ("float32", 8.0, 8.0008, True),
        ("bfloat16", 0.5, 0.51, True),
        ("bfloat16", 0.5, 0.48, False),
        ("int8", 0.5, 0.525, True),
        ("int8", 5.22, 5.52, False),
        ("float32", 0.5, math.nan, False),
    ],
)
def test_losses_agree_to_the_rounding_of_their_arithmetic(
    arithmetic: str, trial: float, again: float, agrees: bool
) -> None:
    found = disagreement(trial, {"trial_loss": again, "arithmetic": arithmetic})
    assert (found is None) == agrees


def test_an_adapter_that_was_changed_is_found(
    configured: Callable[..., tuple[RunConfig, TokenStore]], tiny_folder: Path, tmp_path: Path
) -> None:
    cfg, store = configured("evaluation.loss_rows=10", "evaluation.generate_rows=0")
    base = load_model(tiny_folder, TinyModelConfig(), cfg.quantization)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    split = store.split("validation")
    trial = validation_loss(model, split, rows=10, batch=4, pad_id=0, rank=0, workers=1)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert disagreement(trial, measured(cfg, store, tmp_path, tmp_path / "adapter")) is None
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1.1
    model.save_pretrained(str(tmp_path / "adapter"))
    found = disagreement(trial, measured(cfg, store, tmp_path, tmp_path / "adapter"))
    assert found is not None
    assert found["trial"] == trial != pytest.approx(found["measured"], abs=found["tolerance"])


def test_an_adapter_that_cannot_be_asked_has_its_loss_all_the_same(
    configured: Callable[..., tuple[RunConfig, TokenStore]],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg, store = configured("evaluation.loss_rows=4", "evaluation.final_rows=4", "evaluation.generate_rows=2")
    base = load_model(tiny_folder, TinyModelConfig(), cfg.quantization)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(str(tmp_path))
    asked = measured(cfg, store, tmp_path, tmp_path)
    assert (asked["exact_match_rows"], asked["unanswered"]) == (2, None)
    monkeypatch.setattr("raytune_lora.evaluation.generate._change", lambda *_: math.inf)
    found = measured(cfg, store, tmp_path, tmp_path)
    assert found["eval_loss"] == asked["eval_loss"]
    assert (found["exact_match"], found["exact_match_rows"]) == (None, 0)
    assert "evaluation.generate_rows=0" in found["unanswered"]
    with pytest.raises(UserError, match=r"evaluation\.generate_rows=0"):
        measured(cfg, store, tmp_path)


def test_the_coarsest_arithmetic_counts(
    configured: Callable[..., tuple[RunConfig, TokenStore]], tmp_path: Path
) -> None:
    few = ("evaluation.loss_rows=2", "evaluation.final_rows=2", "evaluation.generate_rows=0")
    for overrides, arithmetic in (
        (("quantization=nf4",), "float32"),
        (("quantization=nf4", "quantization.compute=bf16"), "bfloat16"),
        (("quantization=int8",), "int8"),
    ):
        assert measured(*configured(*few, *overrides), tmp_path)["arithmetic"] == arithmetic


REPORT: dict[str, Any] = {
    "samples_seen": 16,
    "eval_loss": 0.5,
    "train_loss": 0.6,
    "training_seconds": 1.0,
    "trainable_parameters": 1,
}
REPORT |= {"peak_memory_bytes": 1, "micro_batch": 1, "checkpoint": "/s/trials/0000/checkpoint-00000002", "last": True}
MEASURED = {"eval_loss": 8.1, "trial_loss": 8.0, "arithmetic": "float32", "exact_match": 0.0}


def ended(folder: SweepFolder) -> Journal:
    """The journal of a sweep whose one trial has ended."""
    journal = Journal(folder.journal)
    journal.append("phase", name=BASELINE, seconds=1.0, eval_loss=9.0, trial_loss=9.1, parameters=5)
    journal.append("trial_started", trial_id="0000", params={})
    journal.append("trial_result", trial_id="0000", **REPORT)
    journal.append("trial_ended", trial_id="0000", status="completed", error=None, seconds=1.0)
    return journal


def test_a_sweep_does_not_export_what_was_not_trained(cache: Path, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    journal = ended(folder)
    cfg = compose(["model=tiny", "data=fake", f"cache={cache}", f"output={tmp_path}"])
    store = TokenStore(tmp_path, {"fingerprint": "f", "rows": {"train": 1, "validation": 1, "test": 1}})
    unused: Any = None
    job = Job(SWEEP, cfg, folder, journal, unused, store, tmp_path, unused, unused)
    best = journal.record.best()
    assert best is not None
    job._see_that_it_is_what_was_trained(best, {**MEASURED, "trial_loss": 0.5})
    assert journal.record.mismatch is None
    with pytest.raises(JobFailed, match=r"is not what was trained: its loss is 8\.00000, .* was 0\.50000 on"):
        job._see_that_it_is_what_was_trained(best, MEASURED)

    for name in (BASELINE, BEST):
        folder.phase(name).mkdir()
        answer = {"prompt": "p", "expected": "e", "answer": "a"}
        (folder.phase(name) / ANSWERS).write_text(json.dumps(answer))
    again = Journal(folder.journal).record
    results = write_results(folder, cfg, store, again, kind=SWEEP, learned={})
    assert (results["state"], results["best"]["adapter"], results["best"]["eval_loss"]) == ("interrupted", None, None)
    assert results["best"]["trial_loss"] == 0.5
    assert results["best"]["mismatch"] | {"why": ""} == {
        "trial_id": "0000", "trial": 0.5, "measured": 8.0, "tolerance": 2**-13, "why": ""
    }  # fmt: skip
    assert results["examples"] == [], "its answers are no one's"
    assert "is not what was trained" in folder.report.read_text()

    journal.append("phase", name=BEST, seconds=1.0, **MEASURED)
    results = write_results(folder, cfg, store, journal.record, kind=SWEEP, learned={})
    assert results["best"]["mismatch"] is None
    assert (results["best"]["eval_loss"], results["best"]["trial_loss"]) == (8.1, 0.5), "as measured, and as trained"
    assert results["best"]["adapter"] == "best/adapter"
    assert len(results["examples"]) == 1
