"""The Polar Express polynomials, constructed (arXiv 2505.16932; KERNELS section c)."""

from __future__ import annotations

import numpy as np

Quintic = tuple[float, float, float]  # a, b, c of a·x + b·x³ + c·x⁵


def polar_coefficients(
    steps: int, lower: float, safety: float = 1.02, cushion: float = 0.02
) -> tuple[Quintic, ...]:
    """`steps` polynomials, each of which takes what is left of [lower, 1] nearer to 1.

    safety: all but the last take x/safety, so that an x up to so many times too large can't escape.
    cushion: none is made for less than this share of its largest input, which bounds its slope.
    ValueError: numbers out of range.
    """
    for name, value, ok in (
        ("steps", steps, steps >= 1),
        ("lower", lower, 0 < lower < 1),
        ("safety", safety, safety >= 1),
        ("cushion", cushion, 0 <= cushion < 1),
    ):
        if not ok:
            wanted = {"steps": "at least 1", "lower": "in (0, 1)", "safety": "at least 1"}
            raise ValueError(
                f"polar_coefficients: {name} must be {wanted.get(name, 'in [0, 1)')}, got {value}"
            )
    low, high, found = lower, 1.0, []
    for step in range(steps):
        abc = _optimal_quintic(max(low, cushion * high), high)
        if cushion * high > low:  # centre the results of [low, high], not of the cushion, on 1
            middle = (value_at(low, abc) + value_at(high, abc)) / 2
            abc = tuple(x / middle for x in abc)
        if step < steps - 1:
            abc = tuple(x / safety**power for x, power in zip(abc, (1, 3, 5), strict=True))
        found.append(abc)
        low = value_at(low, abc)
        high = 2 - low
    return tuple(found)


def value_at(x: float, abc: Quintic) -> float:
    """What a polynomial makes of x, a number or an array or tensor of them."""
    a, b, c = abc
    return a * x + b * x**3 + c * x**5


def _optimal_quintic(low: float, high: float) -> Quintic:
    """The odd quintic with the least max|1 − p(x)| on [low, high], by Remez' exchange."""
    if low / high >= 1 - 5e-6:  # the exchange is ill-conditioned there: the Taylor series at `high`
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner, error = [(3 * low + high) / 4, (low + 3 * high) / 4], np.inf
    for _ in range(100):  # about 10 are enough
        rows = [[x, x**3, x**5, (-1) ** i] for i, x in enumerate((low, *inner, high))]
        a, b, c, new_error = np.linalg.solve(rows, np.ones(4)).tolist()
        if abs(new_error - error) < 1e-15:
            break
        error, root = new_error, (9 * b * b - 20 * a * c) ** 0.5
        inner = [((-3 * b + sign * root) / (10 * c)) ** 0.5 for sign in (-1, 1)]
    return a, b, c
