"""The Ray cluster a job runs on: one that is there, or a local one made for the job."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from raytune_lora.config.schema import ClusterConfig, RunConfig
from raytune_lora.errors import UserError

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
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
def connected(cfg: ClusterConfig) -> Iterator[None]:
    """Connect to the cluster for the time of a job; a local one is stopped afterwards.

    Raises:
        UserError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = _address(cfg)
    if address is None:
        ray.init(
            address="local",
            num_cpus=int(local_node().cpus),
            num_gpus=int(local_node().gpus),
            object_store_memory=cfg.object_store_mb * 2**20,
            include_dashboard=cfg.dashboard,
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
            )
        except ConnectionError as error:
            raise UserError(f"cluster.address: no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def placement_problems(cfg: RunConfig, nodes: list[Node], *, concurrent: int = 1) -> list[str]:
    """Whether the machines can ever hold ``concurrent`` trials at once."""
    cpus, gpus = cfg.cpus_per_worker, cfg.gpus_per_worker
    if gpus and not any(node.gpus for node in nodes):
        return [f"gpus_per_worker={gpus}: this machine has no GPU; set gpus_per_worker=0 to train on the CPU"]
    room = sum(_fits(node, cpus, gpus) for node in nodes)
    wanted = cfg.workers * concurrent
    if room >= wanted:
        return []
    offer = " + ".join(f"{node.cpus:g} CPUs" + (f" and {node.gpus:g} GPUs" if gpus else "") for node in nodes)
    what = f"workers={cfg.workers}" + (f" in each of search.concurrent={concurrent} trials" if concurrent > 1 else "")
    each = f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
    return [f"{what} with {each} each do not fit: the cluster has {offer}, enough for {room}; ask for fewer"]


def nodes(cfg: ClusterConfig) -> list[Node]:
    """The machines of the cluster that the config names; of the local one without starting it."""
    if not ray.is_initialized() and _address(cfg) is None:
        return [local_node()]
    with connected(cfg):
        alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
        return [Node(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in alive]


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
