"""What can be known here to be wrong with a sweep that is to run on a cluster.

Files that the cluster alone sees, packages that are installed there and the room it has are checked there, before
anything starts.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

from raytune_lora.config import validate
from raytune_lora.config.data import FileDataConfig
from raytune_lora.config.schema import HubModelConfig, SweepConfig
from raytune_lora.data import sources, templates
from raytune_lora.data.files import expand, is_hub_name
from raytune_lora.errors import UserError
from raytune_lora.models import sources as model_sources
from raytune_lora.models import stored
from raytune_lora.models.methods import fit
from raytune_lora.tuning import samplers, secrets, space
from raytune_lora.tuning.preflight import extremes, model_problems

_KNOWN_THERE = {
    "output": "sweeps/mine",
    "cache": "cache",
    "search.warm_start": "sweeps/first",
    "deepspeed.nvme_path": "nvme",
}


def check_elsewhere(cfg: SweepConfig, root: Path) -> list[Path]:
    """Refuse a config that cannot work on any cluster.

    Args:
        cfg: composed.
        root: the working folder, which goes along with the sweep.

    Returns:
        The files below ``root`` that the config names and that have to go along.

    Raises:
        UserError: with every problem found.
    """
    cfg = stored.as_stored(copy.deepcopy(cfg))  # of a checkpoint that is here; the job itself sees to the others
    found = validate.problems(cfg, here=False) + secrets.problems(cfg)
    found += space.problems(cfg.space, cfg) or extremes(cfg) or samplers.problems(cfg, here=False)
    found += (stored.problems(cfg) or fit.problems(cfg)) + templates.problems(cfg.data.template) + _folder_problems(cfg)
    files, missing = _named_files(cfg, root)
    found += missing or _content_problems(cfg)
    if found:
        raise UserError(found)
    return files


def _folder_problems(cfg: SweepConfig) -> list[str]:
    """Folders that a job would look for in its working folder, a copy on each node that Ray deletes after it."""
    if cfg.output is None:
        return ["output: name the sweep's folder on storage that all nodes of the cluster share (/shared/sweeps/mine)"]
    named = {
        "output": [cfg.output],
        "cache": [cfg.cache],
        "search.warm_start": cfg.search.warm_start,
        "deepspeed.nvme_path": [cfg.deepspeed.nvme_path] if cfg.deepspeed.nvme_path else [],
    }
    return [
        f"{key}={path}: a folder that the cluster is to use is named from its root (/shared/{_KNOWN_THERE[key]}): what "
        "a job writes into its working folder is lost"
        for key, paths in named.items()
        for path in paths
        if not path.startswith(("/", "~")) and "://" not in path
    ]


def _named_files(cfg: SweepConfig, root: Path) -> tuple[list[Path], list[str]]:
    """Data and model that are named by a path from the working folder: the files, and what is wrong with them."""
    files, found = list[Path](), list[str]()
    for key, path in [*_data_paths(cfg), *_model_paths(cfg)]:
        if path is None or not _is_here(path):
            continue
        here = _files(path)
        if not here:
            found.append(
                f"{key}={path}: nothing is there, seen from {root}; a file of the cluster is named from its root"
            )
        elif any(not file.resolve().is_relative_to(root.resolve()) for file in here):
            found.append(
                f"{key}={path} lies outside of {root}, which goes to the cluster; move it there, or to the cluster"
            )
        files += here
    return files, found


def _files(path: str) -> list[Path]:
    if (Path(path) / "config.json").is_file():  # a model's folder
        return [file for file in _plain_files(Path(path)) if file.is_file()]
    try:
        return [Path(file) for file in expand(path)]
    except UserError:
        return []


def _plain_files(folder: Path) -> list[Path]:
    """All in a model's folder but what is hidden: downloads and repositories keep their own things there."""
    found = folder.rglob("*")
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _data_paths(cfg: SweepConfig) -> list[tuple[str, str | None]]:
    named: list[tuple[str, str | None]] = [("data.benchmarks", path) for path in cfg.data.benchmarks]
    named += [(f"data.mix.{name}.path", mix.path) for name, mix in cfg.data.mix.items()]
    if isinstance(cfg.data, FileDataConfig):
        own = {"path": cfg.data.path, "validation_path": cfg.data.validation_path, "test_path": cfg.data.test_path}
        named += [(f"data.{name}", path) for name, path in own.items()]
    return named


def _model_paths(cfg: SweepConfig) -> list[tuple[str, str | None]]:
    return [("model.path", cfg.model.path)] if isinstance(cfg.model, HubModelConfig) else []


def _is_here(path: str) -> bool:
    """Whether a path is seen from the working folder, rather than the cluster's, a URI or a name on the hub."""
    return not path.startswith(("/", "~")) and "://" not in path and not is_hub_name(path)


def _content_problems(cfg: SweepConfig) -> list[str]:
    """What is wrong within the files that are here; where one is the cluster's, the cluster checks them all."""
    found = []
    if isinstance(cfg.data, FileDataConfig) and all(path is None or _is_here(path) for _, path in _data_paths(cfg)):
        found += sources.problems(cfg.data)
    model = cfg.model
    if not isinstance(model, HubModelConfig):
        return found
    if model.path is None or (Path(model.path) / "config.json").is_file():
        found += model_sources.problems(model)
    if not found and model.path is not None and _files(model.path) and importlib.util.find_spec("torch") is not None:
        from raytune_lora.models.shape import shape_of_folder

        found += model_problems(cfg, shape_of_folder(Path(model.path), model), searching=True)
    return found
