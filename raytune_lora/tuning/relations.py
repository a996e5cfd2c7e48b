"""Comparisons between config keys, as ``search.constraints.relations`` has them: ``method.alpha <= 4 * method.r``.

A relation is Python's arithmetic over dotted keys and numbers: + - * /, parentheses, min(…), max(…), and < <= > >= ==,
which may be chained. Everything else is refused; nothing is ever executed.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raytune_lora.config.schema import RunConfig
from raytune_lora.tuning.space import lookup, plain

_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max}
_LEAST = 1e-12  # by how much a relation is broken that does not hold at all: Optuna takes what is above zero
_LONGEST, _DEEPEST = 1000, 50  # characters, and operations within each other
_ALLOWED = "keys, numbers, + - * /, min(…), max(…), and < <= > >= == between them"


class Unreadable(Exception):
    """What is wrong with a relation's text, and where."""


@dataclass(frozen=True)
class Relation:
    """A comparison that a config fulfils or breaks."""

    text: str
    tree: ast.Compare

    @property
    def keys(self) -> list[str]:
        """The config keys it names, each once."""
        return list(dict.fromkeys(_key(node) for node in _keys(self.tree)))

    def broken_by(self, cfg: RunConfig) -> float:
        """By how much the config breaks it: zero where it holds, infinite where it cannot be computed.

        Raises:
            KeyError: the config has no such key.
        """
        try:
            sides = [_value(side, cfg) for side in (self.tree.left, *self.tree.comparators)]
        except (ZeroDivisionError, OverflowError):
            return math.inf
        pairs = zip(self.tree.ops, sides, sides[1:], strict=False)
        return max(_distance(operator, one, other) for operator, one, other in pairs)

    def shown(self, cfg: RunConfig) -> str:
        """The values of its keys in a config."""
        return ", ".join(f"{key}={plain(lookup(cfg, key)):g}" for key in self.keys)


def parse(text: str) -> Relation:
    """Read a relation.

    Raises:
        Unreadable: it is none.
    """
    if len(text) > _LONGEST:
        raise Unreadable(f"it has {len(text):,} characters, and may have {_LONGEST}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last: Python's own parser is full
        column = getattr(error, "offset", None) or len(text) + 1  # none where the text ends too early
        raise Unreadable(f"at character {column}: this is no comparison; it may have {_ALLOWED}") from error
    if not isinstance(tree, ast.Compare):
        raise Unreadable("at character 1: it compares nothing; write for example method.alpha <= 4 * method.r")
    for operator in tree.ops:
        if not isinstance(operator, (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq)):
            raise _refused(tree)
    for side in (tree.left, *tree.comparators):
        _check(side)
    return Relation(text, tree)


def problems(relation: Relation, cfg: RunConfig) -> list[str]:
    """Keys that the schema does not have, or that hold no number."""
    found = []
    for node in _keys(relation.tree):
        key, at = _key(node), f"at character {node.col_offset + 1}"
        try:
            value = plain(lookup(cfg, key))
        except KeyError:
            found.append(f"{at}: there is no config key {key!r} (for the method and model chosen)")
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found.append(f"{at}: {key} is no number (it is {value!r})")
    return list(dict.fromkeys(found))


def _check(node: ast.expr, left: int = _DEEPEST) -> None:
    """See that an expression has nothing but what is allowed."""
    if left == 0:
        raise Unreadable(f"at character {node.col_offset + 1}: more than {_DEEPEST} operations stand within each other")
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        _check(node.left, left - 1)
        _check(node.right, left - 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        _check(node.operand, left - 1)
    elif isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        if not named or node.keywords or len(node.args) < 2:
            raise _refused(node)
        for argument in node.args:
            _check(argument, left - 1)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            raise _refused(node)
    elif not _is_key(node):
        raise _refused(node)


def _refused(node: ast.expr) -> Unreadable:
    return Unreadable(f"at character {node.col_offset + 1}: {ast.unparse(node)!r} cannot be used; take {_ALLOWED}")


def _is_key(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_key(node.value))


def _key(node: ast.expr) -> str:
    return ast.unparse(node)


def _keys(node: ast.AST) -> Iterator[ast.expr]:
    """The keys within an expression, from left to right, functions' names aside."""
    if isinstance(node, ast.expr) and _is_key(node):
        yield node
    elif isinstance(node, ast.Call):
        for argument in node.args:
            yield from _keys(argument)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _keys(child)


def _value(node: ast.expr, cfg: RunConfig) -> float:
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left, cfg), _value(node.right, cfg))
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, cfg)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call):
        return _FUNCTIONS[ast.unparse(node.func)](*(_value(argument, cfg) for argument in node.args))
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]  # `parse` has let numbers through alone
    return float(lookup(cfg, _key(node)))


def _distance(operator: ast.cmpop, one: float, other: float) -> float:
    if isinstance(operator, ast.Eq):
        return 0.0 if math.isclose(one, other, rel_tol=1e-9) else max(abs(one - other), _LEAST)
    over = one - other if isinstance(operator, (ast.Lt, ast.LtE)) else other - one
    if math.isclose(one, other, rel_tol=1e-9):  # 0.1 * 3 and 0.3
        return 0.0 if isinstance(operator, (ast.LtE, ast.GtE)) else _LEAST
    return max(0.0, over)
