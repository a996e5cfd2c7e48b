"""Surrogates of fine-tuning: learning curves without training, for the benchmarks of search.

Two are made up, with the structure that fine-tuning with LoRA is known for; one is fitted to real trainings.
"""

from __future__ import annotations

import importlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.config.search import DimensionConfig, DimensionKind

QUICKSTART = Path(__file__).with_name("quickstart_curves.json")
UNTRAINED = 3.0  # loss of the made-up models before training

Params = dict[str, Any]  # by dotted config key, as a trial has them
Losses = NDArray[np.float64]

_RATE, _RANK, _ALPHA, _DROPOUT = "training.learning_rate", "method.r", "method.alpha", "method.dropout"
_FLOAT, _INT, _CATEGORICAL = DimensionKind.float, DimensionKind.int, DimensionKind.categorical


@dataclass(frozen=True)
class Surrogate:
    """A task of fine-tuning. P: validations of a whole run."""

    name: str
    about: str
    space: dict[str, DimensionConfig]
    total: int  # samples of a whole run
    every: int  # samples between two validations
    expected: Callable[[Params], Losses]  # (P,) without noise; not a number from where it diverges on
    noise: Callable[[random.Random], Losses]  # (P,) of one training: what is added to the losses' logarithms

    @property
    def samples(self) -> list[int]:
        """Samples seen at each validation."""
        return list(range(self.every, self.total + 1, self.every))

    def measured(self, params: Params, draw: random.Random) -> Losses:
        """(P,) what one training measures."""
        losses: Losses = self.expected(params) * np.exp(self.noise(draw))
        return losses

    def optimum(self) -> float:
        """The lowest expected loss at the end of a run: random points, then ever closer ones around the best."""
        draw, best, found = random.Random(0), self._random(random.Random(0)), math.inf
        for spread in [math.inf] * 4000 + [0.5 ** (n // 250) for n in range(3000)]:
            point = self._random(draw) if spread == math.inf else self._near(best, spread / 4, draw)
            loss = float(self.expected(self.values(point))[-1])
            if loss < found:
                best, found = point, loss
        return found

    def values(self, point: dict[str, float]) -> Params:
        """The parameters at a point of the unit cube."""
        params: Params = {}
        for d in self.space.values():
            value = place(d, point[d.key])
            params[d.key] = value * params[d.multiple_of] if d.multiple_of else value
        return params

    def _random(self, draw: random.Random) -> dict[str, float]:
        return {d.key: draw.random() for d in self.space.values()}

    def _near(self, point: dict[str, float], spread: float, draw: random.Random) -> dict[str, float]:
        return {key: min(1.0, max(0.0, at + draw.gauss(0, spread))) for key, at in point.items()}


def place(d: DimensionConfig, share: float) -> Any:
    """The value of a dimension at a share of its way from low to high."""
    if d.kind is _CATEGORICAL:
        return d.choices[min(int(share * len(d.choices)), len(d.choices) - 1)]
    assert d.low is not None
    assert d.high is not None
    value = d.low * (d.high / d.low) ** share if d.log else d.low + share * (d.high - d.low)
    if d.kind is _INT:
        return round(value)
    return d.low + round((value - d.low) / d.step) * d.step if d.step else value


def coordinate(d: DimensionConfig, params: Params) -> float:
    """Where the parameters lie in a dimension, from 0 to 1."""
    value = params[d.key] / params[d.multiple_of] if d.multiple_of else params[d.key]
    if d.kind is _CATEGORICAL:
        near = min(d.choices, key=lambda choice: abs(choice - value)) if d.multiple_of else value
        return d.choices.index(near) / max(1, len(d.choices) - 1)
    assert d.low is not None
    assert d.high is not None
    if d.log:
        return math.log(value / d.low) / (math.log(d.high / d.low) or 1)
    return float(value - d.low) / ((d.high - d.low) or 1)


def tasks(names: Sequence[str] = (), curves: Path = QUICKSTART) -> list[Surrogate]:
    """The surrogates of those names; all that there are without any. The real one needs its file of curves."""
    builders = {"lora": lora_like, "valleys": two_valleys}
    if curves.exists():
        builders["quickstart"] = partial(quickstart, curves)
    return [builders[name]() for name in names or builders]


# ------------------------------------------------------------------------------------------------------- made-up tasks


def _space(**changes: Any) -> dict[str, DimensionConfig]:
    """Three decades of learning rates, and ranks, scales and rates of dropout that people use."""
    found = {
        "rank": DimensionConfig(_RANK, _INT, 4, 128, log=True),
        "alpha": DimensionConfig(_ALPHA, _CATEGORICAL, choices=[1, 2, 4], multiple_of=_RANK),
        "learning_rate": DimensionConfig(_RATE, _FLOAT, 1e-5, 1e-2, log=True),
        "dropout": DimensionConfig(_DROPOUT, _FLOAT, 0.0, 0.2, step=0.05),
    }
    return found | changes


def lora_like() -> Surrogate:
    """One valley along the learning rate, whose floor moves with alpha / r and with r.

    Loss falls by a power of the samples. What learns fast has the higher floor, so that curves cross and the best run
    is not the best early on; above a threshold runs diverge. More rank helps less and less and asks for more dropout.
    """
    about = "one valley that moves with alpha/r and r; slow starters win; divergence above"
    share = np.arange(1, 11) / 10
    return Surrogate("lora", about, _space(), 1000, 100, partial(_lora_loss, share), partial(_noise, 0.006, 0.003, 10))


def _lora_loss(share: Losses, params: Params) -> Losses:
    rank, scale = params[_RANK], params[_ALPHA] / params[_RANK]
    best_rate = -3.4 - 0.5 * math.log10(scale / 2) - 0.25 * math.log10(rank / 16)
    off = math.log10(params[_RATE]) - best_rate  # decades
    dropout = params[_DROPOUT] - 0.02 * math.log2(rank / 4)
    floor = 1.2 + 0.1 * (rank / 8) ** -0.7 + 4 * dropout**2 + 0.03 * 10 ** (1.6 * off)
    losses: Losses = floor + (UNTRAINED - floor) / (1 + 30 * 10 ** (1.2 * off) * share)
    return np.where(share >= 1.7 - off, np.nan, losses) if off > 1.1 else losses


def two_valleys() -> Surrogate:
    """A broad valley that is learned fast, and a deeper narrow one that wants all of rank, rate, scale and dropout."""
    about = "a broad valley, and a deeper narrow one that is learned slowly; parameters interact"
    share = np.arange(1, 11) / 10
    noise = partial(_noise, 0.006, 0.003, 10)
    return Surrogate("valleys", about, _space(), 1000, 100, partial(_valleys_loss, share), noise)


def _valleys_loss(share: Losses, params: Params) -> Losses:
    rate, rank = math.log10(params[_RATE]), math.log2(params[_RANK])
    scale, dropout = math.log2(params[_ALPHA] / params[_RANK]), params[_DROPOUT]
    strength = rate + 0.3 * (scale - 1)  # a larger scale acts like a larger learning rate
    broad = 0.25 * math.exp(-(((strength + 2.9) / 0.5) ** 2) / 2 - ((rank - 3) / 4) ** 2 / 2 - (dropout / 0.2) ** 2 / 2)
    deep = 0.4 * math.exp(
        -(((strength + 3.9) / 0.25) ** 2) / 2 - ((rank - 6) / 1.2) ** 2 / 2 - ((dropout - 0.1) / 0.15) ** 2 / 2
    )
    end = 1.6 - max(broad, deep) - 0.1 * min(broad, deep) + 0.01 * math.cos(9 * rate + 2 * rank)
    end += 0.3 * max(0.0, -3.9 - strength)  # too slow to get there
    speed = 22 if deep > broad else 40 * 10 ** (0.4 * (strength + 2.9))
    losses: Losses = end + (UNTRAINED - end) * (1 / (1 + speed * share) - 1 / (1 + speed))
    return np.where(share >= 0.2, np.nan, losses) if strength > -2.1 else losses


def _noise(run: float, validation: float, points: int, draw: random.Random) -> Losses:
    """Relative deviations of a whole run (its seed) and of each of its validations."""
    shift = draw.gauss(0, run)
    return np.array([shift + draw.gauss(0, validation) for _ in range(points)])


# ------------------------------------------------------------------------------------------------------- real trainings


class Fitted:
    """Gaussian process regression of whole learning curves. N: runs, P: validations, D: dimensions.

    The logarithms of the losses are matrix-normal (Stegle et al. 2011): rows covary by a squared exponential kernel
    over the parameters plus noise, columns by a matrix that has a closed form given the rows'. Length scales and noise
    are those of the greatest likelihood. Where the nearest run, by the same length scales, diverged, a run diverges.
    """

    def __init__(self, points: Losses, curves: Losses) -> None:
        """
        Args:
            points: (N, D), each from 0 to 1.
            curves: (N, P) losses; not a number where a run diverged.
        """
        minimize: Any = importlib.import_module("scipy.optimize").minimize

        whole = np.asarray(np.isfinite(curves).all(axis=1))
        self._all, self._diverged = points, np.logical_not(whole)
        self._points, logs = points[whole], np.log(curves[whole])
        self._curves = curves
        self._mean = logs.mean(axis=0)
        self._centred = logs - self._mean
        size = points.shape[1]
        start = np.array([math.log(0.5)] * size + [math.log(0.1)])
        bounds = [(math.log(0.05), math.log(20.0))] * size + [(math.log(1e-4), math.log(1.0))]
        self._scales = minimize(self._cost, start, bounds=bounds, method="L-BFGS-B").x
        rows = self._rows(self._scales)
        inverse = np.linalg.inv(rows)
        self._weights = inverse @ self._centred
        self._columns = self._column_covariance(inverse)
        self._noise = np.linalg.cholesky(self._columns) * math.exp(self._scales[-1] / 2)
        left_out = self._weights[:, -1] / np.diag(inverse)
        self.explained = 1 - float((left_out**2).mean() / (self._centred[:, -1] ** 2).mean())  # each run by the others

    def __call__(self, point: Losses) -> Losses:
        """(P,) losses at (D,) a point."""
        nearest = int((((self._all - point) / np.exp(self._scales[:-1])) ** 2).sum(axis=1).argmin())
        losses: Losses = np.exp(self._mean + self._kernel(point[None], self._scales)[0] @ self._weights)
        return np.where(np.isfinite(self._curves[nearest]), losses, np.nan) if self._diverged[nearest] else losses

    def noise(self, draw: random.Random) -> Losses:
        """(P,) what the seed of a run does to the losses' logarithms."""
        return self._noise @ np.array([draw.gauss(0, 1) for _ in self._mean])

    def _kernel(self, points: Losses, scales: Losses) -> Losses:
        apart = (points[:, None] - self._points[None]) / np.exp(scales[:-1])
        return np.exp(-(apart**2).sum(axis=2) / 2)

    def _rows(self, scales: Losses) -> Losses:
        return self._kernel(self._points, scales) + math.exp(scales[-1]) * np.eye(len(self._points))

    def _column_covariance(self, inverse: NDArray[Any]) -> Losses:
        found = self._centred.T @ inverse @ self._centred / len(self._centred)
        return found + (1e-6 * np.trace(found) + 1e-12) * np.eye(len(found))

    def _cost(self, scales: Losses) -> float:
        """The negative logarithm of the likelihood, but for a constant."""
        rows = self._rows(scales)
        columns = self._column_covariance(np.linalg.inv(rows))
        count, points = self._centred.shape
        return float(points * np.linalg.slogdet(rows)[1] + count * np.linalg.slogdet(columns)[1]) / 2


def quickstart(path: Path = QUICKSTART) -> Surrogate:
    """What real trainings of the quickstart measured, in between by regression.

    Raises:
        ValueError: there are too few whole runs.
    """
    stored = json.loads(path.read_text())
    space = {name: DimensionConfig(**{**d, "kind": DimensionKind(d["kind"])}) for name, d in stored["space"].items()}
    runs = stored["runs"]
    length = stored["total"] // stored["every"]
    curves = np.array([_padded(run["losses"], length) for run in runs])
    if int(np.isfinite(curves).all(axis=1).sum()) < 2:
        raise ValueError(f"{path} has fewer than two whole runs; collect more")
    fitted = Fitted(np.array([_coordinates(space, run["params"]) for run in runs]), curves)
    about = f"{len(runs)} real runs of {stored['experiment']}; regression explains {fitted.explained:.0%} of final loss"

    def expected(params: Params) -> Losses:
        return fitted(np.array(_coordinates(space, params)))

    return Surrogate("quickstart", about, space, stored["total"], stored["every"], expected, fitted.noise)


def _coordinates(space: dict[str, DimensionConfig], params: Params) -> list[float]:
    return [coordinate(d, params) for d in space.values()]


def _padded(losses: list[float], length: int) -> list[float]:
    return [*losses, *[math.nan] * (length - len(losses))]
