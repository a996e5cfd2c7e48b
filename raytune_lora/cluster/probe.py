"""What a node has and sees. It is sent to nodes that may not have this package, and needs nothing but Python."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
import time
from importlib import metadata
from pathlib import Path

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
