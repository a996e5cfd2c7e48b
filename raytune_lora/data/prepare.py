"""A data set checked, split, tokenized and masked once, into the token store all trials read.

The store is addressed by a fingerprint of all it depends on, by content and not by name, and lies in the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from raytune_lora.artifacts import content_digest, fingerprint, read_manifest, write_json
from raytune_lora.cache import Cache
from raytune_lora.config.data import DataConfig
from raytune_lora.data.build import REPORT, VERSION, survey
from raytune_lora.data.harmful import PACKAGED
from raytune_lora.data.sources import sources
from raytune_lora.data.splits import SPLITS
from raytune_lora.data.store import TOKENS, TokenStore
from raytune_lora.data.trained_template import write_template
from raytune_lora.errors import UserError

_PLACES = ("kind", "path", "validation_path", "test_path", "mix", "benchmarks", "processes")  # stood for by contents
_PACKAGES = ("transformers", "tokenizers", "jinja2")  # whose versions decide on tokens


def prepare(cfg: DataConfig, tokenizer: Callable[[], Any], tokenizer_id: str, cache: Cache) -> TokenStore:
    """Write the store, or find it.

    Args:
        cfg: the data set.
        tokenizer: gives that of the base model; asked where the store is missing.
        tokenizer_id: stands for the tokenizer in the store's address.
        cache: for stores.

    Raises:
        UserError: a source is missing, no row is left, a split has no row, or a gate of ``data.quality`` is closed.
        StorageError: the cache's object store refuses or does not answer.
    """
    found = sources(cfg)
    inputs = {
        "rows": fingerprint([[source.role, source.identity()] for source in found]),
        "settings": fingerprint(VERSION, settings(cfg)),
        "tokenizer": tokenizer_id,
        "packages": ", ".join(f"{package} {metadata.version(package)}" for package in _PACKAGES),
    }
    name = fingerprint(inputs)

    def build(work: Path) -> dict[str, Any]:
        known = tokenizer()
        report = survey(cfg, found, known, work)
        largest = max(report["largest_id"], known.pad_token_id)  # what fills short rows is looked up as well
        write_template(cfg.template, known, work)
        shutil.rmtree(work / "parts")
        write_json(work / REPORT, report)
        return {
            "fingerprint": name,
            "inputs": inputs,
            "content": content_digest([work / f"{split}.arrow" for split in SPLITS]),
            "rows": report["rows"]["splits"],
            "tokens": report["tokens"],
            "stop_ids": report["stop_ids"],
            "largest_id": largest,
            "largest_token": known.convert_ids_to_tokens(largest),
        }

    try:
        folder = cache.build_once(f"{TOKENS}/{name}", build)
        cache.publish(folder)
        return TokenStore(folder, read_manifest(folder) or {})
    except OSError as error:
        raise UserError(
            f"cache: the token store cannot be written to {cache.folder / TOKENS} ({error.strerror or error}); make "
            "room, or name another folder (cache=…)"
        ) from error


def settings(cfg: DataConfig) -> dict[str, Any]:
    """All of a data set's config that its rows' contents do not stand for; of files that it names, the content."""
    from raytune_lora.config.plain import to_plain

    plain: dict[str, Any] = to_plain(cfg)
    mix = {name: {key: value for key, value in one.items() if key != "path"} for name, one in plain["mix"].items()}
    template, words = cfg.template.chat_template, cfg.quality.harmful_words
    if template is not None:
        plain["template"]["chat_template"] = content_digest([Path(template).expanduser()])
    plain["quality"]["harmful_words"] = content_digest([Path(words).expanduser() if words is not None else PACKAGED])
    return {name: value for name, value in plain.items() if name not in _PLACES} | {"mix": mix}
