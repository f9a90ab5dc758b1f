"""Loss curves: of one run at its end, of several runs and logs, and of the runs of a record.

All need matplotlib (extra `cli`), and raise ImportError where it is absent.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedrun.curves import Curve, curves_of
from speedrun.record_logs import read_run_folder
from speedrun.record_rules import FinishedRun

UNITS = {  # of each axis: for values from the first number on, what one unit is, and the label
    "step": [(0, 1, "step")],
    "tokens": [
        (1e9, 1e9, "training tokens (billions)"),
        (1e6, 1e6, "training tokens (millions)"),
        (0, 1e3, "training tokens (thousands)"),
    ],
    "time": [(600, 60, "training time (minutes)"), (0, 1, "training time (s)")],
}
# Okabe and Ito's colours, which people with colour blindness can tell apart too; black is the
# target's, and yellow is too light for a line. Behind the last of them, another kind of line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LEGEND_ROW_INCH = 0.2
LONG_LABEL = 40  # characters, from which on the legend has one column
LINE_STYLES = ("-", "--", ":", "-.")


def plot_curves(
    curves: Sequence[Curve],
    targets: Sequence[float],
    path: Path,
    axes: Sequence[str],
    loss_range: tuple[float, float] | None = None,
    training: bool = False,
) -> None:
    """Write path (.png, .svg or .pdf), a panel for each of `axes`, which `known_axes` gives.

    Several runs of a curve are their mean in a band from the lowest to the highest loss. Without a
    range, the panels begin with the second validations: the first are of untrained models.
    training: with a thin line of each run's training losses.
    """
    height = 5 + LEGEND_ROW_INCH * len(curves)
    figure, panels = _figure(2 + 4.5 * len(axes), height, columns=len(axes))
    for panel, axis in zip(panels, axes, strict=True):
        last = [curve.means()[-1].of(axis) for curve in curves]
        longest = max(value for value in last if not math.isnan(value))
        _, unit, label = next(row for row in UNITS[axis] if longest >= row[0])
        for number, curve in enumerate(curves):
            _draw(panel, curve, number, axis, unit, training)
        _finish_axes(panel, targets, label)
        panel.set_ylabel(f"{'' if training else 'validation '}loss (nats per token)")
        panel.get_legend().remove()
        panel.set_ylim(*(loss_range or _default_range(curves, targets)))
        if loss_range is not None:
            panel.set_xlim(left=_before(curves, axis, loss_range[1]) / unit)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > LONG_LABEL else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    _save(figure, path)


def known_axes(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """For each axis that some curve can be drawn over, those that can't: their logs don't tell."""
    unknown = {axis: [c for c in curves if math.isnan(c.means()[-1].of(axis))] for axis in UNITS}
    return {axis: missing for axis, missing in unknown.items() if len(missing) < len(curves)}


def _default_range(curves: Sequence[Curve], targets: Sequence[float]) -> tuple[float, float]:
    seen = [loss for curve in curves for row in curve.ranges() for loss in row[1:] or row]
    shown = [loss for loss in [*seen, *targets] if math.isfinite(loss)] or [0.0]
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _before(curves: Sequence[Curve], axis: str, loss: float) -> float:
    """Where the first curve is one validation before it comes to such a loss; 0 where none does."""
    steps = [
        earlier.of(axis)
        for curve in curves
        for earlier, later in itertools.pairwise(curve.means())
        if earlier.loss > loss >= later.loss
    ]
    return min((place for place in steps if not math.isnan(place)), default=0.0)


def plot_loss(folder: Path, title: str, target: float | None) -> Path:
    """Write folder/loss.png: training and validation loss against the step."""
    (curve,), _ = curves_of([read_run_folder(folder)])
    figure, (panel,) = _figure(8)
    _draw(panel, dataclasses.replace(curve, label="validation"), 0, "step", 1, training=True)
    _finish_axes(panel, [] if target is None else [target])
    final = curve.means()[-1]
    panel.set_title(
        f"{title}: {final.loss:.3f} after {final.step:.0f} steps, {final.time:.1f} s of training"
    )
    path = folder / "loss.png"
    _save(figure, path)
    return path


def plot_runs(
    runs: Sequence[FinishedRun],
    baseline: Sequence[FinishedRun],
    target: float,
    title: str,
    path: Path,
) -> None:
    """Write path's .png and .svg: validation curves, and where they end beside the target."""
    figure, (curves, ends) = _figure(11, columns=2)
    sides = [("baseline", baseline, "tab:gray"), ("runs", runs, "tab:orange")]
    for column, (name, side, color) in enumerate(side for side in sides if side[1]):
        label = f"{name}: {len(side)}"
        for run, _ in side:
            # Without step 0, whose loss would leave no room for the others.
            points = [v for v in run.validations if v.step]
            steps, losses = [v.step for v in points], [v.loss for v in points]
            curves.plot(steps, losses, color=color, alpha=0.6, linewidth=1, label=label)
            label = None  # one entry in the legend
        finals = [final.loss for _, final in side]
        ends.plot([column] * len(finals), finals, "o", color=color, alpha=0.6, label=name)
        mean = sum(finals) / len(finals)
        ends.plot([column - 0.2, column + 0.2], [mean, mean], color=color, label=f"mean {mean:.4f}")
    for axes in (curves, ends):
        _finish_axes(axes, [target])
    curves.set_title(title)
    ends.set_title("final validation loss")
    ends.set_xlim(-1, 2)
    ends.set_xticks([])
    ends.set_xlabel("")
    for suffix in (".png", ".svg"):
        _save(figure, path.with_suffix(suffix))


def _figure(width: float, height: float = 5, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure without a window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(ncols=columns, squeeze=False)[0]


def _draw(panel: Any, curve: Curve, number: int, axis: str, unit: float, training: bool) -> None:
    """The curve, with its training losses behind it, and the range of several runs."""
    color = COLORS[number % len(COLORS)]
    style = LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
    for i, points in enumerate(curve.training if training else ()):
        x, y = [point.of(axis) / unit for point in points], [point.loss for point in points]
        label = None if number or i else "training"  # one entry in the legend
        panel.plot(x, y, color=color, alpha=0.3, linewidth=0.7, label=label)
    means = curve.means()
    x, y = [point.of(axis) / unit for point in means], [point.loss for point in means]
    if len(curve.runs) > 1:
        panel.fill_between(x, *curve.ranges(), color=color, alpha=0.25, linewidth=0)
    panel.plot(x, y, style, color=color, marker=".", linewidth=1.2, label=curve.label)


def _finish_axes(panel: Any, targets: Sequence[float], x_label: str = "step") -> None:
    for target in targets:
        label = f"target {target:.4g}"
        panel.axhline(target, color="black", linestyle="--", linewidth=1, label=label)
    panel.set_xlabel(x_label)
    panel.set_ylabel("loss (nats per token)")
    panel.grid(alpha=0.3)
    panel.legend()


def _save(figure: Any, path: Path) -> None:
    """The same runs give the same file: no date in it, no random names."""
    import matplotlib

    dates = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "speedrun"}):
        figure.savefig(path, dpi=120, metadata=dates[path.suffix])
