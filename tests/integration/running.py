"""A task on a worker group, and what its folder tells afterwards."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from raytune_lora.training.task import Task
from tests.integration import tasks


def run(pool: Pool, store: TokenStore, folder: Path, cfg: Any, function: Any = tasks.train) -> list[dict[str, Any]]:
    """The reports of a task."""
    return list(pool.stream(Task(uuid.uuid4().hex, function, cfg, store, folder)))


def steps(folder: Path) -> list[dict[str, float]]:
    """Loss, gradient norm and learning rate of each step of a trial."""
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [step["loss"] for step in steps(folder)]
