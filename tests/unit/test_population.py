"""Population based training: who is replaced by whose child, with which parameters, and that a kill changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raytune_lora.config import validate
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import CHANGEABLE, SchedulerConfig
from raytune_lora.tuning.job import segments
from raytune_lora.tuning.population import Population, perturbed
from raytune_lora.tuning.trials import Journal, Record, Trial
from raytune_lora.tuning.turns import Child, Turn
from tests.unit.playing import EVERY, Disk, Killed, Play, Weights, outcome

TOTAL, INTERVAL = 128, 32
PBT = ("experiment=tiny", "scheduler=pbt", "scheduler.population=4", "search.trials=7", f"scheduler.grace={INTERVAL}")


def config(concurrent: int = 1, *overrides: str) -> SweepConfig:
    return compose([*PBT, "search=random", f"search.concurrent={concurrent}", *overrides])


def train(weights: Weights, params: dict[str, Any]) -> float:
    """The loss falls fastest at a rate of 1e-3."""
    away = abs(math.log10(params["training.learning_rate"]) + 3)
    return weights[1] * (0.8 + 0.1 * away)


def play(folder: Path, cfg: SweepConfig, disk: Disk, killed_after: int | None = None) -> Play:
    folder.mkdir(exist_ok=True)
    return Play(folder, cfg, train, TOTAL, disk).run(killed_after)


# ----------------------------------------------------------------------------------------------------- the whole search


def test_the_worst_give_way_to_children_of_the_best_at_equal_samples(tmp_path: Path) -> None:
    record = play(tmp_path, config(), Disk()).record
    children = [trial for trial in record.searched if trial.parent]
    assert len(record.searched) == record.ended == 7
    assert [child.born for child in children] == [32, 64, 96]
    for child in children:
        assert child.replaces is not None
        alive = [t for t in record.searched if t.born < child.born and losses(t).get(child.born) is not None]
        ranked = sorted(alive, key=lambda t: losses(t)[child.born])
        assert [child.parent, child.replaces] == [ranked[0].trial_id, ranked[-1].trial_id]
        assert record.trials[child.replaces].status == "stopped"
        assert record.trials[child.replaces].samples_seen == child.born
        assert losses(child)[child.born] == losses(ranked[0])[child.born], "it begins from the parent's weights"
    assert sorted(t.samples_seen for t in record.searched) == [32, 64, 96, 128, 128, 128, 128]


def losses(trial: Trial) -> dict[float, float]:
    return {point["samples_seen"]: point["eval_loss"] for point in trial.curve}


def test_members_take_turns_and_it_makes_no_difference(tmp_path: Path) -> None:
    at_once = [outcome(play(tmp_path / str(n), config(n), Disk()).record) for n in (1, 3, 4)]
    assert at_once[0] == at_once[1] == at_once[2]


@pytest.mark.parametrize("concurrent", [1, 4])
def test_after_a_kill_at_any_moment_it_decides_as_without(concurrent: int, tmp_path: Path) -> None:
    """But the first proposals, which are the sampler's."""
    cfg = config(concurrent)
    whole = play(tmp_path / "whole", cfg, Disk())
    for moment in range(5, whole.events, 7):
        folder, disk = tmp_path / str(moment), Disk()
        with pytest.raises(Killed):
            play(folder, cfg, disk, moment)
        begun = sum(trial.parent is None for trial in Journal(folder / "journal.jsonl").record.searched)
        again = play(folder, cfg, disk)
        if begun == 4:
            assert outcome(again.record) == outcome(whole.record)
        assert len(again.record.searched) == again.record.ended == 7
        assert not [t for t in again.study.get_trials(deepcopy=False) if t.state.name == "RUNNING"]


def test_the_winner_says_which_parameters_it_had_in_turn(tmp_path: Path) -> None:
    record = play(tmp_path, config(), Disk()).record
    child = next(trial for trial in record.searched if trial.parent)
    assert child.parent is not None
    first, second, third = segments(record.lineage(child)).splitlines()
    assert "with these parameters in turn" in first
    assert second.startswith(f"# from sample 0 on, as trial {child.parent}: ")
    assert f"training.learning_rate={record.trials[child.parent].params['training.learning_rate']}" in second
    assert third.startswith(f"# from sample 32 on, as trial {child.trial_id}: ")
    assert segments(record.lineage(record.trials[child.parent])) == ""


# ---------------------------------------------------------------------------------------------------- a round in detail


def member(name: str, *seen: float, status: str = "paused", **facts: Any) -> Trial:
    """One that measured these losses, one an interval."""
    curve = [
        {"samples_seen": float(INTERVAL * n), "eval_loss": loss, "train_loss": loss} for n, loss in enumerate(seen, 1)
    ]
    return Trial(name, {}, status, samples_seen=INTERVAL * len(seen), curve=curve, latest=f"{name}/checkpoint", **facts)


def population(*members: Trial, size: int = 4, trials: int = 20) -> Population:
    cfg = SchedulerConfig(population=size, grace=INTERVAL)
    record = Record({each.trial_id: each for each in members})
    return Population(record, trials, cfg, total=TOTAL, every=EVERY, seed=0)


def test_nobody_goes_on_before_the_last_has_come_as_far() -> None:
    running = member("d", status="running")
    waiting = population(member("a", 1.0), member("b", 2.0), member("c", 3.0), running)
    assert waiting.next({"d": running}) is Turn.WAIT


def test_a_child_is_on_record_before_a_member_goes_on_and_has_measured_before_its_parent_does() -> None:
    members = [member("a", 1.0), member("b", 2.0), member("c", 3.0), member("d", 4.0)]
    child = population(*members).next({})
    assert child == Child(members[0], members[3])
    begun = Trial("e", {}, parent="a", born=INTERVAL, samples_seen=INTERVAL, replaces="d")
    assert population(*members).next({"e": begun}) is Turn.WAIT
    members[3].status = "stopped"
    assert population(*members, begun).next({"e": begun}) is members[1]
    begun.curve = members[0].curve[:]
    assert population(*members, begun).next({"e": begun}) is members[0]


def test_a_quarter_is_replaced_and_whoever_ended_before() -> None:
    losses_of = dict(zip("abcdefgh", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), strict=True))
    members = [member(name, loss) for name, loss in losses_of.items()]
    members[2] = member("c", 3.0, status="completed")  # it gained nothing any more
    members[3] = member("d", status="diverged")
    whole = population(*members, size=8)
    made = []
    for number in range(4):
        child = whole.next({})
        assert isinstance(child, Child)
        made.append((child.parent.trial_id, child.replaces.trial_id))
        born = Trial(f"x{number}", {}, "paused", parent="a", born=32, samples_seen=32, replaces=made[-1][1])
        born.curve = members[0].curve[:]
        whole._record.trials[born.trial_id] = born
    assert [replaced for _, replaced in made] == ["c", "d", "g", "h"]
    assert {parent for parent, _ in made} <= {"a", "b"}
    assert isinstance(whole.next({}), Trial)


def test_without_trials_left_all_go_on_and_at_the_end_nobody_is_replaced() -> None:
    members = [member(name, loss) for name, loss in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True)]
    assert population(*members, trials=4).next({}) is members[0]
    ended = [member(name, 4.0, 3.0, 2.0, loss, status="completed") for name, loss in zip("abcd", range(4), strict=True)]
    assert population(*ended).next({}) is Turn.END
    lost = [member(name, status="failed") for name in "abcd"]
    assert population(*lost).next({}) is Turn.END


# ------------------------------------------------------------------------------------------------------- the parameters

SPACE = {
    "training.learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
    "training.weight_decay": FloatDistribution(0.0, 0.1),
    "method.dropout": FloatDistribution(0.0, 0.15, step=0.05),
    "training.max_grad_norm": CategoricalDistribution((0.3, 1.0, 3.0)),
    "method.ratio": IntDistribution(1, 16),
    "method.r": IntDistribution(8, 64, log=True),
    "method.alpha / method.r": CategoricalDistribution((1, 2, 4)),
    "training.global_batch": IntDistribution(8, 64, step=8),
}
POINT = dict(zip(SPACE, (2e-4, 0.05, 0.05, 1.0, 4, 16, 2, 32), strict=True))


def test_what_may_not_change_is_inherited_and_the_rest_stays_within_the_space() -> None:
    drawn: dict[str, set[Any]] = {name: set() for name in SPACE}
    point = dict(POINT)
    for number in range(400):
        point = perturbed(point if number % 20 else POINT, SPACE, str(number))
        for name, value in point.items():
            assert SPACE[name]._contains(SPACE[name].to_internal_repr(value)), (name, value)
            drawn[name].add(value)
    for name, values in drawn.items():
        assert (len(values) > 1) == (name in CHANGEABLE), name
    assert drawn["method.dropout"] == {0.0, 0.05, 0.1, 0.15}
    assert drawn["training.max_grad_norm"] == {0.3, 1.0, 3.0}


def test_a_number_is_multiplied_or_drawn_anew_and_always_the_same_for_a_name() -> None:
    rates = [perturbed(POINT, SPACE, str(number))["training.learning_rate"] for number in range(400)]
    assert rates == [perturbed(POINT, SPACE, str(number))["training.learning_rate"] for number in range(400)]
    lower, higher = sum(r == 2e-4 * 0.8 for r in rates), sum(r == 2e-4 * 1.2 for r in rates)
    assert 0.3 < lower / 400 < 0.45
    assert 0.3 < higher / 400 < 0.45
    assert 0.18 < 1 - (lower + higher) / 400 < 0.32


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["scheduler.population=8"], "scheduler.population must be <= search.trials"),
        (["search=cmaes"], "take random, qmc or tpe"),
        (["confirm.top=1"], "a winner of scheduler=pbt had several in turn; set confirm.top=0"),
        (["~space.learning_rate", "~space.dropout"], "the space has no dimension that may change in the middle"),
        (["scheduler.resume_stopped=true"], "scheduler=pbt has none: take scheduler=asha or hyperband"),
        (["search.objectives=[eval_loss,training_seconds]"], "set scheduler=none (got pbt)"),
    ],
)
def test_what_does_not_go_together_with_it_is_refused(overrides: list[str], reason: str) -> None:
    assert validate.problems(config()) == []
    (problem,) = validate.problems(compose([*PBT, *overrides]))
    assert reason in problem
