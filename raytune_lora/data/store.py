"""The token store: a data set split, tokenized and masked once, memory-mapped by every trial.

It is addressed by a fingerprint of all it depends on, and lies in the cache folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytune_lora.artifacts import build_once, fingerprint
from raytune_lora.config.schema import DataConfig
from raytune_lora.data.sources import read_rows, source_identity
from raytune_lora.data.templates import TEMPLATES, Row
from raytune_lora.errors import UserError

VERSION = 1  # of what ``_encode`` and ``split_of`` do: a change of theirs makes older stores stale
SPLITS = ("train", "validation", "test")
IGNORED = -100  # the label of a token that is not trained, as torch's cross entropy has it


class Tokenizer(Protocol):
    """What the store needs of a transformers tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class TokenStore:
    """A whole store on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each split."""
        return dict(self.manifest["rows"])

    def split(self, name: str) -> Any:
        """One split as a memory-mapped ``datasets.Dataset``: input_ids, labels, prompt, answer."""
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / name))


def prepare(cfg: DataConfig, tokenizer: Tokenizer, tokenizer_id: str, cache: Path) -> TokenStore:
    """Write the store, or find it.

    Args:
        cfg: the data set.
        tokenizer: of the base model.
        tokenizer_id: stands for the tokenizer in the store's address.
        cache: folder for stores.

    Raises:
        UserError: the data has malformed rows, no rows, or a split without rows.
    """
    settings = [cfg.template, cfg.max_length, cfg.validation, cfg.test]
    name = fingerprint(VERSION, source_identity(cfg), settings, tokenizer_id)
    folder = cache / "tokens" / name
    manifest = build_once(folder, lambda work: _write(work, cfg, tokenizer, name))
    return TokenStore(folder, manifest)


def split_of(row: Row, validation: float, test: float) -> str:
    """The split a row belongs to: a function of its text alone, so that adding rows moves none."""
    digest = hashlib.sha256(f"{row.instruction}\x00{row.input}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"


def _write(work: Path, cfg: DataConfig, tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    from datasets import Dataset

    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    dropped = 0
    for row in read_rows(cfg):
        encoded = _encode(row, cfg, tokenizer)
        if encoded is None:
            dropped += 1
        else:
            splits[split_of(row, cfg.validation, cfg.test)].append(encoded)
    _check(cfg, splits, dropped)
    for split, rows in splits.items():
        if rows:
            Dataset.from_list(rows).save_to_disk(str(work / split))
    tokens = {split: sum(len(row["input_ids"]) for row in rows) for split, rows in splits.items()}
    counts = {split: len(rows) for split, rows in splits.items()}
    return {"fingerprint": name, "rows": counts, "tokens": tokens, "dropped_too_long": dropped}


def _encode(row: Row, cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Token ids and labels; None where the row is longer than ``max_length``.

    Prompt and answer are tokenized apart, so that the prompt's ids are the same as when the model later answers it. The
    end-of-sequence token is appended to the answer and trained.
    """
    prompt = TEMPLATES[cfg.template](row)
    prompt_ids = list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids.pop()
    answer_ids = [*tokenizer(row.output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(prompt_ids) + len(answer_ids) > cfg.max_length:
        return None
    return {
        "input_ids": prompt_ids + answer_ids,
        "labels": [IGNORED] * len(prompt_ids) + answer_ids,
        "prompt": prompt,
        "answer": row.output,
    }


def _check(cfg: DataConfig, splits: dict[str, list[dict[str, Any]]], dropped: int) -> None:
    counts = {split: len(rows) for split, rows in splits.items()}
    if not counts["train"]:
        long = f"; {dropped} rows are longer than data.max_length={cfg.max_length} tokens" if dropped else ""
        raise UserError(f"data: no row is left to train on (rows: {counts}{long})")
    for split, share in (("validation", cfg.validation), ("test", cfg.test)):
        if share > 0 and not counts[split]:
            raise UserError(
                f"data.{split}={share} leaves no row in the {split} split (rows: {counts}): add rows or raise the share"
            )
