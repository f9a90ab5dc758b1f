"""The steps of `polar_express` over `sym_matmul`, for several banks at a time.

The same as reference/polar_express.py. Banks of equal short side n lie one after another in the
buffers of their n × n matrices, so that each product of those is one launch for all. All buffers
are allocated before the first step (but for the counters of `polar_chain`), and nothing waits for
the device: the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speedrun.ops.polar_chain import num_slots, polar_chain, serves_polar_express
from speedrun.ops.sym_matmul import sym_matmul
from speedrun.reference._polar_coefficients import Quintic
from speedrun.reference.polar_express import (
    PolarExpress,
    is_tall,
    rounds_twice,
    s4_scale,
    takes_gram,
)

Steps = Sequence[Quintic]


def run_banks(xs: Sequence[Tensor], spec: PolarExpress) -> list[Tensor]:
    """The steps on normalised X (B, M, N), contiguous; what is in them is lost."""
    found: list[Tensor] = list(xs)
    groups: dict[tuple[int, torch.dtype, bool], list[int]] = {}
    for index, x in enumerate(xs):
        if x.numel():
            key = (min(x.shape[-2:]), x.dtype, takes_gram(x, spec))
            groups.setdefault(key, []).append(index)
    for (n, dtype, gram), places in groups.items():
        banks = [xs[index] for index in places]
        in_one_launch = gram and serves_polar_express(banks[0].device, dtype, n, spec.chains)
        group = _Group(banks, num_slots(max(map(len, spec.chains))) if in_one_launch else 1)
        if spec.norm == "s4":
            group.rescale(spec)
        results = (_gram if gram else _standard)(group, spec)
        for index, x in zip(places, results, strict=True):
            found[index] = x
    return found


class _Group:
    """Banks of one short side n, type and form: X, a second buffer for each, and XXᵀ of all.

    gram is (B, n, n), the first of work's slots. What XXᵀ is for wide banks, XᵀX is for tall ones,
    and all is from the right.
    """

    def __init__(self, xs: list[Tensor], slots: int) -> None:
        self.xs, self.spare = xs, [torch.empty_like(x) for x in xs]
        n = min(xs[0].shape[-2:])
        self.sizes = [len(x) for x in xs]
        self.work = xs[0].new_empty(slots, sum(self.sizes), n, n)
        self.gram = self.work[0]
        # On a CPU, for Triton's interpreter, `add` would round its alpha to X's type.
        shapes = [x.shape if rounds_twice(x, x.dtype) and not x.is_cuda else (0,) for x in xs]
        self.wide = [self.gram.new_empty(shape, dtype=torch.float32) for shape in shapes]
        self.compute_gram()

    def compute_gram(self) -> None:
        for x, part in zip(self.xs, self.gram.split(self.sizes), strict=True):
            sym_matmul(x, trans=is_tall(x), out=part)

    def rescale(self, spec: PolarExpress) -> None:
        """From the Frobenius norm to ‖XXᵀ‖_F^½."""
        scale = s4_scale(self.gram, spec)
        for x, part in zip(self.xs, scale.split(self.sizes), strict=True):
            x.mul_(part)
        self.gram.mul_(scale.square_())

    def apply(self, factor: Tensor, a: float = 0.0) -> None:
        """X ← factor·X + a·X; `factor` (B, n, n)."""
        parts = factor.split(self.sizes)
        for x, part, out, wide in zip(self.xs, parts, self.spare, self.wide, strict=True):
            pair = (x, part) if is_tall(x) else (part, x)
            if a and rounds_twice(x, x.dtype):
                torch.bmm(*pair, out=out)
                if x.is_cuda:
                    out.add_(x, alpha=a)
                else:
                    out.copy_(torch.add(out, wide.copy_(x), alpha=a, out=wide))
            elif a:
                torch.baddbmm(x, *pair, beta=a, out=out)
            else:
                torch.bmm(*pair, out=out)
        self.xs, self.spare = self.spare, self.xs


def _standard(group: _Group, spec: PolarExpress) -> list[Tensor]:
    poly = torch.empty_like(group.gram)
    for step, (a, b, c) in enumerate(spec.coefficients):
        if step:
            group.compute_gram()
        sym_matmul(group.gram, alpha=c, beta=b, c=group.gram, out=poly)
        group.apply(poly, a)
    return group.xs


def _gram(group: _Group, spec: PolarExpress) -> list[Tensor]:
    run = _one_launch(group.work) if len(group.work) > 1 else ChainOfProducts(group.gram)
    for number, steps in enumerate(spec.chains):
        if number:
            group.compute_gram()
        group.apply(run(steps))
    return group.xs


def _one_launch(work: Tensor) -> Callable[[Steps], Tensor]:
    return lambda steps: polar_chain(work[: num_slots(len(steps))], steps)


class ChainOfProducts:
    """What `polar_chain` computes, product after product, on R (B, n, n), which is overwritten."""

    def __init__(self, r: Tensor) -> None:
        self.r = r
        self.z, self.q, self.product = (torch.empty_like(r) for _ in range(3))
        wide = torch.promote_types(r.dtype, torch.float32)
        self.diagonal = r.new_empty(r.shape[:-1], dtype=wide)

    def __call__(self, steps: Steps) -> Tensor:
        r, z, q, product = self.r, self.z, self.q, self.product
        for step, (a, b, c) in enumerate(steps):
            sym_matmul(r, alpha=c, beta=b, c=r, out=z)
            if step == 0:
                # By way of float32: torch may round a itself to the type before it adds.
                self.diagonal.copy_(z.diagonal(dim1=-2, dim2=-1)).add_(a)
                q.copy_(z).diagonal(dim1=-2, dim2=-1).copy_(self.diagonal)
            else:
                sym_matmul(q, z, beta=a, c=q, out=product)
                q, product = product, q
            if step + 1 < len(steps):
                sym_matmul(r, z, beta=a, c=r, out=product)
                sym_matmul(z, product, beta=a, c=product, out=r)
        return q
