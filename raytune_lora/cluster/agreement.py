"""Whether the nodes of a cluster are alike where a sweep needs them to be: the same programs, the same storage.

Each node that could hold a worker is asked before anything starts. On one that joins later the workers ask themselves
(``training.entry.work``).
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_lora.config.schema import RunConfig
from raytune_lora.training import entry

_SECONDS = 120.0  # until a node has started a process and answered


def disagreements(cfg: RunConfig, folders: dict[str, Path]) -> list[str]:
    """What the nodes of the connected cluster do not share with the driver.

    Args:
        cfg: says what a node must have to hold a worker.
        folders: by config key, those that every worker reads or writes.
    """
    mine = ray.get_runtime_context().get_node_id()
    others = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != mine and _holds_a_worker(node["Resources"], cfg)
    ]
    with contextlib.ExitStack() as held:
        marks = {key: held.enter_context(_mark(path)) for key, path in folders.items()}
        answers = _ask(others, list(marks.values()))
    here = entry.versions()
    found = [f"the node {ip} does not answer" for ip, answer in answers if answer is None]
    told = [(ip, answer) for ip, answer in answers if answer is not None]
    for ip, (there, _) in told:
        if (differing := entry.disagreement(ip, there, here)) is not None:
            found.append(differing)
    for key, path in folders.items():
        blind = [ip for ip, (_, seen) in told if not seen[str(marks[key][0])]]
        if blind:
            found.append(
                f"{key}: {path} is not one folder on all nodes of the cluster: what the driver writes there is not "
                f"seen on {', '.join(blind)}; name one on storage that all nodes share (NFS, a ReadWriteMany volume)"
            )
    return found


def _holds_a_worker(resources: dict[str, float], cfg: RunConfig) -> bool:
    return resources.get("CPU", 0) >= cfg.cpus_per_worker and resources.get("GPU", 0) >= cfg.gpus_per_worker


@contextlib.contextmanager
def _mark(folder: Path) -> Iterator[tuple[Path, str]]:
    """A file in a folder, or in the nearest one above it that is there, and what is in it, for a while."""
    while not folder.is_dir():
        folder = folder.parent
    content = secrets.token_hex(8)
    with tempfile.NamedTemporaryFile("w", prefix=".seen-by-all-", dir=folder) as file:
        file.write(content)
        file.flush()
        Path(file.name).chmod(0o644)
        yield Path(file.name), content


def _ask(nodes: Sequence[dict[str, Any]], marks: list[tuple[Path, str]]) -> list[tuple[str, Any]]:
    """By the address of each node what it has and sees; None of one that does not answer, and none that has gone."""
    cloudpickle.register_pickle_by_value(entry)  # a node may have another version of this package, or none
    ask = ray.remote(num_cpus=0, max_retries=0)(entry.look)
    wanted = [(str(path), content) for path, content in marks]
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[ask.options(scheduling_strategy=there).remote(wanted)] = node
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS) if asked else ([], [])
    answers = {}
    for ref in ready:
        with contextlib.suppress(RayError):
            answers[ref] = ray.get(ref)
    left = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [(node["NodeManagerAddress"], answers.get(ref)) for ref, node in asked.items() if node["NodeID"] in left]
