"""The token store: a data set checked, split, tokenized and masked once, memory-mapped by every trial.

``prepare`` writes it. Processes that only read one import this module alone: what prepares data takes long to import.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.cache import Cache

TOKENS = "tokens"  # in the cache


@dataclass(frozen=True)
class TokenStore:
    """A whole store on a disk of this node, or on one that all nodes share."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each split."""
        return dict(self.manifest["rows"])

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that the rows train as the end of an answer."""
        return list(self.manifest["stop_ids"])

    def here(self, cache: Cache) -> TokenStore:
        """The store on the node that asks, brought there first where the cache is an object store.

        Raises:
            StorageError: it cannot be brought.
        """
        return replace(self, folder=cache.fetch(f"{TOKENS}/{self.folder.name}")) if cache.uri else self

    def split(self, name: str) -> Any:
        """One split as a memory-mapped ``datasets.Dataset``.

        Its columns: input_ids, labels (``IGNORED`` where a token is not trained), prompt_length (tokens before the last
        answer), answer (the text that the model is to write there, as it is trained, without its end) and answer_length
        (its tokens, without the end). The last two are null where there is nothing to compare an answer with: the
        answer was cut, its whole prompt was, or there is none.
        """
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / f"{name}.arrow"))

    def answered(self, rows: int) -> Any:
        """The first test rows that have an answer to compare, at most ``rows``."""
        split = self.split("test")
        comparable: NDArray[np.int64] = np.flatnonzero(split.data.column("answer").is_valid().to_numpy())
        return split.select(comparable[:rows])

    def lengths(self, name: str) -> NDArray[np.int64]:
        """Tokens of each row of a split, (N,)."""
        return row_lengths(self.split(name))


def row_lengths(split: Any) -> NDArray[np.int64]:
    """Tokens of each row of a split as ``TokenStore.split`` gives it, (N,)."""
    import pyarrow.compute as pc

    lengths: NDArray[np.int64] = pc.list_value_length(split.data.column("input_ids")).to_numpy()
    return lengths.astype(np.int64)
