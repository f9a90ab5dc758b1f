"""Loss curves: of one run from its metrics.jsonl, and of the runs of a record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedrun.record_rules import FinishedRun


def read_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """(training events, validation events) of a run folder."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    return (
        [event for event in events if event["event"] == "training"],
        [event for event in events if event["event"] == "validation"],
    )


def plot_loss(folder: Path, title: str, target: float) -> Path:
    """Write folder/loss.png: training and validation loss against the step, with the target.

    Raises ImportError where matplotlib is absent (extra `cli`).
    """
    training, validation = read_metrics(folder)
    figure, (axes,) = _figure(8)
    axes.plot(
        [event["step"] for event in training],
        [event["train_loss"] for event in training],
        color="tab:blue",
        alpha=0.35,
        linewidth=1,
        label="training",
    )
    axes.plot(
        [event["step"] for event in validation],
        [event["val_loss"] for event in validation],
        color="tab:orange",
        marker="o",
        markersize=3,
        label="validation",
    )
    _finish_axes(axes, target)
    final = validation[-1]
    axes.set_title(
        f"{title}: {final['val_loss']:.3f} after {final['step']} steps, "
        f"{final['train_time_s']:.1f} s of training"
    )
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def plot_runs(
    runs: Sequence[FinishedRun],
    baseline: Sequence[FinishedRun],
    target: float,
    title: str,
    path: Path,
) -> None:
    """Write path's .png and .svg: validation curves, and where they end beside the target.

    Raises ImportError where matplotlib is absent (extra `cli`).
    """
    import matplotlib

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
        _finish_axes(axes, target)
    curves.set_title(title)
    ends.set_title("final validation loss")
    ends.set_xlim(-1, 2)
    ends.set_xticks([])
    ends.set_xlabel("")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    # The same runs give the same file: no date in it, no random names.
    with matplotlib.rc_context({"svg.hashsalt": "speedrun"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _figure(width: float, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure without a window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(ncols=columns, squeeze=False)[0]


def _finish_axes(axes: Any, target: float) -> None:
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
