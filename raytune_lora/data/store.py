"""The token store: a data set checked, split, tokenized and masked once, memory-mapped by every trial.

It is addressed by a fingerprint of all it depends on, and lies in the cache.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.artifacts import fingerprint, read_manifest, write_json
from raytune_lora.cache import Cache
from raytune_lora.config.data import DataConfig
from raytune_lora.data.build import REPORT, VERSION, survey
from raytune_lora.data.sources import sources
from raytune_lora.errors import UserError

_TOKENS = "tokens"  # in the cache
_PLACES = ("kind", "path", "validation_path", "test_path", "mix", "benchmarks", "processes")  # stood for by contents


@dataclass(frozen=True)
class TokenStore:
    """A whole store on a disk of this node, or on one that all nodes share."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each split."""
        return dict(self.manifest["rows"])

    def here(self, cache: Cache) -> TokenStore:
        """The store on the node that asks, brought there first where the cache is an object store.

        Raises:
            StorageError: it cannot be brought.
        """
        return replace(self, folder=cache.fetch(f"{_TOKENS}/{self.folder.name}")) if cache.uri else self

    def split(self, name: str) -> Any:
        """One split as a memory-mapped ``datasets.Dataset``.

        Its columns: input_ids, labels (``IGNORED`` where a token is not trained), prompt_length (tokens before the last
        answer) and answer (its text).
        """
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / f"{name}.arrow"))

    def lengths(self, name: str) -> NDArray[np.int64]:
        """Tokens of each row of a split, (N,)."""
        return row_lengths(self.split(name))


def row_lengths(split: Any) -> NDArray[np.int64]:
    """Tokens of each row of a split as ``TokenStore.split`` gives it, (N,)."""
    import pyarrow.compute as pc

    lengths: NDArray[np.int64] = pc.list_value_length(split.data.column("input_ids")).to_numpy()
    return lengths.astype(np.int64)


def prepare(cfg: DataConfig, tokenizer: Any, tokenizer_id: str, cache: Cache) -> TokenStore:
    """Write the store, or find it.

    Args:
        cfg: the data set.
        tokenizer: of the base model.
        tokenizer_id: stands for the tokenizer in the store's address.
        cache: for stores.

    Raises:
        UserError: a source is missing, no row is left, a split has no row, or a gate of ``data.quality`` is closed.
        StorageError: the cache's object store refuses or does not answer.
    """
    found = sources(cfg)
    contents = [[source.role, source.identity()] for source in found]
    name = fingerprint(VERSION, contents, settings(cfg), tokenizer_id)

    def build(work: Path) -> dict[str, Any]:
        report = survey(cfg, found, tokenizer, work)
        shutil.rmtree(work / "parts")
        write_json(work / REPORT, report)
        return {"fingerprint": name, "rows": report["rows"]["splits"], "tokens": report["tokens"]}

    try:
        folder = cache.build_once(f"{_TOKENS}/{name}", build)
        cache.publish(folder)
        return TokenStore(folder, read_manifest(folder) or {})
    except OSError as error:
        raise UserError(
            f"cache: the token store cannot be written to {cache.folder / _TOKENS} ({error.strerror or error}); make "
            "room, or name another folder (cache=…)"
        ) from error


def settings(cfg: DataConfig) -> dict[str, Any]:
    """All of a data set's config that its rows' contents do not stand for."""
    from raytune_lora.config.compose import to_plain

    plain: dict[str, Any] = to_plain(cfg)
    mix = {name: {key: value for key, value in one.items() if key != "path"} for name, one in plain["mix"].items()}
    return {name: value for name, value in plain.items() if name not in _PLACES} | {"mix": mix}
