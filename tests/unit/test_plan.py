"""The plan of a run: the same step sees the same samples however they are shared out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from raytune_lora.config.data import FakeDataConfig
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import RunConfig, TinyModelConfig
from raytune_lora.training.plan import Plan, pack_rows, permutation, plan_run, remarks, stream

BATCH = 24
# workers, micro batch, accumulation
SPLITS = [(1, 24, 1), (1, 4, 6), (1, 1, 24), (2, 12, 1), (2, 3, 4), (3, 8, 1), (4, 2, 3), (6, 1, 4), (24, 1, 1)]
ORDER = [0, 1, 3, 5, 2, 4]
TOTALS = [1, 5, 24, 25, 47, 48, 240]


def plan(workers: int = 1, micro_batch: int = 4, total: int = 48, every: int = 24) -> Plan:
    return Plan(rows=10, total=total, global_batch=BATCH, micro_batch=micro_batch, workers=workers, every=every, seed=0)


def config(workers: int = 1) -> RunConfig:
    cfg = RunConfig(TinyModelConfig(), FakeDataConfig(), LoraMethodConfig(), workers=workers)
    cfg.training.global_batch, cfg.training.micro_batch = 8, 2
    return cfg


# ------------------------------------------------------------------------------------------------------ who trains what


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(("workers", "micro_batch", "accumulation"), SPLITS)
def test_each_step_sees_the_same_samples_however_they_are_shared(
    workers: int, micro_batch: int, accumulation: int, total: int
) -> None:
    split = plan(workers, micro_batch, total)
    assert split.accumulation == accumulation
    ranks = [list(split.positions(rank)) for rank in range(workers)]
    assert {len(batches) for batches in ranks} == {split.steps * accumulation}
    assert {len(batch) for batches in ranks for batch in batches} == {micro_batch}
    for step in range(split.steps):
        mine = slice(step * accumulation, (step + 1) * accumulation)
        seen = [position for batches in ranks for batch in batches[mine] for position in batch]
        assert sorted(seen) == list(range(step * BATCH, (step + 1) * BATCH))


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(("workers", "micro_batch", "accumulation"), SPLITS)
def test_every_sample_is_trained_once_and_the_rest_is_padding(
    workers: int, micro_batch: int, accumulation: int, total: int
) -> None:
    split = plan(workers, micro_batch, total)
    times = Counter(p for rank in range(workers) for batch in split.positions(rank) for p in batch)
    assert [times[position] for position in range(total)] == [1] * total
    padding = sorted(position for position in times if position >= total)
    assert padding == list(range(total, split.steps * BATCH))
    assert len(padding) < BATCH


@pytest.mark.parametrize(("total", "steps"), [(1, 1), (24, 1), (25, 2), (48, 2), (49, 3)])
def test_the_last_step_may_be_short(total: int, steps: int) -> None:
    short = plan(total=total)
    assert short.steps == steps
    assert [short.samples_seen(step) for step in range(steps + 1)] == [min(s * BATCH, total) for s in range(steps + 1)]


# -------------------------------------------------------------------------------------------------- when it is measured


@pytest.mark.parametrize(
    ("total", "every", "after"),
    [
        (120, 24, [1, 2, 3, 4, 5]),
        (120, 48, [2, 4, 5]),
        (120, 60, [3, 5]),
        (120, 7, [1, 2, 3, 4, 5]),
        (100, 48, [2, 4, 5]),
        (120, 1000, [5]),
        (5, 24, [1]),
    ],
)
def test_it_is_measured_at_the_multiples_reached_and_at_the_end(total: int, every: int, after: list[int]) -> None:
    measured = plan(total=total, every=every)
    assert [step for step in range(1, measured.steps + 1) if measured.evaluates_after(step)] == after


def test_measuring_does_not_depend_on_the_share_of_a_worker() -> None:
    plans = [plan(workers, micro_batch, total=240, every=60) for workers, micro_batch, _ in SPLITS]
    assert len({tuple(p.evaluates_after(step) for step in range(1, 11)) for p in plans}) == 1


# ------------------------------------------------------------------------------------------------------ from the config


@pytest.mark.parametrize(
    ("max_steps", "epochs", "total"),
    [(3, 1.0, 24), (None, 1.0, 50), (None, 2.5, 125), (None, 0.5, 25), (None, 0.001, 1)],
)
def test_steps_overrule_epochs(max_steps: int | None, epochs: float, total: int) -> None:
    cfg = config()
    cfg.training.max_steps, cfg.training.epochs = max_steps, epochs
    assert plan_run(cfg, rows=50).total == total


@pytest.mark.parametrize(("every", "rows", "expected"), [(16, 50, 16), (None, 50, 8), (None, 800, 80), (None, 805, 81)])
def test_a_run_is_measured_ten_times_unless_told(every: int | None, rows: int, expected: int) -> None:
    cfg = config()
    cfg.training.epochs, cfg.evaluation.every = 1.0, every
    assert plan_run(cfg, rows).every == expected


def test_workers_change_nothing_but_the_share() -> None:
    one, two = (plan_run(config(workers), rows=50) for workers in (1, 2))
    assert (one.accumulation, two.accumulation) == (4, 2)
    assert replace(two, workers=1) == one


@pytest.mark.parametrize(("rows", "batch", "workers"), [(10, 32, 1), (10, 32, 2), (60, 32, 2), (300, 64, 4)])
def test_few_steps_are_said_with_what_makes_more(rows: int, batch: int, workers: int) -> None:
    cfg = config(workers)
    cfg.training.global_batch = batch
    steps = plan_run(cfg, rows).steps
    said = remarks(cfg, rows)[0]
    assert f"{rows} training rows x training.epochs=3 in steps of training.global_batch={batch} are {steps} " in said
    for remedy in said.rpartition(": ")[2].removesuffix(" makes 20 or more").split(" or "):
        changed = replace(cfg, training=replace(cfg.training))
        for key, value in (setting.split("=") for setting in remedy.split()):
            setattr(changed.training, key.removeprefix("training."), int(value))
        assert plan_run(changed, rows).steps >= 20
        assert changed.training.global_batch % (changed.training.micro_batch * workers) == 0


def test_a_step_that_takes_rows_twice_is_said() -> None:
    cfg = config()
    cfg.training.global_batch, cfg.training.epochs = 32, 100
    assert remarks(cfg, 10) == [
        "training.global_batch=32 is more than the 10 training rows: a step takes rows more than once, and epochs flow "
        "together; training.global_batch=10 keeps them apart"
    ]
    cfg.training.max_steps = 2
    assert len(remarks(cfg, 10)) == 1, "who names the steps knows how many they are"
    assert remarks(cfg, 32) == []


def test_nothing_is_said_of_a_run_of_many_steps() -> None:
    assert remarks(config(), 1000) == []


# --------------------------------------------------------------------------------------------- order and random streams


@pytest.mark.parametrize("rows", [1, 2, 97])
def test_an_epoch_takes_each_row_once(rows: int) -> None:
    assert sorted(permutation(rows, epoch=3, seed=5)) == list(range(rows))


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    orders = [tuple(permutation(50, epoch, seed)) for epoch in range(4) for seed in (0, 1, 11)]
    assert len(set(orders)) == 12
    assert tuple(permutation(50, 1, 0)) == orders[3]
    assert permutation(6, 0, 0).tolist() == ORDER, "runs that are resumed go on in the order they began"


def test_rows_are_those_of_the_epochs_one_after_the_other() -> None:
    three = np.concatenate([permutation(10, epoch, 0) for epoch in range(3)])
    assert plan().rows_at(0, 30).tolist() == three.tolist()
    assert plan().rows_at(7, 25).tolist() == three[7:25].tolist()
    assert plan().rows_at(5, 5).tolist() == []


# --------------------------------------------------------------------------------------------------- packing, grouping

LENGTHS = np.random.default_rng(0).integers(1, 65, 10)


def packed(workers: int = 1, micro_batch: int = 4, capacity: int = 256) -> Plan:
    return replace(plan(workers, micro_batch), lengths=LENGTHS, capacity=capacity)


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 1), (1, 4), (2, 2), (3, 4)])
def test_packing_takes_the_same_samples_in_fewer_passes_of_bounded_size(workers: int, micro_batch: int) -> None:
    plain, full = plan(workers, micro_batch), packed(workers, micro_batch, capacity=64 * micro_batch)
    assert full.accumulation < plain.accumulation
    ranks = [list(full.positions(rank)) for rank in range(workers)]
    assert {len(batches) for batches in ranks} == {full.steps * full.accumulation}
    for step in range(full.steps):
        mine = slice(step * full.accumulation, (step + 1) * full.accumulation)
        passes = [batch for batches in ranks for batch in batches[mine]]
        assert sorted(p for batch in passes for p in batch) == list(range(step * BATCH, (step + 1) * BATCH))
        loads = [sum(int(LENGTHS[full.rows_at(p, p + 1)[0]]) for p in batch) for batch in passes]
        assert 0 < min(loads) <= max(loads) <= 64 * micro_batch


def test_packing_goes_on_where_it_was() -> None:
    full = packed(2, 2)
    whole = list(full.positions(1))
    assert list(full.positions(1, first=full.accumulation + 1)) == whole[full.accumulation + 1 :]


def test_rows_are_packed_evenly() -> None:
    found = pack_rows([7, 1, 5, 5, 3, 3], 3, 8)
    assert found == [[0, 1], [2, 4], [3, 5]]
    assert pack_rows([7, 1, 5, 5, 3, 3], 3, 7) is None, "24 tokens do not fit three times 7"
    assert pack_rows([5, 5, 5], 2, 9) is None
    assert pack_rows([1], 2, 9) is None, "a pass without a row computes nothing"


def test_grouping_takes_each_row_once_an_epoch_and_pads_less() -> None:
    lengths = np.random.default_rng(1).integers(1, 500, 1000)
    chance = Plan(1000, 2000, 8, 4, 1, 100, 0, lengths)
    grouped = replace(chance, grouped=True)
    for epoch in range(2):
        rows = grouped.rows_at(1000 * epoch, 1000 * epoch + 1000)
        assert sorted(rows) == list(range(1000))
    assert grouped.rows_at(0, 1000).tolist() != grouped.rows_at(1000, 2000).tolist()

    def padded(split: Plan) -> int:
        return sum(4 * int(lengths[[split.rows_at(p, p + 1)[0] for p in batch]].max()) for batch in split.positions(0))

    assert padded(grouped) < 1.05 * 2 * lengths.sum()
    assert padded(chance) > 1.4 * 2 * lengths.sum()


def test_each_stream_has_its_own_seed() -> None:
    seeds = [
        stream(seed, name, rank) for seed in (0, 1) for name in ("order", "weights", "dropout") for rank in range(3)
    ]
    assert len(set(seeds)) == 18
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert stream(0, "weights") == stream(0, "weights", 0)


def test_the_training_seed_decides_the_order() -> None:
    cfg = config()
    first = plan_run(cfg, 50).seed
    cfg.training.seed = 1
    assert plan_run(cfg, 50).seed != first
