"""What tests of every kind need: a cache of their own, and the tiny model in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from raytune_lora.cache import Cache
from raytune_lora.config.schema import TinyModelConfig
from raytune_lora.models.sources import byte_tokenizer, materialize


class _OneRay(LoadScopeScheduling):
    """The tests that start Ray run one after the other, as they want both cores, and beside them those of the units."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0] if nodeid.startswith("tests/unit/") else "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quickstart is timed: it comes last, when the units' tests have left a core to it."""
    items.sort(key=lambda item: item.nodeid.startswith("tests/e2e/"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _OneRay:
    return _OneRay(config, log)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of models and token stores."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_folder(cache: Path) -> Path:
    """The folder of ``model=tiny``."""
    return materialize(TinyModelConfig(), Cache(cache))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny model's, without the model."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own file of Alpaca rows."""
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    lines = [
        {"instruction": "Say it backwards.", "input": f"item {number}", "output": f"item {number}"[::-1]}
        for number in range(200)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
