"""What of this machine would stop a run or slow it down, each with its fix."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from speedrun import doctor, hardware, kernel_trials, machine
from speedrun.doctor import Finding

ITEM_LIMIT_S = 30.0  # of a kernel: Triton or Inductor compile it first
WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"shards to check (default: {doctor.DATA_FOLDER}, if it is there)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="findings as JSON; -: on stdout")
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="for trying kernels, after which the rest is left out (default 20; 0: none is tried)",
    )


def _seconds(text: str) -> float:
    try:
        if float(text) >= 0:  # not nan
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: give a number of seconds, 0 or more")


def run(args: argparse.Namespace) -> int:
    """0: no check failed; 1: one did; 2: the JSON can't be written."""
    to_stdout = args.json == Path("-")
    say = sys.stderr if to_stdout else sys.stdout
    facts = machine.look(os.environ, Path())
    findings = [*doctor.check_machine(facts), doctor.check_data(args.data)]
    print(as_text(findings), file=say, flush=True)
    items = doctor.trial_items(facts)
    outcomes = kernel_trials.run(items, args.seconds, ITEM_LIMIT_S)
    kernels = doctor.check_kernels(facts, outcomes)
    print(as_text(kernels), file=say)
    findings += kernels
    seconds = hardware.process_age_s()
    print(summary(findings, seconds), file=say)
    content = json.dumps(
        {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "seconds": round(seconds, 1),
        },
        indent=1,
        ensure_ascii=False,
    )
    if to_stdout:
        print(content)
    elif args.json:
        try:
            args.json.write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            reason = f"can't be written ({error.strerror})"
            print(f"speedrun doctor: {args.json}: {reason}", file=sys.stderr)
            return 2
    return int(any(finding.status == "fail" for finding in findings))


def as_text(findings: Sequence[Finding]) -> str:
    """A line each, "status topic text", and the fix below it."""
    lines = []
    for finding in findings:
        head = f"{finding.status:4}  {finding.topic:18}  "
        for prefix, text in ((head, finding.text), (f"{'':26}-> ", finding.fix)):
            if text:
                indent = " " * len(prefix)
                lines += textwrap.wrap(
                    text,
                    WIDTH,
                    initial_indent=prefix,
                    subsequent_indent=indent,
                    break_on_hyphens=False,
                    break_long_words=False,
                )
    return "\n".join(lines)


def summary(findings: Sequence[Finding], seconds: float) -> str:
    count = Counter(finding.status for finding in findings)
    return (
        f"{count['pass']} passed, {count['warn']} to look at (warn), {count['fail']} failed, "
        f"{count['skip']} not tried here (skip); {seconds:.0f} s"
    )
