"""The sweep folder: where everything of a sweep or a run lies, and who may write to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from raytune_lora import storage
from raytune_lora.config.compose import dump, parse
from raytune_lora.config.schema import SweepConfig
from raytune_lora.config.typed import typed
from raytune_lora.errors import Passing, UserError
from raytune_lora.tuning.claim import OWNER, Claim
from raytune_lora.working_copy import WorkingCopy

_HEADER = "# the resolved config of a "
_LOCK = ".lock"
_LOOK = 0.5  # seconds: longer than ``busy`` holds the lock to look at it
_NEW_CONFIG = ".config.yaml.new"
CONFIG = "config.yaml"
COPY = ".copy"  # in a working copy: what it is told from others by
_TRIALS = "trials"
JOURNAL = "journal"  # in a store: folder of the journal's parts


@dataclass(frozen=True)
class SweepFolder:
    """The paths of a sweep or run."""

    path: Path
    uri: str | None = None  # of the store that it is a working copy of

    @classmethod
    def of(cls, cfg: SweepConfig) -> SweepFolder:
        """The folder of a config's ``output``, on this node.

        Raises:
            UserError: none is named.
        """
        if cfg.output is None:
            raise UserError("output: no folder named")
        copy = WorkingCopy.of(cfg.output, cfg.cluster.node_cache)
        return cls(copy.path, copy.uri)

    @property
    def copy(self) -> WorkingCopy:
        return WorkingCopy(self.path, self.uri)

    @property
    def address(self) -> str:
        """What a user names it by, on any machine."""
        return self.uri or str(self.path)

    @property
    def name(self) -> str:
        return Path(self.address).name

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def trials(self) -> Path:
        return self.path / _TRIALS

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
        self.copy.send(self.config)

    def copy_id(self) -> str:
        """What this working copy is told from all others by."""
        file = self.path / COPY
        if not file.is_file():
            file.write_text(secrets.token_hex(8))
        return file.read_text()

    def refresh(self) -> None:
        """Have what the store has of a sweep, its trials aside; the store may have gone on without this copy.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        self.copy.clear((_LOCK, COPY, _TRIALS))
        self.copy.bring("*", but=(f"{_TRIALS}/*", f"{JOURNAL}/*", OWNER, "study.db"))

    def lock(self) -> FileLock:
        """Held, from now on, by the process that writes to the folder; the system gives it back when that one dies.

        Raises:
            UserError: another process holds it.
        """
        lock = FileLock(self.path / _LOCK, timeout=_LOOK)
        try:
            lock.acquire()
        except Timeout as error:
            raise Passing(
                f"output: another process is working in {self.path}; wait for it, or use another folder"
            ) from error
        except OSError as error:
            raise UserError(f"output: {self.path} cannot be written ({error.strerror})") from error
        return lock

    def busy(self) -> bool | None:
        """Whether a process is working in the folder; None where the file system cannot say."""
        try:
            with (self.path / _LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False


def problems(path: Path, uri: str | None = None) -> list[str]:
    """Why a new sweep cannot use the folder.

    Args:
        path: of the folder.
        uri: of the one in a store that it is a working copy of.
    """
    folder = SweepFolder(path, uri)
    if exists(folder.address):
        return [
            f"output: {folder.address} holds a sweep or run already, and nothing is overwritten: "
            f"go on with it ({typed('resume', folder.address)}), or name another folder (output=…)"
        ]
    return _path_problems(path) if uri is None else _store_problems(uri, path)


def _store_problems(uri: str, path: Path) -> list[str]:
    if found := [f"output: {problem}" for problem in storage.problems(uri)]:
        return found
    if others := [name for name in storage.sizes(uri) if name != OWNER]:
        return [f"output: {uri} is not empty ({others[0]} is in it); name a new folder"]
    return [f"cluster.node_cache: {problem}" for problem in storage.problems(str(path.parent))]


def _path_problems(path: Path) -> list[str]:
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


@contextlib.contextmanager
def held(
    folder: SweepFolder,
    lease: float,
    tell: Callable[[str], None],
    lost: Callable[[Exception], None] = lambda _why: None,
) -> Iterator[Claim | None]:
    """Be the one process that writes to a folder, and have it as the store has it.

    Args:
        folder: which is made where it is missing.
        lease: as for ``Claim``.
        tell: called with what people should know.
        lost: as for ``Claim``.

    Returns:
        The claim, where the folder is in a store.

    Raises:
        UserError: another process works in it, or it cannot be made.
        StorageError: the store refuses or does not answer.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder.path, error) from error
    lock = folder.lock()
    try:
        if folder.uri is None:
            yield None
            return
        claim = Claim(folder.uri, folder.copy_id(), lease, tell, lost)
        claim.take()
        try:
            folder.refresh()
            yield claim
        finally:
            claim.release()
    finally:
        lock.release()


def create(path: Path, cfg: SweepConfig, kind: str, uri: str | None = None) -> SweepFolder:
    """Make the folder and write the config that is about to run; of two that make the same one, one is refused.

    Args:
        path: of the folder.
        cfg: resolved.
        kind: ``sweep`` or ``run``.
        uri: of the one in a store that it is a working copy of.

    Raises:
        UserError: the folder is in use or cannot be made.
        StorageError: the store refuses or does not answer.
    """
    if found := problems(path, uri):
        raise UserError(found)
    folder = SweepFolder(path, uri)
    with held(folder, cfg.cluster.lease, lambda _line: None):
        if found := problems(path, uri):  # another was faster
            raise UserError(found)
        try:
            folder.write_config(f"{_HEADER}{kind}", cfg)
        except OSError as error:
            raise _unwritable(path, error) from error
    return folder


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"output: {path} cannot be written ({error.strerror}); name another folder (output=…)")


def address(output: str) -> str:
    """A folder or URI as it is named from anywhere on this machine."""
    local = storage.local_path(output)
    return output.rstrip("/") if local is None else str(local)


def exists(output: str) -> bool:
    """Whether there is a sweep or run.

    Raises:
        UserError: the store refuses or does not answer.
    """
    return _text(output) is not None


def reopen(output: str | Path, kind: str) -> SweepConfig:
    """The config of a folder to go on with.

    Args:
        output: the folder or its URI.
        kind: that it is to be.

    Raises:
        UserError: it holds no sweep or run, or the other of the two.
    """
    cfg, found = read(output, "resume: ")
    if found != kind:
        raise UserError(f"resume: {output} holds a {found}, not a {kind}; go on with it by the job that began it")
    cfg.output = str(output)
    return cfg


def read(output: str | Path, key: str = "") -> tuple[SweepConfig, str]:
    """The config in a folder, and whether it is a ``sweep``'s or a ``run``'s.

    Args:
        output: the folder or its URI.
        key: that named the folder, before what is said of it.

    Raises:
        UserError: it holds neither.
    """
    text = _text(str(output))
    if text is None:
        raise UserError(f"{key}{output} holds no sweep or run (there is no config.yaml in it)")
    first = text.partition("\n")[0]
    if not first.startswith(_HEADER):
        raise UserError(f"{key}{output} holds no sweep or run (its config.yaml is another program's)")
    return parse(text, f"{output}/{CONFIG}"), first.removeprefix(_HEADER)


def _text(output: str) -> str | None:
    """What is in a folder's config file; None without one."""
    if (local := storage.local_path(output)) is not None:
        file = local / CONFIG
        return file.read_text(errors="replace") if file.is_file() else None
    content = storage.read(storage.join(output, CONFIG), storage.QUICK)
    return None if content is None else content.decode(errors="replace")
