"""Steps of the training loop: what they wait for, whose numbers are reported, and how batches come ahead of them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import DivergedError
from raytune_lora.training import trainer
from raytune_lora.training.batches import Batches, MicroBatch, StepBatches, Tokens, collate
from raytune_lora.training.numbers import Numbers
from raytune_lora.training.place import GO_ON, SAVE_AND_STOP, STOP, Place
from raytune_lora.training.plan import Plan, plan_run
from raytune_lora.training.worker import train
from raytune_lora.tuning.job import plain_run, prepare_inputs
from tests.unit.test_device import trained

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")  # of the host for what a GPU computes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Configs and the store of a tiny run, by overrides."""
    cache = tmp_path_factory.mktemp("cache")
    own = ("model=tiny", "data=fake", "deepspeed=off", "training.max_steps=6", "training.global_batch=8")
    own += ("evaluation.every=24", "evaluation.loss_rows=4", f"cache={cache}")

    def composed(*overrides: str) -> tuple[RunConfig, TokenStore]:
        cfg = compose([*own, *overrides])
        return plain_run(cfg), prepare_inputs(cfg).store

    return composed


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the step log says of each step, without times."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_second", "memory", "mfu")
    return [{key: value for key, value in line.items() if not any(word in key for word in timed)} for line in lines]


# ------------------------------------------------------------------------------------------------ what a step waits for


class Waits(TorchDispatchMode):
    """Counts what would have the host wait for a GPU, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = []
        self.passed: set[int] = set()  # tensors that are on the CPU wherever the rest is: an optimizer's step counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS and self.steps and id(args[0]) not in self.passed:
            self.steps[-1][name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("overrides", "a_pass"),
    [
        (["training.packing=true", "training.micro_batch=1", "data.max_length=512"], 0),
        (["training.micro_batch=2"], 2),  # transformers asks twice whether a mask hides anything
    ],
)
def test_a_step_does_not_wait_for_what_it_computes(
    overrides: list[str], a_pass: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, store = tiny(*overrides)
    seen, passes = Waits(), plan_run(cfg, store.rows["train"], store.lengths("train")).accumulation

    class Watched(trainer.PlannedTrainer):
        def _forward_and_backward(self, model: Any, batches: StepBatches) -> torch.Tensor:
            seen.steps.append(Counter())
            states = self.optimizer.state.values()  # type: ignore[union-attr]
            seen.passed = {id(state["step"]) for state in states}
            return super()._forward_and_backward(model, batches)

        def _end_step(self, model: Any, numbers: Numbers) -> None:
            before = Counter(seen.steps[-1])
            super()._end_step(model, numbers)
            validated = self._plan.evaluates_after(self.state.global_step)
            seen.steps[-1] = before if validated else seen.steps[-1]

    monkeypatch.setattr("raytune_lora.training.worker.PlannedTrainer", Watched)
    with seen:
        trained(cfg, store, tmp_path / "trial")
    assert len(seen.steps) == 6
    for step in seen.steps[1:-1]:  # the first looks at more, and the run ends in the last
        assert sum(step.values()) <= passes * a_pass, step


# ------------------------------------------------------------------------------------------------------ whose numbers


def reading_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(trainer, "Numbers", partial(Numbers, late=True))


def test_numbers_that_are_read_late_are_of_the_right_step(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, store = tiny("training.micro_batch=4")
    at_once = trained(cfg, store, tmp_path / "at-once")
    reading_late(monkeypatch)
    late = trained(cfg, store, tmp_path / "late")
    assert steps(tmp_path / "late") == steps(tmp_path / "at-once")
    assert [line["step"] for line in steps(tmp_path / "late")] == [1, 2, 3, 4, 5, 6]
    for key in ("eval_loss", "train_loss", "samples_seen", "last"):
        assert late[key] == at_once[key]


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_diverges_names_the_step(
    late: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:
        reading_late(monkeypatch)
    cfg, store = tiny("training.learning_rate=1e30", "training.max_grad_norm=1e30")
    with pytest.raises(DivergedError) as caught:
        trained(cfg, store, tmp_path / "trial")
    assert caught.value.step == 2


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", [STOP, SAVE_AND_STOP])
def test_who_is_asked_to_stop_does_so_a_step_later_at_most(
    how: int, late: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:
        reading_late(monkeypatch)
    cfg, store = tiny("evaluation.every=1000")
    asked = iter([GO_ON, how, how])
    place = Place(0, 1, tmp_path, lambda _: True, lambda: next(asked), ask_every=0)
    if how == SAVE_AND_STOP:
        with pytest.raises(Exception, match=f"saved at step {3 if late else 2}"):
            train(cfg, store, place)
    else:
        train(cfg, store, place)
    assert len(steps(tmp_path)) == (3 if late else 2)


def test_the_driver_is_asked_a_few_times_a_second(tiny: Any, tmp_path: Path) -> None:
    cfg, store = tiny("evaluation.every=1000", "training.max_steps=10")
    times: list[int] = []

    def stopped() -> int:
        times.append(1)
        return GO_ON

    train(cfg, store, Place(0, 1, tmp_path, lambda _: True, stopped))
    assert len(times) < 10, "steps that take some hundredths of a second"


# -------------------------------------------------------------------------------------------------------------- batches


def split(rows: int = 50) -> Any:
    """In two parts, as the writer of a large store leaves it."""
    drawn = [{"input_ids": list(range(n, n + 3 + n % 7)), "labels": [-100] + [n] * (2 + n % 7)} for n in range(rows)]
    return concatenate_datasets([Dataset.from_list(drawn[:20]), Dataset.from_list(drawn[20:])])


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {"rows": 50, "total": 70, "global_batch": 8, "micro_batch": 2, "workers": 2}
    return Plan(**settings | {"every": 8, "seed": 3} | changes)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("first", [0, 5])
def test_batches_are_the_plans_from_any_step_on(rank: int, first: int) -> None:
    of, rows = plan(), split()
    batches = Batches(rows, of, rank, 0, first=first)
    found = [batch for step in batches for batch in step.micro]
    batches.close()
    wanted = list(of.positions(rank, first * of.accumulation))
    assert len(found) == len(wanted) == len(batches)
    for batch, positions in zip(found, wanted, strict=True):
        members = [rows[int(of.rows_at(p, p + 1)[0])] for p in positions]
        members = [
            m | {"labels": [-100] * len(m["labels"])} if p >= 70 else m for m, p in zip(members, positions, strict=True)
        ]
        inputs, _ = batch.on(torch.device("cpu"))
        assert batch.position == positions[0]
        for name, tensor in collate(members, 0).items():
            assert torch.equal(inputs[name], tensor)


def test_the_trained_tokens_are_those_of_all_workers() -> None:
    both = [list(Batches(split(), plan(), rank, 0)) for rank in range(2)]
    for mine, theirs in zip(*both, strict=True):
        labels = [batch.whole[2][..., 1:] for batch in [*mine.micro, *theirs.micro]]
        assert mine.trained == theirs.trained == sum(int((each != -100).sum()) for each in labels)


def test_rows_are_read_as_the_data_set_gives_them() -> None:
    rows, tokens = split(), Tokens(split())
    for number in (0, 19, 20, 49):
        assert {name: values.tolist() for name, values in tokens[number].items()} == rows[number]
    assert tokens.trained(3) == 5


def test_what_fails_in_the_thread_is_raised_and_no_thread_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, number: int) -> StepBatches:
        if number == 2:
            raise OSError("the disk is gone")
        return StepBatches([MicroBatch(number, (), torch.zeros(0), 0)], 0)

    monkeypatch.setattr(Batches, "step", broken)
    batches, seen = Batches(split(), plan(), 0, 0), []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(step.micro[0].position for step in batches)
    batches.close()
    assert seen == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_no_thread_stays_when_a_run_fails(tiny: Any, tmp_path: Path) -> None:
    cfg, store = tiny("training.learning_rate=1e30", "training.max_grad_norm=1e30")
    with pytest.raises(DivergedError):
        trained(cfg, store, tmp_path / "trial")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
