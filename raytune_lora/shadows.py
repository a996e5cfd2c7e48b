"""Files of the user's own that Python would import in place of a package, as a ``torch.py`` in the working folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

_OWN = ("raytune_lora", "jobs", "tests")  # of a checkout of this package


def problems(folder: str, path: Sequence[str]) -> list[str]:
    """What in a folder hides a module of Python or of an installed package; empty where the folder is not looked into.

    Args:
        folder: the working folder.
        path: where Python looks for modules, in this order; an empty entry is the working folder.
    """
    here = os.path.realpath(folder)
    places = [os.path.realpath(place) if place else here for place in path]
    if here not in places:
        return []
    later = [place for place in places[places.index(here) + 1 :] if place != here]
    hidden = [name for name in _modules(Path(here)) if name in sys.stdlib_module_names or _is_in(name, later)]
    return [
        f"{_shown(Path(here), name)} would be imported in place of {name}, as this folder comes before the installed "
        "packages; rename it, or leave the folder out of PYTHONPATH"
        for name in hidden
    ]


def _modules(folder: Path) -> list[str]:
    """Names that a folder gives to import; one without an ``__init__.py`` hides nothing."""
    files = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/__init__.py")}
    return sorted(name for name in files if name.isidentifier() and name not in _OWN and name != "__init__")


def _is_in(name: str, places: Sequence[str]) -> bool:
    found = PathFinder.find_spec(name, list(places))
    return found is not None and found.origin is not None


def _shown(folder: Path, name: str) -> str:
    return str(folder / (f"{name}.py" if (folder / f"{name}.py").is_file() else name))
