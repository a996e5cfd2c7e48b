"""How a sweep stands, from its folder alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.cli import main
from raytune_lora.config.compose import compose
from raytune_lora.tuning import status
from raytune_lora.tuning.folder import SweepFolder, create
from raytune_lora.tuning.trials import Journal

RESULT = {
    "samples_seen": 16,
    "eval_loss": 1.25,
    "train_loss": 2.0,
    "training_seconds": 3.0,
    "trainable_parameters": 10,
    "peak_memory_bytes": None,
    "micro_batch": 4,
    "last": False,
    "checkpoint": "/c",
}


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    """A sweep of four trials: one has ended, one runs."""
    cfg = compose(["experiment=tiny", f"output={tmp_path / 'mine'}", "budget.hours=2"])
    made = create(tmp_path / "mine", cfg, "sweep")
    (made.path / "data_report.json").write_text(json.dumps({"rows": {"splits": {"train": 100}}}))
    journal = Journal(made.journal)
    journal.append("phase", name="prepare", seconds=1.0)
    journal.append("phase", name="baseline", seconds=2.0, eval_loss=5.5, trial_loss=5.25, exact_match=0.0)
    for trial_id, ended in (("0000", True), ("0001", False)):
        journal.append("trial_started", trial_id=trial_id, params={"method.r": 8}, gpus=0)
        journal.append("trial_result", trial_id=trial_id, **RESULT)
        logs = made.trials / trial_id / "logs"
        logs.mkdir(parents=True)
        (logs / "worker-0.log").write_text("one line\nand another\nhalf a li")
        (made.trials / trial_id / "steps.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
        if ended:
            journal.append("trial_ended", trial_id=trial_id, status="completed", error=None, seconds=7.0)
    return made


@pytest.fixture
def running(folder: SweepFolder) -> Iterator[SweepFolder]:
    """The same, with a driver at work."""
    lock = folder.lock()
    yield folder
    lock.release()


def facts(folder: SweepFolder) -> dict[str, Any]:
    return status.summary(status.look(folder.path))


def add(folder: SweepFolder, **event: Any) -> None:
    with folder.journal.open("a") as file:
        file.write(json.dumps({"time": time.time(), "clock": 60.0, **event}) + "\n")


def test_a_day_in_all_goes_on_while_nothing_works(folder: SweepFolder) -> None:
    folder.rewrite(compose(["experiment=tiny", f"output={folder.path}", "budget.wall_hours=24", "budget.hours=8"]))
    before, after = (json.dumps({"time": when, "clock": 60.0, "event": "clock"}) for when in (1000.0, 2000.0))
    folder.journal.write_text(f"{before}\n{folder.journal.read_text()}{after}\n")
    looked = replace(status.look(folder.path), now=940.0 + 6 * 3600)
    assert looked.state == status.INTERRUPTED
    assert status.budget(looked)["wall_hours"] == {"limit": 24.0, "used": 6.0}
    assert status.budget(looked)["hours"]["used"] == round(60 / 3600, 4)


def test_a_sweep_that_runs(running: SweepFolder) -> None:
    said = facts(running)
    assert (said["state"], said["doing"], said["kind"]) == ("running", "trials", "sweep")
    assert said["counts"] == {"completed": 1, "running": 1, "ended": 1, "total": 4}
    not_yet = {"eval_loss": None, "eval_loss_rows": None, "exact_match": None}
    assert said["best"] == {"trial_id": "0000", "trial_loss": 1.25, "params": {"method.r": 8}, **not_yet}
    assert said["baseline"] == {"eval_loss": 5.5, "trial_loss": 5.25, "exact_match": 0.0}
    assert said["budget"].keys() == {"hours"}
    assert said["goal"] == 64
    assert [trial["status"] for trial in said["trials"]] == ["completed", "running"]
    assert said["hints"] == []
    assert set(said) == {
        *("schema_version", "name", "folder", "kind", "state", "doing", "seconds", "phases", "counts", "budget"),
        *("ended_by", "baseline", "best", "last", "eta_seconds", "hints", "goal", "trials"),
    }
    for key in said:
        assert f"``{key}``" in str(status.__doc__)


def test_one_that_nobody_works_on_says_how_to_go_on(folder: SweepFolder) -> None:
    said = facts(folder)
    assert said["state"] == "interrupted"
    assert said["hints"] == [f"no process works on it; go on with resume={folder.path}"]


def test_looking_keeps_no_driver_out(folder: SweepFolder) -> None:
    assert facts(folder)["state"] == "interrupted"
    folder.lock().release()


def test_a_line_cut_short_by_a_kill(folder: SweepFolder) -> None:
    before = folder.journal.read_bytes()
    folder.journal.write_bytes(before + b'{"time": 1, "event": "trial_en')
    assert facts(folder)["counts"]["ended"] == 1
    assert folder.journal.read_bytes() == before + b'{"time": 1, "event": "trial_en'


@pytest.mark.parametrize(
    "line", [b"not json", b"\0" * 40, b"\xff\xfe", b"[]", b'{"event": "trial_result"}', b'{"time": 1}', b""]
)
def test_a_damaged_line_is_told(line: bytes, running: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lines = running.journal.read_bytes().splitlines()
    running.journal.write_bytes(b"\n".join([*lines[:2], line, *lines[2:], b""]))
    assert main(["status", str(running.path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {running.journal}, line 3: it is damaged")
    assert "(head -n 2)" in said
    running.journal.write_bytes(b"\n".join([*lines[:2], b""]))
    assert main(["status", str(running.path)]) == 0


def test_a_log_commands_no_terminal(running: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever may write to a shared folder writes what is shown on the terminal of who looks."""
    log = running.trials / "0001" / "logs" / "worker-0.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"fine\r 50%\x1b]52;c;cm0gLXJmIC8K\x07\n\xc2\x9b31mred \xeb\x91\x98\n")
    assert main(["status", str(running.path), "--trial", "0001"]) == 0
    shown = capsys.readouterr().out
    assert "red 둘" in shown
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(shown)


def test_before_the_first_event(tmp_path: Path) -> None:
    made = create(tmp_path / "new", compose(["experiment=tiny"]), "run")
    said = facts(made)
    assert (said["doing"], said["last"], said["best"], said["counts"]["total"]) == ("prepare", None, None, 1)


def test_a_finished_one(folder: SweepFolder) -> None:
    add(folder, event="phase", name="trials", seconds=3.0)
    add(folder, event="phase", name="best", seconds=1.0)
    said = facts(folder)
    assert (said["state"], said["doing"], said["hints"]) == ("finished", None, [])


def test_the_end_is_told_once_there_is_a_pace(running: SweepFolder) -> None:
    assert facts(running)["eta_seconds"] is None
    for trial_id in ("0002", "0003"):
        add(running, event="trial_started", trial_id=trial_id, params={})
        add(running, event="trial_ended", trial_id=trial_id, status="stopped", error=None, seconds=1.0)
    assert 18 <= facts(running)["eta_seconds"] <= 22  # a minute for three, and one is left


def test_a_trial_without_a_step_for_long(running: SweepFolder) -> None:
    for file in (running.trials / "0001").rglob("*.*"):
        os.utime(file, (time.time() - 1200, time.time() - 1200))
    (hint,) = facts(running)["hints"]
    assert hint.startswith("trial 0001 has made no step for 20 minutes; its log is in ")
    assert "search.stalled" in hint


def test_a_clock_that_is_ahead(running: SweepFolder) -> None:
    add(running, event="clock", time=time.time() + 300)
    (hint,) = facts(running)["hints"]
    assert "ahead of this one's" in hint
    assert facts(running)["seconds"] == pytest.approx(60.0, abs=1)


def test_one_trial(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = status.detail(status.look(folder.path), "0001")
    assert (found["steps"], found["lines"]) == ([{"step": 1, "loss": 2.5}], ["one line", "and another"])
    assert main(["status", str(folder.path), "--trial", "0001"]) == 0
    assert "validation loss 1.2500 after 16 samples" in capsys.readouterr().out


@pytest.mark.parametrize("trial_id", ["0009", "../../mine", "/etc", ""])
def test_a_trial_is_one_of_the_sweep(folder: SweepFolder, trial_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(folder.path), "--trial", trial_id]) == 2
    assert capsys.readouterr().err == f"error: --trial {trial_id}: there is no such trial; there are: 0000, 0001\n"


def test_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no sweep or run (there is no config.yaml in it)\n"


def test_followed_to_its_end(running: SweepFolder) -> None:
    """In a process of its own, which loads neither torch nor Ray and answers at once."""
    code = "import sys\nfrom raytune_lora.cli import main\nmain(sys.argv[1:])\n"
    code += "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    arguments = ["status", str(running.path), "--follow"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("mine: running, trials; at work for 0:0")
    time.sleep(0.5)
    add(running, event="trial_ended", trial_id="0001", status="failed", error="out of luck", seconds=3.0)
    add(running, event="phase", name="trials", seconds=3.0)
    add(running, event="phase", name="best", seconds=1.0)
    out, _ = process.communicate(timeout=60)
    assert "1:00 trial 0001 failed after 16 samples, 3 s: out of luck" in out
    assert out.endswith("mine: finished\n[]\n")


def test_the_log_of_a_trial_is_followed(running: SweepFolder) -> None:
    code = "import sys\nfrom raytune_lora.cli import main\nmain(sys.argv[1:])\n"
    arguments = ["status", str(running.path), "--trial", "0001", "--follow"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line == "and another\n" for line in process.stdout)
    with (running.trials / "0001" / "logs" / "worker-0.log").open("a") as log:
        log.write("ne more\n")
    time.sleep(2.5)
    add(running, event="trial_ended", trial_id="0001", status="stopped", error=None, seconds=3.0)
    assert process.communicate(timeout=60)[0] == "half a line more\n"
