"""How sure a figure is, and whether two of them are the same model's. N: rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

_SURE = 0.95
_Z = 1.959964  # of the normal distribution, 95 %, two-sided

# By how much the same weights' loss may differ between two ways to compute it (a merged update or its own product,
# another worker count, padding or kernel), a share of the loss or, below 1 nat, in nats. In fp32 what differs is the
# order of sums: a thousand roundings of 2^-23. In bf16 each activation is rounded to 8 bits, and training rounds
# elsewhere than inference does (autocast): of SmolLM2-135M, 0.002. int8 rounds activations to 7 bits besides, by scales
# that depend on the batch. A 4-bit base is the same in both, so that its dtype of arithmetic counts.
_ROUNDING = {"float32": 2.0**-13, "bfloat16": 2.0**-6, "int8": 2.0**-5}


def wilson(right: int, asked: int) -> Interval | None:
    """The 95 % interval of a share (Wilson 1927); None where nothing was asked."""
    if not asked:
        return None
    share, z = right / asked, _Z
    centre = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + (z / (2 * asked)) ** 2)
    low, high = ((centre + side) / (1 + z * z / asked) for side in (-half, half))
    return max(0.0, low), min(1.0, high)


def loss_interval(nats_N: NDArray[np.float64], tokens_N: NDArray[np.float64]) -> Interval | None:
    """The 95 % interval of a loss a token as an estimate for rows of that kind; None of one row, or of no number.

    As tokens of a row are not independent, the loss is a ratio of two sums over rows, R = sum(y) / sum(x), of variance
    n / (n - 1) * sum((y - R x)^2) / sum(x)^2 (Cochran 1977, Sampling Techniques, section 2.11), by Student's t. Rows
    that nearly repeat each other count as if they did not, and make it too narrow.

    Args:
        nats_N: (N,) loss of each row over its tokens, y.
        tokens_N: (N,) how many tokens that is, x.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    n, tokens = len(nats_N), float(tokens_N.sum())
    loss = float(nats_N.sum()) / tokens if tokens else math.nan
    if n < 2 or not math.isfinite(loss):
        return None
    error = math.sqrt(n / (n - 1) * float(((nats_N - loss * tokens_N) ** 2).sum())) / tokens
    half = float(stdtrit(n - 1, (1 + _SURE) / 2)) * error
    return max(0.0, loss - half), loss + half


def disagreement(trial_loss: float, measured: dict[str, Any]) -> dict[str, float] | None:
    """Why an adapter is not what its trial trained: both losses on the trial's rows and how far apart they may be.

    Args:
        trial_loss: as the trial reported it with the checkpoint that the adapter is of.
        measured: by ``compare.measure`` on the adapter.

    Returns:
        ``trial``, ``measured`` and ``tolerance`` (nats a token); None where they agree.
    """
    tolerance = _ROUNDING[measured["arithmetic"]] * max(1.0, abs(trial_loss))
    if abs(measured["trial_loss"] - trial_loss) <= tolerance:  # false of a loss that is no number
        return None
    return {"trial": trial_loss, "measured": measured["trial_loss"], "tolerance": tolerance}
