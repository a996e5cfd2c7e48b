"""Whole jobs on the tiny model, by the commands that users type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from markupsafe import escape
from mlflow import MlflowClient

from raytune_lora.config.compose import load
from raytune_lora.data.store import TokenStore
from raytune_lora.training.metrics import validation_loss
from tests import readme
from tests.integration.running import losses

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
STATUSES = {"completed", "stopped", "failed", "diverged", "oom", "lost", "quota"}


def start(job: str, *overrides: str, python: Sequence[str] = (), cwd: Path | None = None) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, *python, str(ROOT / "jobs" / f"{job}.py"), *overrides], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=cwd)


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"{out}\n{err}"
    return out, err


def trials_in(folder: Path) -> list[dict[str, Any]]:
    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [event for event in map(json.loads, lines) if event["event"].startswith("trial_")]


def ended(folder: Path) -> list[str]:
    """The trials whose end the journal holds, in order."""
    return [event["trial_id"] for event in trials_in(folder) if event["event"] == "trial_ended"]


def wait_for(condition: Any, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.1)


def processes_of(session: int) -> list[str]:
    """The processes of a session that still run: a child that nobody has waited for yet is none."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                name, state = (entry / "stat").read_text().split("(", 1)[1].rsplit(") ", 1)
                if state[0] != "Z":
                    found.append(f"{entry.name} {name}")
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


def nothing_left(session: int, seconds: float = 60) -> None:
    """Waits for a command's processes to end: Ray's own follow the command by some seconds."""
    deadline = time.monotonic() + seconds
    while left := processes_of(session):
        assert time.monotonic() < deadline, f"it left processes behind: {left}"
        time.sleep(0.1)


SMALL = (
    "training.global_batch=8",
    "training.max_steps=8",
    "training.learning_rate=3e-3",
    "space.learning_rate.high=1e-2",
    "evaluation.every=16",
    "evaluation.loss_rows=16",
    "evaluation.generate_rows=4",
    "evaluation.max_new_tokens=16",
    "search.trials=4",
    "search.concurrent=2",
    "scheduler.reduction=2",
)
ONE = ("search.concurrent=1",)  # a worker group less to start


@pytest.fixture(scope="module")
def sweep(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, tiny_folder: Path, rows: Path
) -> tuple[Path, str, str]:
    """A finished sweep of the README's command for one's own data and model: its folder and what it printed.

    It is begun in a folder whose files are named as packages are.
    """
    folder, cwd = tmp_path_factory.mktemp("sweeps") / "mine", tmp_path_factory.mktemp("cwd")
    for name in ("torch.py", "ray.py", "random.py", "datasets/__init__.py"):
        (cwd / name).parent.mkdir(exist_ok=True)
        (cwd / name).write_text("raise ImportError(__file__)")
    own = {"<folder or owner/name>": str(tiny_folder), "<file>.jsonl": str(rows), "sweeps/mine": str(folder)}
    process = start("sweep", *readme.arguments("output=sweeps/mine", own), *SMALL, f"cache={cache}", cwd=cwd)
    out, err = finish(process)
    nothing_left(process.pid)
    return folder, out, err


def test_results_say_what_was_promised(sweep: tuple[Path, str, str]) -> None:
    folder, out, _ = sweep
    results = json.loads((folder / "results.json").read_text())
    assert results["schema_version"] == 2
    assert results["state"] == "finished"
    for measured in (results["baseline"], results["best"]):
        assert measured["eval_loss_rows"] == results["data"]["rows"]["validation"] > results["data"]["loss_rows"]
        assert measured["eval_loss_interval"][0] < measured["eval_loss"] < measured["eval_loss_interval"][1]
        assert measured["exact_match_rows"] == 4
    assert results["best"]["eval_loss"] < results["baseline"]["eval_loss"]
    assert len(results["trials"]) == 4
    for trial in results["trials"]:
        assert trial["status"] in STATUSES
        assert set(trial["params"]) == {"method.r", "method.alpha", "training.learning_rate", "method.dropout"}
        assert (folder / trial["log"]).is_dir()
        assert [point["samples_seen"] for point in trial["curve"]] == [16, 32, 48, 64][: len(trial["curve"])]
    assert results["best"]["trial_loss"] == min(trial["eval_loss"] for trial in results["trials"])
    assert str(folder / "report.html") in out
    assert results["seconds"]["total"] > 0


def test_first_trial_is_the_config_as_it_stands(sweep: tuple[Path, str, str]) -> None:
    cfg = load(sweep[0] / "config.yaml")
    first = json.loads((sweep[0] / "results.json").read_text())["trials"][0]
    assert first["trial_id"] == "0000"
    assert first["params"]["training.learning_rate"] == cfg.training.learning_rate
    assert first["params"]["method.r"] == cfg.method.r  # type: ignore[attr-defined]


def test_study_is_a_real_one(sweep: tuple[Path, str, str]) -> None:
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{sweep[0] / 'study.db'}")
    trials = json.loads((sweep[0] / "results.json").read_text())["trials"]
    states = {"completed": "COMPLETE", "stopped": "PRUNED"}
    assert [t.state.name for t in study.trials] == [states[trial["status"]] for trial in trials]
    for frozen, trial in zip(study.trials, trials, strict=True):
        assert frozen.intermediate_values == {p["samples_seen"]: p["eval_loss"] for p in trial["curve"]}


def test_the_report_holds_everything_itself(sweep: tuple[Path, str, str]) -> None:
    page = (sweep[0] / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page


def test_best_adapter_works_with_plain_peft(sweep: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded by the report's own lines, without this package, it gives the validation loss that the sweep reports."""
    folder, scope = sweep[0], dict[str, Any]()
    results = json.loads((folder / "results.json").read_text())
    lines = results["best"]["loading"]
    assert "raytune_lora" not in lines
    assert escape(lines) in (folder / "report.html").read_text()
    monkeypatch.chdir(folder)
    exec(lines, scope)
    model, tokenizer = scope["model"], scope["tokenizer"]
    cfg = load(folder / "config.yaml")
    store = TokenStore(Path(cfg.cache) / "tokens" / results["data"]["fingerprint"], {})
    loss = validation_loss(
        model, store.split("validation"), rows=0, batch=4, pad_id=tokenizer.pad_token_id, rank=0, workers=1
    )
    assert loss == pytest.approx(results["best"]["eval_loss"], abs=1e-5)


def test_a_second_sweep_in_the_folder_is_refused(sweep: tuple[Path, str, str], cache: Path) -> None:
    before = (sweep[0] / "journal.jsonl").read_bytes()
    _, err = finish(start("sweep", "experiment=tiny", f"output={sweep[0]}", f"cache={cache}"), status=2)
    assert f"resume={sweep[0]}" in err
    assert (sweep[0] / "journal.jsonl").read_bytes() == before


def test_interrupted_killed_and_resumed(tmp_path: Path, cache: Path) -> None:
    """The total is what was asked for, nothing that had ended is run again, and a trial that diverges ends alone.

    The first time it goes on with twice the workers and under another ZeRO stage; the second time by the command that
    began it, which a scheduler repeats.
    """
    folder = tmp_path / "ended"
    wild = ("space.learning_rate.low=1e-3", "space.learning_rate.high=1e30", "training.max_grad_norm=1e30")
    resume = readme.arguments("resume=", {"sweeps/mine": str(folder)})
    command = ("experiment=tiny", "search=tpe", *ONE, *wild, f"output={folder}", f"cache={cache}", "resume=auto")
    process = start("sweep", *command)
    wait_for(lambda: ended(folder) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, status=130)
    assert f"resume={folder}" in err
    assert json.loads((folder / "results.json").read_text())["state"] == "interrupted"
    nothing_left(process.pid)
    first = ended(folder)
    assert 0 < len(first) < 4

    process = start("sweep", *resume, "workers=2", "training.micro_batch=2", "deepspeed=zero3")
    wait_for(lambda: len(ended(folder)) > len(first) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    nothing_left(process.pid)
    second = ended(folder)
    assert len(first) < len(second) < 4
    moved = load(folder / "config.yaml")
    assert (moved.workers, moved.training.micro_batch, moved.deepspeed.stage) == (2, 2, 3)

    out, err = finish(start("sweep", *command, python=("-X", "importtime")))
    brought = {line.rpartition("|")[2].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert "optuna" in brought
    assert not brought & {"torch", "transformers", "mlflow", "wandb"}, "a driver that finds all in the cache needs none"
    assert load(folder / "config.yaml") == moved
    trials = json.loads((folder / "results.json").read_text())["trials"]
    names = [trial["trial_id"] for trial in trials]
    assert len(set(names)) == 4, "a number that was given out just before the kill is not used again"
    assert sorted(ended(folder)) == names, "one was run twice"
    assert ended(folder)[: len(second)] == second
    assert trials[0]["status"] == "completed"
    diverged = [trial for trial in trials if trial["status"] == "diverged"]
    assert {trial["status"] for trial in trials} - {"completed", "stopped"} == {"diverged"}
    assert all("at step" in trial["error"] and trial["log"] in out for trial in diverged)
    assert "report" in out


def test_the_time_in_all_ends_a_sweep_that_is_started_again(tmp_path: Path, cache: Path) -> None:
    """By the command that began it, after a kill, as KubeRay does on a new cluster: what lay between counts."""
    folder = tmp_path / "in all"
    command = ("experiment=tiny", *ONE, "search.trials=40", f"output={folder}", f"cache={cache}", "resume=auto")
    process = start("sweep", *command, "budget.wall_hours=2")
    wait_for(lambda: ended(folder) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    nothing_left(process.pid)
    known = trials_in(folder)
    journal = folder / "journal.jsonl"  # as if all of it had been three hours ago
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps(event | {"time": event["time"] - 3 * 3600}) + "\n" for event in events))
    out, _ = finish(start("sweep", *command, "budget.wall_hours=2"))
    assert "ended early: budget.wall_hours=2, and the sweep began 3.0" in out
    results = json.loads((folder / "results.json").read_text())
    assert results["state"] == "finished"
    assert results["ended_by"]["budget"] == "wall_hours"
    assert results["ended_by"]["remedy"] == "budget.wall_hours=<more> (or null)"
    assert {trial["trial_id"] for trial in results["trials"]} == {trial["trial_id"] for trial in known}
    assert results["best"]["eval_loss"] is not None
    assert (folder / "best" / "adapter" / "adapter_model.safetensors").is_file()


def test_one_run_without_a_sweep(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched by every tracker."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = tmp_path / "run"
    overrides = readme.arguments("output=runs/tiny", {"runs/tiny": str(folder)})
    trackers = "tracking.trackers=[tensorboard,wandb,mlflow,ray]"
    assert f"`'{trackers}'`" in (readme.ROOT / "README.md").read_text()
    out, _ = finish(start("train", *overrides, trackers, "model=tiny_bias", f"cache={cache}"))
    results = json.loads((folder / "results.json").read_text())
    assert results["kind"] == "run"
    assert [trial["status"] for trial in results["trials"]] == ["completed"]
    assert results["trials"][0]["samples_seen"] == 4 * 32
    assert results["best"]["eval_loss"] < results["baseline"]["eval_loss"]
    assert (folder / "best" / "adapter" / "adapter_model.safetensors").is_file()
    assert str(folder / "report.html") in out

    trial = folder / "trials" / "0000"
    assert "switched off" not in (trial / "logs" / "worker-0.log").read_text()
    assert len(losses(trial)) == 4
    assert list((trial / "tensorboard").glob("events.out.tfevents.*"))
    assert list((trial / "wandb").glob("offline-run-*/run-*.wandb"))
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (mlflow_run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert mlflow_run.data.metrics["loss"] == losses(trial)[-1]
