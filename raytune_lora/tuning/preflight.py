"""All that can be known to be wrong before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable

from raytune_lora import storage
from raytune_lora.cache import Cache
from raytune_lora.cluster.agreement import disagreements
from raytune_lora.cluster.connect import connected, is_given, nodes, placement_problems, temporary_folder
from raytune_lora.config import validate
from raytune_lora.config.schema import HubModelConfig, SweepConfig
from raytune_lora.data import sources as data_sources
from raytune_lora.data import templates
from raytune_lora.errors import UserError
from raytune_lora.models import sources as model_sources
from raytune_lora.models import stored
from raytune_lora.models.methods import fit
from raytune_lora.planning.shape import Shape
from raytune_lora.training import tracking
from raytune_lora.tuning import constraints, folder, limits, search, secrets, space

_MLFLOW = "MLFLOW_TRACKING_URI"


def check(cfg: SweepConfig, *, searching: bool, fresh: bool) -> None:
    """Refuse a config that cannot work.

    Args:
        cfg: composed.
        searching: whether there is a search, or one run.
        fresh: whether the output folder is to be made.

    Raises:
        UserError: with every problem found.
    """
    found = validate.problems(cfg) + secrets.problems(cfg)
    if searching:
        found += space.problems(cfg.space, cfg) or extremes(cfg) or search.problems(cfg) or constraints.problems(cfg)
    found += stored.problems(cfg) or fit.problems(cfg)
    found += tracking.problems(cfg.tracking) + _input_problems(cfg)
    if fresh:
        found += _output_problems(cfg)
    if not found:
        found += _cluster_problems(cfg, cfg.search.concurrent if searching else 1)
    if found:
        raise UserError(found)


def check_inputs(cfg: SweepConfig) -> None:
    """Refuse a config whose data, and model where one is named, cannot be prepared.

    Raises:
        UserError: with every problem found.
    """
    found = validate.problems(cfg) + secrets.problems(cfg) + _input_problems(cfg, preparing=True)
    if cfg.output is not None:
        if storage.local_path(cfg.output) is None:
            found.append(f"output={cfg.output}: the report on the data is written here; name a folder, or leave it out")
        else:
            found += folder.problems(folder.SweepFolder.of(cfg).path)
    if found:
        raise UserError(found)


def _input_problems(cfg: SweepConfig, *, preparing: bool = False) -> list[str]:
    """Preparing needs no model, and reports on rows whatever they are."""
    unnamed = isinstance(cfg.model, HubModelConfig) and cfg.model.path is None
    found = [] if preparing and unnamed else model_sources.problems(cfg.model)
    return (
        data_sources.problems(cfg.data, unread=preparing)
        + templates.problems(cfg.data.template)
        + found
        + _cache_problems(cfg)
    )


def _cluster_problems(cfg: SweepConfig, concurrent: int) -> list[str]:
    """Whether the nodes have room for the trials, the same programs and the same storage."""
    if not is_given(cfg.cluster):
        temporary_folder()
        return placement_problems(cfg, nodes(cfg.cluster), concurrent=concurrent)
    with connected(cfg.cluster):
        found = placement_problems(cfg, nodes(cfg.cluster), concurrent=concurrent)
        named = {"output": str(cfg.output), "cache": cfg.cache}
        folders = {key: path for key, name in named.items() if (path := storage.local_path(name)) is not None}
        return found or disagreements(cfg, folders)


def _output_problems(cfg: SweepConfig) -> list[str]:
    home = folder.SweepFolder.of(cfg)
    found = folder.problems(home.path, home.uri)
    if home.uri and "mlflow" in cfg.tracking.trackers and not (cfg.tracking.mlflow_uri or os.environ.get(_MLFLOW)):
        found.append(
            f"tracking.mlflow_uri: a database of MLflow's cannot lie in {home.uri}; name a server, or set ${_MLFLOW}"
        )
    return found


def model_problems(cfg: SweepConfig, shape: Shape, *, searching: bool) -> list[str]:
    """Why the config does not fit the model, nor the bounds of a search."""

    def problems(trial: SweepConfig) -> list[str]:
        return fit.model_problems(trial, shape) + limits.config_problems(trial, shape)

    return problems(cfg) + (extremes(cfg, problems) if searching else [])


def config_problems(cfg: SweepConfig) -> list[str]:
    """What is wrong with the config of a trial, whatever the model."""
    return validate.problems(cfg) or fit.problems(cfg)


def extremes(cfg: SweepConfig, problems: Callable[[SweepConfig], list[str]] = config_problems) -> list[str]:
    """What goes wrong at the bounds of each dimension, where it goes well at the configured value."""
    base = set(problems(cfg))
    found: list[str] = []
    for name, params in space.extremes(cfg.space, cfg):
        new = [p for p in problems(space.apply(cfg, params)) if p not in base]
        found += [f"space.{name}: {problem}; or leave it out of the search: '~space.{name}'" for problem in new]
    return list(dict.fromkeys(found))


def _cache_problems(cfg: SweepConfig) -> list[str]:
    cache = Cache.of(cfg.cache, cfg.cluster.node_cache)
    places = {"cache": str(cache.folder)}
    if cache.uri is not None:
        places = {"cache": cache.uri, "cluster.node_cache": str(cache.folder)}
    return [f"{key}: {problem} ({key}=…)" for key, place in places.items() for problem in storage.problems(place)]
