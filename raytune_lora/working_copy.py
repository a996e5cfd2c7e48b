"""A folder here that stands for one in an object store.

The store is the truth between machines; what lies here is a copy to work on, and may be deleted at any time that nobody
works on it. Where all nodes share a folder there is no store, and each of these steps is nothing.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from raytune_lora import storage
from raytune_lora.artifacts import MANIFEST, build_once, fingerprint, folder_bytes, read_manifest, remove_folder
from raytune_lora.errors import StorageError
from raytune_lora.names import Outside, inside

_OUTPUTS = "outputs"  # in a node's cache
_AT_ONCE = 8  # files
# a name that is too long, or those of a file and of a folder at once
_NO_FILE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def as_trouble() -> Iterator[None]:
    """Let a store that cannot be worked with halt a job in order, as a full disk does.

    Raises:
        StorageError: of ``errors``, also where a name would lead out of its folder, or can be none here; what is not
            whole is told as it is.
    """
    try:
        yield
    except storage.NotWhole:
        raise
    except (storage.StorageError, Outside) as error:
        raise StorageError(str(error)) from error
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise StorageError(f"{error.filename}: a name in the store cannot be one here: {error.strerror}") from error


@dataclass(frozen=True)
class WorkingCopy:
    """A folder of this node, and the one in a store that it is a copy of."""

    path: Path
    uri: str | None = None

    @classmethod
    def of(cls, output: str, node_cache: str) -> WorkingCopy:
        """Of a sweep or run, on the node that asks.

        Args:
            output: its folder or URI.
            node_cache: folder of a node for copies.
        """
        if (local := storage.local_path(output)) is not None:
            return cls(local)
        uri = output.rstrip("/")
        name = f"{uri.rpartition('/')[2]}-{fingerprint(uri)}"
        return cls(Path(node_cache).expanduser().absolute() / _OUTPUTS / name, uri)

    @classmethod
    def at(cls, output: str | None, node_cache: str, folder: Path) -> WorkingCopy:
        """Of a folder within a sweep, on the node that asks.

        Args:
            output: the sweep's folder or URI; None: of the folder itself.
            node_cache: folder of a node for copies.
            folder: as another node has it, in a working copy of its own.
        """
        home = cls(folder) if output is None else cls.of(output, node_cache)
        if home.uri is None:
            return cls(folder)
        return home.within(*folder.parts[folder.parts.index(home.path.name) + 1 :])

    def within(self, *names: str) -> WorkingCopy:
        """Of a folder in this one."""
        return WorkingCopy(self.path.joinpath(*names), self.uri and storage.join(self.uri, *names))

    def name(self, path: Path) -> str:
        """What is in the folder, as other machines know it."""
        return str(path) if self.uri is None else storage.join(self.uri, path.relative_to(self.path).as_posix())

    # ---------------------------------------------------------------------------------------------------------- files

    def send(self, *paths: Path) -> None:
        """Have files, and all files in folders, in the store.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        if self.uri is None:
            return
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        with as_trouble(), ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(self._send, [file for file in files if file.is_file()]):
                pass

    def _send(self, file: Path) -> None:
        storage.write(self.name(file), file.read_bytes())

    def bring(self, *patterns: str, but: tuple[str, ...] = ()) -> None:
        """Have files of the store here that are missing, or of another size.

        Args:
            patterns: of their names from this folder on; ``*`` stands for slashes too.
            but: patterns of those that stay there.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        if self.uri is None:
            return
        with as_trouble(), ThreadPoolExecutor(_AT_ONCE) as pool:
            wanted = [
                name
                for name, size in storage.sizes(self.uri).items()
                if _matches(name, patterns) and not _matches(name, but) and _size(self._inside(name)) != size
            ]
            for _ in pool.map(self._bring, wanted):
                pass

    def _bring(self, name: str) -> None:
        content = storage.read(storage.join(str(self.uri), name))
        if content is not None:
            path = self._inside(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _inside(self, name: str) -> Path:
        """Where a name of the store lies here."""
        return inside(self.path, name, storage.shown(str(self.uri)))

    # -------------------------------------------------------------------------------------------------- whole folders

    def manifests(self, pattern: str) -> dict[str, dict[str, Any]]:
        """By name, in order, the manifests of the whole folders in this one; where there is a store, of those there.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        if self.uri is None:
            here = {path.name: read_manifest(path) for path in sorted(self.path.glob(pattern))}
            return {name: manifest for name, manifest in here.items() if manifest is not None}
        found = {}
        with as_trouble():
            sizes = storage.sizes(self.uri)
            for name in sorted({name.partition("/")[0] for name in sizes if fnmatch(name, f"{pattern}/{MANIFEST}")}):
                manifest = storage.manifest_of(storage.join(self.uri, name)) or {}
                sent = manifest.get("files", {}).items()
                if manifest and all(sizes.get(f"{name}/{file}") == size for file, size in sent):
                    found[name] = manifest
        return found

    def sizes(self, pattern: str) -> dict[str, int]:
        """Bytes of the folders in this one, by name, in order; where there is a store, of those there.

        Args:
            pattern: of their names from this folder on.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        if self.uri is None:
            paths = sorted(self.path.glob(pattern))
            return {path.relative_to(self.path).as_posix(): folder_bytes(path) for path in paths}
        found: dict[str, int] = {}
        with as_trouble():
            for name, size in storage.sizes(self.uri).items():
                folder = "/".join(name.split("/")[: pattern.count("/") + 1])
                if folder != name and fnmatch(folder, pattern):
                    found[folder] = found.get(folder, 0) + size
        return found

    def send_whole(self, name: str) -> None:
        """Have a whole folder in the store, its manifest last.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        if self.uri is not None:
            with as_trouble():
                storage.upload(self.path / name, storage.join(self.uri, name))

    def bring_whole(self, name: str) -> Path:
        """Have a whole folder of the store here, as it is there; one process of a node brings it.

        Raises:
            NotWhole: it is not there, or damaged.
            StorageError: the store refuses or does not answer.
        """
        if self.uri is None:
            return self.path / name
        uri = storage.join(self.uri, name)
        with as_trouble():
            folder = self._inside(name)
            there = storage.whole(uri)
            if there is None:
                raise storage.NotWhole(f"{storage.shown(uri)} is not there, or not whole")
            if (here := read_manifest(folder)) is not None and here != there:
                remove_folder(folder)
            build_once(folder, lambda work: {**storage.fetch(uri, work), **there})
        return folder

    def here(self, name: str) -> Path:
        """A whole folder by the name that other machines know, on this node.

        Raises:
            NotWhole: it is not there, or damaged.
            StorageError: the store refuses or does not answer.
        """
        if self.uri is None:
            return Path(name)
        if not name.startswith(f"{self.uri}/"):
            raise storage.NotWhole(f"{name} is not in {storage.shown(self.uri)}, which speaks of it")
        return self.bring_whole(name.removeprefix(f"{self.uri}/"))

    def remove(self, name: str) -> None:
        """Delete a folder, there and here.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        if self.uri is not None:
            with as_trouble():
                storage.delete(storage.join(self.uri, name))
        remove_folder(self.path / name)

    def clear(self, keep: tuple[str, ...]) -> None:
        """Delete all that is here but some names, where there is a store, which has what counts."""
        if self.uri is not None and self.path.is_dir():
            for entry in self.path.iterdir():
                if not _matches(entry.name, keep):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
