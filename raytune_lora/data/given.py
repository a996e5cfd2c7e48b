"""Splits that data gives itself: by names of its files and folders, keys of a JSON object, or a column of its rows.

The words are those of the ``datasets`` library, so that a folder that ``load_dataset`` divides is divided alike here,
and others that say the same, so that no test rows are trained on.
"""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from raytune_lora.config.typed import typed
from raytune_lora.data import files
from raytune_lora.data.json_stream import LISTS, list_keys, two_lists
from raytune_lora.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SAID = (None, TRAIN, VALIDATION, TEST)  # what a row's column may say; None: no split
_WORDS = {
    TRAIN: ("train", "training", "훈련", "학습"),
    VALIDATION: ("validation", "valid", "val", "dev", "validate", "devel", "development", "검증"),
    TEST: ("test", "testing", "eval", "evaluation", "tests", "evals", "heldout", "holdout", "테스트", "시험", "평가"),
}
_SPLIT_OF = {
    word + ending: split
    for split, words in _WORDS.items()
    for word in words
    for ending in ("", "set", "data", "용", "셋", "세트", "데이터")
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[가-힣]+")
_HELD_OUT = re.compile(r"(?<![a-z])h[eo]ld[-_ ]?out", re.IGNORECASE)
_LONGEST = 40  # characters of a split's name in a column; a text is none
_SHOWN = 4  # files that a message names


@dataclass(frozen=True)
class Piece:
    """A file, or the lists of rows that some keys of a JSON file hold."""

    file: str
    label: str  # its name, with the folders that the user has not spelled out
    keys: tuple[str, ...] | None = None  # None: all of the file
    stray: tuple[str, ...] = ()  # keys of lists that are of no use, whose items are counted with this piece

    @property
    def name(self) -> str:
        """The label with the keys."""
        return self.label + (f" [{', '.join(self.keys)}]" if self.keys else "")


Pieces = dict[str | None, list[Piece]]  # by split; None: of no named one


def split_named(name: str) -> str | None:
    """The split that a name says (``train-00000-of-00002``, ``dev``, ``test_sft``); None for none or several."""
    name = unicodedata.normalize("NFC", _HELD_OUT.sub("_heldout", name))
    found = {split for word in _WORD.findall(name) if (split := _SPLIT_OF.get(word.lower()))}
    return found.pop() if len(found) == 1 else None


def split_said(value: Any) -> int:
    """What a row's column says, as an index of ``SAID``."""
    return SAID.index(split_named(value) if isinstance(value, str) and len(value) <= _LONGEST else None)


def pieces(path: str, but: Collection[str] = ()) -> Pieces:
    """What a path means, by the split that each file's name, else its folder's below the path, or a JSON key says.

    Args:
        path: as for ``files.expand``.
        but: files, by their real paths, that a folder or pattern does not mean.

    Raises:
        UserError: as ``files.expand``; or a file cannot be read.
    """
    found: Pieces = {}
    expanded = files.expand(path)
    kept = [file for file in expanded if os.path.realpath(file) not in but]
    for file in kept or expanded:
        label = os.path.basename(file) if file == os.path.expanduser(path) else _below(path, file)
        split = next((split for name in _names(label) if (split := split_named(name))), None) if label else None
        keyed = list(_by_key(file, label))
        by_file = split if len(keyed) == 1 else None
        for of_key, piece in keyed:
            found.setdefault(of_key or by_file, []).append(piece)
    return found


def divided(key: str, path: str, but: Collection[str] = ()) -> dict[str, list[Piece]]:
    """The pieces of each split that a path gives: under ``TRAIN`` what no split's name says, where nothing else is.

    Where only one split is named, that is what the user has named: all of it is under ``TRAIN``.

    Raises:
        UserError: which split a file is for cannot be told, or there is nothing to train on.
    """
    found = pieces(path, but)
    held = [split for split in (VALIDATION, TEST) if split in found]
    if not held or len(found) == 1:
        return {TRAIN: sorted((piece for some in found.values() for piece in some), key=lambda piece: piece.file)}
    if TRAIN in found and None in found:
        raise UserError(
            f"{key}: {path} holds {_listed(found)}, and of what split {_named(found[None])} is does not show; give "
            f"it a name with train, validation or test in it, move it away, or name the files by {_keys(key)}"
        )
    if TRAIN not in found and None not in found:
        raise UserError(
            f"{key}: {path} holds {_listed(found)}, and nothing to train on; name the training rows' files here, and "
            f"these by {_keys('data.path')}"
        )
    return {TRAIN: found.get(TRAIN, found.get(None, []))} | {split: found[split] for split in held}


def undivided(key: str, path: str, *, any_split: bool = False) -> list[Piece]:
    """The pieces of a path that stands for one purpose.

    Args:
        key: that names the path.
        path: as for ``files.expand``.
        any_split: whether rows of several splits may be meant.

    Raises:
        UserError: it gives several splits.
    """
    found = pieces(path)
    if len(found) > 1 and not any_split:
        raise UserError(
            f"{key}: {path} holds {_listed(found)}; name what is meant (a file, or a pattern that leaves the rest out)"
        )
    return [piece for some in found.values() for piece in some]


def column_refused(role: str, name: str, column: str, held: Sequence[str], without: str | None) -> str:
    """What is said of rows of which a column says a split for some.

    Args:
        role: of their source.
        name: of their source.
        column: its name.
        held: splits that are not for training and that it says.
        without: where the first row stands of which it says no split; None where it says one of all.
    """
    what = f"{name}: {column!r} says {' and '.join(held)} of some rows"
    ignored = "data.split_column=null takes all rows alike, data.split_column=<another> the splits of another column"
    if not role.startswith("mix."):
        what += f", and no split of others (the first at {without})" if without else ", and train of none"
        return f"data.path: {what}; write train, validation or test into each row, or {ignored}"
    return f"data.{role}.path: {what}; name a file of the rows to mix in alone, or {ignored}"


def column_twice(name: str, column: str, twice: Sequence[tuple[str, str]]) -> str:
    """What is said where a column and files of their own both give splits.

    Args:
        name: of the rows to train on.
        column: its name.
        twice: the splits, each with the name of its rows' own source.
    """
    splits, others = " and ".join(split for split, _ in twice), " and ".join(other for _, other in twice)
    return (
        f"data.path: {name} holds {splits} rows, as {column!r} says, beside those of {others}; leave those out to take "
        "these, or set data.split_column=null to train on all rows of data.path"
    )


def other_column(name: str, column: str, held: Sequence[str]) -> str:
    """What is said where a column that is not the one of splits says splits."""
    return (
        f"data.path: {column!r} says train of some rows of {name}, and {' and '.join(held)} of others: "
        f"{typed('data.split_column', column)} uses them so, data.split_column=null takes all rows alike"
    )


def _listed(found: Pieces) -> str:
    return ", ".join(f"{_named(some)} ({split or 'no split'})" for split, some in found.items())


def _named(some: Sequence[Piece]) -> str:
    return ", ".join(names(some))


def names(some: Sequence[Piece]) -> list[str]:
    """The first few names of files, and how many more there are."""
    shown = [piece.name for piece in some[:_SHOWN]]
    return [*shown, f"{len(some) - _SHOWN} more"] if len(some) > _SHOWN else shown


def _keys(key: str) -> str:
    return " and ".join(name for name in ("data.path", "data.validation_path", "data.test_path") if name != key)


def _names(label: str) -> list[str]:
    """What may say a file's split: its name without suffixes, then its folders', the nearest first."""
    *folders, name = PurePosixPath(label).parts
    return [name.partition(".")[0], *reversed(folders)]


def _below(path: str, file: str) -> str:
    """The part of a file's name that a folder or pattern does not spell out, from the last folder on."""
    spelled = re.split(r"[*?\[]", path)[0].rpartition("/")[0] if glob.has_magic(path) else path
    parts = PurePosixPath(file).parts
    known = len(PurePosixPath(os.path.expanduser(spelled)).parts)
    return "/".join(parts[min(known, len(parts) - 1) :])


def _holds_rows(key: str) -> bool:
    return key in LISTS or split_named(key) is not None


def _by_key(file: str, label: str) -> list[tuple[str | None, Piece]]:
    """The file whole, or its lists of rows by the split that their keys name.

    Raises:
        UserError: it holds two lists of rows that are not of different splits.
    """
    found = list_keys(file, _holds_rows) if files.suffixes(file)[0] == ".json" else []
    known = {key: split for key in found if (split := split_named(key)) or key in LISTS}
    if not known or found == [key for key in LISTS if key in found][:1]:
        return [(None, Piece(file, label))]
    if None in known.values() and len(alike := [key for key in known if known[key] in (None, TRAIN)]) > 1:
        raise UserError(two_lists(file, alike))
    stray = tuple(dict.fromkeys(key for key in found if key not in known))
    by_split = {split: tuple(key for key in known if known[key] == split) for split in known.values()}
    first = TRAIN if TRAIN in by_split else next(iter(by_split))
    return [(split, Piece(file, label, keys, stray if split == first else ())) for split, keys in by_split.items()]
