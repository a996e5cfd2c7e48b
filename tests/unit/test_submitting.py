"""A submission is checked, and its results are read, without a cluster."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from raytune_lora.cli import main
from raytune_lora.cluster import bring
from raytune_lora.cluster.addresses import dashboard
from raytune_lora.cluster.submit import sweep_job
from raytune_lora.errors import UserError
from raytune_lora.tuning.progress import Progress, Tally
from raytune_lora.tuning.trials import Journal
from raytune_lora.working_copy import WorkingCopy
from tests.unit.test_status import RESULT

TOKEN = "hf_" + "Ab1" * 11
FACTS = json.dumps({"overrides": ["a=1"], "output": "/shared/mine", "env": [], "resource": None, "trials": 8})
DRY = ("submit", "--dry-run", "model=tiny", "data=fake")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine\n")
    return tmp_path


def rows(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"instruction": f"i{n}", "output": f"o{n}"}) + "\n" for n in range(50)))


def test_what_would_be_sent(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(here / "data" / "mine.jsonl")
    rows(here / "data" / "other.jsonl")
    arguments = ["data=file", "data.path=data/mine.jsonl", "output=/shared/sweeps/mine", "search.trials=3"]
    assert main(["submit", "model=tiny", "--dry-run", *arguments]) == 0
    out = capsys.readouterr().out
    assert "data/mine.jsonl" in out.partition("command:")[0]
    assert "other" not in out
    assert "notes.txt" in out
    command = (
        "raytune-lora sweep model=tiny data=file data.path=data/mine.jsonl output=/shared/sweeps/mine search.trials=3"
    )
    assert out.endswith(f"in 2 files of {here}\ncommand: {command}\nname:    mine\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "output: name the sweep's folder on storage that all nodes of the cluster share"),
        (("output=sweeps/mine",), "output=sweeps/mine: a folder that the cluster is to use is named from its root"),
        (
            ("output=/s/a", "cache=c"),
            "cache=c: a folder that the cluster is to use is named from its root (/shared/cache)",
        ),
        (("output=/s/a", "workers=0"), "workers must be >= 1 (got 0)"),
        (("output=/s/a", "space.rank.low=256"), "space.rank"),
        (
            ("output=/s/a", "method=lora", "deepspeed=zero3", "quantization=int8"),
            "quantization=int8 does not work with",
        ),
        (("output=/s/a", "data=file", "data.path=none.jsonl"), "data.path=none.jsonl: nothing is there, seen from "),
        (("output=/s/a", "data=file", "data.path=../up.jsonl"), "data.path=../up.jsonl lies outside of "),
        (("output=/s/a", "data=file", "data.path=bad.jsonl"), "bad.jsonl:1: "),
        (("output=/s/a b",), "--name a b: a name has letters, digits"),
        (("output=/s/a", "resume=auto"), "resume=auto: to go on with a sweep by its name, --resume <name>"),
        (("output=/s/a", "--env", "NOT_SET_HERE"), "--env NOT_SET_HERE: no such variable is set here"),
        (("output=/s/a", "--env", f"HF_TOKEN={TOKEN}"), "--env takes the name of a variable that is set here"),
        (("output=/s/a", f"tracking.project={TOKEN}"), "tracking.project: a secret in the command would be shown"),
        (("output=/s/a", "--stop", "a"), "output=/s/a: --stop, --status, --logs and --list take no overrides"),
        (("--stop", "a", "--logs", "b"), "--resume, --stop, --status, --logs and --list: take one of them"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.jsonl").write_text("no json\n")
    rows(here.parent / "up.jsonl")
    given = [a for a in DRY if not (a == "data=fake" and "data=file" in arguments)]
    if "--stop" in arguments:
        given = ["submit"]
    assert main([*given, *arguments]) == 2
    err = capsys.readouterr().err
    assert f"error: {said}" in err
    assert TOKEN not in err


def test_files_and_packages_of_the_cluster_are_not_looked_for_here(here: Path) -> None:
    cluster = ["output=/s/a", "model.path=/shared/llama", "data.path=/shared/rows.jsonl", "gpus_per_worker=1"]
    there = ["model.attention=flash_attention_2", "training.liger=true", "search.storage=postgresql+psycopg2://me@db/x"]
    assert main(["submit", "--dry-run", *cluster, *there, "search.warm_start=[/shared/first]"]) == 0


def test_results_are_not_brought_over_what_is_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "model=tiny", "data=fake", "output=/s/a", "--to", str(here)]) == 2
    assert f"error: --to {here}: it is there already, and nothing is overwritten" in capsys.readouterr().err


def test_no_dashboard(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for address, said in {
        "127.0.0.1:1": "--address http://127.0.0.1:1: no Ray dashboard answers there (ConnectionError)",
        "ray://head:10001": "--address ray://head:10001: a sweep is submitted through the dashboard",
    }.items():
        assert main(["submit", "model=tiny", "data=fake", "output=/s/a", "--detach", "--address", address]) == 2
        assert f"error: {said}" in capsys.readouterr().err


def test_a_cluster_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is given counts more than those in the environment, where Ray's own client prefers these."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert dashboard(None) == "http://other:8265"
    assert [dashboard(a) for a in ("http://h:1", "h:1", "localhost", "10.0.0.1")] == [
        *["http://h:1"] * 2,
        "http://localhost",
        "http://10.0.0.1",
    ]
    with pytest.raises(
        UserError, match=r"--address lab: no cluster of that name is in .*clusters.yaml \(there is none\)"
    ):
        dashboard("lab")
    (tmp_path / "raytune-lora").mkdir()
    clusters = tmp_path / "raytune-lora" / "clusters.yaml"
    clusters.write_text("lab: http://lab:8265\nprod: https://ray.example.org\n")
    assert dashboard("prod") == "https://ray.example.org"
    with pytest.raises(UserError, match=r"there are: lab, prod"):
        dashboard("dev")
    for wrong in ("- lab", "lab: 5", "lab: {", "lab"):
        clusters.write_text(wrong)
        with pytest.raises(UserError, match="name: URL"):
            dashboard("lab")


def test_the_tally_is_that_of_the_journal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / "journal.jsonl", Progress("mine", 8).watch)
    for number, status in enumerate(["completed", "stopped", "failed", "oom", None]):
        trial_id = f"{number:04d}"
        journal.append("trial_started", trial_id=trial_id, params={"method.r": 8})
        journal.append("trial_result", trial_id=trial_id, **{**RESULT, "eval_loss": 2.0 - number / 10})
        if status is not None:
            journal.append("trial_ended", trial_id=trial_id, status=status, error="out of memory", seconds=1.0)
    assert str(Tally(8, capfd.readouterr().err)) == "4 of 8 trials ended, lowest validation loss 1.6000 (trial 0004)"
    assert str(Tally(8)) == "0 of 8 trials ended"

    Progress("mine", 8).know(64, journal.record)  # as where a sweep goes on, whose first job's log is another
    assert str(Tally(8, capfd.readouterr().err)) == "4 of 8 trials ended, lowest validation loss 1.6000 (trial 0004)"


# ------------------------------------------------------------------------------------------------------------- results


def sent(folder: Path, limit: int) -> str:
    """The log of the job that prints a sweep's results."""
    command = [sys.executable, "-c", bring._SENDER.strip(), str(folder), str(limit), bring._MARK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (
        f"INFO job_manager.py:581 -- Runtime env is setting up.\nRunning entrypoint: {bring._MARK} {{}}\n{done.stdout}"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "there"
    (root / "best" / "adapter").mkdir(parents=True)
    (root / "trials").mkdir()
    (root / "trials" / "big").write_bytes(b"x" * 1000)
    (root / "results.json").write_text("{}")
    (root / "report.html").write_text("<p>")
    (root / "best" / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 400)
    return root


def test_results_arrive_as_they_were(folder: Path) -> None:
    said, data = bring.received(sent(folder, 10**6))
    assert said["left_out"] == []
    assert said["files"] == 3
    assert data.count(bytes(range(256))) == 400
    assert b"trials/big" not in data


def test_what_is_too_big_stays_and_is_named(folder: Path) -> None:
    said, data = bring.received(sent(folder, 1000))
    assert said["left_out"] == [["best/adapter/adapter_model.safetensors", 102400]]
    assert b"report.html" in data


@pytest.mark.parametrize("damage", [lambda log: log[: len(log) // 2], lambda log: log.replace("AAECAw", "AAECBw", 1)])
def test_results_that_are_not_whole_are_refused(damage: object, folder: Path) -> None:
    assert callable(damage)
    with pytest.raises(UserError, match="did not arrive whole"):
        bring.received(damage(sent(folder, 10**6)))


def test_help_is_the_commands_own(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("submit", "status"):
        with contextlib.suppress(SystemExit):
            main([verb, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: raytune-lora {verb} ")


def test_results_in_a_store_are_read_from_there(folder: Path, tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/sweeps/mine"
    facts = {"output": uri, "resource": None}
    with pytest.raises(UserError, match="holds no results of mine"):
        bring.bring(None, "mine", facts, tmp_path / "back")  # type: ignore[arg-type]  # no cluster is asked
    WorkingCopy(folder, uri).send(folder)
    assert bring.bring(None, "mine", facts, tmp_path / "back") == []  # type: ignore[arg-type]
    files = {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert files == {"results.json", "report.html", "best/adapter/adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("metadata", "known"),
    [
        ({"raytune-lora": "mine", "facts": FACTS}, True),
        ({"raytune-lora": "mine"}, False),
        ({"raytune-lora": "mine", "facts": "no JSON"}, False),
        ({"raytune-lora": "mine", "facts": "[]"}, False),
        ({"raytune-lora": "mine", "facts": FACTS.replace("8", "null")}, False),
        ({"raytune-lora": "../mine", "facts": FACTS}, False),
        ({"facts": FACTS}, False),
        (None, False),
    ],
)
def test_a_job_that_anybody_made_is_no_sweep(metadata: dict[str, str] | None, known: bool) -> None:
    """One such job would keep all others from being listed."""
    job = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="x.1",
        status=JobStatus.RUNNING,
        entrypoint="python x.py",
        metadata=metadata,
    )
    found = sweep_job(job)
    assert (found is not None) is known
    assert found is None or found.facts["trials"] == 8
