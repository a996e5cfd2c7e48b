"""The config groups on disk; it imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

import os
from pathlib import Path

from raytune_lora.errors import UserError

OWN = "RAYTUNE_LORA_CONF"  # names a folder of the user's own groups, laid out as conf/ is


def conf_dir() -> Path:
    """The folder of the YAML groups: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {package} or {package.parent}: install raytune-lora again")


def own_dir() -> Path | None:
    """The folder of the user's own groups, such as ``experiment/mine.yaml``, where there is one.

    Raises:
        UserError: there is no such folder, or a file in it has the name of one that comes with the project.
    """
    if not (named := os.environ.get(OWN)):
        return None
    folder = Path(named).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{OWN}: {folder} is no folder")
    if taken := sorted(f for f in _files(folder) if (conf_dir() / f).exists()):
        raise UserError(f"{OWN}: {folder / taken[0]} has the name of a file that comes with the project; rename it")
    return folder


def own_files() -> list[Path]:
    """The files of the user's own groups."""
    folder = own_dir()
    return [folder / file for file in _files(folder)] if folder else []


def groups() -> dict[str, list[str]]:
    """Each config group and the names that can be chosen from it; a group within another is written ``data/mix``."""
    found: dict[str, list[str]] = {}
    for folder in filter(None, (conf_dir(), own_dir())):
        for file in _files(folder):
            if (group := file.parent.as_posix()) != ".":
                found.setdefault(group, []).append(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def file_of(group: str, name: str) -> Path | None:
    """The file that a choice names; None where there is none."""
    for folder in filter(None, (own_dir(), conf_dir())):
        if (file := folder / group / f"{name}.yaml").is_file():
            return file
    return None


def _files(folder: Path) -> list[Path]:
    """The YAML files, those in hidden folders aside: a mounted ConfigMap keeps its versions there."""
    found = [file.relative_to(folder) for file in folder.rglob("*.yaml")]
    return [file for file in found if not any(part.startswith(".") for part in file.parts)]
