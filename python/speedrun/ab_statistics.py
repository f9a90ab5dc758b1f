"""Is command B faster than command A? Pure functions from the times of ABBA blocks to a verdict.

A block runs each command twice, in the order ABBA or, every second time, BAAB: a drift that is
linear within a block falls out of its ratio, and what bends changes its sign from block to block.
A/A blocks run command A in all four places, so that their ratios show what the machine does by
itself. scipy (extra `cli`) gives the t quantiles.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedrun.record_rules import scipy_stats

FALSE_POSITIVE_RATE = 0.05  # of verdicts other than "not shown" on equal commands: at most this
# Of the interval's and the noise floor's condition each; both hold about 4 times in 5, as the floor
# is of few blocks too (simulated in tests/test_ab.py).
POWER = 0.9
MAX_BLOCKS = 2000
ORDERS = ("ABBA", "BAAB")
FASTER, SLOWER, NOT_SHOWN = "faster", "slower", "not shown"


@dataclass(frozen=True)
class Comparison:
    """Time of B over time of A, its confidence interval, and what may be said of it."""

    verdict: str  # of B: FASTER, SLOWER or NOT_SHOWN
    ratio: float
    low: float
    high: float
    noise_floor: float  # relative: 0.01 is 1 %
    # What a "not shown" is worth: of effects that are found about 4 times in 5.
    floor_limits: bool  # the noise floor is above the interval's half-width
    detectable: float  # relative: the smallest effect that such blocks find
    blocks_needed: tuple[int, int] | None  # A/B and A/A, for one of this ratio; None: no number


def plan_blocks(num_ab: int, num_aa: int) -> list[tuple[str, str]]:
    """("A/B" or "A/A", order) of each block, the A/A blocks spread evenly among the others."""
    planned = [
        ((i + 0.5) / count, kind, ORDERS[i % 2])
        for kind, count in (("A/B", num_ab), ("A/A", num_aa))
        for i in range(count)
    ]
    return [(kind, order) for _, kind, order in sorted(planned)]


def block_log_ratio(order: str, seconds: Sequence[float]) -> float:
    """Log of B's time over A's in one block: the times in the order they were measured."""
    logs = {"A": 0.0, "B": 0.0}
    for side, value in zip(order, seconds, strict=True):
        logs[side] += math.log(value) / order.count(side)
    return logs["B"] - logs["A"]


def compare(ab: Sequence[float], aa: Sequence[float], resolution: float = 0.0) -> Comparison:
    """The verdict on the log ratios of A/B blocks, given those of A/A blocks; two or more of each.

    The interval is Student's, over blocks. A verdict needs the interval to exclude 1 and the ratio
    to lie beyond the noise floor: the largest of the A/A blocks' mean (a bias of the place in the
    block), the half-width of an interval from their scatter around the 0 that they should have,
    and `resolution`, the relative rounding of the times.
    """
    t = scipy_stats().t
    tail = 1 - FALSE_POSITIVE_RATE / 2
    mean, error = statistics.mean(ab), statistics.stdev(ab) / math.sqrt(len(ab))
    half_width = t.ppf(tail, len(ab) - 1) * error
    scatter = math.sqrt(sum(x * x for x in aa) / len(aa))
    aa_half_width = t.ppf(tail, len(aa)) * scatter / math.sqrt(len(aa))
    floor = max(abs(statistics.mean(aa)), aa_half_width, resolution)
    limit = max(half_width, floor)
    verdict = NOT_SHOWN
    if abs(mean) > limit:
        verdict = FASTER if mean < 0 else SLOWER
    ratio, low, high = (math.exp(mean + d) for d in (0.0, -half_width, half_width))
    aa_spread = statistics.stdev(aa) / math.sqrt(len(aa))
    is_biased = abs(statistics.mean(aa)) > t.ppf(tail, len(aa) - 1) * aa_spread
    bias = max(resolution, abs(statistics.mean(aa)) if is_biased else 0.0)
    return Comparison(
        verdict,
        ratio,
        low,
        high,
        noise_floor=math.expm1(floor),
        floor_limits=bool(floor > half_width),
        detectable=math.expm1(limit + t.ppf(POWER, len(ab) - 1) * error),
        blocks_needed=_blocks_needed(abs(mean), statistics.stdev(ab), scatter, bias),
    )


def _blocks_needed(
    effect: float, ab_std: float, aa_scatter: float, bias: float
) -> tuple[int, int] | None:
    """The fewest A/B and A/A blocks of such scatter with which `compare` finds such an effect.

    bias: what the noise floor keeps with any number of blocks.
    """
    n, margin, half_width, aa_half_width = _by_num_blocks()
    margin, interval = margin * ab_std, half_width * ab_std
    floor = np.maximum(bias, aa_half_width * aa_scatter)  # of n A/A blocks, falling
    first_below = np.searchsorted(-floor, margin - effect, side="right")
    possible = np.flatnonzero((interval + margin < effect) & (first_below < len(n)))
    if not len(possible):
        return None
    best = possible[np.argmin(possible + first_below[possible])]
    return int(n[best]), int(n[first_below[best]])


@functools.cache
def _by_num_blocks() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of blocks; in standard deviations the margin for POWER, and half-widths of intervals
    over so many A/B and A/A blocks."""
    t, tail, n = scipy_stats().t, 1 - FALSE_POSITIVE_RATE / 2, np.arange(2, MAX_BLOCKS + 1)
    quantiles = t.ppf(POWER, n - 1), t.ppf(tail, n - 1), t.ppf(tail, n)
    return n, *(quantile / np.sqrt(n) for quantile in quantiles)
