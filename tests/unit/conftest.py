"""What tests of small models share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give on so small a model, and take the cores from the tests that start Ray."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of models of the zoo, by name and by what is changed in their config."""
    from tests.unit import zoo

    root, made = tmp_path_factory.mktemp("zoo"), dict[str, Path]()

    def saved(name: str, **changes: Any) -> Path:
        key = json.dumps([name, changes])
        if key not in made:
            made[key] = root / f"{name}-{len(made)}"
            config, model = zoo.ZOO[name](**changes), zoo.build(name, **changes)
            model.save_pretrained(made[key])
            if type(config) is not type(model.config):  # a language model within another: its folder is the other's
                config.save_pretrained(made[key])
        return made[key]

    return saved
