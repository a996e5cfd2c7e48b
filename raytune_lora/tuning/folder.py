"""The sweep folder: where everything of a sweep or a run lies, and who may write to it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from raytune_lora.config.compose import dump, load
from raytune_lora.config.schema import SweepConfig
from raytune_lora.errors import UserError

_HEADER = "# the resolved config of a "
_LOCK = ".lock"
_NEW_CONFIG = ".config.yaml.new"


@dataclass(frozen=True)
class SweepFolder:
    """The paths of a sweep or run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def groups(self) -> Path:
        """What Ray Train keeps of the worker groups."""
        return self.path / "groups"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def phase(self, name: str) -> Path:
        """Where a phase that runs on workers keeps its logs and answers."""
        return self.path / name

    def rewrite(self, cfg: SweepConfig) -> None:
        """Replace the config by one that goes on elsewhere; the journal keeps what changed."""
        self.write_config(self.config.read_text().partition("\n")[0], cfg)

    def write_config(self, header: str, cfg: SweepConfig) -> None:
        """Write the config whole or not at all, so that what a kill leaves can be gone on with."""
        new = self.path / _NEW_CONFIG
        new.write_text(f"{header}\n{dump(cfg)}")
        os.replace(new, self.config)

    def lock(self) -> FileLock:
        """Held, from now on, by the process that writes to the folder; the system gives it back when that one dies.

        Raises:
            UserError: another process holds it.
        """
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"output: another process is working in {self.path}; wait for it, or use another folder"
            ) from error
        return lock


def problems(path: Path) -> list[str]:
    """Why a new sweep cannot use the folder."""
    if (path / "config.yaml").exists():
        return [
            f"output: {path} holds a sweep or run already, and nothing is overwritten: "
            f"go on with it (resume={path}), or name another folder (output=…)"
        ]
    if path.exists() and not path.is_dir():
        return [f"output: {path} is a file; name a folder"]
    if path.is_dir() and any(entry.name not in (_LOCK, _NEW_CONFIG) for entry in path.iterdir()):
        return [f"output: {path} is not empty; name a new folder"]
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return [f"output: {parent} is a file, so {path} cannot be made; name another folder"]
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=parent))
    except OSError as error:
        return [f"output: {parent} is not writable ({error.strerror}), so {path} cannot be made; name another folder"]
    return []


def create(path: Path, cfg: SweepConfig, kind: str) -> SweepFolder:
    """Make the folder and write the config that is about to run; of two that make the same one, one is refused.

    Args:
        path: of the folder.
        cfg: resolved.
        kind: ``sweep`` or ``run``.

    Raises:
        UserError: the folder is in use or cannot be made.
    """
    if found := problems(path):
        raise UserError(found)
    folder = SweepFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = folder.lock()
        try:
            if found := problems(path):  # another was faster
                raise UserError(found)
            folder.write_config(f"{_HEADER}{kind}", cfg)
        finally:
            lock.release()
    except OSError as error:
        raise UserError(
            f"output: {path} cannot be written ({error.strerror}); name another folder (output=…)"
        ) from error
    return folder


def reopen(path: Path, kind: str) -> SweepConfig:
    """The config of a folder to go on with.

    Raises:
        UserError: it holds no sweep or run, or the other of the two.
    """
    file = SweepFolder(path).config
    if not file.is_file():
        raise UserError(f"resume: {path} holds no sweep or run (there is no config.yaml in it)")
    first = file.read_text(errors="replace").partition("\n")[0]
    if not first.startswith(_HEADER):
        raise UserError(f"resume: {path} holds no sweep or run (its config.yaml is another program's)")
    if (found := first.removeprefix(_HEADER)) != kind:
        raise UserError(f"resume: {path} holds a {found}, not a {kind}; go on with it by the job that began it")
    cfg = load(file)
    cfg.output = str(path)
    return cfg
