"""Is command B faster than command A? Pure functions from the times of ABBA blocks to a verdict.

A block runs each command twice, in the order ABBA or, every second time, BAAB: a drift that is
linear within a block falls out of its ratio, and what bends changes its sign from block to block.
A/A blocks run command A in all four places, so that their ratios show what the machine does by
itself. scipy (extra `cli`) gives the t quantiles.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from speedrun.record_rules import scipy_stats

FALSE_POSITIVE_RATE = 0.05  # of verdicts other than "not shown" on equal commands: at most this
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
    mean = statistics.mean(ab)
    half_width = t.ppf(tail, len(ab) - 1) * statistics.stdev(ab) / math.sqrt(len(ab))
    scatter = math.sqrt(sum(x * x for x in aa) / len(aa))
    aa_half_width = t.ppf(tail, len(aa)) * scatter / math.sqrt(len(aa))
    floor = max(abs(statistics.mean(aa)), aa_half_width, resolution)
    verdict = NOT_SHOWN
    if abs(mean) > max(half_width, floor):
        verdict = FASTER if mean < 0 else SLOWER
    ratio, low, high = (math.exp(mean + d) for d in (0.0, -half_width, half_width))
    return Comparison(verdict, ratio, low, high, math.expm1(floor))
