"""The config groups on disk; it imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from pathlib import Path


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


def groups() -> dict[str, list[str]]:
    """Each config group and the names that can be chosen from it; a group within another is written ``data/mix``."""
    root = conf_dir()
    return {
        folder.relative_to(root).as_posix(): sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(path for path in root.rglob("*") if path.is_dir())
    }
