"""Draw loss curves of runs and public logs: against steps, tokens and time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speedrun.curves import curves_of
from speedrun.plot import UNITS, known_axes, plot_curves
from speedrun.record_logs import LogError, read_all

SUFFIXES = (".png", ".svg", ".pdf")


class PlotError(ValueError):
    """What the picture can't be made with; the message names it and the fix."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Runs that differ in nothing but their seed (config, sources, device, data; of public logs "
        "the program that they begin with) are one curve: their mean, in a band from the lowest "
        "to the highest loss."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, public logs, or folders of these"
    )
    parser.add_argument(
        "--x", choices=list(UNITS), help="one panel (default: all three, side by side)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("loss.png"),
        metavar="FILE",
        help=f"{', '.join(SUFFIXES)} (default: loss.png); one that is there is replaced",
    )
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="of the line (default: the runs' own)"
    )
    parser.add_argument(
        "--loss",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="show this range alone, from where the first curve comes into it",
    )
    parser.add_argument(
        "--training", action="store_true", help="with each run folder's training losses"
    )


def run(args: argparse.Namespace) -> int:
    """0; 1 where there is nothing to draw, or it can't be written, with the reason on stderr."""
    try:
        _plot(args)
        return 0
    except ImportError:
        message = "matplotlib is missing (pip install 'nanogpt-speedrun[cli]')"
    except (LogError, PlotError) as error:
        message = str(error)
    except BrokenPipeError:  # of stdout: for cli
        raise
    except OSError as error:
        message = f"{error.filename or args.out}: {error.strerror}"
    print(f"speedrun plot: error: {message}", file=sys.stderr)
    return 1


def _plot(args: argparse.Namespace) -> None:
    if args.out.suffix not in SUFFIXES:
        raise PlotError(f"--out {args.out}: must end in {', '.join(SUFFIXES)}")
    if args.loss and not args.loss[0] < args.loss[1]:
        raise PlotError(f"--loss {args.loss[0]} {args.loss[1]}: the lower one goes first")
    curves, notes = curves_of(read_all(args.runs))
    known = known_axes(curves)
    if args.x and args.x not in known:
        raise PlotError(f"--x {args.x}: no log here tells it; there is {', '.join(known)}")
    axes = [args.x] if args.x else list(known)
    notes += [
        f"not over {axis}, which its log doesn't tell: {c.label}"
        for axis in axes
        for c in known[axis]
    ]
    targets = {curve.target for curve in curves} - {None} if args.target is None else {args.target}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_curves(curves, sorted(targets), args.out, axes, args.loss, args.training)
    for note in notes:
        print(note)
    num_curves, num_runs = len(curves), sum(len(curve.runs) for curve in curves)
    print(
        f"{args.out}: {num_curves} curve{'s' * (num_curves > 1)} of {num_runs} "
        f"run{'s' * (num_runs > 1)}, over {', '.join(axes)}"
    )
