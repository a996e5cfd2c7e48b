"""``resume=auto``: the same command line begins a sweep and goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_lora.config.compose import compose
from raytune_lora.tuning.folder import create, problems, reopen
from raytune_lora.tuning.resume import settle

TYPED = ["experiment=tiny", "resume=auto", "+space.decay={key: training.weight_decay, low: 0.0, high: 0.1}"]


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    return [*TYPED, f"output={tmp_path / 'sweep'}"]


def begin(tmp_path: Path, overrides: list[str]) -> None:
    create(tmp_path / "sweep", compose(overrides), "sweep")


def test_it_begins_where_there_is_nothing(typed: list[str]) -> None:
    cfg = compose(typed)
    assert settle(cfg, typed) == []
    assert cfg.resume is None


def test_the_same_command_goes_on_and_changes_nothing(typed: list[str], tmp_path: Path) -> None:
    begin(tmp_path, typed)
    cfg = compose(typed)
    assert settle(cfg, typed) == []
    assert cfg.resume == str(tmp_path / "sweep")


def test_where_it_runs_may_be_typed_anew(typed: list[str], tmp_path: Path) -> None:
    begin(tmp_path, [*typed, "workers=2", "deepspeed=zero2", "budget.hours=3"])
    again = [*typed, "workers=2", "deepspeed=zero3", "budget.hours=4"]
    assert settle(compose(again), again) == ["deepspeed", "budget.hours"]
    assert settle(compose(typed), typed) == [], "what is not typed stays as the folder has it"


def test_a_folder_whose_first_write_was_killed_is_begun_anew(typed: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.yaml.new").write_text("# the resolved config of a sw")
    cfg = compose(typed)
    settle(cfg, typed)
    assert cfg.resume is None
    assert problems(folder) == []
    begin(tmp_path, typed)
    assert reopen(folder, "sweep").search.trials == 4
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml"]
