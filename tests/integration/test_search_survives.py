"""A search that is killed, that ends early or that hangs, on the tiny model."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from raytune_lora.training.task import Task, TaskFailed
from tests.integration import tasks
from tests.integration.conftest import Configure
from tests.integration.test_jobs import ended, finish, nothing_left, start, trials_in, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(300)]

cloudpickle.register_pickle_by_value(sys.modules[__name__])

TINY = ("experiment=tiny", "search.trials=3", "search.concurrent=1")


def hang_in_a_step(cfg: Any, store: Any, place: Any) -> None:
    """Train, and stop moving after the first step: as the workers of a group do that wait for each other."""
    from raytune_lora.training.trainer import PlannedTrainer

    original = PlannedTrainer.training_step

    def training_step(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        while self.state.global_step:
            time.sleep(1)
        return original(self, model, *arguments, **settings)

    PlannedTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        tasks.train(cfg, store, place)
    finally:
        PlannedTrainer.training_step = original  # type: ignore[method-assign]


def events(folder: Path, kind: str) -> list[str]:
    return [event["trial_id"] for event in trials_in(folder) if event["event"] == kind]


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return read


def test_a_confirmation_goes_on_after_a_kill_and_a_second_driver_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    confirm = ("scheduler=none", "confirm.top=2", "confirm.seeds=2")
    process = start("sweep", *TINY, *confirm, f"output={folder}", f"cache={cache}")
    wait_for(lambda: trials_in(folder) or process.poll() is not None)
    _, err = finish(start("sweep", f"resume={folder}"), status=2)
    assert "another process is working" in err

    wait_for(lambda: any("-s1" in name for name in events(folder, "trial_result")) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    nothing_left(process.pid)
    before = ended(folder)
    assert len(before) in (3, 4)

    out, _ = finish(start("sweep", f"resume={folder}"))
    assert ended(folder)[: len(before)] == before
    assert len(set(ended(folder))) == len(ended(folder)) == 5
    found = results(folder)
    confirmation = found["confirmation"]
    best = sorted((t for t in found["trials"] if not t["confirms"]), key=lambda t: t["eval_loss"])[:2]
    assert {c["trial_id"] for c in confirmation["configurations"]} == {t["trial_id"] for t in best}
    for configuration in confirmation["configurations"]:
        name, runs = configuration["trial_id"], configuration["runs"]
        assert [(run["trial_id"], run["seed"]) for run in runs] == [(name, 0), (f"{name}-s1", 1)]
        assert runs[0]["eval_loss"] != runs[1]["eval_loss"]
        assert configuration["mean"] == pytest.approx(sum(run["eval_loss"] for run in runs) / 2)
    assert {t["samples_seen"] for t in found["trials"]} == {64}
    assert found["best"]["trial_id"].removesuffix("-s1") == confirmation["winner"]
    assert confirmation["words"] in out


def test_a_target_ends_a_search_and_another_lets_it_go_on(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    out, _ = finish(start("sweep", *TINY, "budget.target=100", f"output={folder}", f"cache={cache}"))
    found = results(folder)
    assert found["state"] == "finished"
    assert found["ended_by"]["budget"] == "target"
    assert [(t["trial_id"], t["status"], t["samples_seen"]) for t in found["trials"]] == [("0000", "stopped", 16)]
    assert found["best"]["trial_id"] == "0000"
    said = (
        f"ended early: {found['ended_by']['why']}",
        f"to search on: resume={folder} budget.target=<lower> (or null)",
    )
    assert all(line in out for line in said)

    journal = (folder / "journal.jsonl").read_bytes()
    out, _ = finish(start("sweep", f"resume={folder}"))
    assert all(line in out for line in said)
    assert (folder / "journal.jsonl").read_bytes() == journal

    out, _ = finish(start("sweep", f"resume={folder}", "budget.target=null"))
    found = results(folder)
    assert found["ended_by"] is None
    assert [t["trial_id"] for t in found["trials"]] == ["0000", "0001", "0002"]
    assert ended(folder)[0] == "0000"
    assert "ended early" not in out


def test_a_trial_that_hangs_fails_and_its_group_is_replaced(
    ray_instance: None, configure: Configure, store: TokenStore, tmp_path: Path
) -> None:
    cfg = configure("workers=2")
    with Pool(cfg, tmp_path / "groups", groups=1, stalled=20) as pool:
        with pytest.raises(TaskFailed, match="no sign of life for 20 s"):
            list(pool.stream(Task("hangs", hang_in_a_step, cfg, store, tmp_path / "hangs", steps=True)))
        reports = list(pool.stream(Task("next", tasks.train, cfg, store, tmp_path / "next", steps=True)))
    assert reports[-1]["last"]
