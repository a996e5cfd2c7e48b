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
    """Each config group and the names that can be chosen from it."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir()
    }
