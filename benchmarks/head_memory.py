"""Time and peak memory of the head, loss and both gradients, by form.

    python -m benchmarks.head_memory [--shape TxDxV] [--dtype float32|bfloat16] [--fp8]

Peak: what is allocated at most beyond x, W and its copies (in FP8 2 bytes a weight, without logits
4), by the allocator's counters on a GPU, by the profiler's on a CPU. Forms: the plain expression,
all logits at once and their gradient by autograd; `head_loss`, which takes rows in chunks where
logits are many; with --fp8 `head_loss` in FP8, with its logits in memory and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import bench
from benchmarks.report import markdown_table
from speedrun.ops.head_loss import head_loss, quantize_head
from speedrun.ops.softcap_ce import LOGITS_AT_ONCE
from speedrun.reference import softcap_ce as reference

SOFTCAP = (23.0, 5.0, 7.5)  # RECIPE section 3
SHAPES = ("2048x128x272", "4096x128x272", "1024x768x50304")  # tiny's parts; the record's width


def forms(
    shape: tuple[int, int, int], dtype: torch.dtype, fp8: bool, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Of two targets a position: each gives the losses' gradients with respect to x and W."""
    num_tokens, dim, num_columns = shape
    x = torch.randn(num_tokens, dim, device=device).to(dtype).requires_grad_()
    w = torch.randn(dim, num_columns, device=device).mul_(0.1).to(dtype).requires_grad_()
    targets = torch.randint(num_columns, (num_tokens, 2), device=device)
    arguments = (targets, torch.tensor([1.0, 0.5], device=device), *SOFTCAP)

    def gradients(losses: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses.sum(), (x, w))

    found: dict[str, Callable[[], object]] = {
        "plain expression": lambda: gradients(reference.softcap_ce(x @ w, *arguments)),
        "head_loss": lambda: gradients(head_loss(x, w, *arguments)),
    }
    if fp8:
        head = quantize_head(w.detach(), form="fused")
        for name, form in (("head_loss in FP8", "logits"), ("the same, no logits", "fused")):
            found[name] = lambda form=form: gradients(
                head_loss(x, w, *arguments, fp8=head, form=form)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="TxDxV", help=f"default: {SHAPES}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--fp8", action="store_true", help="too; needs --dtype bfloat16")
    parser.add_argument("--repeats", type=int, default=10, help="samples of each (10)")
    args = parser.parse_args()
    if args.fp8 and args.dtype != "bfloat16":
        parser.error("--fp8 needs --dtype bfloat16")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mode = bench.modes(device)[-1]
    rows = []
    for text in args.shape or SHAPES:
        num_tokens, dim, num_columns = map(int, text.split("x"))
        shape = (num_tokens, dim, num_columns)
        calls = forms(shape, getattr(torch, args.dtype), args.fp8, device)
        timings = bench.time_interleaved(calls, device, mode, args.repeats)
        for name, call in calls.items():
            timing, peak = timings[name], bench.peak_bytes(call, device)
            time_ms = f"{timing.median_us / 1e3:.2f} ± {timing.iqr_us / 1e3:.2f}"
            rows.append((text, name, time_ms, f"{peak / 1e6:.1f}"))
            print(*rows[-1], flush=True)
    print(f"\n{args.dtype}, {device.type}, {torch.get_num_threads()} threads, mode {mode}")
    print(f"head_loss takes at most {LOGITS_AT_ONCE[device.type]:,} logits at once")
    print(markdown_table(("shape", "form", "ms ± IQR", "peak MB"), rows))


if __name__ == "__main__":
    main()
