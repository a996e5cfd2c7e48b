"""Where what is made once is kept: a folder that all nodes share, or an object store with a folder on each node."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_lora import storage
from raytune_lora.artifacts import build_once


@dataclass(frozen=True)
class Cache:
    """Artifacts by name, such as ``tokens/<fingerprint>``."""

    folder: Path  # of this node; shared by all nodes, where there is no store
    uri: str | None = None  # of the object store
    patience: storage.Patience = storage.PATIENT

    @classmethod
    def of(cls, cache: str, node_cache: str) -> Cache:
        """The cache of a config's two keys, on this node."""
        local = storage.local_path(cache)
        return cls(local) if local is not None else cls(Path(node_cache).expanduser().absolute(), cache)

    def build_once(self, name: str, build: Callable[[Path], dict[str, Any]]) -> Path:
        """The artifact's folder here, after bringing it or building it where it is missing or damaged.

        Args:
            name: of the artifact.
            build: as for ``artifacts.build_once``.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        build_once(self.folder / name, lambda work: self._brought(name, work) or build(work))
        return self.folder / name

    def fetch(self, name: str) -> Path:
        """The artifact's folder here, after bringing it where it is missing or damaged; one process of a node does.

        Raises:
            StorageError: it is not in the store, or the store refuses or does not answer.
        """
        if self.uri is not None:
            storage.download(storage.join(self.uri, name), self.folder / name, self.patience)
        return self.folder / name

    def publish(self, folder: Path) -> None:
        """Let the other nodes have what is in a folder of this cache, if they do not yet.

        A name stands for its content, so that what is whole there is not sent again; a folder elsewhere is left alone.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        if self.uri is None or not folder.is_relative_to(self.folder):
            return
        uri = storage.join(self.uri, folder.relative_to(self.folder).as_posix())
        if storage.whole(uri, self.patience) is None:
            storage.upload(folder, uri, self.patience)

    def _brought(self, name: str, work: Path) -> dict[str, Any] | None:
        """The manifest, where the store has the artifact; what is damaged there is removed, to be made anew."""
        if self.uri is None:
            return None
        uri = storage.join(self.uri, name)
        try:
            return storage.fetch(uri, work, self.patience)
        except storage.Damaged:
            storage.delete(uri, self.patience)
        except storage.NotWhole:  # yet: another node may be sending it
            pass
        for entry in work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return None
