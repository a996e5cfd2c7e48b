"""Workers, machines and disks that go away under a sweep, each one really taken away."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool, TaskFailed
from raytune_lora.tuning import isolated
from tests.integration import tasks
from tests.integration.conftest import Configure
from tests.integration.running import losses, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS, CUT = 6, 2
RUN = ("method.dropout=0.1", "training.micro_batch=2", f"training.max_steps={STEPS}", "evaluation.every=16")


def train_and_kill(cfg: Any, store: Any, place: Any) -> None:
    """Train, and at the first attempt kill the last worker's process between the first checkpoint and the second."""
    import os
    import signal

    from transformers import Trainer

    original = Trainer.training_step

    def training_step(self: Any, *arguments: Any, **settings: Any) -> Any:
        marker = place.folder / "killed"
        if place.rank == place.workers - 1 and self.state.global_step == CUT + 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **settings)

    Trainer.training_step = training_step  # type: ignore[method-assign]
    try:
        tasks.train(cfg, store, place)
    finally:
        Trainer.training_step = original  # type: ignore[method-assign]


def test_a_killed_worker_costs_the_steps_since_the_checkpoint_and_changes_no_bit(
    pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configure(*RUN, "workers=2")
    run(pair, store, tmp_path / "whole", cfg)
    monkeypatch.setattr(isolated, "_train", train_and_kill)
    reports = list(isolated.train(pair.board, "killed", cfg, store, tmp_path))
    assert [(r.get("samples_seen"), r.get("kind")) for r in reports] == [
        (16, None),
        (None, "lost"),
        (16, None),
        (32, None),
        (48, None),
    ]
    assert losses(tmp_path / "killed")[-(STEPS - CUT) :] == losses(tmp_path / "whole")[CUT:]

    never = configure(*RUN, "workers=2", "cluster.retries=0")
    with pytest.raises(TaskFailed, match=r"a worker's process ended|lost each other") as caught:
        list(isolated.train(pair.board, "lost", never, store, tmp_path))
    assert caught.value.ended.status == "lost"
