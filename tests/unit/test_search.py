"""The study as a Tune searcher, which goes on after a kill as if there had been none, and where it is kept."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from raytune_lora.config import validate
from raytune_lora.config.compose import compose, dump
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.search import Objective, SearchConfig
from raytune_lora.errors import UserError
from raytune_lora.tuning.search import StudySearcher
from raytune_lora.tuning.search import problems as search_problems
from raytune_lora.tuning.space import apply, configured_point, lookup
from raytune_lora.tuning.study import keep, open_study, pareto, warm_start
from raytune_lora.tuning.told import reconcile, report, tell
from raytune_lora.tuning.trials import Record, Trial, trial_name

CURVE = [{"samples_seen": 16.0, "eval_loss": 2.0, "train_loss": 2.0}]


@pytest.fixture(scope="module")
def cfg() -> SweepConfig:
    return compose(["experiment=quickstart"])


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study(tmp_path, SearchConfig(startup_trials=2))


def searcher(study: optuna.Study, cfg: SweepConfig, interrupted: list[Trial] | None = None) -> StudySearcher:
    return StudySearcher(study, cfg.space, cfg, interrupted or [])


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def trial(number: int, status: str, loss: float | None = None, **facts: Any) -> Trial:
    return Trial(trial_name(number), facts.pop("params", {}), status, eval_loss=loss, **facts)


def record(*trials: Trial) -> Record:
    return Record({each.trial_id: each for each in trials})


# ------------------------------------------------------------------------------------------------------------ proposing


def test_the_config_as_it_stands_comes_first(study: optuna.Study, cfg: SweepConfig) -> None:
    searching = searcher(study, cfg)
    first, second = searching.suggest("a"), searching.suggest("b")
    assert first == {"trial_id": "0000", "params": {d.key: lookup(cfg, d.key) for d in cfg.space.values()}}
    assert second["trial_id"] == "0001"
    assert second["params"] != first["params"]


def test_a_loss_is_told_to_the_study_once(study: optuna.Study, cfg: SweepConfig) -> None:
    searcher(study, cfg).suggest("a")
    known = trial(0, "running")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a step told twice
        for seen, loss in ((16, 3.0), (32, 2.0)):
            known.curve.append({"samples_seen": seen, "eval_loss": loss, "train_loss": loss})
            report(study, known)
    assert study.get_trials()[0].intermediate_values == {16: 3.0, 32: 2.0}
    assert states(study) == ["RUNNING"]


def test_the_last_loss_of_a_stopped_trial_is_in_the_study(study: optuna.Study, cfg: SweepConfig) -> None:
    """Tune tells a searcher of all results but the one it stops a trial at."""
    searcher(study, cfg).suggest("a")
    known = trial(0, "stopped", 3.0)
    known.curve = [{"samples_seen": 16, "eval_loss": 3.0, "train_loss": 3.0}]
    tell(study, known)
    assert study.get_trials()[0].intermediate_values == {16: 3.0}
    assert states(study) == ["PRUNED"]


@pytest.mark.parametrize(
    ("ended", "state", "value"),
    [
        (trial(0, "completed", 1.5), "COMPLETE", 1.5),
        (trial(0, "stopped", 1.5), "PRUNED", None),
        (trial(0, "failed", 1.5), "FAIL", None),
        (trial(0, "diverged"), "PRUNED", None),
        (trial(0, "oom"), "PRUNED", None),
        (trial(0, "completed"), "FAIL", None),
    ],
    ids=lambda value: value.status if isinstance(value, Trial) else "",
)
def test_the_study_is_told_how_a_trial_ended(
    ended: Trial, state: str, value: float | None, study: optuna.Study, cfg: SweepConfig
) -> None:
    searcher(study, cfg).suggest("a")
    for _ in range(2):
        tell(study, ended)
    assert states(study) == [state]
    assert study.trials[0].value == value


def test_a_trial_that_ran_out_of_memory_or_diverged_is_an_infeasible_point_and_others_say_why_they_failed(
    study: optuna.Study, cfg: SweepConfig
) -> None:
    searching = searcher(study, cfg)
    for number, status in enumerate(("oom", "failed", "stopped", "completed", "diverged")):
        searching.suggest("")
        tell(study, trial(number, status, 2.0, error=None if status == "completed" else f"it was {status}"))
    assert [t.constraints for t in study.trials] == [{"memory": 1.0}, {}, {}, {}, {"finite": 1.0}]
    assert study.trials[1].user_attrs == {"status": "failed", "error": "it was failed"}
    assert states(study) == ["PRUNED", "FAIL", "PRUNED", "COMPLETE", "PRUNED"]


# --------------------------------------------------------------------------------------------------- several objectives


def test_the_front_has_each_trial_that_no_other_beats(tmp_path: Path, cfg: SweepConfig) -> None:
    both = SearchConfig(objectives=[Objective.eval_loss, Objective.trainable_parameters], startup_trials=2)
    study = open_study(tmp_path, both)
    searching = searcher(study, cfg)
    for number, (loss, size) in enumerate([(3.0, 10), (1.0, 30), (2.0, 20), (2.5, 20), (1.0, 40), (3.0, 10)]):
        searching.suggest("")
        known = trial(number, "completed", loss, trainable_parameters=size, curve=list(CURVE))
        report(study, known)
        tell(study, known)
    searching.suggest("")
    tell(study, trial(6, "completed", 0.5))  # its size was not measured
    assert study.metric_names == ["eval_loss", "trainable_parameters"]
    assert pareto(study) == ["0001", "0002", "0000", "0005"]
    assert {f"{t.number:04d}" for t in study.best_trials} == set(pareto(study))
    assert states(study)[6] == "FAIL"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["search.objectives=[eval_loss,training_seconds]"], "set scheduler=none (got asha)"),
        (["search.objectives=[training_seconds]"], "must contain eval_loss"),
        (["search.objectives=[]"], "must contain eval_loss"),
        (["search.objectives=[eval_loss,eval_loss]", "scheduler=none"], "names one twice"),
    ],
)
def test_objectives_that_do_not_go_together_are_refused(overrides: list[str], reason: str) -> None:
    (problem,) = validate.problems(compose(["experiment=tiny", *overrides]))
    assert problem.startswith("search.objectives")
    assert reason in problem


# -------------------------------------------------------------------------------------------------------- the database


def search_twice(folder: Path, cfg: SweepConfig, storage: str) -> list[str]:
    """A search that is opened again, and another one in the same database."""
    other = folder / "elsewhere" / "sweep"
    for path in (folder / "sweep", other):
        path.mkdir(parents=True)
    own = SearchConfig(storage=storage)
    study = open_study(folder / "sweep", own)
    first = searcher(study, cfg).suggest("")
    tell(study, trial(0, "completed", 1.5, params=first["params"], curve=list(CURVE)))
    keep(study)
    assert searcher(open_study(other, own), cfg).suggest("")["params"] == first["params"]
    again = open_study(folder / "sweep", own)
    assert reconcile(again, Record(), cfg) == []
    assert [t.value for t in again.trials] == [1.5]
    assert again.trials[0].intermediate_values == {16: 2.0}
    assert searcher(again, cfg).suggest("")["trial_id"] == "0001"
    return [again.study_name, open_study(other, own).study_name]


@pytest.mark.parametrize("url", ["sqlite:///{}/shared.db", "journal://{}/shared.log"])
def test_sweeps_share_a_database(url: str, tmp_path: Path, cfg: SweepConfig) -> None:
    own, other = search_twice(tmp_path, cfg, url.format(tmp_path))
    assert own != other
    assert own.startswith("sweep-")


def test_a_folder_that_was_deleted_and_made_again_has_another_study(tmp_path: Path) -> None:
    own = SearchConfig(storage=f"journal://{tmp_path}/shared.log")
    names = []
    for _ in range(2):
        (tmp_path / "sweep").mkdir()
        names.append(open_study(tmp_path / "sweep", own).study_name)
        shutil.rmtree(tmp_path / "sweep")
    assert names[0] != names[1]


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a server of its own, on a socket."""
    found = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    programs = Path(next((path for path in found if path), "")).resolve().parent
    if not any(found):
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        if user:
            shutil.chown(folder, user)
        common: Any = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        made = [programs / "initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tester", "-N"]
        subprocess.run(made, check=True, **common)
        settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", folder]
        server = subprocess.Popen([programs / "postgres", "-D", f"{folder}/data", *settings], **common)
        try:
            deadline = time.monotonic() + 60
            ready = [programs / "pg_isready", "-h", folder]
            while subprocess.run(ready, **common).returncode and time.monotonic() < deadline:
                time.sleep(0.05)
            yield f"postgresql+psycopg2://tester@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def test_a_postgresql_server_keeps_the_studies(postgres: str, tmp_path: Path, cfg: SweepConfig) -> None:
    own, other = search_twice(tmp_path, cfg, postgres)
    assert own != other
    assert problems_with(storage=postgres) == []


def problems_with(**settings: Any) -> list[str]:
    changed = compose(["experiment=tiny"])
    for key, value in settings.items():
        setattr(changed.search, key, value)
    return search_problems(changed)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:///study.db", "must name an absolute path"),
        ("journal://study.log", "must name an absolute path"),
        ("journal:///nowhere/study.log", "there is no folder /nowhere; make it"),
        ("oracledb2://x", "there is no database 'oracledb2'; write sqlite:////path.db"),
        ("secret", "search.storage is no URL of a database; write sqlite:////path.db"),
        ("postgresql+psycopg2://u:secret@h/d", "needs the driver psycopg2: pip install psycopg2-binary, and write"),
        ("mysql+pymysql://u:secret@h/d", "needs the driver pymysql: pip install pymysql"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for driver in ("psycopg2", "pymysql"):
        monkeypatch.setitem(sys.modules, driver, None)
    (problem,) = problems_with(storage=url)
    assert reason in problem
    assert "secret" not in problem


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached") as caught:
        open_study(tmp_path, SearchConfig(storage=f"postgresql+psycopg2://u:secret@/d?host={tmp_path}"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("listens", [False, True])
def test_a_server_that_does_not_answer_is_named_before_the_start(
    listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_lora.tuning.study._SECONDS", 2.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        began = time.monotonic()
        (problem,) = problems_with(storage=f"postgresql+psycopg2://u@127.0.0.1:{server.getsockname()[1]}/d")
    assert problem.startswith("search.storage: postgresql+psycopg2://u@127.0.0.1:")
    assert ("no answer in 2 s" if listens else "cannot be reached (") in problem
    assert time.monotonic() - began < 10


def test_optuna_dashboard_shows_the_study(study: optuna.Study, cfg: SweepConfig, tmp_path: Path) -> None:
    searcher(study, cfg).suggest("")
    tell(study, trial(0, "completed", 1.5))
    keep(study)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    command = [program, f"sqlite:///{tmp_path}/study.db", "--host", "127.0.0.1", "--port", str(port)]
    shown = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies") as answer:
                    found = json.load(answer)["study_summaries"]
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        shown.terminate()
        shown.wait(60)
    assert [(each["study_name"], each["directions"]) for each in found] == [("sweep", ["minimize"])]


# --------------------------------------------------------------------------------------------------------- a warm start


@pytest.fixture
def earlier(tmp_path: Path, cfg: SweepConfig) -> Path:
    """A sweep of six trials: two completed, one stopped, one without memory, one failed, one of another space."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    study = open_study(folder, SearchConfig())
    searching = searcher(study, cfg)
    for number, status in enumerate(("completed", "completed", "stopped", "oom", "failed")):
        tell(study, trial(number, status, 1.0 + number, params=searching.suggest("")["params"], curve=list(CURVE)))
    study.ask({"training.seed": optuna.distributions.IntDistribution(0, 9)})
    study.tell(5, 0.1)
    keep(study)
    return folder


def test_a_warm_start_gives_the_study_what_fits_and_the_sweep_its_own_trials(
    earlier: Path, tmp_path: Path, cfg: SweepConfig
) -> None:
    changed = copy.deepcopy(cfg)
    changed.search.warm_start = [str(earlier)]
    assert search_problems(changed) == []
    before = (earlier / "study.db").read_bytes()
    study = open_study(tmp_path, changed.search)
    first = searcher(study, changed).suggest("")
    assert first == {"trial_id": "0003", "params": {d.key: lookup(cfg, d.key) for d in cfg.space.values()}}
    assert states(study) == ["COMPLETE", "COMPLETE", "PRUNED", "RUNNING"]
    assert [t.user_attrs["warm_start"] for t in study.trials[:3]] == [f"{earlier}#000{n}" for n in range(3)]
    assert [t.value for t in study.trials[:2]] == [1.0, 2.0]
    assert study.trials[2].intermediate_values == {16: 2.0}
    assert (earlier / "study.db").read_bytes() == before

    ended = trial(3, "completed", 1.5, params=first["params"])
    study = open_study(tmp_path, changed.search)
    assert reconcile(study, record(ended), cfg) == []
    assert searcher(study, changed).suggest("")["trial_id"] == "0004"
    tell(study, trial(4, "completed", 0.5))
    assert states(study) == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert pareto(study) == ["0004"]
    assert warm_start(study, changed.space, changed) == 3


def test_a_warm_start_that_was_cut_short_is_made_whole(earlier: Path, tmp_path: Path, cfg: SweepConfig) -> None:
    changed = copy.deepcopy(cfg)
    changed.search.warm_start = [str(earlier)]
    study = open_study(tmp_path, changed.search)
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"warm_start": f"{earlier}#0000"}))
    assert searcher(study, changed).suggest("")["trial_id"] == "0003"


def test_a_folder_that_teaches_nothing_is_refused(earlier: Path, tmp_path: Path, cfg: SweepConfig) -> None:
    changed = copy.deepcopy(cfg)
    changed.search.warm_start = [str(tmp_path / "nowhere"), str(earlier)]
    changed.space["rank"].low = changed.space["rank"].high = 3
    nothing, outside = search_problems(changed)
    assert nothing == f"search.warm_start: {tmp_path}/nowhere holds no study; name the folder of an earlier sweep"
    assert outside.startswith(f"search.warm_start: no trial of {earlier} lies in this space")
    (earlier / "study.db").write_bytes(b"not a database, but a text that is long enough to be looked at" * 20)
    assert "cannot be read" in search_problems(changed)[1]
    assert not (tmp_path / "nowhere").exists()


def test_a_sweep_in_a_shared_database_is_a_warm_start_too(tmp_path: Path) -> None:
    cfg = compose(["experiment=tiny", f"search.storage=journal://{tmp_path}/shared.log"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(dump(cfg))
    study = open_study(tmp_path / "a", cfg.search)
    tell(study, trial(0, "completed", 1.0, params=searcher(study, cfg).suggest("")["params"]))
    keep(study)
    cfg.search.warm_start = [str(tmp_path / "a")]
    (tmp_path / "b").mkdir()
    study = open_study(tmp_path / "b", cfg.search)
    assert searcher(study, cfg).suggest("")["trial_id"] == "0001"


# --------------------------------------------------------------------------------------------------------- after a kill


@pytest.fixture(params=[True, False], ids=["kept", "behind"])
def kept(request: pytest.FixtureRequest) -> bool:
    """Whether the database had caught up when the kill came."""
    return bool(request.param)


def killed(folder: Path, cfg: SweepConfig, kept: bool = True) -> tuple[Record, list[dict[str, Any]]]:
    """Four trials: ended, ended but the study not told of it, running, and asked for but never started."""
    study = open_study(folder, cfg.search)
    searching = searcher(study, cfg)
    proposals = [searching.suggest(str(number)) for number in range(4)]
    known = [trial(n, "running", params=proposals[n]["params"]) for n in range(3)]
    known[0].status, known[0].eval_loss = "completed", 1.0
    known[1].status, known[1].eval_loss = "completed", 2.0
    known[2].curve, known[2].samples_seen = list(CURVE), 16
    report(study, known[2])
    tell(study, known[0])
    if kept:
        keep(study)
    return record(*known), proposals


def test_the_study_catches_up_with_the_journal(kept: bool, tmp_path: Path, cfg: SweepConfig) -> None:
    known, proposals = killed(tmp_path, cfg, kept)
    drawn = [configured_point(cfg.space, apply(cfg, proposal["params"])) for proposal in proposals[:3]]
    for _ in range(2):
        study = open_study(tmp_path, cfg.search)
        interrupted = reconcile(study, known, cfg)
        assert [each.trial_id for each in interrupted] == ["0002"]
        assert states(study) == ["COMPLETE", "COMPLETE", "RUNNING", *(["FAIL", "WAITING"] if kept else [])]
        assert [each.value for each in study.trials[:2]] == [1.0, 2.0]
        assert study.trials[2].intermediate_values == {16: 2.0}
        assert [t.params for t in study.trials[:3]] == drawn


def test_an_interrupted_trial_goes_on_first_with_its_parameters(kept: bool, tmp_path: Path, cfg: SweepConfig) -> None:
    known, proposals = killed(tmp_path, cfg, kept)
    study = open_study(tmp_path, cfg.search)
    searching = searcher(study, cfg, reconcile(study, known, cfg))
    assert searching.suggest("new a") == proposals[2]
    again = trial(2, "completed", 1.0)
    again.curve = [{"samples_seen": seen, "eval_loss": 1.0, "train_loss": 1.0} for seen in (16, 32)]
    tell(study, again)
    assert study.trials[2].intermediate_values == {16: 2.0, 32: 1.0}
    assert states(study)[:3] == ["COMPLETE", "COMPLETE", "COMPLETE"]


def test_what_never_started_is_proposed_again_and_then_something_new(tmp_path: Path, cfg: SweepConfig) -> None:
    known, proposals = killed(tmp_path, cfg)
    study = open_study(tmp_path, cfg.search)
    searching = searcher(study, cfg, reconcile(study, known, cfg)[1:])
    assert searching.suggest("a") == {"trial_id": "0004", "params": proposals[3]["params"]}
    fresh = searching.suggest("b")
    assert fresh["trial_id"] == "0005"
    assert fresh["params"] not in [proposal["params"] for proposal in proposals]


def test_a_study_that_is_lost_is_made_again_from_the_journal(tmp_path: Path, cfg: SweepConfig) -> None:
    known, proposals = killed(tmp_path, cfg)
    del known.trials["0001"]
    (tmp_path / "study.db").unlink()
    study = open_study(tmp_path, cfg.search)
    searching = searcher(study, cfg, reconcile(study, known, cfg))
    assert states(open_study(tmp_path, cfg.search)) == ["COMPLETE", "FAIL", "RUNNING"]
    assert [searching.suggest("")["trial_id"] for _ in range(2)] == ["0002", "0003"]
    assert proposals[0]["params"] == known.trials["0000"].params


def test_what_waited_in_the_study_and_began_keeps_its_number(tmp_path: Path, cfg: SweepConfig) -> None:
    """It is proposed again after one kill, begins, and the database has not heard of that when the next one comes."""
    known, _ = killed(tmp_path, cfg)
    study = open_study(tmp_path, cfg.search)
    again = searcher(study, cfg, reconcile(study, known, cfg)[1:]).suggest("")
    known.trials["0004"] = trial(4, "completed", 0.5, params=again["params"])
    study = open_study(tmp_path, cfg.search)
    assert states(study)[4:] == ["WAITING"]
    reconcile(study, known, cfg)
    assert states(study)[4:] == ["COMPLETE"]
    assert study.trials[4].params == study.trials[3].params


def test_a_first_trial_that_never_started_is_still_the_config(tmp_path: Path, cfg: SweepConfig) -> None:
    study = open_study(tmp_path, cfg.search)
    first = searcher(study, cfg).suggest("a")
    keep(study)
    study = open_study(tmp_path, cfg.search)
    again = searcher(study, cfg, reconcile(study, Record(), cfg)).suggest("b")
    assert again == {"trial_id": "0001", "params": first["params"]}


def test_a_finished_study_stays_as_it_is(tmp_path: Path, cfg: SweepConfig) -> None:
    study = open_study(tmp_path, cfg.search)
    searcher(study, cfg).suggest("a")
    ended = trial(0, "completed", 1.0)
    tell(study, ended)
    assert reconcile(study, record(ended), cfg) == []
    searching = searcher(study, cfg)
    assert states(study) == ["COMPLETE"]
    assert searching.suggest("b")["trial_id"] == "0001"
    assert study.trials[0].state is TrialState.COMPLETE


# ------------------------------------------------------------------------------------------------------ another machine


@pytest.mark.parametrize("objectives", [[Objective.eval_loss], [Objective.eval_loss, Objective.training_seconds]])
def test_a_study_is_rebuilt_from_the_journal(objectives: list[Objective], tmp_path: Path) -> None:
    cfg = compose(["experiment=quickstart", "+space.alpha={key: method.alpha, multiple_of: method.r, low: 1, high: 4}"])
    cfg.search.objectives = objectives
    study = open_study(make(tmp_path / "first"), cfg.search)
    searching = searcher(study, cfg)
    known = []
    for number, status in enumerate(("completed", "stopped", "oom", "failed", "running")):
        params = searching.suggest("")["params"]
        if number == 3:
            searching.suggest("")  # the sweep was killed before it started
        facts: dict[str, Any] = {"params": params, "curve": list(CURVE), "training_seconds": 3.0}
        facts["error"] = "why" if status in ("oom", "failed") else None
        each = trial(number + (number > 3), status, 2.0, **facts)
        (tell if each.ended else report)(study, each)
        known.append(each)
    study.tell(4, state=TrialState.FAIL)

    other = open_study(make(tmp_path / "other"), cfg.search)
    assert [each.trial_id for each in reconcile(other, record(*known), cfg)] == ["0005"]
    for one, again in zip(study.get_trials(), other.get_trials(), strict=True):
        if one.number == 4:
            assert again.state is TrialState.FAIL
            continue
        for name in ("number", "state", "values", "distributions", "intermediate_values", "user_attrs", "constraints"):
            assert getattr(again, name) == getattr(one, name), name
        assert again.params == pytest.approx(one.params)
    ended = trial(5, "completed", 1.5, params=known[4].params, curve=list(CURVE), training_seconds=1.0)
    tell(other, ended)
    assert other.get_trials()[5].state is TrialState.COMPLETE
    assert searcher(other, cfg).suggest("")["trial_id"] == "0006"


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_rebuilt_study_has_its_warm_start_first(tmp_path: Path, cfg: SweepConfig) -> None:
    earlier = open_study(make(tmp_path / "earlier"), cfg.search)
    params = searcher(earlier, cfg).suggest("")["params"]
    tell(earlier, trial(0, "completed", 2.0, params=params))
    keep(earlier)
    warm = copy.deepcopy(cfg)
    warm.search.warm_start = [str(tmp_path / "earlier")]
    study = open_study(make(tmp_path / "first"), warm.search)
    own = searcher(study, warm).suggest("")
    assert own["trial_id"] == "0001"
    other = open_study(make(tmp_path / "other"), warm.search)
    reconcile(other, record(trial(1, "completed", 1.0, params=own["params"])), warm)
    assert [t.values for t in other.get_trials()] == [[2.0], [1.0]]
    assert searcher(other, warm).suggest("")["trial_id"] == "0002"
