"""From Hydra's groups and the user's overrides to one typed ``SweepConfig``, and back to a file.

Hydra only composes here: it never changes the working directory, makes folders or sets up logging.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytune_lora.config import schema
from raytune_lora.config.composition import REFUSAL, composed, register, to_object
from raytune_lora.config.explain import explain
from raytune_lora.config.plain import to_plain
from raytune_lora.config.yaml_text import read_yaml
from raytune_lora.errors import UserError

T = TypeVar("T")


def compose(overrides: Sequence[str]) -> schema.SweepConfig:
    """Compose the config of a sweep.

    Args:
        overrides: as typed on the command line, such as ``experiment=quickstart`` or ``method.r=8``.

    Raises:
        UserError: an override has no such key, no such choice or the wrong type; all of them at once.
    """
    register()
    if own := [o for o in overrides if re.match(r"[+~]*hydra[./=@]", o)]:
        raise UserError(f"{own[0]}: Hydra only composes the config here; it has no keys of its own to set")
    try:
        return to_object(composed(overrides))
    except REFUSAL as error:
        raise UserError(explain(overrides, error)) from error


def dump(cfg: schema.RunConfig) -> str:
    """The config as YAML that ``load`` reads back."""
    return yaml.safe_dump(to_plain(cfg), sort_keys=False, allow_unicode=True)


def load(path: Path) -> schema.SweepConfig:
    """Read a config that ``dump`` wrote.

    Raises:
        UserError: the file is missing or does not fit this version's schema.
    """
    try:
        return parse(path.read_text(), str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error


def parse(text: str, path: str) -> schema.SweepConfig:
    """The config in a text that ``dump`` wrote.

    Args:
        text: of the file.
        path: of the file, for what is said of it.

    Raises:
        UserError: it does not fit this version's schema.
    """
    try:
        raw = _as_text(read_yaml(text, path))
        node = OmegaConf.structured(schema.SweepConfig)
        for group in schema.VARIANTS:
            node[group] = OmegaConf.structured(schema.variant(group, raw[group]["kind"]))
        return to_object(OmegaConf.merge(node, raw))
    except (OmegaConfBaseException, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a config of this version of raytune-lora: {error}") from error


def _as_text(value: Any) -> Any:
    """What was read, with each ``${`` meant as it stands: ``dump`` has resolved all, and a folder may be another's."""
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def from_plain(cls: type[T], plain: dict[str, Any]) -> T:
    """A dataclass of the schema from what ``to_plain`` made of it.

    Raises:
        OmegaConfBaseException: it does not fit this version's schema.
    """
    made: T = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain))  # type: ignore[assignment]
    return made


def keys(cfg: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted path of a config's leaves and sections."""
    plain = to_plain(cfg) if prefix == "" else cfg
    for name, value in plain.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
