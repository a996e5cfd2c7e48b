"""What a node has and sees. It is sent to nodes that may not have this package, or an old one, and stands alone."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import platform
import re
import time
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


def agreed(config: dict[str, Any]) -> None:
    """Be a worker of a group, on a node that may have joined after all were asked.

    Args:
        config: ``versions``, of the driver; ``function``, by its module and name, and its own ``config``.

    Raises:
        RuntimeError: the node has other versions than the driver.
    """
    from ray.util import get_node_ip_address

    if (found := disagreement(get_node_ip_address(), versions(), config["versions"])) is not None:
        raise RuntimeError(found)
    module, name = config["function"]
    getattr(importlib.import_module(module), name)(config["config"])


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
