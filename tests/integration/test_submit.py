"""Sweeps as jobs of a Ray cluster that is started for them and wants a token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_lora.cluster import submit
from raytune_lora.cluster.pack import Package
from raytune_lora.config.compose import compose
from raytune_lora.tuning.folder import create
from tests import k8s, readme

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
# what the nodes have from a Kubernetes Secret, and one thing more that a laptop passes on
PLANTED = {
    "RAY_AUTH_TOKEN": "planted0token0of0the0cluster0a1b2c3",
    "HF_TOKEN": "hf_planted0a1b2c3d4e5f6a1b2c3d4e5f6a1",
    "WANDB_API_KEY": "planted0a1b2c3d4e5f6a1b2c3d4e5f6a1b2c3d4",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-a1b2",
    "RAYTUNE_LORA_STORAGE_PASSWORD": "planted-database-a1b2",
}
PASSED = {"PASSED_ON": "planted-passed-on-a1b2"}
SMALL = ("evaluation.generate_rows=2", "evaluation.loss_rows=8", "evaluation.max_new_tokens=8", "search.concurrent=1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Cluster:
    """A head node, with a token."""

    home: Path
    port: int
    dashboard_port: int

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a laptop that has the token."""
        return laptop() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.home / "token")}

    def leaks(self, secret: str, *folders: Path) -> set[str]:
        """The names of the files that hold a secret, among Ray's own logs and in other folders."""
        files = (file for folder in (*self.home.rglob("logs"), *folders) for file in folder.rglob("*"))
        return {file.name for file in files if file.is_file() and secret.encode() in file.read_bytes()}


def laptop() -> dict[str, str]:
    """The environment of a machine that knows no cluster."""
    cleared = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", *PLANTED}
    kept = {name: value for name, value in os.environ.items() if name not in cleared}
    return kept | {"PYTHONPATH": str(readme.ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Its path is short, as sockets need."""
    home = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    found = Cluster(home, free_port(), free_port())
    (home / "token").write_text(PLANTED["RAY_AUTH_TOKEN"])
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={found.port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={found.dashboard_port}", f"--temp-dir={home / 'ray'}"]
    command += [
        f"--dashboard-agent-listen-port={free_port()}",
        "--object-store-memory=100000000",
        '--resources={"driver": 2}',
    ]
    environment = {**found.environment, **PLANTED, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH")  # what runs there is what was sent
    with (home / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    wait_until_up(found.dashboard)
    yield found
    os.killpg(head.pid, signal.SIGKILL)
    head.wait(60)
    shutil.rmtree(home)


def wait_until_up(url: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2)
        except urllib.error.HTTPError as refused:
            if refused.code == 401:  # it wants the token
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no dashboard at {url}, or one that wants no token")


class Way(socketserver.ThreadingTCPServer):
    """To the dashboard, as long as the lid is open."""

    daemon_threads = True
    open = True

    def __init__(self, port: int) -> None:
        self.port = port
        super().__init__(("127.0.0.1", 0), _Connection)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Way)
        if not self.server.open:
            return
        with socket.create_connection(("127.0.0.1", self.server.port)) as there:
            back = threading.Thread(target=_pour, args=(there, self.request), daemon=True)
            back.start()
            _pour(self.request, there)
            back.join()


def _pour(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


class Job:
    """One of jobs/ at work, and what it has printed."""

    def __init__(self, name: str, *arguments: str, environment: dict[str, str], project: Path = readme.ROOT) -> None:
        command = [sys.executable, f"jobs/{name}.py", *arguments]
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=project,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))  # extend takes them one by one

    def said(self, words: str) -> bool:
        return any(words in line for line in list(self.lines))

    def wait_for(self, words: str, seconds: float = 150) -> None:
        wait_for(lambda: self.said(words) or self.process.poll() is not None, seconds)
        assert self.said(words), self.text

    def end(self, status: int = 0) -> str:
        assert self.process.wait(200) == status, self.text
        self._reader.join()
        return self.text

    @property
    def text(self) -> str:
        return "".join(self.lines)


def wait_for(condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.1)


def events(folder: Path, kind: str) -> list[dict[str, float]]:
    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ({}, "the cluster wants a token, and none was sent; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another0planted0token"}, "the cluster refuses the token in"),
    ],
)
def test_without_the_token(cluster: Cluster, token: dict[str, str], said: str, tmp_path: Path) -> None:
    environment = laptop() | token | {"HOME": str(tmp_path)}  # where Ray may have put a token of this machine's own
    refused = Job("submit", "--address", cluster.dashboard, "--status", "mine", environment=environment).end(2)
    assert refused.startswith(f"error: --address {cluster.dashboard}: {said}")
    assert refused.count("\n") == 1
    assert not any(secret in refused for secret in token.values() if "planted" in secret)
    assert not cluster.leaks("another0planted0token")


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ({}, "wants a token, and none was sent; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "wants a token, and none was sent; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "wants a token, and none was sent"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another0planted0token"}, "refuses the token in RAY_AUTH_TOKEN"),
    ],
)
def test_joined_without_the_token(cluster: Cluster, token: dict[str, str], said: str, tmp_path: Path) -> None:
    """By a driver on one of its machines; Ray itself tries for twenty seconds, and speaks of a lost connection."""
    environment = laptop() | token | {"HOME": str(tmp_path)}
    address = f"cluster.address=127.0.0.1:{cluster.port}"
    arguments = ("experiment=tiny", f"output={tmp_path / 'sweep'}", f"cache={tmp_path / 'cache'}", address)
    refused = Job("sweep", *arguments, environment=environment).end(2)
    assert refused.startswith(f"error: {address}: the cluster {said}")
    assert refused.count("\n") == 1
    assert not any(secret in refused for secret in token.values() if "planted" in secret)


def test_submitted_by_ray_and_no_secret_is_written(
    cluster: Cluster, tmp_path: Path, cache: Path, tiny_folder: Path, rows: Path
) -> None:
    text = readme.command("ray job submit")
    for old, new in {
        "<folder or owner/name>": str(tiny_folder),
        "<file>.jsonl": str(rows),
        "workers=4": "workers=2",
        "gpus_per_worker=1": "gpus_per_worker=0",
        "search.concurrent=8": "search.concurrent=1",
        "/shared/sweeps/mine": str(tmp_path / "mine"),
        "/shared/cache": str(cache),
        "--working-dir .": f"--working-dir {readme.ROOT}",
    }.items():
        assert old in text
        text = text.replace(old, new)
    small = ["search.trials=2", "training.global_batch=8", "training.micro_batch=4", "training.max_steps=2"]
    command = [RAY, *shlex.split(text)[1:], *SMALL[:-1], *small, "tracking.trackers=[wandb,mlflow]"]
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.dashboard}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert results["state"] == "finished"
    assert len(results["trials"]) == 2
    for name, secret in PLANTED.items():
        assert not cluster.leaks(secret, tmp_path), name
        assert secret not in done.stdout + done.stderr
    actors = listed("/api/v0/actors?detail=true", cluster)
    names = {actor["class_name"].rpartition(".")[2]: actor["repr_name"] for actor in actors}
    assert names["Board"] == "mine board"
    assert names["RayTrainWorker"] == "mine group 0"
    assert names["ImplicitFunc"] == "mine trials"


@dataclass(frozen=True)
class RayJob:
    """A job as KubeRay submits it: what its submitter runs, with this cluster's address and this checkout."""

    cluster: Cluster
    id: str
    own: Path  # the user's config groups
    folder: Path

    def run(self, manifest: dict[str, Any], *overrides: str) -> tuple[str, str]:
        """Its status at the end, and what the submitter shows."""
        environment = {**self.cluster.environment, "SWEEP": self.id}
        runtime = yaml.safe_load(manifest["runtimeEnvYAML"])
        runtime["env_vars"] |= {"RAYTUNE_LORA_CONF": str(self.own), "PYTHONPATH": str(readme.ROOT)}
        entrypoint = manifest["entrypoint"].replace("/app/", f"{readme.ROOT}/").replace("/shared/", f"{self.folder}/")
        job = [RAY, "job", "submit", "--address", self.cluster.dashboard, "--no-wait", "--submission-id", self.id]
        job += ["--runtime-env-json", json.dumps(runtime), "--", *shlex.split(entrypoint), *overrides]
        job = [argument.replace("$SWEEP", self.id) for argument in job]
        subprocess.run(job, env=environment, capture_output=True, timeout=100, check=True)
        follow = [RAY, "job", "logs", "--address", self.cluster.dashboard, "--follow", self.id]
        followed = subprocess.run(follow, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert followed.returncode == 0, followed.stderr  # or the submitter's Job fails, and the RayJob with it
        facts = job_facts(self.cluster, self.id)
        wait_for(lambda: job_facts(self.cluster, self.id)["status"] not in ("PENDING", "RUNNING"), 30)
        facts = job_facts(self.cluster, self.id)
        return facts["status"], followed.stdout


def job_facts(cluster: Cluster, name: str) -> dict[str, Any]:
    token = {"Authorization": f"Bearer {PLANTED['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{cluster.dashboard}/api/jobs/{name}", headers=token), timeout=20
    ) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders k8s/, is not installed")
def test_kuberay_retries_what_may_pass_and_not_what_was_refused(cluster: Cluster, tmp_path: Path, cache: Path) -> None:
    """It retries a job that has failed, and none that was stopped."""
    (manifest,) = k8s.jobs(k8s.render("base"))
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    sweep = own / "experiment" / "sweep.yaml"
    sweep.write_text("# @package _global_\ndefaults: [tiny]\nsearch: {trails: 3}\n")
    status, log = RayJob(cluster, "sweep-typo", own, tmp_path).run(manifest)
    assert f"error: {sweep}: search.trails: unknown key. Did you mean search.trials" in log
    assert (status, "the job is stopped, so that nobody tries again" in log) == ("STOPPED", True)
    assert "Traceback" not in log
    sweep.write_text("# @package _global_\ndefaults: [tiny, {override /data: file}]\ndata: {path: /nowhere/my.jsonl}\n")
    status, log = RayJob(cluster, "sweep-data", own, tmp_path).run(manifest)
    assert "/nowhere/my.jsonl" in log
    assert status == "STOPPED"
    assert not (tmp_path / "sweeps").exists()

    sweep.write_text("# @package _global_\ndefaults: [tiny]\n")
    cfg = compose(["experiment=tiny", f"output={tmp_path / 'sweeps' / 'sweep-busy'}", f"cache={tmp_path / 'cache'}"])
    lock = create(tmp_path / "sweeps" / "sweep-busy", cfg, "sweep").lock()
    try:
        status, log = RayJob(cluster, "sweep-busy", own, tmp_path).run(manifest)
    finally:
        lock.release()
    assert "error: output: another process is working in" in log
    assert (status, "the job is stopped" in log) == ("FAILED", False)


def test_drivers_take_turns_where_their_resource_is_short(cluster: Cluster, tmp_path: Path) -> None:
    """Two at a time on the node that has room for two; a small job beside them is not kept waiting."""
    Package(readme.ROOT, [Path("Makefile")]).write(tmp_path / "package.zip")
    script = f"from {__name__} import take_turns; take_turns({cluster.dashboard!r}, {str(tmp_path / 'package.zip')!r})"
    command = [sys.executable, "-c", script]  # Ray reads the token's place when it is imported
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, timeout=300, cwd=readme.ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def take_turns(dashboard: str, package: str) -> None:
    there = submit.Cluster(dashboard)
    names = ["turn-1", "turn-2", "turn-3"]
    for name in names:
        there.submit(submit.Submission(name, "sleep 300", [], "/nowhere", {}, "driver"), Path(package))
        if name != names[-1]:
            wait_for(partial(is_at, there, name, "RUNNING"), 60)
    assert there.run("beside", "echo here", "driver").strip().endswith("here")
    assert is_at(there, names[2], "PENDING")
    there.stop(there.get(names[0]))
    wait_for(partial(is_at, there, names[2], "RUNNING"), 60)
    for name in names[1:]:
        there.stop(there.get(name))
        wait_for(partial(is_at, there, name, "STOPPED"), 60)


def is_at(there: submit.Cluster, name: str, status: str) -> bool:
    return bool(there.get(name).status.value == status)


def listed(path: str, cluster: Cluster) -> list[dict[str, Any]]:
    """What the state API lists, those that ended included."""
    token = {"Authorization": f"Bearer {PLANTED['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(cluster.dashboard + path, headers=token)
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    return found


def forget(job: str, cluster: Cluster) -> None:
    """Have the cluster know a job no more."""
    token = {"Authorization": f"Bearer {PLANTED['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/{job}", headers=token, method="DELETE")
    urllib.request.urlopen(request, timeout=20).close()


@pytest.fixture
def project(tmp_path: Path, rows: Path) -> Path:
    """A user's checkout, with data in it."""
    for name in ("jobs", "conf", "raytune_lora"):
        shutil.copytree(readme.ROOT / name, tmp_path / "project" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(rows, tmp_path / "project" / "my.jsonl")
    return tmp_path / "project"


def test_submitted_left_alone_stopped_and_resumed(
    cluster: Cluster, tmp_path: Path, cache: Path, tiny_folder: Path, project: Path
) -> None:
    way, sweep, got = Way(cluster.dashboard_port), tmp_path / "mine", project / "sweeps" / "mine"
    changed = {
        "gpus_per_worker=1": "gpus_per_worker=0",
        "workers=4": "workers=1",
        "search.concurrent=8": "search.trials=1",
    }
    changed |= {"deepspeed=zero3": "deepspeed=off", "http://127.0.0.1:8265": way.address}
    changed |= {"/shared/sweeps/mine": str(sweep), "/shared/cache": str(cache), "/shared/model": str(tiny_folder)}
    arguments = [*readme.arguments("jobs/submit.py", changed), *SMALL, "--env", "PASSED_ON", "training.max_steps=2000"]
    arguments += ["training.global_batch=8", "evaluation.every=1600", "scheduler=none"]
    there = ("--address", way.address)

    # where Ray's own client would go, whatever address it is given
    environment = cluster.environment | PASSED | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}

    def submit(*arguments: str) -> Job:
        return Job("submit", *arguments, environment=environment, project=project)

    began = time.time()
    first = submit(*arguments)
    first.wait_for("mine: submitted as job raytune-lora-mine.1")
    assert re.search(r"error: --name mine: a sweep of that name is (running|pending); ", submit(*arguments).end(2))
    way.open = False
    first.wait_for("does not answer (ConnectionError); the sweep goes on; trying again in 1 s")
    way.open = True
    assert re.search(r"mine: (running|pending), ", submit(*there, "--status", "mine").end())
    first.wait_for("trial 0000 started")
    told = [line for line in first.lines if "does not answer" not in line]
    assert len(set(told)) == len(told)  # nothing is told twice
    first.process.send_signal(signal.SIGINT)
    assert "the sweep goes on without this machine\nto follow it, and fetch its results: " in first.end(0)
    assert not got.exists()

    wait_for(lambda: bool(events(sweep, "trial_result")))
    print(f"submit to first trial: {events(sweep, 'trial_started')[0]['time'] - began:.1f} s")
    follower, near = submit(*there, "--logs", "mine"), ("--address", cluster.dashboard)
    follower.wait_for("trial 0000 started")
    way.open = False
    assert "mine: asked to stop" in submit(*near, "--stop", "mine").end()
    assert "mine: stopped, " in submit(*near, "--logs", "mine").end(130)
    assert "mine: stopped, " in submit(*near, "--list").end()
    assert len(events(sweep, "phase")) == 2  # prepare, baseline
    forget("raytune-lora-mine.1", cluster)  # as a head does that is started again
    assert "mine: " not in submit(*near, "--list").end()
    way.open = True
    lost = follower.end(1)
    assert "its head was started again, and the sweep ended with it" in lost
    assert "Traceback" not in lost
    again = shlex.split(lost.rpartition("to go on with it: python jobs/submit.py ")[2])

    said = submit(*again).end(0)
    assert "mine: submitted as job raytune-lora-mine.1" in said
    assert "going on: 0 ended, lowest validation loss " in said
    assert "mine: succeeded, " in said
    assert f"results: {got}\n" in said
    results = json.loads((got / "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["completed"]
    for file in ("report.html", "best/adapter/adapter_model.safetensors", "best/config.yaml"):
        assert (got / file).read_bytes() == (sweep / file).read_bytes()
    # Ray's agent writes down what it is passed; nothing of this project does
    assert cluster.leaks(PASSED["PASSED_ON"], tmp_path) == {"runtime_env_agent.log"}

    command = [sys.executable, "jobs/status.py", *readme.arguments("jobs/status.py", {"sweeps/mine": str(sweep)})]
    shown = subprocess.run(command, cwd=project, env=laptop(), capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("mine: finished; at work for ")


def test_the_dashboard_of_a_local_cluster_is_for_this_machine_alone() -> None:
    code = (
        "import ray\nfrom raytune_lora.cluster.connect import connected\n"
        "from raytune_lora.config.schema import ClusterConfig\n"
        "with connected(ClusterConfig(dashboard=True)): print('at', ray._private.worker.global_worker.node.webui_url)\n"
    )
    environment = laptop() | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"^at 127\.0\.0\.1:\d+$", done.stdout, re.MULTILINE)


@contextlib.contextmanager
def old_node(cluster: Cluster, folder: Path) -> Iterator[None]:
    """A node whose processes find an older package first."""
    shutil.copytree(readme.ROOT / "raytune_lora", folder / "old" / "raytune_lora")
    init = folder / "old" / "raytune_lora" / "__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.9"', init.read_text()))
    (folder / "old" / "sitecustomize.py").write_text("import raytune_lora\n")
    with node(cluster, folder, variables={"PYTHONPATH": str(folder / "old")}):
        yield


@contextlib.contextmanager
def node(
    cluster: Cluster, folder: Path, wrapped: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A node with one CPU that joins.

    Args:
        cluster: that it joins.
        folder: in which it starts.
        wrapped: command that starts it.
        variables: of its environment.
    """
    command = [*wrapped, RAY, "start", "--block", f"--address=127.0.0.1:{cluster.port}", "--num-cpus=1"]
    command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}"]
    environment = cluster.environment | dict(variables or {})
    process = subprocess.Popen(
        [*command, "--object-store-memory=80000000"],
        env=environment,
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        next(line for line in process.stdout if b"Ray runtime started" in line)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


OLD = r"the node [\d.]+ has raytune-lora 0\.0\.9 \(source \w+\) \(the driver has 0\.1\.0 "


def test_a_node_with_another_version_and_other_storage(cluster: Cluster, tmp_path: Path, cache: Path) -> None:
    """And a path that means another folder in each process."""
    job = [sys.executable, str(readme.ROOT / "jobs" / "sweep.py"), "experiment=tiny", f"cache={cache}", *SMALL[-1:]]
    (tmp_path / "driver").mkdir()
    with old_node(cluster, tmp_path):
        refused = subprocess.run(
            [*job, "output=/proc/self/cwd/mine"],
            env=cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
            cwd=tmp_path / "driver",
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert refused.returncode == 2, refused.stderr
    version, storage = refused.stderr.splitlines()
    assert re.match(f"error: {OLD}", version)
    assert re.match(r"error: output: /proc/self/cwd/mine is not one folder on all nodes of the cluster: ", storage)
    assert not any((tmp_path / "driver").iterdir())


def test_a_node_with_another_version_that_joins_later_trains_nothing(
    cluster: Cluster, tmp_path: Path, cache: Path
) -> None:
    small = ("search.trials=2", "search.concurrent=3", "cluster.autoscaler=true", "scheduler=none", *SMALL[:-1])
    there = cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    folders = (f"cache={cache}", f"output={tmp_path / 'mine'}")
    sweep = Job("sweep", "experiment=tiny", *small, *folders, environment=there)
    sweep.wait_for("measuring the base model")  # and the third group waits for room
    with old_node(cluster, tmp_path):
        sweep.wait_for("it is left out")
        said = sweep.end(0)
    assert re.search(rf"{OLD}.*; it is left out", said)
    assert said.count("left out") == 1
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["completed"] * 2


def test_a_node_without_the_storage_that_joins_later_trains_nothing(
    cluster: Cluster, tmp_path: Path, cache: Path
) -> None:
    """There is an empty folder where all others have the sweep's."""
    there = cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    shared = tmp_path / "shared"
    shared.mkdir()
    small = ("search.trials=4", "search.concurrent=3", "cluster.autoscaler=true", "scheduler=none", *SMALL[:-1])
    folders = (f"cache={cache}", f"output={shared / 'mine'}")
    sweep = Job("sweep", "experiment=tiny", *small, *folders, environment=there)
    sweep.wait_for("measuring the base model")
    with node(
        cluster, tmp_path, ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {shared} && exec "$@"', "sh")
    ):
        sweep.wait_for("it is left out")
        said = sweep.end(0)
    assert re.search(rf"the node [\d.]+ does not see {shared}/mine/config.yaml as the driver wrote it", said)
    results = json.loads((shared / "mine" / "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["completed"] * 4
