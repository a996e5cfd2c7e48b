"""The Ray cluster a job runs on: one that is there, or a local one made for the job."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from raytune_lora import network
from raytune_lora.cluster.addresses import token_refused
from raytune_lora.config.schema import ClusterConfig, RunConfig
from raytune_lora.errors import JobFailed, Passing, UserError

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor a group; the pool watches for all of them
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a job has its own
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # a sweep goes on from its journal, not from Tune's snapshots
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed reports its status and no loss
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_LONGEST = 107  # bytes of a socket's path, by Linux
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # in Ray's folder of temporary files
_SHORT = "/tmp/ray"  # that folder where the named one will not do
_DEVICE = re.compile(r"nvidia\d+")
_ANSWER = 20.0  # seconds for the driver's own tool
_logger = logging.getLogger(__name__)


class _JobConfig(JobConfig):
    """Keeps the working folder out of the workers: Ray would put it, and a ``torch.py`` in it, before all packages."""

    def _runtime_env_has_working_dir(self) -> bool:
        return True


@dataclass(frozen=True)
class Node:
    """What one machine offers."""

    cpus: float
    gpus: float


@contextlib.contextmanager
def connected(cfg: ClusterConfig, name: str = "") -> Iterator[None]:
    """Connect to the cluster for the time of a job; a local one is stopped afterwards.

    Args:
        cfg: which cluster.
        name: of the sweep or run, which Ray's dashboard shows with the job.

    Raises:
        UserError: there is no cluster at the address.
        JobFailed: a local one does not come up.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = _address(cfg)
    package = str(Path(__file__).parents[2])  # the workers' package is the driver's
    job = _JobConfig(metadata={"raytune_lora": name} if name else None, _py_driver_sys_path=[package])
    if address is None:
        folder = temporary_folder()
        try:
            with _own_handlers():
                ray.init(
                    address="local",
                    _temp_dir=folder,
                    num_cpus=int(local_node().cpus),
                    num_gpus=int(local_node().gpus),
                    object_store_memory=cfg.object_store_mb * 2**20,
                    include_dashboard=cfg.dashboard,
                    dashboard_host="127.0.0.1",  # whoever reaches it can run code here
                    job_config=job,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:  # Ray raises nothing narrower where one of its processes does not come up
            raise JobFailed(
                f"Ray did not start on this machine ({error}); is it overloaded, or out of memory or disk? Ray's logs: "
                f"{folder}/session_latest/logs"
            ) from error
    else:
        _reach(address)
        try:
            with _own_handlers():
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": ENVIRONMENT},
                    job_config=job,
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise Passing(f"{_named(address)}: no Ray cluster there that can be joined: {error}") from error
    try:
        yield
    finally:
        with _own_handlers():
            ray.shutdown()


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Ray puts a handler of its own in place of the job's, which ends it in order at SIGTERM, and takes away both."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def placement_problems(cfg: RunConfig, nodes: list[Node], *, concurrent: int = 1) -> list[str]:
    """Whether the machines can ever hold ``concurrent`` trials at once; a worker never spans two of them.

    Where an autoscaler adds machines, too few of them are no problem: trials wait for them, and that is said.
    """
    cpus, gpus = cfg.cpus_per_worker, cfg.gpus_per_worker
    if gpus and not any(node.gpus for node in nodes) and not cfg.cluster.autoscaler:
        where = "this machine" if len(nodes) == 1 else f"none of the {len(nodes)} machines"
        return [
            f"gpus_per_worker={gpus}: {where} has {'no' if len(nodes) == 1 else 'a'} GPU; "
            "set gpus_per_worker=0 to train on the CPU"
        ]
    room = sum(_fits(node, cpus, gpus) for node in nodes)
    wanted = cfg.workers * concurrent
    if room >= wanted or cfg.cluster.autoscaler:
        return []
    each = f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
    if not room:
        most = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0.0, 0.0))
        return [
            f"one trial needs workers={cfg.workers} x ({each}), and a worker never spans machines: the largest has "
            f"{_offer(most, gpus)}; ask for fewer (cpus_per_worker, gpus_per_worker), or set cluster.autoscaler=true "
            "where larger machines will be added"
        ]
    counts = Counter(_offer(node, gpus) for node in nodes)
    offer = " + ".join(f"{count} x ({what})" if count > 1 else what for what, count in counts.items())
    what = f"workers={cfg.workers}" + (f" in each of search.concurrent={concurrent} trials" if concurrent > 1 else "")
    remedy = "ask for fewer, or set cluster.autoscaler=true where machines will be added"
    return [f"{what} with {each} each do not fit: the cluster has {offer}, enough for {room}; {remedy}"]


def nodes(cfg: ClusterConfig) -> list[Node]:
    """The machines of the cluster that the config names; of the local one without starting it."""
    if not is_given(cfg):
        return [local_node()]
    with connected(cfg):
        alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
        return [Node(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in alive]


def _offer(node: Node, gpus: int) -> str:
    return f"{node.cpus:g} CPUs" + (f" and {node.gpus:g} GPUs" if gpus else "")


def is_given(cfg: ClusterConfig) -> bool:
    """Whether the cluster is there already, rather than made for the job on this machine."""
    return ray.is_initialized() or _address(cfg) is not None


def smallest_gpu(cfg: ClusterConfig) -> float | None:
    """GB of 10^9 bytes of the smallest GPU; None where it is not known, as on a cluster that is elsewhere."""
    if _address(cfg) is not None:
        return None
    listed = _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")
    sizes = [int(line) for line in (listed or "").split() if line.isdigit()]  # MiB
    return min(sizes) * 2**20 / 10**9 if sizes else None


def local_node() -> Node:
    """This machine, as far as this process may use it."""
    return Node(float(len(os.sched_getaffinity(0))), float(_local_gpus()))


def temporary_folder() -> str:
    """Where a local cluster keeps its temporary files; a short folder where the usual one is too long for its sockets.

    Raises:
        UserError: there is none.
    """
    usual = get_default_ray_temp_dir()  # by RAY_TMPDIR and TMPDIR
    for folder in (usual, _SHORT):
        if len(os.fsencode(folder + _SOCKET)) <= _LONGEST and _writable(Path(folder)):
            if folder != usual:
                _logger.warning("Ray's temporary files are in %s: %s is too long, or cannot be written", folder, usual)
            return folder
    longest = _LONGEST - len(_SOCKET) - len("/ray")
    raise UserError(
        f"TMPDIR: neither {usual} nor {_SHORT} can hold Ray's temporary files, which lie in a folder that can be "
        f"written and has a path of at most {longest} bytes; name one (RAY_TMPDIR=/short)"
    )


def _writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _address(cfg: ClusterConfig) -> str | None:
    address = cfg.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def _named(address: str) -> str:
    """An address as the user named it."""
    return f"RAY_ADDRESS={address}" if os.environ.get("RAY_ADDRESS") == address else f"cluster.address={address}"


def _reach(address: str) -> None:
    """See in seconds whether anything answers at an address: Ray itself tries for minutes.

    Raises:
        UserError: nothing does, or it is no address of a cluster.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{_named(address)} is a dashboard, through which jobs are submitted: raytune-lora submit --address "
            f"{address} (or ray job submit); to run on this machine unset RAY_ADDRESS, and to join a cluster from one "
            "of its machines set cluster.address=auto, or to its head's <host>:6379"
        )
    try:
        where = canonicalize_bootstrap_address(address) or "" if address == "auto" else address.removeprefix("ray://")
    except ConnectionError as error:
        raise Passing(f"{_named(address)}: there is no Ray cluster to be found: {error}") from error
    host, _, port = where.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"{_named(address)} is no address of a Ray cluster; name <host>:6379, auto or local")
    plain = os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true")
    if why := network.unreachable(host.strip("[]"), int(port), grpc=plain):
        raise Passing(
            f"{_named(address)}: no Ray cluster answers there ({why}); is it up, and is this its head's address and "
            "port (6379)? To run on this machine, unset RAY_ADDRESS and leave cluster.address out"
        )
    if not address.startswith("ray://"):
        _see_to_token(address, where)


def _see_to_token(address: str, where: str) -> None:
    """Ask a cluster's head something: without its token, Ray itself tries for long, and does not say why it fails.

    Raises:
        UserError: the head refuses the token, or wants one.
    """
    if address == "auto" and maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
        return  # Ray itself takes what token this machine has, for a cluster that it has found here
    try:
        with contextlib.closing(create_gcs_channel(where)) as channel:
            asked = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            question = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]  # made when it is imported
            asked.GetClusterId(question, timeout=network.SECONDS)
    except AuthenticationError as error:  # there is no token to be sent
        raise UserError(f"{token_refused(_named(address), sent=False)}: {error.message}") from error
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(token_refused(_named(address), sent=is_token_auth_enabled())) from error


def _local_gpus() -> int:
    """Those that are there and that this process may use; counted without torch, which would have to be loaded."""
    there = _gpus_there()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return sum(line.startswith("GPU ") for line in there)
    found = 0
    for device in (part.strip() for part in visible.split(",")):
        by_number = device.isdigit() and int(device) < sum(line.startswith("GPU ") for line in there)
        if not (by_number or (device.startswith(("GPU-", "MIG-")) and any(device in line for line in there))):
            break  # as CUDA has it: what follows one that is not there is not seen either
        found += 1
    return found


def _gpus_there() -> list[str]:
    """A line each: as ``nvidia-smi -L`` shows GPUs and their parts, or, in a container without it, their devices."""
    if (listed := _nvidia_smi("-L")) is not None:
        return [line.strip() for line in listed.splitlines()]
    return [f"GPU {path.name}" for path in Path("/dev").glob("nvidia*") if _DEVICE.fullmatch(path.name)]


def _nvidia_smi(*arguments: str) -> str | None:
    """What the driver's tool says; None where there is none, or it hangs."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=_ANSWER, check=False).stdout
    except (subprocess.TimeoutExpired, OSError):
        return None


def _fits(node: Node, cpus: int, gpus: int) -> int:
    by_cpu = int(node.cpus // cpus)
    return min(by_cpu, int(node.gpus // gpus)) if gpus else by_cpu
