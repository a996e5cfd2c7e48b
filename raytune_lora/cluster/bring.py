"""The results of a sweep, brought from the cluster's storage to a machine that cannot see it.

The dashboard gives away nothing but logs. So a small job packs the files and prints them, in base64 and with a digest,
and this machine reads its log. That is meant for reports and adapters: hundreds of megabytes, not models. What is in
an object store is read from there, with this machine's own rights.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

from raytune_lora import storage
from raytune_lora.cluster.submit import Cluster
from raytune_lora.errors import StorageError, UserError
from raytune_lora.names import inside
from raytune_lora.working_copy import WorkingCopy

LIMIT = 200  # megabytes
_MARK = "raytune-lora results"

# It runs where this package need not be installed. Small files come first, so that a big adapter alone is left out.
_SENDER = """
import base64, hashlib, io, json, pathlib, sys, tarfile
root, limit, mark = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
wanted = [root / "report.html", root / "results.json", root / "data_report.json", *sorted((root / "best").rglob("*"))]
files = sorted((p for p in wanted if p.is_file()), key=lambda p: p.stat().st_size)
packed, left, size = io.BytesIO(), [], 0
with tarfile.open(fileobj=packed, mode="w") as archive:
    for path in files:
        size += path.stat().st_size
        if size <= limit:
            archive.add(path, str(path.relative_to(root)))
        else:
            left.append([str(path.relative_to(root)), path.stat().st_size])
data = packed.getvalue()
print()
print(mark, json.dumps({"files": len(files), "sha256": hashlib.sha256(data).hexdigest(), "left_out": left}))
for at in range(0, len(data), 49152):
    print(base64.b64encode(data[at : at + 49152]).decode())
print(mark, "end")
"""


def bring(cluster: Cluster, name: str, facts: dict[str, Any], target: Path, limit: int = LIMIT) -> list[str]:
    """Fetch the report, the results and the best adapter of a sweep.

    Args:
        cluster: that it ran on.
        name: of the sweep.
        facts: of its job: ``output`` and ``resource``.
        target: folder for them; it is new.
        limit: megabytes of all files; the biggest stay where they are beyond it.

    Returns:
        The files that were too big, in words.

    Raises:
        UserError: there are no results, or they did not arrive whole.
    """
    if storage.local_path(facts["output"]) is None:
        _bring_from_store(facts["output"], name, target)
        return []
    arguments = [facts["output"], str(limit * 10**6), _MARK]
    command = shlex.join(["python", "-c", _SENDER.strip(), *arguments])
    log = cluster.run(f"results-of-{name}", command, facts["resource"])
    said, data = received(log)
    if not said["files"]:
        raise UserError(f"{facts['output']} on the cluster holds no results of {name}")
    unpack(data, target)
    return [f"{file} ({size / 1e6:.0f} MB)" for file, size in said["left_out"]]


def unpack(data: bytes, target: Path) -> None:
    """Write the files of an archive, and nothing else that it holds, to a new folder.

    Raises:
        UserError: a file would lie outside of the folder; none is written then.
    """
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {inside(target, entry.name, "the results"): entry for entry in archive if entry.isfile()}
        target.mkdir(parents=True)
        for path, entry in files.items():
            content = archive.extractfile(entry)
            assert content is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


def _bring_from_store(uri: str, name: str, target: Path) -> None:
    try:
        WorkingCopy(target, uri).bring("report.html", "results.json", "data_report.json", "best/*")
    except StorageError as error:
        raise UserError(f"the results of {name} are in the store, and cannot be read from here: {error}") from error
    if not target.exists():
        raise UserError(f"{uri} holds no results of {name}")


def received(log: str) -> tuple[dict[str, Any], bytes]:
    """What a log carries: what the sender says of it, and the bytes.

    Raises:
        UserError: they are not whole.
    """
    lines = log.splitlines()
    marks = [number for number, line in enumerate(lines) if line.startswith(_MARK)]
    try:
        first, last = marks
        said: dict[str, Any] = json.loads(lines[first].removeprefix(_MARK))
        data = b"".join(base64.b64decode(line, validate=True) for line in lines[first + 1 : last])
        whole = hashlib.sha256(data).hexdigest() == said["sha256"]
    except (ValueError, binascii.Error):
        whole = False
    if not whole:
        raise UserError("the results did not arrive whole; fetch them again with --logs")
    return said, data
