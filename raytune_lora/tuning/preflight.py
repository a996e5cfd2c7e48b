"""All that can be known to be wrong before anything starts."""

from __future__ import annotations

from pathlib import Path

from raytune_lora.cluster.connect import nodes, placement_problems
from raytune_lora.config import validate
from raytune_lora.config.schema import HubModelConfig, SweepConfig
from raytune_lora.data import sources as data_sources
from raytune_lora.data import templates
from raytune_lora.errors import UserError
from raytune_lora.models import sources as model_sources
from raytune_lora.models.methods.fit import problems as method_problems
from raytune_lora.training import tracking
from raytune_lora.tuning import constraints, folder, search, space


def check(cfg: SweepConfig, *, searching: bool, fresh: bool) -> None:
    """Refuse a config that cannot work.

    Args:
        cfg: composed.
        searching: whether there is a search, or one run.
        fresh: whether the output folder is to be made.

    Raises:
        UserError: with every problem found.
    """
    found = validate.problems(cfg)
    if searching:
        found += space.problems(cfg.space, cfg) or _extremes(cfg) or search.problems(cfg) or constraints.problems(cfg)
    found += method_problems(cfg) + tracking.problems(cfg.tracking) + _input_problems(cfg)
    if fresh:
        found += folder.problems(output_path(cfg))
    if not found:
        concurrent = cfg.search.concurrent if searching else 1
        found += placement_problems(cfg, nodes(cfg.cluster), concurrent=concurrent)
    if found:
        raise UserError(found)


def check_inputs(cfg: SweepConfig) -> None:
    """Refuse a config whose data, and model where one is named, cannot be prepared.

    Raises:
        UserError: with every problem found.
    """
    found = validate.problems(cfg) + _input_problems(cfg, preparing=True)
    if cfg.output is not None:
        found += folder.problems(output_path(cfg))
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


def output_path(cfg: SweepConfig) -> Path:
    """The absolute path of the sweep or run folder."""
    if cfg.output is None:
        raise UserError("output: no folder named")
    return Path(cfg.output).expanduser().absolute()


def _extremes(cfg: SweepConfig) -> list[str]:
    """What goes wrong at the bounds of each dimension, where it goes well at the configured value."""
    base = set(validate.problems(cfg))
    found: list[str] = []
    for name, params in space.extremes(cfg.space, cfg):
        new = [p for p in validate.problems(space.apply(cfg, params)) if p not in base]
        found += [f"space.{name}: {problem}" for problem in new]
    return list(dict.fromkeys(found))


def _cache_problems(cfg: SweepConfig) -> list[str]:
    path = Path(cfg.cache).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return [f"cache: {path} cannot be written ({error.strerror}); name another folder (cache=…)"]
    return []
