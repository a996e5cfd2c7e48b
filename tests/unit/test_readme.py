"""Every command of the README is executed by a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import readme

# a part of the command, and the test that executes it
EXECUTED = {
    "make sweep": "e2e/test_quickstart.py::test_quickstart",
    "make test": "the tests themselves",
    "jobs/sweep.py model.path=": "integration/test_jobs.py::sweep",
    "jobs/train.py model=tiny data=fake workers=2": "integration/test_jobs.py::test_one_run_without_a_sweep",
    "jobs/sweep.py resume=": "integration/test_jobs.py::test_interrupted_killed_and_resumed",
    "jobs/sweep.py --help": "unit/test_readme.py::test_help_and_config",
    "jobs/prepare.py data.path=": "unit/test_inspect.py::test_no_model_is_needed_to_see_what_is_in_the_data",
    "--cfg job": "unit/test_readme.py::test_help_and_config",
    "ray job submit": "integration/test_submit.py::test_submitted_by_ray_and_no_secret_is_written",
    "jobs/submit.py": "integration/test_submit.py::test_submitted_left_alone_stopped_and_resumed",
    "jobs/status.py": "integration/test_submit.py::test_submitted_left_alone_stopped_and_resumed",
}


@pytest.mark.parametrize("command", readme.commands())
def test_each_command_has_its_test(command: str) -> None:
    parts = [part for part in EXECUTED if part in command and not (part.startswith("jobs/") and "ray job" in command)]
    assert len(parts) == 1, f"no test, or several, for: {command}"
    path, _, name = EXECUTED[parts[0]].partition("::")
    if name:
        assert f"def {name}(" in (Path(__file__).parents[1] / path).read_text()


def test_every_test_named_has_a_command() -> None:
    assert all(readme.command(part) for part in EXECUTED if part != "jobs/sweep.py model.path=")


def test_help_and_config(capsys: pytest.CaptureFixture[str]) -> None:
    from raytune_lora.cli import job

    assert job("sweep", readme.arguments("--help", {})) == 0
    assert "quickstart" in capsys.readouterr().out
    assert job("sweep", readme.arguments("--cfg job", {})) == 0
    assert "trials: 12" in capsys.readouterr().out
