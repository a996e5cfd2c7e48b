"""Every method in a real worker group: trained, saved, and measured as it was trained."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from raytune_lora.config.compose import compose
from raytune_lora.config.groups import groups
from raytune_lora.data.store import TokenStore
from raytune_lora.evaluation.figures import disagreement
from raytune_lora.models.export import ADAPTER
from raytune_lora.training.driver import Pool
from raytune_lora.training.task import Task
from raytune_lora.tuning.job import plain_run
from tests.integration import tasks
from tests.integration.conftest import EVALUATION, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SETTINGS = {
    "bitfit": ["model=tiny_bias"],
    "ir_qlora": ["method.r=8"],  # it divides the widths
}


@pytest.mark.parametrize("method", groups()["method"])
def test_a_method_trains_and_is_measured_as_it_was_trained(
    method: str, single: Pool, store: TokenStore, cache: Path, tmp_path: Path
) -> None:
    own = [f"method={method}", *SETTINGS.get(method, [])]
    cfg = plain_run(compose([*TINY, *EVALUATION, *own, "training.max_steps=4", f"cache={cache}"]))
    reports = list(single.stream(Task(uuid.uuid4().hex, tasks.train, cfg, store, tmp_path / "trial")))
    extra = {"adapter": str(Path(reports[-1]["checkpoint"]) / ADAPTER)}
    (measured,) = single.stream(Task(uuid.uuid4().hex, tasks.measure, cfg, store, tmp_path / "best", extra=extra))
    assert measured["exact_match"] is not None
    assert measured["trial_loss"] == pytest.approx(reports[-1]["eval_loss"], abs=1e-4)
    assert disagreement(reports[-1]["eval_loss"], measured) is None
