"""Trials that stop and go on in one search: stopped ones that rise, and the members of a population."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest

from raytune_lora.config.compose import load
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from raytune_lora.tuning.job import plain_run
from raytune_lora.tuning.space import apply
from tests.integration.running import run, steps
from tests.integration.test_jobs import ended, finish, nothing_left, start, trials_in, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(300)]

SPACE = ("~space.rank", "~space.alpha", "~space.dropout")
RATES = (
    "space.learning_rate.kind=categorical",
    "space.learning_rate.log=false",
    "space.learning_rate.choices=[3e-3,1e-3,1e-5,2e-5]",
)
RISING = ("search=grid", "search.seed=2", "search.concurrent=1", "scheduler.resume_stopped=true")  # the second rises
PBT = ("scheduler=pbt", "scheduler.population=3", "scheduler.grace=32", "evaluation.every=32", "search=random")


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return read


def by_step(folder: Path) -> dict[int, float]:
    """The last loss of each step: those between the last checkpoint and the stop are done again."""
    return {int(step["step"]): step["loss"] for step in steps(folder)}


def child_measured(folder: Path) -> bool:
    events = trials_in(folder)
    children = {event["trial_id"] for event in events if "parent" in event}
    return any(event["event"] == "trial_result" and event["trial_id"] in children for event in events)


def config_of(folder: Path, trial: dict[str, Any]) -> RunConfig:
    return apply(plain_run(load(folder / "config.yaml")), trial["params"])


def test_a_stopped_trial_that_rises_goes_on_as_if_never_stopped(
    single: Pool, store: TokenStore, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "sweep"
    finish(start("sweep", "experiment=tiny", *SPACE, *RATES, *RISING, f"output={folder}", f"cache={cache}"))
    trials = results(folder)["trials"]
    assert [(t["trial_id"], t["resumed"]) for t in trials] == [("0000", 0), ("0001", 1), ("0002", 0), ("0003", 0)]
    assert [t["samples_seen"] for t in trials] == [64, 32, 16, 16]
    assert len(ended(folder)) == 5
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'study.db'}")
    assert [t.state.name for t in study.trials] == ["COMPLETE", *["PRUNED"] * 4]
    assert [t.user_attrs.get("continues") for t in study.trials] == [None, None, None, None, "0001"]

    risen = trials[1]
    whole = run(single, store, tmp_path / "whole", config_of(folder, risen))
    assert [p["eval_loss"] for p in risen["curve"]] == [report["eval_loss"] for report in whole[:2]]
    found, expected = by_step(folder / "trials" / "0001"), by_step(tmp_path / "whole")
    assert [found[step] for step in range(1, 5)] == [expected[step] for step in range(1, 5)]


def test_a_population_goes_on_after_a_kill_and_a_child_from_its_parents_weights(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    process = start("sweep", "experiment=tiny", *SPACE, *PBT, f"output={folder}", f"cache={cache}")
    wait_for(lambda: process.poll() is not None or child_measured(folder))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    nothing_left(process.pid)

    finish(start("sweep", f"resume={folder}"))
    found = results(folder)
    trials = {trial["trial_id"]: trial for trial in found["trials"]}
    (child,) = [trial for trial in trials.values() if trial["parent"]]
    parent = trials[child["parent"]]
    assert len(trials) == 4
    assert sorted((t["status"], t["samples_seen"]) for t in trials.values()) == [
        ("completed", 64),
        ("completed", 64),
        ("completed", 64),
        ("stopped", 32),
    ]
    (worst,) = [trial for trial in trials.values() if trial["status"] == "stopped"]
    at_32 = [t["curve"][0]["eval_loss"] for t in trials.values() if t is not child]
    assert parent["curve"][0]["eval_loss"] == min(at_32)
    assert worst["curve"][0]["eval_loss"] == max(at_32)

    assert child["born"] == 32
    assert [p["samples_seen"] for p in child["curve"]] == [32, 64]
    assert child["curve"][0]["eval_loss"] == parent["curve"][0]["eval_loss"]
    assert child["params"] != parent["params"]
    mine, its = (steps(folder / "trials" / t["trial_id"]) for t in (child, parent))
    assert [step["step"] for step in mine] == [5, 6, 7, 8]
    fifth = next(step for step in its if step["step"] == 5)
    assert mine[0]["loss"] == fifth["loss"], "the same weights and samples"
    ratio = child["params"]["training.learning_rate"] / parent["params"]["training.learning_rate"]
    assert mine[0]["learning_rate"] / fifth["learning_rate"] == pytest.approx(ratio)
    assert mine[1]["loss"] != next(step for step in its if step["step"] == 6)["loss"]

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'study.db'}")
    assert sorted(t.state.name for t in study.trials) == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]
    winner = found["best"]["trial_id"]
    said = (folder / "best" / "config.yaml").read_text()
    assert ("in turn" in said) == (winner == child["trial_id"])
    assert len(found["best"]["segments"]) == (2 if winner == child["trial_id"] else 1)
    assert (
        load(folder / "best" / "config.yaml").training.learning_rate
        == found["best"]["params"]["training.learning_rate"]
    )
