"""Rules that choose which granularities of which memories to remove when bytes run short, as array operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vmemory.graph.arrays import CAPTION, MEAN, NEAREST, VECTOR


def _first(order: np.ndarray, size: np.ndarray, target: int) -> np.ndarray:
    """Mark entries of `size` in an order until their bytes reach the target."""
    bytes = size.ravel()[order]
    before = np.cumsum(bytes) - bytes
    removed = np.zeros(size.size, np.bool_)
    removed[order[(bytes > 0) & (before < target)]] = True
    return removed.reshape(size.shape)


def nsbg(size: np.ndarray, visits: np.ndarray, target: int) -> np.ndarray:
    """Pick by node: the least visited loses everything, fine before coarse, then the next (PerStream's NSBG).

    Args:
        size: `[N, 4]` int64, bytes of each memory by granularity, 0 = absent.
        visits: `[N]` int64; of equal counts the older memory comes first.
        target: Bytes to free. The last removal may free more.

    Returns:
        `[N, 4]` bool, True = remove.
    """
    cold = np.argsort(visits, kind="stable")
    return _first((cold[:, None] * 4 + np.arange(4)).ravel(), size, target)


def gsbn(size: np.ndarray, visits: np.ndarray, target: int) -> np.ndarray:
    """Pick by granularity: the finest of all memories, least visited first, then the next (PerStream's GSBN).

    Args and result as of `nsbg`.
    """
    cold = np.argsort(visits, kind="stable")
    return _first((cold * 4 + np.arange(4)[:, None]).ravel(), size, target)


def by_value(size: np.ndarray, visits: np.ndarray, target: int) -> np.ndarray:
    """Pick the removals that lose the fewest answers for its bytes.

    A memory will be asked about in proportion to its visits plus one. A caption can answer only while its vector finds
    it, so those two leave together and last; visual tokens answer only while the memory is found. The nearest frame
    repeats most of what the mean frame has, so the mean is worth more. Values are divided by bytes, and the least
    valuable byte leaves first.

    Args and result as of `nsbg`.
    """
    use = (visits + 1.0)[:, None]
    text = size[:, [VECTOR, CAPTION]].sum(1, keepdims=True)
    # without the mean frame the nearest one answers its questions too
    fine = np.where(size[:, [MEAN]] > 0, FINE, FINE + COARSE)
    worth = np.empty(size.shape)
    worth[:, [NEAREST]] = use * fine / np.maximum(size[:, [NEAREST]], 1)
    worth[:, [MEAN]] = use * COARSE / np.maximum(size[:, [MEAN]], 1)
    worth[:, [VECTOR, CAPTION]] = use * TEXT / np.maximum(text, 1)
    # text never leaves before the visual tokens of the same memory, which nobody finds without it
    worth[:, [VECTOR, CAPTION]] = np.maximum(
        worth[:, [VECTOR, CAPTION]], worth[:, [NEAREST, MEAN]].max(1, keepdims=True)
    )
    return _first(np.argsort(worth.ravel(), kind="stable"), size, target)


# assumed shares of questions that need a memory's text, its coarse picture and its fine picture
TEXT, COARSE, FINE = 0.6, 0.25, 0.15

RULES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "value": by_value,
    "nsbg": nsbg,
    "gsbn": gsbn,
}
