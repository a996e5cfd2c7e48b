"""What runs first on a node: it says what the node has and sees, and has a worker join its group.

It is sent there by value, as the node may have another version of this package, or none; so it uses nothing of it. The
libraries that its functions import are those of the node: neither the driver nor a group's controller needs torch,
which would cost 1.6 s and 190 MB of each.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "peft")  # beside this one, what decides how a trial trains


def versions() -> dict[str, str]:
    """Of this package, with a digest of its source, of Python and of what decides how a trial trains.

    Builds of one version for CPU and GPU (``2.13.0+cu130``) count as the same.
    """
    found = {"raytune-lora": _own(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def disagreement(node: str, there: dict[str, str], here: dict[str, str]) -> str | None:
    """What a node has of other versions than the driver; None where all are the same."""
    differing = [name for name in here if here[name] != there.get(name)]
    if not differing:
        return None
    pairs = ", ".join(f"{name} {there.get(name)} (the driver has {here[name]})" for name in differing)
    return f"the node {node} has {pairs}; give all nodes the same image, or the same installation"


def join(address: str, port: int, rank: int, workers: int, backend: str) -> None:
    """Join torch's process group, as with Ray Train's own ``TorchConfig``.

    Over gloo train workers without a GPU. The machine may have some all the same: they are hidden, as torch, accelerate
    and DeepSpeed would each take one by themselves.
    """
    if backend == "gloo":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    from ray.train.torch import config

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, workers, "env://")


def leave(several: bool) -> None:
    """Leave it, where there are others in it."""
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=several)


@contextmanager
def on_its_device() -> Iterator[None]:
    """In which a worker trains."""
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def work(config: dict[str, Any]) -> None:
    """Be a worker of a group, on a node that may have joined after all were asked.

    Args:
        config: ``versions`` and ``node`` of the driver, and ``marks``: files that it has written, with their content;
            ``function``, by its module and name, and its own ``config``, whose ``board`` hears of a node that will not
            do.

    Raises:
        RuntimeError: the node is another one than the driver's, and has other versions or other storage, or has it no
            more where the function fails.
    """
    import ray

    node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
    other, place = node != config["node"], config["config"]
    if other and (found := disagreement(address, versions(), config["versions"]) or _blind(address, config["marks"])):
        ray.get(place["board"].leave_out.remote(node, place["group"], found))
        raise RuntimeError(found)
    module, name = config["function"]
    try:
        getattr(importlib.import_module(module), name)(place)
    except Exception as error:  # it may be that the node has lost its storage since, which is no fault of the task
        if other and (found := _blind(address, config["marks"])):
            ray.get(place["board"].leave_out.remote(node, place["group"], found))
            raise RuntimeError(found) from error
        raise


def _blind(node: str, marks: list[tuple[str, str]]) -> str | None:
    unseen = [path for path, content in marks if not _seen(Path(path), content)]
    if not unseen:
        return None
    return (
        f"the node {node} does not see {unseen[0]} as the driver wrote it; mount the storage that all other nodes share"
    )


def look(marks: list[tuple[str, str]]) -> tuple[dict[str, str], dict[str, bool]]:
    """The versions here, and whether each file is seen with its content."""
    return versions(), {path: _seen(Path(path), content) for path, content in marks}


def _seen(path: Path, content: str) -> bool:
    for wait in (0.0, 0.5, 1.0, 2.0):  # NFS may remember for a moment that a file was not there
        time.sleep(wait)
        try:
            if path.read_text() == content:
                return True
        except OSError:
            continue
    return False


def _own() -> str:
    spec = importlib.util.find_spec("raytune_lora")
    if spec is None or spec.origin is None:
        return "not installed"
    root, digest = Path(spec.origin).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    version = re.search(r'^__version__ = "(.*)"', Path(spec.origin).read_text(), re.MULTILINE)
    return f"{version[1] if version else 'of no version'} (source {digest.hexdigest()[:8]})"
