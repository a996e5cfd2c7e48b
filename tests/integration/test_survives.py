"""Workers, machines and disks that go away under a sweep, each one really taken away."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle

from raytune_lora.artifacts import folder_bytes
from raytune_lora.data.store import TokenStore
from raytune_lora.training import driver
from raytune_lora.training.driver import Pool
from raytune_lora.training.task import TaskFailed
from raytune_lora.tuning import isolated
from tests.integration import tasks
from tests.integration.conftest import Configure
from tests.integration.running import losses, run
from tests.integration.running import steps as steps_of
from tests.integration.test_jobs import ONE, ROOT, ended, finish, nothing_left, start, trials_in, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS, CUT = 6, 2
RUN = ("method.dropout=0.1", "training.micro_batch=2", f"training.max_steps={STEPS}", "evaluation.every=16")


def train_and_kill(cfg: Any, store: Any, place: Any) -> None:
    """Train, and at the first attempt kill the last worker's process between the first checkpoint and the second."""
    import os
    import signal

    from raytune_lora.training.trainer import PlannedTrainer

    original = PlannedTrainer.training_step

    def training_step(self: Any, *arguments: Any, **settings: Any) -> Any:
        marker = place.folder / "killed"
        if place.rank == place.workers - 1 and self.state.global_step == CUT + 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **settings)

    PlannedTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        tasks.train(cfg, store, place)
    finally:
        PlannedTrainer.training_step = original  # type: ignore[method-assign]


def test_a_killed_worker_costs_the_steps_since_the_checkpoint_and_changes_no_bit(
    pair: Pool, store: TokenStore, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configure(*RUN, "workers=2")
    run(pair, store, tmp_path / "whole", cfg)
    monkeypatch.setattr(isolated, "_train", train_and_kill)
    reports = list(isolated.train(pair.board, "killed", cfg, store, tmp_path))
    assert [(r.get("samples_seen"), r.get("kind")) for r in reports] == [
        (16, None),
        (None, "lost"),
        (16, None),
        (32, None),
        (48, None),
    ]
    assert losses(tmp_path / "killed")[-(STEPS - CUT) :] == losses(tmp_path / "whole")[CUT:]

    never = configure(*RUN, "workers=2", "cluster.retries=0")
    with pytest.raises(TaskFailed, match=r"a worker's process ended|lost each other") as caught:
        list(isolated.train(pair.board, "lost", never, store, tmp_path))
    assert caught.value.ended.status == "lost"


# ------------------------------------------------------------------------------------------------ whole jobs, as typed

SLOW = (  # trials of the tiny model that last long enough for something to happen to them
    "experiment=tiny",
    "scheduler=none",
    "training.patience=null",
    "training.global_batch=8",
    "training.max_steps=200",
    "evaluation.every=40",
    "evaluation.loss_rows=4",
    "evaluation.generate_rows=0",
)


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in trials_in(folder) if event["event"] == kind]


def at_work(folder: Path, process: subprocess.Popen[str], trials: int = 1) -> None:
    """Waits until so many trials have measured something."""
    wait_for(
        lambda: len({e["trial_id"] for e in of_kind(folder, "trial_result")}) >= trials or process.poll() is not None
    )
    assert process.poll() is None, process.communicate()


def went_well(folder: Path, trials: int) -> dict[str, Any]:
    """All trials came to their end, each once, whatever happened to the sweep."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["completed"] * trials
    assert sorted(ended(folder)) == [trial["trial_id"] for trial in results["trials"]]
    assert {trial["samples_seen"] for trial in results["trials"]} == {
        trial["curve"][-1]["samples_seen"] for trial in results["trials"]
    }
    assert results["state"] == "finished"
    return results


@pytest.fixture(params=[{}])
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A head, without CPUs unless asked for, that soon notices that a machine is gone, and a way to add machines."""
    from ray.cluster_utils import Cluster

    noticing = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
        "health_check_timeout_ms": 1000,
    }
    memory = {"object_store_memory": 100 * 2**20}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticing, **memory, **request.param}
    found = Cluster(initialize_head=True, connect=False, head_node_args=head)
    found.add_machine = lambda: found.add_node(num_cpus=2, **memory)
    yield found
    found.shutdown()


def drain(cluster: Any, machine: Any, seconds: float) -> None:
    """Announce that a machine will be taken away, as ``ray drain-node`` does."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline = int((time.time() + seconds) * 1000)
    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(cluster.address).drain_node(machine.node_id, preemption, "spot", deadline)
    assert accepted, why


def actors(cluster: Any, *kinds: str) -> list[psutil.Process]:
    """The processes of actors on a cluster's machines."""
    nodes = [cluster.head_node, *cluster.worker_nodes]
    raylets = [psutil.Process(info.process.pid) for node in nodes for info in node.all_processes["raylet"]]
    found = []
    for process in (child for raylet in raylets for child in raylet.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline())
            found += [process for kind in kinds if name.startswith(f"ray::{kind}")]
    return found


def test_machines_that_die_come_or_are_about_to_go(cluster: Any, tmp_path: Path, cache: Path) -> None:
    """The trial of a dead machine waits for room and goes on; that of one which is drained is saved and moves."""
    folder, machines = tmp_path / "sweep", [cluster.add_machine() for _ in range(2)]
    where = ("search.trials=2", "search.concurrent=2", "cpus_per_worker=2", f"cluster.address={cluster.address}")
    process = start("sweep", *SLOW, *where, f"output={folder}", f"cache={cache}")
    wait_for(lambda: len(list(folder.glob("trials/*/logs"))) == 2 or process.poll() is not None)
    cluster.add_machine()  # for the one that moves
    at_work(folder, process, 2)
    readers = actors(cluster, "ImplicitFunc")
    assert len(readers) == 2
    readers[0].kill()  # the process of a Tune trial: its training goes on, and another reads of it
    drain(cluster, machines[1], seconds=90)
    wait_for(lambda: of_kind(folder, "trial_retried") or process.poll() is not None)
    cluster.remove_node(machines[0], allow_graceful=False)
    wait_for(lambda: len(of_kind(folder, "trial_retried")) > 1 or process.poll() is not None)
    assert {event["kind"] for event in of_kind(folder, "trial_retried")} == {"moved", "lost"}
    cluster.add_machine()  # for the one that lost its own
    _, err = finish(process)
    assert "leaves a machine that is about to be taken away" in err
    results = went_well(folder, 2)
    assert [trial["retries"] for trial in results["trials"]] == [1, 1]
    wait_for(lambda: not actors(cluster, "ImplicitFunc", "Board", "RayTrainWorker", "TrainController"), 60)


@pytest.mark.parametrize("cluster", [{"num_cpus": 2}], indirect=True)
def test_a_sweep_whose_own_machine_is_drained_goes_on_elsewhere(cluster: Any, tmp_path: Path, cache: Path) -> None:
    """Driver and trials on one machine, which is about to be taken away: what runs is saved, and no trial ends."""
    folder = tmp_path / "sweep"
    where = ("search.trials=3", "search.concurrent=2", f"cluster.address={cluster.address}")
    process = start("sweep", *SLOW, *where, f"output={folder}", f"cache={cache}")
    at_work(folder, process, 2)
    drain(cluster, cluster.head_node, seconds=90)
    _, err = finish(process, status=130)
    assert "Ray is about to take this machine away" in err
    assert f"go on with resume={folder}" in err
    assert not ended(folder)
    for trial in ("0000", "0001"):
        newest = sorted((folder / "trials" / trial).glob("checkpoint-*"))[-1]
        assert newest.name == f"checkpoint-{len(losses(folder / 'trials' / trial)):08d}", "saved at its last step"
    out, err = finish(start("sweep", f"resume={folder}", "cluster.address=local", "tracking.log=json"))
    told = [json.loads(line) for line in (err + out).splitlines()]  # all that it says is for machines
    assert told[-1]["event"] == "summary"
    assert "best trial:" in told[-1]["message"]
    went_well(folder, 3)


def test_ctrl_c_once_saves_what_runs_and_twice_ends_at_once(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    process = start("sweep", *SLOW, *ONE, "search.trials=2", "budget.hours=1", f"output={folder}", f"cache={cache}")
    at_work(folder, process)
    process.send_signal(signal.SIGTERM)  # as a supervisor does; it counts as Ctrl-C
    _, err = finish(process, status=130)
    assert "ending in order" in err
    assert f"resume={folder}" in err
    nothing_left(process.pid)
    steps = len(losses(folder / "trials" / "0000"))
    newest = sorted((folder / "trials" / "0000").glob("checkpoint-*"))[-1]
    assert newest.name == f"checkpoint-{steps:08d}", "saved at its last step"
    assert json.loads((folder / "results.json").read_text())["trials"][0]["status"] == "running"
    known = len(trials_in(folder))

    process = start("sweep", f"resume={folder}")
    wait_for(lambda: len(trials_in(folder)) > known + 2 or process.poll() is not None)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    finish(process, status=130)
    assert time.monotonic() - began < 5
    nothing_left(process.pid, seconds=10)

    finish(start("sweep", f"resume={folder}"))
    went_well(folder, 2)
    numbers = [step["step"] for step in steps_of(folder / "trials" / "0000")]
    assert sorted(set(numbers)) == list(range(1, 201))


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[Callable[[bool], None]]:
    """A folder on a small disk, and a function that fills it or makes room; who cannot mount one has it read-only."""
    path.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", path], capture_output=True
    ).returncode

    def fill(full: bool) -> None:
        ballast = path / "ballast"
        if not mounted:
            for folder in (path, *path.rglob("*/")):
                folder.chmod(0o500 if full else 0o700)
        elif not full:
            ballast.unlink()
        else:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    try:
        yield fill
    finally:
        if mounted:
            subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_halts_a_sweep_that_goes_on_when_there_is_room(tmp_path: Path, cache: Path) -> None:
    with full_disk(tmp_path / "disk") as fill:
        folder = tmp_path / "disk" / "sweep"
        process = start(
            "sweep", *SLOW, *ONE, "search.trials=2", "disk.trial_gb=1", f"output={folder}", f"cache={cache}"
        )
        at_work(folder, process)
        fill(True)
        _, err = finish(process, status=1)
        assert err.count("error: ") == 1
        assert "storage cannot be written" in err
        assert f"GB are free in {folder}" in err
        assert f"go on with resume={folder}" in err
        assert "Traceback" not in err
        nothing_left(process.pid)
        assert not ended(folder)
        _, err = finish(start("sweep", f"resume={folder}"), status=1)
        assert f"go on with resume={folder}" in err
        fill(False)
        finish(start("sweep", f"resume={folder}"))
        went_well(folder, 2)
        assert not list(folder.rglob("saving"))
        assert not list(folder.rglob(".*.json.*"))


def test_a_trial_beyond_its_quota_ends_alone(
    single: Pool, store: TokenStore, configure: Configure, tmp_path: Path
) -> None:
    measured = run(single, store, tmp_path / "free", configure(*RUN))
    room = 1.5e-9 * folder_bytes(Path(measured[-1]["checkpoint"]))
    cfg = configure(*RUN, f"disk.trial_gb={room}")
    with pytest.raises(TaskFailed, match=r"more than disk\.trial_gb=") as caught:
        list(isolated.train(single.board, "full", cfg, store, tmp_path))
    assert caught.value.ended.status == "quota"
    assert [path.name for path in (tmp_path / "full").glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert run(single, store, tmp_path / "next", configure(*RUN))[-1]["last"]


def hold_memory(cfg: Any, store: Any, place: Any) -> None:
    """Leave twice as much behind in the worker as it had, where that is the limit."""
    import builtins

    from raytune_lora.training import duty, worker

    duty._GROWTH = 0
    builtins.held = b"x" * worker.held().own  # type: ignore[attr-defined]


def test_a_group_that_does_not_let_go_of_memory_is_replaced(
    ray_instance: None, configure: Configure, store: TokenStore, tmp_path: Path
) -> None:
    notes: list[str] = []
    cfg = configure("workers=1")
    with Pool(cfg, tmp_path / "groups", groups=1, tell=notes.append) as pool:
        for name, task in (("a", tasks.nothing), ("b", hold_memory), ("c", tasks.nothing)):
            run(pool, store, tmp_path / name, cfg, task)
    assert len(list((tmp_path / "groups").iterdir())) == 2
    assert "is replaced: a worker holds" in notes[0]


def test_a_group_waits_for_room_says_for_what_and_is_sent_home(
    ray_instance: None, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_PATIENCE", 1.0)
    notes: list[str] = []
    with Pool(configure("workers=2", "cpus_per_worker=9"), tmp_path / "groups", groups=1, tell=notes.append):
        wait_for(lambda: notes, 60)
    assert re.fullmatch(r"waiting for 2 x \{CPU: 9\} since \d+ s, 1 times: the cluster has \d of 8 CPUs free", notes[0])
    here = ray.get_runtime_context().get_node_id()
    assert driver._offer([here]) == "the cluster (without 1 that are left out) has no CPU"


def test_a_driver_that_is_killed_again_and_again_loses_no_trial(tmp_path: Path) -> None:
    """At random moments of a sweep; each time it is started again at once."""
    bench = [sys.executable, str(ROOT / "jobs" / "bench" / "kills.py"), "driver", "--kills", "2", "--trials", "3"]
    done = subprocess.run([*bench, "--output", str(tmp_path / "sweep")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["kills"]) == 2
    went_well(tmp_path / "sweep", 3)
