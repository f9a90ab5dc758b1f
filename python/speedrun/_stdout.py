"""Standard output whose reader is gone, as in `speedrun … | head`.

Python ignores SIGPIPE, so that writing raises BrokenPipeError.
"""

from __future__ import annotations

import os
import sys

EXIT_NO_READER = 141  # what shells show of a program that SIGPIPE ended: 128 + 13


def discard() -> None:
    """What is in its buffer, which Python writes when it ends, and all that is printed later."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
