"""What lets a step's launches run as CUDA graphs: the optimizer's numbers on the device, and the
graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from speedrun.schedule import StepPlan
from speedrun.update_rules import UpdateRule


class StepNumbers:
    """The `numbers` of all rules in one tensor, which one copy a step brings to the device."""

    def __init__(self, rules: Iterable[UpdateRule], device: torch.device) -> None:
        self.places: dict[UpdateRule, slice] = {}
        self.values: list[float] = []
        for rule in rules:
            first = len(self.values)
            self.values += rule.numbers.tolist()
            self.places[rule] = slice(first, len(self.values))
        self.on_device = torch.tensor(self.values, dtype=torch.float64, device=device)
        for rule, place in self.places.items():
            rule.numbers = self.on_device[place]

    def write(self, rules: Iterable[UpdateRule], plan: StepPlan) -> None:
        """Those of the rules whose update begins. The host doesn't wait for the device."""
        for rule in rules:
            self.values[self.places[rule]] = rule.next_numbers(plan)
        # Pinned and new in each step: torch keeps it until the device has read it.
        pinned = self.on_device.is_cuda
        values = torch.tensor(self.values, dtype=torch.float64, pin_memory=pinned)
        self.on_device.copy_(values, non_blocking=True)


class StepGraphs:
    """CUDA graphs of some work, one for each kind of it.

    A kind's first run is as it is, which leaves everything compiled and allocated; its second is
    captured. All graphs use the same memory, one after the other, so nothing that a graph allocates
    may be read behind another one. Opt-in: not yet run on hardware.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting  # the config's, that asks for them
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, kind: Hashable, work: Callable[[], None]) -> None:
        """Do work of this kind. It must touch the same tensors each time."""
        if kind not in self.graphs:
            self.graphs[kind] = None
            work()
            return
        if self.graphs[kind] is None:
            self.graphs[kind] = torch.cuda.CUDAGraph()
            # Loader, watchdog and checkpoints may call CUDA in their threads meanwhile.
            mode = "thread_local"
            try:
                with torch.cuda.graph(self.graphs[kind], self.pool, capture_error_mode=mode):
                    work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"these launches can't be captured as a CUDA graph ({error}); go on without: "
                    f"--set {self.setting}=false"
                ) from error
        self.graphs[kind].replay()
