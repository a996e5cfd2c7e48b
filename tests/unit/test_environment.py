"""What a start depends on outside: a cluster, a GPU, a folder for temporary files, the hub, the user's own folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raytune_lora import network, shadows
from raytune_lora.cluster import connect
from raytune_lora.config.schema import ClusterConfig
from raytune_lora.errors import UserError
from raytune_lora.tuning import folder

ROOT = Path(__file__).resolve().parents[2]
SOON = 12.0  # seconds on a machine that does much else


@pytest.fixture
def dead_port() -> int:
    """Where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def soon() -> Iterator[None]:
    """What is done within seconds."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON


# -------------------------------------------------------------------------------------------------------------- cluster


@pytest.mark.usefixtures("soon")
def test_a_cluster_that_is_gone(dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead_port}")
    with pytest.raises(UserError, match=f"RAY_ADDRESS=127.0.0.1:{dead_port}: no Ray cluster answers there"):
        connect.nodes(ClusterConfig())
    with pytest.raises(UserError, match=f"cluster.address=localhost:{dead_port}: no Ray cluster answers there"):
        connect.nodes(ClusterConfig(address=f"localhost:{dead_port}"))


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "http://127.0.0.1:8265",
            "is a dashboard, through which jobs are submitted: raytune-lora submit --address http",
        ),
        ("https://ray.example.com", "is a dashboard"),
        ("head", "is no address of a Ray cluster; name <host>:6379"),
        ("no-such-host.invalid:6379", "no Ray cluster answers there"),
    ],
)
def test_an_address_that_is_none(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as refused:
        connect.nodes(ClusterConfig())
    assert f"RAY_ADDRESS={address}" in str(refused.value)
    assert said in str(refused.value)


def test_local_is_no_address_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not connect.is_given(ClusterConfig())


@pytest.mark.usefixtures("soon")
def test_a_host_that_says_nothing_is_given_up() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]  # more than its queue has room for
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        assert network.unreachable("127.0.0.1", full.getsockname()[1], seconds=0.5) is not None
        for client in waiting:
            client.close()


@pytest.mark.usefixtures("soon")
def test_a_dashboard_s_port_is_no_cluster() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"no Ray cluster answers there \(something else listens there\)"):
            connect.nodes(ClusterConfig(address=f"127.0.0.1:{server.server_port}"))
        server.shutdown()


# --------------------------------------------------------------------------------------------------- temporary files


def test_a_long_folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    assert connect.temporary_folder() == "/tmp/ray"
    monkeypatch.setattr(connect, "_SHORT", str(long / "ray"))
    with pytest.raises(UserError, match=r"at most \d+ bytes; name one \(RAY_TMPDIR=/short\)"):
        connect.temporary_folder()
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert connect.temporary_folder() == "/tmp/ray"


def test_the_longest_folder_is_one_in_which_a_socket_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    room = connect._LONGEST - len(connect._SOCKET) - len("/ray")
    for length, fits in ((room, True), (room + 1, False)):
        monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "y" * (length - 5))
        assert (connect.temporary_folder() == f"{os.environ['RAY_TMPDIR']}/ray") == fits


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.parametrize(
    ("visible", "listed", "found"),
    [
        (None, 2, 2),
        ("0", 0, 0),
        ("0,1", 1, 1),
        ("1,0", 2, 2),
        ("2,0", 2, 0),
        ("", 2, 0),
        ("-1", 2, 0),
        ("GPU-1", 2, 1),
        ("GPU-7", 2, 0),
    ],
)
def test_only_gpus_that_are_there_are_counted(
    visible: str | None, listed: int, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"echo 'GPU {number}: H200 (UUID: GPU-{number}a)'\n" for number in range(listed))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert connect.local_node().gpus == found


# ------------------------------------------------------------------------------------------------------------------ hub


ASKING = """
import time
import datasets, huggingface_hub
from raytune_lora.config.data import FileDataConfig
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import HubModelConfig, SweepConfig
from raytune_lora.data import sources as data
from raytune_lora.models import sources as models
from raytune_lora.models.stored import as_stored

began = time.monotonic()
as_stored(SweepConfig(HubModelConfig(path="owner/name"), FileDataConfig(), LoraMethodConfig()))
print(*models.problems(HubModelConfig(path="owner/name")))
print(*data.problems(FileDataConfig(path="owner/name")))
print(time.monotonic() - began)
"""


@pytest.mark.parametrize("listens", [False, True])
def test_a_hub_that_does_not_answer(listens: bool, dead_port: int) -> None:
    """In a process of its own: the client reads its address once."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1] if listens else dead_port
        _is_said(f"http://127.0.0.1:{port}")


def _is_said(hub: str) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub, "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", ASKING], env=environment, capture_output=True, text=True, check=True)
    model, rows, seconds = done.stdout.splitlines()
    assert model.startswith("model.path: 'owner/name' is no folder here, and the hub, where it would be a model, does")
    assert "owner/name cannot be read from the hub, which does not answer (127.0.0.1: " in rows
    assert float(seconds) < SOON
    assert not done.stderr


# -------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.usefixtures("soon")
def test_a_store_that_does_not_answer(dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": f"http://127.0.0.1:{dead_port}"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(UserError, match=r"s3://bucket/sweeps/config.yaml cannot be read .* see that the store answers"):
        folder.exists("s3://bucket/sweeps")


# ----------------------------------------------------------------------------------------------------- the user's files


def test_files_that_hide_packages_are_named_where_they_would(tmp_path: Path) -> None:
    for name in ("torch.py", "random.py", "mine.py", "ray/__init__.py", "datasets/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert shadows.problems(str(tmp_path), sys.path) == []
    for path in (["", *sys.path], [str(tmp_path), *sys.path]):
        found = shadows.problems(str(tmp_path), path)
        assert [problem.split()[0] for problem in found] == [
            f"{tmp_path}/random.py",
            f"{tmp_path}/ray",
            f"{tmp_path}/torch.py",
        ]
    assert [problem.split()[0] for problem in shadows.problems(str(tmp_path), [*sys.path, ""])] == [
        f"{tmp_path}/random.py"
    ]


def test_a_folder_on_the_path_that_hides_a_package_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:"}
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "model=tiny", "data=fake"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/torch.py would be imported in place of torch")


def test_this_checkout_hides_nothing() -> None:
    assert shadows.problems(str(ROOT), ["", *sys.path]) == []
