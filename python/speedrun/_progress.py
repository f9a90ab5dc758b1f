"""How far a long transfer is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable


class Progress:
    """Bytes so far: a bar on a terminal that has tqdm, else a line each 5 s."""

    def __init__(self, total: int | None, say: Callable[[str], None], enabled: bool):
        self.total, self.say, self.enabled = total, say, enabled
        self.finished = 0  # bytes of the files before this one
        self.began = self.last = time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, unit="B", unit_scale=True)

    def show(self, done_of_file: int) -> None:
        done = self.finished + done_of_file
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done - self.bar.n)  # backwards where a file starts again
        elif self.enabled and now - self.last >= 5:
            self.last = now
            of = f" of {self.total / 1e6:,.0f}" if self.total else ""
            self.say(f"  {done / 1e6:,.0f}{of} MB after {now - self.began:.0f} s")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
