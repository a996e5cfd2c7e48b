"""The Ray cluster a job runs on: one that is there, or a local one made for the job."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray.job_config import JobConfig

from raytune_lora.config.schema import ClusterConfig, RunConfig
from raytune_lora.errors import UserError

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
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = _address(cfg)
    job = JobConfig(metadata={"raytune_lora": name} if name else None)
    if address is None:
        ray.init(
            address="local",
            num_cpus=int(local_node().cpus),
            num_gpus=int(local_node().gpus),
            object_store_memory=cfg.object_store_mb * 2**20,
            include_dashboard=cfg.dashboard,
            dashboard_host="127.0.0.1",  # whoever reaches it can run code here
            job_config=job,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": ENVIRONMENT},
                job_config=job,
            )
        except ConnectionError as error:
            raise UserError(f"cluster.address: no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


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
    tool = shutil.which("nvidia-smi")
    if _address(cfg) is not None or tool is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    sizes = [int(line) for line in listed.stdout.split() if line.isdigit()]  # MiB
    return min(sizes) * 2**20 / 10**9 if sizes else None


def local_node() -> Node:
    """This machine, as far as this process may use it."""
    return Node(float(len(os.sched_getaffinity(0))), float(_local_gpus()))


def _address(cfg: ClusterConfig) -> str | None:
    return cfg.address or os.environ.get("RAY_ADDRESS")


def _local_gpus() -> int:
    """Counted by the driver's own tool: asking torch would load it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if (tool := shutil.which("nvidia-smi")) is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _fits(node: Node, cpus: int, gpus: int) -> int:
    by_cpu = int(node.cpus // cpus)
    return min(by_cpu, int(node.gpus // gpus)) if gpus else by_cpu
