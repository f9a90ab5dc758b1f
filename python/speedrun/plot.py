"""The loss curve of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training, validation = read_metrics(folder)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:.3f}")
    final = validation[-1]
    axes.set_title(
        f"{title}: {final['val_loss']:.3f} after {final['step']} steps, "
        f"{final['train_time_s']:.1f} s of training"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path
