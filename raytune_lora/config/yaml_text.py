"""YAML from outside, read with bounds: by aliases, a text of a few lines can stand for more than any memory holds."""

from __future__ import annotations

from typing import Any

import yaml

from raytune_lora.errors import UserError

MOST = 50_000  # values of a config
_LONGEST = 40  # characters a value
_DEEPEST = 50  # levels; a config has five


def read_yaml(text: str | bytes, path: str, most: int = MOST) -> Any:
    """What a YAML text says.

    Args:
        text: of the file.
        path: of the file, for what is said of it.
        most: values that it may stand for, those counted again that aliases repeat.

    Raises:
        UserError: it is too large, or its aliases repeat too much.
        yaml.YAMLError: it is no YAML.
    """
    see_to_bounds(text, path, most)
    try:
        return yaml.safe_load(text)
    except ValueError as error:  # a day of no month, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def see_to_bounds(text: str | bytes, path: str, most: int = MOST) -> None:
    """Raise for a YAML text that would keep its reader busy for ever; the arguments are those of ``read_yaml``.

    Raises:
        UserError: it is too large, or its aliases repeat too much.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > _LONGEST * most:
        raise UserError(f"{path}: {len(text):,} characters are more than are read of such a file ({_LONGEST * most:,})")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and (count := _count(node, {}, _DEEPEST)) > most:
            said = f"{count:.3g} values" if count > most**2 else f"{count:,} values"
            raise UserError(f"{path}: it stands for {said}, with all that aliases (*name) repeat; at most {most:,} may")
    except RecursionError as error:
        raise UserError(f"{path}: it is nested more than {_DEEPEST} deep, or in itself; write it flatter") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], left: int) -> int:
    """The values that a node stands for, itself among them."""
    if left == 0:
        raise RecursionError
    if id(node) not in known:
        inner = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in inner for part in pair]
        known[id(node)] = 1 + sum(_count(each, known, left - 1) for each in inner)
    return known[id(node)]
