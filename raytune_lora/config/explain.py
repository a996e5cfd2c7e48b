"""What is wrong with a config, by the key that the user wrote, on the command line or in a file of their own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError

from raytune_lora.config.composition import NO_WORD, NUMBERS, REFUSAL, composed, merged, to_object, typed_keys
from raytune_lora.config.groups import file_of, groups
from raytune_lora.config.lists import as_list, as_pattern
from raytune_lora.config.typed import typed

_GLOBAL = "_global_"  # the package of a file whose keys are those of the whole config
_WHOLE = "experiment"  # the group of such files
_Path = tuple[str, ...]


def explain(overrides: Sequence[str], error: Exception) -> list[str]:
    """Each faulty override's own problems; the error as it came where none is at fault alone.

    Args:
        overrides: as typed.
        error: of composing them.
    """
    choices = [o for o in overrides if o.partition("=")[0].lstrip("+~") in groups()]
    problems = [problem for override in choices for problem in _problems([], override)]
    if not problems:
        others = [o for o in overrides if o not in choices]
        problems = [problem for override in others for problem in _problems(choices, override)]
    if not problems:  # a file may be well by itself, and not with what else is chosen
        for override in choices:
            group, _, name = override.partition("=")
            problems += _file_problems(group, name, [o for o in choices if o != override], ())
    return problems or [_first_line(error)]


# ------------------------------------------------------------------------------------------------------ of an override


def _problems(choices: Sequence[str], override: str, within: Sequence[Path] = ()) -> list[str]:
    """What is wrong with an override beside some choices.

    Args:
        choices: that are well.
        override: as typed, or as a file's defaults have it.
        within: the files whose defaults led to it.
    """
    try:
        pattern = as_pattern(override, typed_keys(*NUMBERS))
        listed = as_list(override, typed_keys("list["))
        where = pattern[0] if pattern else OverridesParser.create().parse_override(listed).key_or_group
    except HydraException:
        key, _, value = override.partition("=")
        quoted = typed(key or "key", value or "value")
        return [f"{override!r} is not an override: write key=value, and a value with unusual signs in quotes: {quoted}"]
    try:
        to_object(composed([*choices, override]))
        return []
    except REFUSAL as error:
        return _explained(choices, override, where, error, within)


def _explained(choices: Sequence[str], override: str, key: str, error: Exception, within: Sequence[Path]) -> list[str]:
    name = override.partition("=")[2]
    if key in groups():
        if name not in groups()[key]:
            return [_no_choice(key, name)]
        return _file_problems(key, name, choices, within) or [f"{override}: a choice is written {typed(key, name)}"]
    if (group := key.replace(".", "/")) in groups():
        known = ", ".join(groups()[group])
        return [f"{key} is a group: choose one with {group}=<name> (got {name!r}; known: {known})"]
    if merged(override) == override and (unknown := _unknown_key(key, choices)):
        return [unknown]
    if "Ambiguous value" in str(error):
        return [f"{key}: a value with a comma in it is written in quotes: {typed(key, name)} (got {name!r})"]
    if isinstance(_cause(error), InterpolationKeyError):
        return [f"{key}: {_first_line(_cause(error))} (got {name!r}; as text it is written {typed(key, name)})"]
    return [f"{key}: {_first_line(_cause(error))} (got {name!r})"]


def _no_choice(group: str, name: str) -> str:
    near = difflib.get_close_matches(name, groups()[group], n=1)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return f"{group}: there is no {name!r}.{hint} Known: {', '.join(groups()[group])}."


def _unknown_key(key: str, choices: Sequence[str]) -> str | None:
    """That there is no such key beside some choices, and what may have been meant; None where there is."""
    known = _known(tuple(choices))
    if key in known:
        return None
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    by_leaf = difflib.get_close_matches(key.split(".")[-1], {k.split(".")[-1] for k in known}, n=1, cutoff=0.6)
    near += [k for k in known if by_leaf and k.split(".")[-1] == by_leaf[0] and k not in near][:2]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else ""
    return f"{key}: unknown key.{hint} `--cfg job` prints all keys."


@lru_cache
def _known(choices: tuple[str, ...]) -> list[str]:
    plain = OmegaConf.to_container(composed(choices), resolve=False)
    return sorted({*_dotted(plain), *groups()})


def _dotted(plain: Any, prefix: str = "") -> Iterator[str]:
    for name, value in plain.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")


# ----------------------------------------------------------------------------------------------------------- of a file


def _file_problems(group: str, name: str, choices: Sequence[str], within: Sequence[Path]) -> list[str]:
    """What is wrong in a file that can be chosen, each problem as on the command line, with the file before it.

    Args:
        group: of the file, such as ``experiment``.
        name: as it is chosen.
        choices: others that are made beside it.
        within: the files whose defaults led to it.
    """
    if (path := file_of(group, name)) is None:
        return []
    if path in within:
        return [f"its defaults lead back to {path}; take {group}={name} out of them"]
    try:
        text = path.read_text(encoding="utf-8")
        body = yaml.load(text, Loader=get_yaml_loader()) or {}
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        place = f", line {where.line + 1}, column {where.column + 1}" if where else ""
        return [f"{path}{place}: not YAML: {error.problem or error.context}"]
    except (yaml.YAMLError, ValueError) as error:
        return [f"{path}: not YAML: {_first_line(error)}"]
    return [f"{path}: {problem}" for problem in _body_problems(group, text, body, choices, (*within, path))]


def _body_problems(group: str, text: str, body: Any, choices: Sequence[str], within: Sequence[Path]) -> list[str]:
    if text.startswith("\ufeff"):
        return ["it begins with a byte order mark, which Hydra takes for a part of the first line; save it without"]
    if not isinstance(body, dict):
        return [f"it holds keys with their values, as `search: {{trials: 8}}` (got {_shown(body)})"]
    package = next(iter(re.findall(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)), group.replace("/", "."))
    if group == _WHOLE and package != _GLOBAL:
        return [f"its first line is `# @package {_GLOBAL}`; without that, its keys are not the config's"]
    defaults = body.pop("defaults", [])
    if not isinstance(defaults, list):
        return [f"defaults is a list, as `defaults: [tiny]` (got {_shown(defaults)})"]
    chosen: list[str] = []
    for item in defaults:
        try:
            chosen += _as_overrides(group, item)
        except ValueError as error:
            return [str(error)]
    if problems := [problem for override in chosen for problem in _problems([], override, within)]:
        return problems
    prefix = () if package == _GLOBAL else tuple(package.split("."))
    return list(_key_problems(prefix, body, [*chosen, *choices]))


def _as_overrides(group: str, item: Any) -> list[str]:
    """An entry of a file's defaults as one would type it.

    Raises:
        ValueError: it cannot work; with the reason.
    """
    if isinstance(item, str):
        return [] if item == "_self_" else [f"{group}={item}"]
    if not isinstance(item, dict) or len(item) != 1:
        raise ValueError(f"defaults: an entry is a name, or `override /<group>: <name>` (got {_shown(item)})")
    ((key, name),) = item.items()
    where = str(key).removeprefix("override").strip().removeprefix("/")
    if where not in groups():
        near = difflib.get_close_matches(where, groups(), n=1)
        hint = f" Did you mean `override /{near[0]}: {name}`?" if near else ""
        raise ValueError(f"defaults: there is no group {where!r}.{hint} Known: {', '.join(groups())}.")
    if not str(key).startswith("override /"):
        raise ValueError(f"defaults: write `override /{where}: {name}` (got `{key}: {name}`)")
    return [f"{where}={'null' if name is None else name}"]


def _key_problems(prefix: _Path, body: dict[Any, Any], choices: Sequence[str]) -> Iterator[str]:
    """What is wrong with the keys of a file, beside what it and the others choose."""
    try:
        base = composed(choices)
        OmegaConf.set_struct(base, False)  # as it is while files are merged: what has no schema may grow
        to_object(base)
    except REFUSAL:
        return  # the choices do not go together, whatever the keys are
    nested = reduce(lambda inner, name: {name: inner}, reversed(prefix), body)
    for path, value in _leaves(nested, base):
        key = ".".join(map(str, path))
        try:
            change = reduce(lambda inner, name: {name: inner}, reversed(path), value)
            to_object(OmegaConf.merge(base, change))
        except (*REFUSAL, TypeError) as error:
            yield _about(key, path, value, error, choices)


def _leaves(body: dict[Any, Any], base: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The keys whose values are no sections, and those that no section has; a dimension of the space is one value."""
    for name, value in body.items():
        path = (*before, name)
        known = isinstance(name, str) and isinstance(base, DictConfig) and name in base
        section = base._get_node(name) if known else None
        if isinstance(value, dict) and isinstance(section, DictConfig) and before != ("space",):
            yield from _leaves(value, section, path)
        else:
            yield path, value


def _about(key: str, path: tuple[Any, ...], value: Any, error: Exception, choices: Sequence[str]) -> str:
    if key in groups():
        if isinstance(value, str) and value in groups()[key]:
            return f"{key}: {value} is chosen in the defaults: `- override /{key}: {value}`"
        return f"{key} is a section, whose keys are written below it (got {_shown(value)})"
    if not all(isinstance(name, str) for name in path):
        return f"{key}: {NO_WORD} (got {_shown(value)})"
    if key in typed_keys("list[") and isinstance(value, str):
        return f"{key} is a list, as `[{_shown(value)}]` (got {_shown(value)})"
    missing = isinstance(_cause(error), (ConfigKeyError, ConfigAttributeError))
    if missing and "." in path[-1]:
        return f"{key}: the keys of a section are written below its name, as `search: {{trials: 8}}`"
    if missing and path[:-1] != ("space",) and (unknown := _unknown_key(key, choices)):
        return unknown
    return f"{key}: {_first_line(_cause(error))} (got {_shown(value)})"


def _shown(value: Any) -> str:
    try:
        return repr(OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=False)["value"])  # type: ignore[index,call-overload]
    except (*REFUSAL, TypeError):
        return type(value).__name__


# --------------------------------------------------------------------------------------------------- of what is raised


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^Error merging override \S+: ?", "", line)
