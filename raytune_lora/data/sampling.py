"""The order in which held-out rows are stored: whoever measures on the first few of them measures on a sample of all.

Files come sorted, by kind, date or source, so that their first rows are of one kind. N: rows of a split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LOW = np.uint64(2**32 - 1)


def held_out_order(digests_N: NDArray[np.uint64], strata_N: Sequence[str] | None = None) -> NDArray[np.int64]:
    """The rows in the order of their digests, (N,): it hangs on no file's order, and rows that are added move none.

    With strata, the i-th of a stratum's n rows comes at (i + u) / n of the whole, u in 0 to 1 from its digest
    (systematic sampling: Cochran 1977, Sampling Techniques, ch. 8), so that every prefix holds the share of each of a
    few strata to within a row or two, and rows that are strata by themselves as chance has it.

    Args:
        digests_N: 64 bits that stand for each row's text.
        strata_N: each row's stratum; None: they count for nothing.
    """
    order: NDArray[np.int64] = np.argsort(digests_N, kind="stable")
    if strata_N is None:
        return order
    _, stratum_N = np.unique(np.array(strata_N, dtype=object)[order].astype(str), return_inverse=True)
    by_stratum = np.argsort(stratum_N, kind="stable")
    counts = np.bincount(stratum_N)
    within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    u = (digests_N[order][by_stratum] & _LOW).astype(np.float64) / 2**32  # the high bits have made the order
    place_N = np.empty(len(order))
    place_N[by_stratum] = (within + u) / np.repeat(counts, counts)
    return order[np.argsort(place_N, kind="stable")]
