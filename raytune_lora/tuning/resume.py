"""Whether a job goes on with one that was interrupted, and what may have changed by then."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.typed import typed as as_typed
from raytune_lora.errors import UserError
from raytune_lora.tuning.folder import address, exists, read
from raytune_lora.tuning.space import lookup

AUTO = "auto"
# what may change when a sweep or run goes on: where and how it is computed and when it ends, and not what
_WHERE = (
    r"workers|[cg]pus_per_worker|training\.micro_batch|search\.concurrent|search\.stalled"
    r"|(deepspeed|cluster|disk|tracking|budget|search\.constraints)(\..*)?"
)
_MAY_CHANGE = (
    "what can be changed is where it runs and when it ends: workers, cpus_per_worker, gpus_per_worker, "
    "training.micro_batch, search.concurrent, search.stalled, and the groups deepspeed, cluster, disk, tracking, "
    "budget and search.constraints"
)
_INPUTS = {
    "rows": "the rows (data.path and the other files of rows)",
    "settings": "a file that data.template or data.quality names, or this program's version",
    "tokenizer": "files of the model's folder (its tokenizer or chat template)",
    "packages": "packages (it was {packages})",
}  # of a token store
_SHOWN = 5  # differences between two configs


def settle(cfg: SweepConfig, overrides: Sequence[str]) -> list[str]:
    """Decide whether a job goes on with an earlier one, and with which changes.

    With ``resume=auto`` it does where ``output`` holds one, so that a command line can be given again as it is:
    ``cfg.resume`` becomes that folder, or None.

    Args:
        cfg: composed of the overrides.
        overrides: as typed.

    Returns:
        The keys whose values in ``cfg`` replace those in the folder; none for a job that begins.

    Raises:
        UserError: something is typed that no resume can change, or ``resume=auto`` without a folder.
    """
    typed = [key for o in overrides if (key := o.lstrip("+~").partition("=")[0]) != "resume"]
    if cfg.resume is None:
        return []
    if cfg.resume != AUTO:
        if fixed := [key for key in typed if not re.fullmatch(_WHERE, key)]:
            raise UserError(
                f"resume: a sweep or run goes on with the config in its folder; leave {', '.join(fixed)} out "
                f"({_MAY_CHANGE})"
            )
        return typed
    if cfg.output is None:
        raise UserError("resume=auto goes on with what is in the output folder: name it (output=…)")
    where = address(cfg.output)
    cfg.resume = where if exists(where) else None
    return _changes(cfg, read(where, "resume: ")[0], typed) if cfg.resume else []


def changed_data(known: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why a sweep or run cannot go on with the data as it now is; None where its rows are token by token the same.

    Args:
        known: ``content`` of the token store that it began with and ``inputs`` of that store, by name; empty where it
            has not come that far.
        now: those of the store that its config now gives.
    """
    if not known or known.get("content") == now["content"]:
        return None
    if "content" not in known:
        return (
            "an earlier version of this program prepared its data, whose trials were measured on other rows than "
            "this one's would be: go on with that version, or begin anew (output=…)"
        )
    names = [name for name, value in now["inputs"].items() if known["inputs"].get(name) != value]
    what = " and ".join(_INPUTS[name].format(**known["inputs"]) for name in names) or "what it is prepared with"
    return (
        f"its trials were trained on other tokens than the data now gives: changed since then: {what}; put that back "
        "as it was, or begin anew (output=…)"
    )


def _changes(cfg: SweepConfig, known: SweepConfig, typed: Sequence[str]) -> list[str]:
    """The keys typed whose values are new.

    Raises:
        UserError: the configs differ in what is trained.
    """
    new, old = dict(_leaves(to_plain(cfg))), dict(_leaves(to_plain(known)))
    other = [
        f"{key}={_shown(new, key)} (in the folder: {_shown(old, key)})"
        for key in {**new, **old}
        if key not in ("output", "resume") and not re.fullmatch(_WHERE, key) and new.get(key) != old.get(key)
    ]
    if other:
        more = [f"and {len(other) - _SHOWN} more"] if len(other) > _SHOWN else []
        raise UserError(
            f"resume=auto: {cfg.resume} was begun with another config: {', '.join(other[:_SHOWN] + more)}; give the "
            f"command that began it, go on with its own config ({as_typed('resume', str(cfg.resume))}), or name "
            f"another folder (output=…) ({_MAY_CHANGE})"
        )
    return [key for key in typed if re.fullmatch(_WHERE, key) and lookup(cfg, key) != lookup(known, key)]


def _leaves(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(leaves: dict[str, Any], key: str) -> str:
    return str(leaves[key]) if key in leaves else "nothing"
