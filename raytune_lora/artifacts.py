"""Folders that are built once and shared: by processes at the same time, and by later runs.

A folder is whole when it holds ``manifest.json``, which is written last. It is built under another name and renamed, so
that an interrupted build is never taken for a whole one, and a lock beside it keeps two builders apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from raytune_lora.names import plain

MANIFEST = "manifest.json"
DIGESTS = "sha256"  # in a manifest, of checkpoints and in a store: of each file
_BLOCK = 2**20  # bytes read at once


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits that stand for values which ``json`` can write."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_digest(files: Sequence[Path]) -> str:
    """SHA-256 of files by content, in order. One that cannot be read counts as that: its own reader says why."""
    digest = hashlib.sha256()
    for file in files:
        one = hashlib.sha256()
        try:
            with file.open("rb") as content:
                while block := content.read(_BLOCK):
                    one.update(block)
        except OSError as error:
            one.update(str(error.errno).encode())
        digest.update(one.digest())
    return digest.hexdigest()


def build_once(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The folder's manifest, after building the folder if it is missing or damaged.

    Args:
        folder: where the artifact lies.
        build: fills the empty folder it is given and returns what the manifest shall say.

    Returns:
        What ``build`` returned, plus ``files``: the size in bytes of each file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (found := read_manifest(folder)) is not None:
        return found
    with FileLock(f"{folder}.lock"):
        if (found := read_manifest(folder)) is not None:
            return found
        for leftover in folder.parent.glob(f".{folder.name}.*.building"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".building", dir=folder.parent))
        try:
            manifest = build(work)
            for path in work.rglob("*"):  # writers of weights make them private; the cache is shared
                path.chmod(0o755 if path.is_dir() else 0o644)
            manifest["files"] = {
                str(path.relative_to(work)): path.stat().st_size for path in sorted(work.rglob("*")) if path.is_file()
            }
            write_json(work / MANIFEST, manifest)
            if folder.exists():
                shutil.rmtree(folder)
            work.chmod(0o755)
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole folder; None where it is missing, unreadable, or a file has another size than it says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not all(plain(name) for name in named(manifest)):
            return None
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if sizes == manifest["files"] else None


def named(manifest: dict[str, Any]) -> list[str]:
    """The names of all files that a manifest speaks of, as they are in it."""
    return list({**manifest["files"], **manifest.get(DIGESTS, {})})


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one, also after a power cut."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder so that nobody who looks for its name finds half of it."""
    doomed = folder.with_name(f".{folder.name}.removed")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
    except FileNotFoundError:  # another was faster
        return
    shutil.rmtree(doomed, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder, those that are deleted meanwhile aside."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total
