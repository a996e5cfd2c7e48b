"""Constraints of the search: what a relation may be, and that what breaks one is never a trial."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from raytune_lora.config.compose import compose, dump, load
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import DimensionConfig, DimensionKind, Sampler
from raytune_lora.errors import UserError
from raytune_lora.tuning import search
from raytune_lora.tuning.constraints import MEMORY, Constraints, MemoryLimit, advice, problems
from raytune_lora.tuning.relations import Unreadable, parse
from raytune_lora.tuning.search import StudySearcher
from raytune_lora.tuning.study import keep, open_study
from raytune_lora.tuning.told import reconcile, refused, tell
from raytune_lora.tuning.trials import Record, Trial
from tests.unit.shapes import LLAMA

INT, CATEGORICAL = DimensionKind.int, DimensionKind.categorical
BELOW = "method.alpha <= 2 * method.r"
pytestmark = pytest.mark.filterwarnings("ignore:Constraints have been set, but CmaEsSampler")


def config(*overrides: str, relations: tuple[str, ...] = (BELOW,)) -> SweepConfig:
    """Rank and alpha; every other point of the 8 x 8 breaks ``BELOW`` or nearly."""
    cfg = compose(["model=tiny", "data=fake", "method=lora", *overrides])
    cfg.space = {
        "rank": DimensionConfig(key="method.r", kind=INT, low=4, high=32, step=4),
        "alpha": DimensionConfig(key="method.alpha", kind=INT, low=8, high=64, step=8),
    }
    cfg.search.constraints.relations = list(relations)
    cfg.search.startup_trials, cfg.search.trials = 4, 12
    return cfg


def completed(proposal: dict[str, Any]) -> Trial:
    """The best rank is low and the best alpha high, where the relation does not hold."""
    params = proposal["params"]
    return Trial(
        proposal["trial_id"], params, "completed", eval_loss=2 + params["method.r"] / 32 - params["method.alpha"] / 64
    )


def run(study: optuna.Study, cfg: SweepConfig, count: int, constraints: Constraints | None = None) -> list[Any]:
    searching = StudySearcher(study, cfg.space, cfg, [], constraints)
    proposals = []
    for _ in range(count):
        proposals.append(searching.suggest(""))
        tell(study, completed(proposals[-1]))
    return proposals


# ------------------------------------------------------------------------------------------------------------ relations


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("method.alpha <= 2 * method.r", 0.0),
        ("method.alpha < 2 * method.r", 1e-12),
        ("method.alpha <= method.r", 16.0),
        ("8 <= method.r <= 12", 4.0),
        ("min(method.r, 99) + 1 >= max(1, 2, 20)", 3.0),
        ("training.global_batch / training.micro_batch == 8", 0.0),
        ("-method.r < -(1 - 3) * 2", 0.0),
        ("method.r == 15", 1.0),
        ("0.1 * 3 >= 0.3", 0.0),
        ("method.r / method.dropout < 1", math.inf),
    ],
)
def test_a_relation_says_by_how_much_it_is_broken(text: str, amount: float) -> None:
    cfg = compose(["model=tiny", "data=fake", "method=lora", "method.dropout=0"])  # r 16, alpha 32
    assert parse(text).broken_by(cfg) == pytest.approx(amount)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("method.r", "at character 1: it compares nothing"),
        ("method.r <=", "at character 12: this is no comparison"),
        ("method.r <= open('x')", "at character 13: \"open('x')\" cannot be used"),
        ("method.r <= 2 ** 8", "at character 13: '2 ** 8' cannot be used"),
        ("method.r[0] <= 2", "at character 1: 'method.r[0]' cannot be used"),
        ("method.r <= min(3)", "'min(3)' cannot be used"),
        ("method.r <= '3'", "cannot be used; take keys, numbers"),
        ("method.r <= True", "'True' cannot be used"),
        ("method.r in (1, 2)", "cannot be used"),
        ("method.r <= (lambda: 3)()", "cannot be used"),
        ("method.r <= 1 if 2 < 3 else 4", "compares nothing"),
        ("", "this is no comparison"),
    ],
)
def test_what_is_no_comparison_is_refused_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse(text)
    assert reason in str(caught.value)
    (problem,) = problems(config(relations=(text,)))
    assert problem.startswith(f"search.constraints.relations: {text!r} ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("method.rank <= 3", "at character 1: there is no config key 'method.rank'"),
        ("3 <= method", "at character 6: method is no number"),
        ("training.lr_scheduler <= 3", "training.lr_scheduler is no number (it is 'cosine')"),
        ("training.packing <= 3", "training.packing is no number (it is False)"),
        ("training.max_steps <= 3", "training.max_steps is no number (it is None)"),
    ],
)
def test_keys_are_checked_against_the_schema(text: str, reason: str) -> None:
    (problem,) = problems(config(relations=(text,)))
    assert reason in problem


def test_the_first_trial_must_hold_them() -> None:
    (problem,) = problems(config("method.alpha=64", "method.r=16"))
    assert f"{BELOW!r} does not hold for the config as it stands" in problem
    assert "(method.alpha=64, method.r=16)" in problem


def test_they_are_written_on_the_command_line_and_kept_in_the_folder(tmp_path: Path) -> None:
    asked = [f'search.constraints.relations=["{BELOW}"]', "search.constraints.memory_gb=8"]
    written = compose(["experiment=tiny", *asked])
    (tmp_path / "config.yaml").write_text(dump(written))
    assert load(tmp_path / "config.yaml").search.constraints.relations == [BELOW]


# ------------------------------------------------------------------------------------------------------------ proposals


@pytest.mark.parametrize("sampler", Sampler)
def test_no_sampler_has_a_trial_that_breaks_a_constraint(sampler: Sampler) -> None:
    cfg, study = config(f"search={sampler.value}"), optuna.create_study()
    cfg.search.startup_trials = 10 if sampler in (Sampler.auto, Sampler.gp) else 4  # GP's models take long
    assert problems(cfg) == []
    proposals = run(study, cfg, 12)
    assert all(p["params"]["method.alpha"] <= 2 * p["params"]["method.r"] for p in proposals)
    assert proposals[0]["params"] == {"method.r": 16, "method.alpha": 32}
    told = [t for t in study.trials if t.constraints]
    assert len(study.trials) == 12 + len(told)
    assert all(t.state is TrialState.PRUNED and t.constraints[BELOW] > 0 for t in told)
    assert refused(study) == ({BELOW: len(told)} if told else {})
    assert bool(told) == (sampler is not Sampler.grid)
    assert not {p["trial_id"] for p in proposals} & {f"{t.number:04d}" for t in told}


def test_a_grid_of_fewer_feasible_points_than_trials_is_refused_before_the_start() -> None:
    cfg = config("search=grid")
    cfg.search.trials = 64
    (problem,) = problems(cfg)
    feasible = sum(alpha <= 2 * r for r in range(4, 33, 4) for alpha in range(8, 65, 8))
    assert f"the {feasible} points of the grid that fulfil search.constraints (got 64)" in problem
    cfg.search.trials = feasible
    assert problems(cfg) == []
    assert len({tuple(p["params"].values()) for p in run(optuna.create_study(), cfg, feasible)}) == feasible


@pytest.mark.parametrize("learning", ["tpe", "gp"])
def test_a_sampler_learns_from_what_was_refused(learning: str) -> None:
    """Seven of eight random proposals break the relation; of its own, far fewer, though the loss draws it there."""
    asked = {}
    for sampler in (learning, "random"):
        cfg = config("method.alpha=8", f"search={sampler}", relations=("method.alpha <= 8",))
        run(study := optuna.create_study(), cfg, 30)
        asked[sampler] = refused(study)["method.alpha <= 8"]
    assert asked[learning] < 0.5 * asked["random"]


def test_a_space_without_a_feasible_point_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_TRIES", 30)
    cfg, study = config(relations=("method.alpha == 32", "method.r == 16")), optuna.create_study()
    cfg.space["rank"].step = cfg.space["alpha"].step = None
    cfg.space["rank"].high, cfg.space["alpha"].high = 30_000, 60_000
    searching = StudySearcher(study, cfg.space, cfg, [])
    tell(study, completed(searching.suggest("")))
    assert searching.suggest("") == StudySearcher.FINISHED
    assert len(study.trials) == 31


def test_a_search_that_goes_on_knows_what_was_refused(tmp_path: Path) -> None:
    cfg = config()
    before = run(first := open_study(tmp_path, cfg.search), cfg, 6)
    keep(first)
    known = Record({p["trial_id"]: completed(p) for p in before})
    study = open_study(tmp_path, cfg.search)
    count = len(study.trials)
    told = refused(study)
    assert reconcile(study, known, cfg) == []
    assert len(study.trials) == count
    assert refused(study) == told
    fresh = StudySearcher(study, cfg.space, cfg, []).suggest("")
    assert int(fresh["trial_id"]) >= count


# --------------------------------------------------------------------------------------------------------------- memory


def limited(cfg: SweepConfig, gb: float) -> Constraints:
    cfg.search.constraints.memory_gb = gb
    return Constraints(cfg, MemoryLimit(gb, LLAMA, 1024))


def on_gpu(*overrides: str) -> SweepConfig:
    long = ("data.max_length=1024", "training.global_batch=64", "training.micro_batch=8", "gpus_per_worker=1")
    return config(*long, *overrides, relations=())


def test_points_that_do_not_fit_the_memory_are_refused() -> None:
    cfg = on_gpu()
    cfg.space["micro"] = DimensionConfig(key="training.micro_batch", kind=CATEGORICAL, choices=[1, 2, 4, 8, 16, 32])
    plan = MemoryLimit(1, LLAMA, 1024).plan(cfg).gb
    study = optuna.create_study()
    proposals = run(study, cfg, 12, limited(cfg, 1.01 * plan))
    assert {p["params"]["training.micro_batch"] for p in proposals} <= {1, 2, 4, 8}
    assert refused(study)[MEMORY] > 0


def test_a_config_that_does_not_fit_is_refused_with_the_parts_and_what_would_fit() -> None:
    cfg = on_gpu()
    plan = MemoryLimit(1, LLAMA, 1024).plan(cfg)
    limited(cfg, plan.gb + 0.01).check()
    with pytest.raises(UserError) as caught:
        limited(cfg, round(0.8 * plan.gb, 1)).check()
    (problem,) = caught.value.problems
    assert f"a worker's planned memory is {plan.gb:.3g} GB (micro batch 8, rows of up to 1024 tokens)" in problem
    assert all(part in problem for part in ("activations", "optimizer", "total"))
    assert "training.micro_batch=4" in problem
    assert "data.max_length=512" in problem


def test_each_remedy_fits() -> None:
    cfg = on_gpu()
    limit = round(0.8 * MemoryLimit(1, LLAMA, 1024).plan(cfg).gb, 1)
    with pytest.raises(UserError) as caught:
        limited(cfg, limit).check()
    ways = caught.value.problems[0].partition("what would fit: ")[2].partition(" (")[0].split("; or ")
    assert len(ways) >= 2
    for way in ways:
        limited(on_gpu(*way.split()), limit).check()


def test_what_trains_but_leaves_no_room_for_answers_is_refused_with_what_does() -> None:
    """Keys and values of 512 prompts of 1024 tokens: 2 x 16 layers x 512 x 2 bytes a token, 17 GB."""
    cfg = on_gpu("evaluation.generate_batch=512", "evaluation.generate_rows=512", "training.micro_batch=1")
    limit = MemoryLimit(1, LLAMA, 1024)
    assert limit.measuring(cfg).activations > 512 * 1024 * 16 * 2 * 512 * 2
    gb = limit.plan(cfg).gb + 0.01
    with pytest.raises(UserError) as caught:
        limited(cfg, gb).check()
    (problem,) = caught.value.problems
    remedy = problem.partition("; set ")[2].partition(" ")[0]
    assert remedy.startswith("evaluation.generate_batch=")
    limited(on_gpu("evaluation.generate_rows=512", "training.micro_batch=1", remedy), gb).check()


def test_what_fits_trained_in_parts_fits_measured_in_parts() -> None:
    cfg = on_gpu("deepspeed=zero3", "workers=8", "training.micro_batch=1", "evaluation.generate_batch=1")
    limit = MemoryLimit(1, LLAMA, 1024)
    whole = on_gpu("deepspeed=zero2", "workers=8", "training.micro_batch=1", "evaluation.generate_batch=1")
    assert limit.measuring(cfg).weights == pytest.approx(limit.measuring(whole).weights / 8, rel=1e-6)
    assert limit.measuring(cfg).gb < limit.plan(cfg).gb


def test_four_bits_on_each_gpu_are_advised_before_parts_of_sixteen() -> None:
    cfg = on_gpu("deepspeed=zero3", "workers=8", "training.micro_batch=1")
    (told,) = advice(cfg, MemoryLimit(40, LLAMA, 1024))
    assert told.startswith("quantization=nf4 deepspeed=zero2")
    for other, gb in (
        (cfg, 1.0),  # it would not fit
        (on_gpu("deepspeed=zero2", "workers=8", "training.micro_batch=1"), 40),
        (on_gpu("deepspeed=zero3", "quantization=nf4", "workers=8", "training.micro_batch=1"), 40),
        (on_gpu("deepspeed=zero3", "method=full", "workers=8", "training.micro_batch=1"), 40),
    ):
        assert advice(other, MemoryLimit(gb, LLAMA, 1024)) == []
    assert advice(cfg, None) == []


def test_a_second_copy_within_the_node_is_planned() -> None:
    plain, twice = (
        MemoryLimit(1, LLAMA, 1024).plan(on_gpu("deepspeed=zero3", "workers=16", f"deepspeed.hpz={n}", *more))
        for n, more in ((1, ("training.micro_batch=1",)), (8, ("training.micro_batch=1",)))
    )
    assert twice.weights == pytest.approx(3 * plain.weights, rel=1e-6)  # 1/16 and 1/8
