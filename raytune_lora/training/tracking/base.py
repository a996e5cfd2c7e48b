"""What a tracker is, and the registry of trackers."""

from __future__ import annotations

import importlib.util
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import RunConfig, TrackingConfig

Values = Mapping[str, float | None]  # None: not measured, or not a finite number

_REGISTRY: dict[str, type[Tracker]] = {}
_RUN_ID = "tracking-id"  # file in the trial's folder


@dataclass(frozen=True)
class TrackedTrial:
    """What a tracker is told of a trial."""

    name: str
    sweep: str  # name of the sweep or run that it belongs to
    home: Path  # folder of that
    folder: Path  # of the trial
    slot: int  # number of the worker group that trains it, among those at work at a time
    config: dict[str, Any]  # the trial's whole config, as plain values
    run_id: str  # no other trial has it, and a trial that goes on keeps it

    @classmethod
    def of(cls, cfg: RunConfig, folder: Path, slot: int = 0) -> TrackedTrial:
        """The facts of a trial that trains in ``folder``."""
        home = Path(cfg.output) if cfg.output else folder.parent
        return cls(folder.name, home.name, home, folder, slot, to_plain(cfg), _run_id(folder))


class Tracker(ABC):
    """Takes a trial's numbers somewhere.

    A subclass names its kind and is registered by being defined. It may raise whatever it likes, and may be slow:
    ``Trackers`` calls it in a thread of its own and goes on without it once it has failed.
    """

    kind: ClassVar[str]
    module: ClassVar[str] = ""  # the library it needs, where that is optional: as imported,
    package: ClassVar[str] = ""  # and as installed

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind in _REGISTRY:
            raise TypeError(f"there are two trackers {cls.kind!r}: {_REGISTRY[cls.kind]} and {cls}")
        _REGISTRY[cls.kind] = cls

    def __init__(self, cfg: TrackingConfig) -> None:
        self.cfg = cfg

    @abstractmethod
    def start(self, trial: TrackedTrial) -> None:
        """Called once, before any number."""

    @abstractmethod
    def log(self, step: int, values: Values) -> None:
        """Take the numbers of one optimizer step; steps after a checkpoint come again when a trial goes on from it."""

    @abstractmethod
    def close(self) -> None:
        """Called once, after the last number: what was logged must be safe when it returns."""


def kinds() -> list[str]:
    """The names of all trackers."""
    return sorted(_REGISTRY)


def tracker_class(kind: str) -> type[Tracker]:
    """The tracker of that name.

    Raises:
        KeyError: there is none.
    """
    return _REGISTRY[kind]


def problems(cfg: TrackingConfig) -> list[str]:
    """Trackers whose library is not installed here; names that no tracker has are for validation to refuse."""
    needed = [(kind, _REGISTRY[kind]) for kind in cfg.trackers if kind in _REGISTRY]
    return [
        f"tracking.trackers: {kind} needs the package {cls.package}: pip install {cls.package}"
        for kind, cls in needed
        if cls.module and importlib.util.find_spec(cls.module) is None
    ]


def _run_id(folder: Path) -> str:
    path = folder / _RUN_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()
