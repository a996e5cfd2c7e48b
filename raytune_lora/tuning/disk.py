"""Room for checkpoints: how much there is, how much will be needed, and whose are deleted first."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from raytune_lora.config.schema import DiskConfig, SweepConfig
from raytune_lora.config.typed import typed
from raytune_lora.errors import JobFailed, disk_trouble
from raytune_lora.training.failures import STOPPED
from raytune_lora.training.place import CHECKPOINTS
from raytune_lora.tuning.trials import ENDED_BADLY, Record, lowest
from raytune_lora.working_copy import WorkingCopy

GB = 1e9
_PARAMETER = 16  # bytes of a trained parameter in a checkpoint: fp32, as the adapter has it, and AdamW's two states


def free_bytes(path: Path) -> int:
    """What can still be written where a path lies, or will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def explained(path: Path, remedy: str) -> Iterator[None]:
    """Let a failure of storage end a job with one message.

    Args:
        path: on the storage.
        remedy: what to do once there is room.

    Raises:
        JobFailed: storage is full, cannot be written or is gone.
    """
    try:
        yield
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None and isinstance(error, OSError) and not path.exists():
            trouble = f"{path} is gone"
        if trouble is None:
            raise
        if "://" in trouble:
            raise JobFailed(f"{trouble}. Nothing that was recorded is lost: once it answers, {remedy}") from error
        there = path if path.exists() else path.parent
        raise JobFailed(
            f"storage cannot be written ({trouble}); {free_bytes(there) / GB:.3g} GB are free in {there}. "
            f"Nothing that was recorded is lost: make room or repair it, then {remedy}"
        ) from error


def problems(cfg: SweepConfig, trainable: int, output: Path, *, trials: int) -> list[str]:
    """Whether the checkpoints of all trials fit on the disk and into the quotas.

    An estimate from below: logs, the study and the data are left out.

    Args:
        cfg: of the sweep or run.
        trainable: parameters that a trial trains.
        output: its folder.
        trials: that keep checkpoints.
    """
    one = _PARAMETER * trainable
    kept = cfg.training.keep_checkpoints + 1  # of a trial: the newest, and the best
    found = []
    if cfg.disk.trial_gb is not None and 2 * one > cfg.disk.trial_gb * GB:
        found.append(
            f"disk.trial_gb={cfg.disk.trial_gb:g}: a checkpoint takes about {one / GB:.3g} GB and a trial has two "
            f"while it writes one; raise it to {2.2 * one / GB:.2g} or more, or train fewer parameters"
        )
    fewest = cfg.search.concurrent * 2 + min(cfg.disk.keep_best, trials)  # that are never deleted
    if cfg.disk.sweep_gb is not None:
        needed, what = float(fewest * one), f"the {fewest} checkpoints that are never deleted"
        room, where = cfg.disk.sweep_gb * GB, f"disk.sweep_gb={cfg.disk.sweep_gb:g}"
        if needed > room:
            found.append(f"{where}: {what} take about {needed / GB:.3g} GB; raise it, or lower disk.keep_best")
        needed = room
    else:
        needed = (trials * kept + cfg.search.concurrent) * one
    if (free := free_bytes(output)) < needed:
        found.append(
            f"output: checkpoints will take about {needed / GB:.3g} GB ({trials} trials, {kept} of {one / GB:.3g} GB "
            f"each), and {free / GB:.3g} GB are free for {output}; name a folder elsewhere (output=…), or set a quota "
            "(disk.sweep_gb), or lower search.trials or training.keep_checkpoints"
        )
    return found


class Quota:
    """Keeps the checkpoints of all trials of a sweep within ``disk.sweep_gb``."""

    def __init__(self, cfg: DiskConfig, trials: WorkingCopy, goes_on: bool = False) -> None:
        """
        Args:
            cfg: how much, and how many trials keep their best checkpoint.
            trials: the folder of all trials.
            goes_on: whether a trial that was stopped may go on.
        """
        self._cfg = cfg
        self._trials = trials
        self._goes_on = goes_on

    def keep(self, record: Record) -> None:
        """Delete checkpoints until the rest fit.

        Those of trials that ended badly go first, then of stopped and completed ones, then the older ones of trials
        that run or pause, then the newest ones of stopped trials that may go on. The best checkpoint of the best trials
        stays, and the newest one of each trial that runs or pauses.

        Raises:
            JobFailed: what must stay does not fit.
            StorageError: the store refuses or does not answer.
        """
        if self._cfg.sweep_gb is None:
            return
        room, sizes = self._cfg.sweep_gb * GB, self._trials.sizes(f"*/{CHECKPOINTS}")
        total = sum(sizes.values())
        for name in self._expendable(record, list(sizes)) if total > room else ():
            self._trials.remove(name)
            total -= sizes[name]
            if total <= room:
                return
        if total > room:
            sweep = (self._trials.uri or str(self._trials.path)).rpartition("/")[0]
            raise JobFailed(
                f"disk.sweep_gb={self._cfg.sweep_gb:g}, and the checkpoints that are never deleted take "
                f"{total / GB:.3g} GB: go on with {typed('resume', str(sweep))} disk.sweep_gb=<more>"
            )

    def _expendable(self, record: Record, checkpoints: list[str]) -> list[str]:
        """Checkpoints that may be deleted, those that are missed least first; what is not known of the sweep stays."""
        best: set[str | None] = set()
        able = list(record.trials.values())
        for _ in range(self._cfg.keep_best):
            if (trial := lowest(able)) is None:
                break
            best.add(trial.checkpoint)
            able.remove(trial)
        ranked: list[tuple[int, int, str]] = []
        for trial_id in {name.partition("/")[0] for name in checkpoints} & record.trials.keys():
            trial = record.trials[trial_id]
            own = sorted(name for name in checkpoints if name.startswith(f"{trial_id}/"))
            if trial.ended and not (self._goes_on and trial.status == STOPPED):
                rank = 0 if trial.status in ENDED_BADLY else 1
            else:
                whole = [f"{trial_id}/{name}" for name in self._trials.within(trial_id).manifests(CHECKPOINTS)]
                rank = 1 if trial.ended else 2
                if trial.ended and whole and self._named(whole[-1]) not in best:
                    ranked.append((3, 0, whole[-1]))
                own = [name for name in own if name not in whole[-1:]]
                own.sort(key=lambda name: self._named(name) == trial.checkpoint)
            ranked += [(rank, n, name) for n, name in enumerate(own) if self._named(name) not in best]
        return [name for _, _, name in sorted(ranked)]

    def _named(self, name: str) -> str:
        """As reports name a checkpoint."""
        return self._trials.name(self._trials.path / name)
