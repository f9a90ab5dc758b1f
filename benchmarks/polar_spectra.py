"""How far `polar_express` is from its own polynomials, by spectrum, form and number type.

    python -m benchmarks.polar_spectra [--shape 3072x768] [--variant "gram fp16"] [--seeds N]

A bank of each shape holds a matrix a spectrum and seed. For each variant: the distance of the
result from U·f(S)·Vᵀ in float64, f the exact polynomials of the variant, as a share of that one's
norm; ‖OᵀO − I‖_F/√n for the shorter side n; and the largest singular value; the worst of all seeds.
Runs on a CPU, by the reference, whose roundings are those of the kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.report import markdown_table
from speedrun.ops.polar_express import RECORD, S4, PolarExpress, polar_express
from speedrun.reference._polar_coefficients import value_at

SHAPES = ((256, 768), (768, 768), (3072, 768), (768, 3072))

GAUSSIAN = "Gaussian"
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {  # of k = 1 … n, except for the first
    "k^-1": lambda k: 1 / k,
    "1 … 1e-2": lambda k: 10 ** (-2 * (k - 1) / (len(k) - 1)),
    "1 … 1e-3": lambda k: 10 ** (-3 * (k - 1) / (len(k) - 1)),
    "1 … 1e-5": lambda k: 10 ** (-5 * (k - 1) / (len(k) - 1)),
    "rank 1/8": lambda k: torch.where(k <= len(k) // 8, 1.0, 1e-6).double(),
    "spike": lambda k: torch.where(k == 1, 1.0, 1e-5).double(),
}

_GRAM, _S4_GRAM = (dataclasses.replace(spec, form="gram") for spec in (RECORD, S4))
VARIANTS: dict[str, tuple[PolarExpress, torch.dtype]] = {
    "standard bf16": (RECORD, torch.bfloat16),
    "standard fp16": (RECORD, torch.float16),
    "gram bf16": (_GRAM, torch.bfloat16),
    "gram fp16": (_GRAM, torch.float16),
    "gram fp16, restarts 2 and 4": (dataclasses.replace(_GRAM, restarts=(2, 4)), torch.float16),
    "s4 standard bf16": (S4, torch.bfloat16),
    "s4 standard fp16": (S4, torch.float16),
    "s4 gram fp16": (_S4_GRAM, torch.float16),
}


class Quality(NamedTuple):
    """Of one result; the exact polynomials' own largest singular value for comparison."""

    residual: float
    orthogonality: float
    largest: float
    exact_largest: float


@functools.lru_cache(maxsize=4)
def singular_vectors(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of a Gaussian matrix in float64."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.linalg.svd(gaussian, full_matrices=False)


def spectra(gaussian: Tensor) -> Tensor:
    """(spectra, n): the Gaussian's own, then those of SPECTRA."""
    k = torch.arange(1, len(gaussian) + 1, dtype=torch.float64)
    return torch.stack([gaussian, *(spectrum(k) for spectrum in SPECTRA.values())])


def exact_values(values: Tensor, spec: PolarExpress) -> Tensor:
    """What the polynomials of `spec`, and its norm, make of singular values (..., n)."""
    values = values / (values.norm(dim=-1, keepdim=True) * spec.norm_factor + spec.eps)
    if spec.norm == "s4":
        norm = values.square().norm(dim=-1, keepdim=True).sqrt()
        values = values / (norm * spec.norm_factor + spec.eps)
    for abc in spec.coefficients:
        values = value_at(values, abc)
    return values


def qualities(
    shape: tuple[int, int], num_seeds: int, spec: PolarExpress, dtype: torch.dtype
) -> dict[str, Quality]:
    """By spectrum; all matrices are one bank. Of each figure the largest over seeds."""
    factors = [singular_vectors(shape, seed) for seed in range(num_seeds)]
    bank = torch.cat([(u * spectra(s)[:, None]) @ vh for u, s, vh in factors])
    found = polar_express(bank, dtype, spec).double().chunk(num_seeds)
    worst: dict[str, Quality] = {}
    for (u, s, vh), results in zip(factors, found, strict=True):
        exact = exact_values(spectra(s), spec)
        for name, out, values in zip((GAUSSIAN, *SPECTRA), results, exact, strict=True):
            gram = out.mT @ out if shape[0] > shape[1] else out @ out.mT
            n = len(gram)
            quality = Quality(
                residual=((out - (u * values) @ vh).norm() / values.norm()).item(),
                orthogonality=(gram - torch.eye(n, dtype=gram.dtype)).norm().item() / n**0.5,
                largest=largest_eigenvalue(gram) ** 0.5,
                exact_largest=values.max().item(),
            )
            worst[name] = Quality(*map(max, quality, worst.get(name, quality)))
    return worst


def largest_eigenvalue(symmetric: Tensor) -> float:
    if not symmetric.isfinite().all():  # a form may overflow
        return math.nan
    return torch.linalg.eigvalsh(symmetric)[-1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="MxN", help="default: all of the banks")
    parser.add_argument("--variant", action="append", choices=[*VARIANTS], help="default: all")
    parser.add_argument("--seeds", type=int, default=1, help="matrices of each spectrum (1)")
    args = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in args.shape or ()] or SHAPES
    for shape in shapes:
        start, rows = time.monotonic(), []
        for name in args.variant or VARIANTS:
            found = qualities(shape, args.seeds, *VARIANTS[name]).values()
            cells = [f"{q.residual:.1e} {q.orthogonality:.2f} {q.largest:.2f}" for q in found]
            rows.append((name, *cells))
        print(f"\n{shape[0]} x {shape[1]}: residual, orthogonality, largest singular value")
        print(markdown_table(("variant", GAUSSIAN, *SPECTRA), rows))
        print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
