"""What goes with a sweep to its cluster: the files of the working folder that a job needs, and no more.

Left out are what git ignores and ``.rayignore`` names, hidden folders, what sweeps and tests leave and need, weights,
and data other than what the config names. A file that looks like a secret is refused: it would lie on every node,
where whoever may use the cluster can read it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_lora.cluster import secret_files
from raytune_lora.data.files import PACKED, SUFFIXES
from raytune_lora.errors import UserError

LIMIT = 100  # megabytes; Ray itself takes 500 MiB, all of which each node loads before its first worker starts
_FOLDERS = {"sweeps", "runs", "tests", "venv", "node_modules", "__pycache__", "build", "dist"}
_KEPT = {".json"}  # a suffix of data, and of configs too
_HEAVY = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".npy", ".npz", ".arrow", ".h5", ".onnx"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"}  # nobody sees what is in them
_DATA = {suffix + packed for suffix in {*SUFFIXES} - _KEPT for packed in ("", *PACKED)}
_BIGGEST = 5  # files named where all together are too big
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in the package, so that the same files are the same package


@dataclass(frozen=True)
class Package:
    """The files that go along, by their paths in the folder."""

    root: Path
    files: list[Path]

    @property
    def size(self) -> int:
        """Bytes, unpacked."""
        return sum((self.root / file).stat().st_size for file in self.files)

    def write(self, path: Path) -> None:
        """Write a zip file; the same files give the same bytes, which Ray uploads once."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in self.files:
                entry = zipfile.ZipInfo(str(file), _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (0o755 if os.access(self.root / file, os.X_OK) else 0o644) << 16
                archive.writestr(entry, (self.root / file).read_bytes())


def collect(root: Path, named: Sequence[Path] = (), limit: int = LIMIT) -> Package:
    """Choose the files of a folder.

    Args:
        root: the working folder.
        named: files of rows and models below it that the config names; they go along though they are data or weights.
        limit: megabytes of all files together.

    Raises:
        UserError: a file looks like a secret, git cannot say what it ignores, or the files are too many megabytes.
    """
    root = root.absolute()
    own = sorted({file.absolute().relative_to(root) for file in named})
    files = [file for file in _listed(root) if file not in own and _goes(root, file)]
    package = Package(root, sorted([*files, *own]))
    looked = ((file, file not in own or _comes_with_weights(file, own)) for file in package.files)
    if found := [why for file, within in looked if (why := secret_files.problem(root, file, within=within))]:
        raise UserError(found)
    if package.size > limit * 10**6:
        sizes = sorted(((root / file).stat().st_size, str(file)) for file in package.files)[::-1]
        biggest = ", ".join(f"{file} ({_megabytes(size)})" for size, file in sizes[:_BIGGEST])
        raise UserError(
            f"{root} would send {_megabytes(package.size)} to the cluster, more than --limit {limit} MB (each node "
            f"loads it; Ray takes 500 MiB at most); the biggest: {biggest}; put data and models on the cluster's "
            "shared storage, name what is not needed in .rayignore, or raise --limit"
        )
    return package


def listing(package: Package) -> str:
    """The files with their sizes, and the sum."""
    lines = [f"{(package.root / file).stat().st_size:>12,}  {file}" for file in package.files]
    return "\n".join([*lines, f"{package.size:>12,}  in {len(package.files)} files of {package.root}"])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _goes(root: Path, file: Path) -> bool:
    if (root / file).is_symlink() or not (root / file).is_file():  # a link may lead out of the folder
        return False
    if any(part in _FOLDERS or (part.startswith(".") and part != ".") for part in file.parent.parts):
        return False
    return _is_plain(file)


def _comes_with_weights(file: Path, named: Sequence[Path]) -> bool:
    """Whether a file that the config names lies beside a model's weights; rows are the user's to send, as they are."""
    return _is_plain(file) and any(folder / "config.json" in named for folder in file.parents)


def _is_plain(file: Path) -> bool:
    """Whether a file is neither data nor weights nor an archive, by its name."""
    name = file.name.lower()
    return file.suffix.lower() not in _HEAVY | _ARCHIVES and not any(name.endswith(suffix) for suffix in _DATA)


# -------------------------------------------------------------------------------------------------------------- ignored


def _listed(root: Path) -> Iterator[Path]:
    """The files that are not ignored, in a repository of git or outside."""
    if _is_repository(root):
        shown = _git(root, "--cached", "--others", "--exclude-standard")
        ignored = [name for which in ("--cached", "--others") for name in _ignored(root, which)]
        yield from sorted({Path(name) for name in shown} - {Path(name) for name in ignored})
        return
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _FOLDERS and not name.startswith("."))
        where = Path(parent).relative_to(root)
        for name in sorted(names):
            if name in (".gitignore", ".rayignore"):
                raise UserError(
                    f"{Path(parent) / name} says what to leave out, and only git can read it: install git, and make "
                    f"{root} a repository (git init)"
                )
            yield where / name


def _is_repository(root: Path) -> bool:
    if shutil.which("git") is None:
        return False
    asked = subprocess.run(["git", "rev-parse"], cwd=root, capture_output=True, text=True, check=False)
    if asked.returncode and "dubious ownership" in asked.stderr:
        raise UserError(
            f"{root} belongs to another user, so that git does not read it: {asked.stderr.splitlines()[-1]}"
        )
    return asked.returncode == 0


def _ignored(root: Path, which: str) -> list[str]:
    return _git(root, which, "--ignored", "--exclude-from=.rayignore") if (root / ".rayignore").is_file() else []


def _git(root: Path, *options: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git cannot list the files of {root}: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name]
