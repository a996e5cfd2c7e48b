"""The surrogates of fine-tuning: the structure they claim, and a fit that finds what it was made of."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench"


def load(name: str) -> ModuleType:
    """A benchmark's module; they lie in no package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


surrogates: Any = load("surrogates")
quality: Any = load("search_quality")
MADE_UP = [surrogates.lora_like(), surrogates.two_valleys()]


def params(rate: float = 4e-4, rank: int = 16, scale: int = 2, dropout: float = 0.05) -> dict[str, Any]:
    values = {"method.r": rank, "method.alpha": scale * rank, "training.learning_rate": rate}
    return {**values, "method.dropout": dropout}


def best_rate(scale: int = 2, rank: int = 16) -> float:
    """The learning rate with the lowest loss at the end."""
    rates = [10 ** (-5 + 0.02 * n) for n in range(150)]
    return min(rates, key=lambda rate: last(params(rate, rank, scale)))


def last(point: dict[str, Any]) -> float:
    loss = float(MADE_UP[0].expected(point)[-1])
    return loss if math.isfinite(loss) else math.inf


@pytest.mark.parametrize("task", MADE_UP, ids=lambda task: task.name)
def test_no_point_lies_below_the_optimum(task: Any) -> None:
    draw, optimum = random.Random(1), task.optimum()
    ends = [task.expected(task.values(task._random(draw)))[-1] for _ in range(2000)]
    assert optimum <= np.nanmin(ends)
    assert np.nanmin(ends) - optimum < 0.1


@pytest.mark.parametrize("task", MADE_UP, ids=lambda task: task.name)
def test_a_point_and_its_coordinates_are_each_others_inverse(task: Any) -> None:
    draw = random.Random(2)
    for _ in range(50):
        values = task.values(task._random(draw))
        point = {d.key: surrogates.coordinate(d, values) for d in task.space.values()}
        nudged = {key: min(at, 1 - 1e-9) for key, at in point.items()}  # a choice's share ends before the next one's
        assert task.values(nudged) == pytest.approx(values)


@pytest.mark.parametrize("task", MADE_UP, ids=lambda task: task.name)
def test_the_same_seed_measures_the_same_and_another_one_does_not(task: Any) -> None:
    point = params()
    one, again, other = (task.measured(point, random.Random(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert other == pytest.approx(task.expected(point), rel=0.03)


def test_the_best_learning_rate_falls_with_the_scale_and_with_the_rank() -> None:
    assert best_rate(scale=1) > best_rate(scale=2) > best_rate(scale=4)
    assert best_rate(rank=4) > best_rate(rank=16) > best_rate(rank=128)


def test_what_learns_faster_may_end_higher() -> None:
    slow, fast = (MADE_UP[0].expected(params(rate)) for rate in (best_rate(), 2.5 * best_rate()))
    assert fast[0] < slow[0]
    assert fast[-1] > slow[-1]


@pytest.mark.parametrize("task", MADE_UP, ids=lambda task: task.name)
def test_a_large_learning_rate_diverges_and_stays_so(task: Any) -> None:
    losses = task.expected(params(rate=1e-2, scale=4))
    finite = np.isfinite(losses)
    assert not finite[-1]
    assert not (finite[1:] & ~finite[:-1]).any()


def test_the_deep_valley_is_deeper_and_not_the_first_to_be_seen() -> None:
    deep = MADE_UP[1].expected(params(rate=10**-3.9, rank=64, dropout=0.1))
    broad = MADE_UP[1].expected(params(rate=10**-2.9, rank=8, dropout=0.0))
    assert deep[0] > broad[0]
    assert deep[-1] < broad[-1] - 0.1


# ------------------------------------------------------------------------------------------------------- real trainings


def stored(folder: Path, runs: int, diverging: bool = False) -> Path:
    """A file of curves as the benchmark collects them, here of the made-up task."""
    task, draw = MADE_UP[0], random.Random(3)
    found: list[dict[str, Any]] = []
    while len(found) < runs:
        values = task.values(task._random(draw))
        losses = task.measured(values, draw)
        whole = bool(np.isfinite(losses).all())
        if whole or diverging:
            kept = losses[np.isfinite(losses)].tolist()
            found.append({"params": values, "status": "completed" if whole else "diverged", "losses": kept})
    space = {
        name: {"key": d.key, "kind": d.kind.value, "low": d.low, "high": d.high, "step": d.step, "log": d.log}
        | {"choices": d.choices, "multiple_of": d.multiple_of, "when": {}}
        for name, d in task.space.items()
    }
    file = folder / "curves.json"
    about = {"experiment": "made up", "total": task.total, "every": task.every}
    file.write_text(json.dumps({**about, "space": space, "runs": found}))
    return file


def test_a_fit_predicts_curves_that_it_has_not_seen(tmp_path: Path) -> None:
    fitted = surrogates.quickstart(stored(tmp_path, 120))
    draw, errors, spreads = random.Random(4), [], []
    for _ in range(200):
        values = fitted.values(fitted._random(draw))
        truth = MADE_UP[0].expected(values)
        if np.isfinite(truth).all():
            errors.append(np.log(fitted.expected(values) / truth)[-1])
            spreads.append(np.log(truth)[-1])
    assert np.var(errors) < 0.1 * np.var(spreads)


def test_the_noise_of_a_fit_is_about_that_of_the_runs(tmp_path: Path) -> None:
    fitted = surrogates.quickstart(stored(tmp_path, 120))
    draw = random.Random(5)
    assert 0.003 < np.std([fitted.noise(draw)[-1] for _ in range(500)]) < 0.05  # the runs' is 0.007


def test_a_run_diverges_where_the_nearest_real_one_did(tmp_path: Path) -> None:
    fitted = surrogates.quickstart(stored(tmp_path, 80, diverging=True))
    assert not np.isfinite(fitted.expected(params(rate=1e-2, rank=128, scale=4))).all()
    assert np.isfinite(fitted.expected(params())).all()


def test_too_few_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than two"):
        surrogates.quickstart(stored(tmp_path, 1))


# ----------------------------------------------------------------------------------------------------------- searches


def play(method: str, seed: int = 0, trials: int = 6) -> list[tuple[int, float]]:
    task = MADE_UP[0]
    args = quality.argparse.Namespace(overrides=[], trials=trials, concurrent=4)
    trace: list[tuple[int, float]] = quality.Play(task, task.optimum(), quality.config(method, task, seed, args)).run(
        trials * task.total
    )
    return trace


@pytest.mark.parametrize("method", ["grid", "random", "TPE", "TPE + ASHA", "GP + ASHA"])
def test_a_search_is_the_same_again_and_keeps_to_its_budget(method: str) -> None:
    trace = play(method)
    assert trace == play(method)
    assert trace[-1][0] <= 6 * MADE_UP[0].total
    assert min(regret for _, regret in trace) > -1e-9


def test_stopped_trials_leave_samples_for_others() -> None:
    def trials(method: str) -> int:
        args = quality.argparse.Namespace(overrides=[], trials=12, concurrent=4)
        search = quality.Play(MADE_UP[0], 0.0, quality.config(method, MADE_UP[0], 0, args))
        search.run(12 * MADE_UP[0].total)
        return len(search._record.trials)

    assert trials("TPE + ASHA") > 1.5 * trials("TPE")


def test_the_regret_counts_from_where_it_stays() -> None:
    curve = [1.0] * 50 + [0.1] * 20 + [0.5] * 30 + [0.2] * 100
    assert quality.reached(curve, 0.3) == 101 / 200
    assert quality.reached(curve, 0.05) == math.inf
    assert quality.reached(curve, 1.0) == 1 / 200


def test_a_lattice_has_as_many_points_as_the_budget_has_trials() -> None:
    args = quality.argparse.Namespace(overrides=[], trials=64, concurrent=4)
    assert quality.config("grid", MADE_UP[0], 0, args).search.trials == 64
