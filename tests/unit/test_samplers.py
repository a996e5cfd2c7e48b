"""The samplers: one contract for all of them, and what is each one's own."""

from __future__ import annotations

import copy
import json
import math
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from raytune_lora.config.compose import compose
from raytune_lora.config.data import FakeDataConfig
from raytune_lora.config.groups import conf_dir
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import SweepConfig, TinyModelConfig
from raytune_lora.config.search import DimensionConfig, DimensionKind, Objective, Sampler, Scheduler, SearchConfig
from raytune_lora.tuning.samplers import WARM, chosen, marks, problems
from raytune_lora.tuning.search import StudySearcher
from raytune_lora.tuning.space import apply, lookup
from raytune_lora.tuning.study import keep, open_study
from raytune_lora.tuning.told import tell
from raytune_lora.tuning.trials import Trial

INT, FLOAT, CATEGORICAL = DimensionKind.int, DimensionKind.float, DimensionKind.categorical
RANK, DECAY = "method.r", "training.weight_decay"
pytestmark = pytest.mark.filterwarnings("ignore:Constraints have been set, but CmaEsSampler")
ROOT = Path(__file__).resolve().parents[2]


def config(sampler: Sampler, seed: int = 0, **space: DimensionConfig) -> SweepConfig:
    """Two dimensions, where no others are given; the grid's have steps."""
    decay = {"step": 0.02} if sampler is Sampler.grid else {}
    cfg = SweepConfig(model=TinyModelConfig(), data=FakeDataConfig(), method=LoraMethodConfig(), space=space)
    cfg.space = space or {
        "rank": DimensionConfig(key=RANK, kind=INT, low=4, high=64, step=4),
        "decay": DimensionConfig(key=DECAY, kind=FLOAT, low=0.0, high=0.2, **decay),
    }
    cfg.training.weight_decay = 0.02
    cfg.search = SearchConfig(sampler=sampler, trials=16, startup_trials=4, seed=seed)
    return cfg


def loss(params: dict[str, Any]) -> float:
    """Lowest, and 1, at rank 48 and a weight decay of 0.15."""
    return 1 + math.log2(params[RANK] / 48) ** 2 / 4 + (params[DECAY] / 0.15 - 1) ** 2


def end(proposal: dict[str, Any], status: str = "completed", **facts: Any) -> Trial:
    value = loss(proposal["params"])
    curve = [{"samples_seen": 16.0 * n, "eval_loss": value + 1 / n, "train_loss": 0.0} for n in (1, 2)]
    reached = {"eval_loss": None if status == "diverged" else value, "curve": curve, **facts}
    return Trial(proposal["trial_id"], proposal["params"], status, **reached)


def search(study: optuna.Study, cfg: SweepConfig, statuses: list[str]) -> list[dict[str, Any]]:
    """One trial after the other, each ending as said."""
    searching = StudySearcher(study, cfg.space, cfg, [])
    proposals = []
    for status in statuses:
        proposals.append(searching.suggest(""))
        tell(study, end(proposals[-1], status))
    return proposals


def parameters(proposals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [proposal["params"] for proposal in proposals]


# --------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("sampler", Sampler)
def test_a_search_keeps_to_the_space_begins_with_the_config_and_improves_on_it(sampler: Sampler) -> None:
    cfg = config(sampler)
    cfg.search.startup_trials = 10 if sampler in (Sampler.auto, Sampler.gp) else 4  # GP's models take long
    assert problems(cfg) == []
    tried = parameters(search(optuna.create_study(), cfg, ["completed"] * 16))
    assert tried[0] == {RANK: 16, DECAY: 0.02}
    assert apply(cfg, tried[0]) == cfg
    assert all(values[RANK] in range(4, 65, 4) and 0 <= values[DECAY] <= 0.2 for values in tried)
    assert len({tuple(values.values()) for values in tried}) >= 15  # a mutation of NSGA-II's may meet an old point
    assert min(map(loss, tried)) < loss(tried[0]) - 0.3


@pytest.mark.parametrize("sampler", Sampler)
def test_the_same_seed_proposes_the_same(sampler: Sampler) -> None:
    outcomes = ["completed"] * 6
    first, again, other = (
        parameters(search(optuna.create_study(), config(sampler, seed), outcomes)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first[0] == other[0]
    assert first[1:] != other[1:]


@pytest.mark.parametrize("sampler", Sampler)
def test_trials_may_end_in_any_way_and_run_side_by_side(sampler: Sampler) -> None:
    cfg, study = config(sampler), optuna.create_study()
    search(study, cfg, ["oom", "failed", "stopped", "diverged", *["completed"] * 4, "oom", "stopped"])
    searching = StudySearcher(study, cfg.space, cfg, [])
    together = parameters([searching.suggest("") for _ in range(4)])
    assert len({tuple(values.values()) for values in together}) == 4
    states = [trial.state.name for trial in study.trials[:4]]
    assert states == ["PRUNED", "FAIL", "PRUNED", "PRUNED"]


def go_on(folder: Path, statuses: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Each sampler's search, begun or gone on with."""
    found = {}
    for sampler in Sampler:
        cfg = config(sampler)
        own = folder / sampler.value
        own.mkdir(exist_ok=True)
        cfg.search.storage = f"journal://{own}/journal"
        study = open_study(own, cfg.search)
        found[sampler.value] = search(study, cfg, statuses)
        keep(study)
    return found


def test_a_search_goes_on_in_another_process_with_what_it_has_not_proposed(tmp_path: Path) -> None:
    before = go_on(tmp_path, ["completed", "stopped", "completed", "oom", "completed"])
    code = (
        f"import json, pathlib, sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT)]}\n"
        f"import test_samplers as t; folder = pathlib.Path({str(tmp_path)!r})\n"
        "print(json.dumps(t.go_on(folder, ['completed'] * 3)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = json.loads(shown.stdout.splitlines()[-1])
    for name, earlier in before.items():
        assert [proposal["trial_id"] for proposal in after[name]] == ["0005", "0006", "0007"]
        assert all(params not in parameters(earlier) for params in parameters(after[name])), name


@pytest.mark.parametrize("sampler", [each for each in Sampler if each is not Sampler.cmaes])
def test_conditional_dimensions_are_drawn_where_they_exist(sampler: Sampler) -> None:
    cfg = config(
        sampler,
        schedule=DimensionConfig(key="training.lr_scheduler", kind=CATEGORICAL, choices=["constant", "cosine"]),
        decay=DimensionConfig(
            key=DECAY, low=0.0, high=0.2, step=0.02, when={"training.lr_scheduler": ["cosine"]}, kind=FLOAT
        ),
    )
    cfg.search.trials = 12
    assert problems(cfg) == []
    searching = StudySearcher(study := optuna.create_study(), cfg.space, cfg, [])
    tried = []
    for _ in range(12):
        proposal = searching.suggest("")
        tried.append(proposal["params"])
        value = loss({RANK: 32, DECAY: 0.2, **proposal["params"]})
        tell(study, Trial(proposal["trial_id"], proposal["params"], "completed", eval_loss=value))
    assert tried[0] == {"training.lr_scheduler": "cosine", DECAY: 0.02}
    assert all((DECAY in values) == (values["training.lr_scheduler"] == "cosine") for values in tried)
    assert {len(values) for values in tried} == {1, 2}


@pytest.mark.parametrize("sampler", [each for each in Sampler if each is not Sampler.cmaes])
def test_several_objectives_are_searched(sampler: Sampler, tmp_path: Path) -> None:
    cfg = config(sampler)
    cfg.search.storage = f"journal://{tmp_path}/journal"
    cfg.search.objectives = [Objective.eval_loss, Objective.trainable_parameters]
    assert problems(cfg) == []
    study = open_study(tmp_path, cfg.search)
    searching = StudySearcher(study, cfg.space, cfg, [])
    for status in [*["completed"] * 5, "oom", "failed", "completed"]:
        proposal = searching.suggest("")
        tell(study, end(proposal, status, trainable_parameters=proposal["params"][RANK]))
    completed = [trial for trial in study.trials if trial.values]
    assert [trial.values for trial in completed] == [[loss(t.params), t.params[RANK]] for t in completed]
    assert len(completed) == 6


# ------------------------------------------------------------------------------------------------------- each one's own


def test_tpe_keeps_away_from_where_memory_runs_out() -> None:
    """The loss alone leads there: it falls towards the half in which every trial ends for want of memory."""
    share = {}
    for status in ("oom", "failed"):
        there = 0
        for seed in range(3):
            cfg, study = config(Sampler.tpe, seed), optuna.create_study()
            searching = StudySearcher(study, cfg.space, cfg, [])
            for number in range(30):
                proposal = searching.suggest("")
                fits = proposal["params"][DECAY] <= 0.1
                there += number >= 10 and not fits
                tell(study, end(proposal, "completed" if fits else status))
        share[status] = there / 60
    assert share["oom"] <= 0.5
    assert share["failed"] >= 0.7


def test_a_grid_tries_each_point_once_and_begins_with_the_configs(tmp_path: Path) -> None:
    cfg = config(
        Sampler.grid,
        rank=DimensionConfig(key=RANK, kind=INT, low=8, high=24, step=8),
        decay=DimensionConfig(key=DECAY, kind=FLOAT, low=0.0, high=0.15, step=0.05),
    )
    cfg.search.storage = f"journal://{tmp_path}/journal"
    study = open_study(tmp_path, cfg.search)
    tried = parameters(search(study, cfg, ["completed", "stopped", "failed", "oom", "completed"]))
    keep(study)
    tried += parameters(search(open_study(tmp_path, cfg.search), cfg, ["completed"] * 7))
    assert tried[0] == {RANK: 16, DECAY: 0.0}
    assert sorted(map(str, tried)) == sorted(
        str({RANK: rank, DECAY: decay}) for rank in (8, 16, 24) for decay in (0.0, 0.05, 0.1, 0.15)
    )


def test_a_grid_has_one_point_where_a_condition_leaves_a_dimension_out() -> None:
    cfg = config(
        Sampler.grid,
        schedule=DimensionConfig(key="training.lr_scheduler", kind=CATEGORICAL, choices=["constant", "cosine"]),
        decay=DimensionConfig(
            key=DECAY, kind=FLOAT, low=0.0, high=0.1, step=0.05, when={"training.lr_scheduler": ["cosine"]}
        ),
    )
    cfg.search.trials = 5
    assert problems(cfg) == [
        "search.trials must be <= the 4 points of the grid (got 5); set search.trials=4, or give "
        "the space more steps or choices"
    ]


def test_a_grid_of_something_continuous_or_of_too_many_points_is_refused() -> None:
    cfg = config(Sampler.grid)
    cfg.space["decay"].step = None
    assert problems(cfg) == [
        "search.sampler=grid: space.decay is continuous; give it a step, or kind: categorical and choices"
    ]
    cfg.space["decay"].step, cfg.space["rank"].step = 0.00001, 1
    (problem,) = problems(cfg)
    assert "more than 100,000 points" in problem


def test_cmaes_moves_numbers_and_leaves_names_to_tpe() -> None:
    cfg = config(
        Sampler.cmaes,
        rank=DimensionConfig(key=RANK, kind=INT, low=4, high=64, step=4),
        decay=DimensionConfig(key=DECAY, kind=FLOAT, low=0.0, high=0.2),
        schedule=DimensionConfig(key="training.lr_scheduler", kind=CATEGORICAL, choices=["constant", "cosine"]),
    )
    assert problems(cfg) == []
    study = optuna.create_study()
    tried = parameters(search(study, cfg, ["completed"] * 24))
    assert {values["training.lr_scheduler"] for values in tried} == {"constant", "cosine"}
    generations = {t.system_attrs["cma:generation"] for t in study.trials if "cma:generation" in t.system_attrs}
    assert len(generations) >= 3
    assert sum(map(loss, tried[-8:])) < sum(map(loss, tried[:8]))


def test_cmaes_refuses_what_it_cannot_search(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(Sampler.cmaes)
    cfg.space["decay"].when = {"training.lr_scheduler": ["cosine"]}
    cfg.search.objectives = [Objective.eval_loss, Objective.training_seconds]
    conditional, several = problems(cfg)
    assert conditional.startswith("search.sampler=cmaes: space.decay is a number that exists only at times")
    assert several.startswith("search.sampler=cmaes has one objective (got 2")
    named = config(
        Sampler.cmaes,
        schedule=DimensionConfig(key="training.lr_scheduler", kind=CATEGORICAL, choices=["constant", "cosine"]),
    )
    assert "no float or int dimension" in problems(named)[0]
    monkeypatch.setitem(sys.modules, "cmaes", None)
    assert problems(config(Sampler.cmaes)) == [
        "search.sampler=cmaes needs the package cmaes: pip install cmaes",
    ]


@pytest.mark.parametrize("sampler", [Sampler.random, Sampler.qmc, Sampler.grid])
def test_what_does_not_learn_takes_no_warm_start(sampler: Sampler) -> None:
    cfg = config(sampler)
    cfg.search.warm_start = ["sweeps/earlier"]
    (problem,) = problems(cfg)
    assert "does not learn from earlier trials; take one of tpe, gp, cmaes, nsga2" in problem


@pytest.mark.parametrize("sampler", [Sampler.tpe, Sampler.gp, Sampler.cmaes, Sampler.nsga2])
def test_what_learns_begins_near_the_best_of_a_warm_start(sampler: Sampler) -> None:
    dimensions = {
        RANK: optuna.distributions.IntDistribution(4, 64, step=4),
        DECAY: optuna.distributions.FloatDistribution(0.0, 0.2),
    }
    cold_mean = warm_mean = 0.0
    for seed in range(3):
        cfg, cold, warm = config(sampler, seed), optuna.create_study(), optuna.create_study()
        cfg.search.random_share = 0.0
        drawn = random.Random(0)
        for number in range(20):
            params = {RANK: 4 * drawn.randint(1, 16), DECAY: 0.2 * drawn.random()}
            known = optuna.trial.create_trial(
                params=params,
                distributions=dimensions,
                value=loss(params),
                user_attrs={WARM: f"x#{number}"},
                system_attrs=marks(cfg),
            )
            warm.add_trial(known)
        found = [parameters(search(study, cfg, ["completed"] * 5)) for study in (cold, warm)]
        assert found[0][0] == found[1][0] == {key: lookup(cfg, key) for key in (RANK, DECAY)}
        cold_mean += sum(map(loss, found[0][1:])) / 12
        warm_mean += sum(map(loss, found[1][1:])) / 12
    assert warm_mean < cold_mean - 0.1


def test_auto_is_gp_where_it_models_the_whole_space_and_tpe_elsewhere() -> None:
    cfg = config(Sampler.auto)
    assert chosen(cfg) is Sampler.gp
    several, conditional, many, bred, named = (copy.deepcopy(cfg) for _ in range(5))
    several.search.objectives = [Objective.eval_loss, Objective.trainable_parameters]
    conditional.space["decay"].when = {"training.optimizer": ["adamw"]}
    many.search.trials = 251
    bred.scheduler.kind = Scheduler.pbt
    assert [chosen(each) for each in (several, conditional, many, bred)] == [Sampler.tpe] * 4
    named.search.sampler = Sampler.qmc
    assert chosen(named) is Sampler.qmc


@pytest.mark.parametrize("path", sorted((conf_dir() / "search").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_of_each_shipped_sampler_can_be_searched(path: Path) -> None:
    command = shlex.split(path.read_text().splitlines()[0].lstrip("# "))
    assert problems(compose(command[2:])) == []
