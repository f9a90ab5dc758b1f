"""Newton–Schulz orthogonalisation; Polar Express (arXiv 2505.16932) as in RECIPE section 4.

B matrices of M × N in a bank. Every product is summed in at least fp32 and rounded once to the type
of the iteration (tall matrices of more than 1,024 rows: see `_standard`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from speedrun.reference._gram_steps import gram_steps
from speedrun.reference._polar_coefficients import Quintic, polar_coefficients

# polar_coefficients(5, 1e-3), in the digits of the public program.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SUM_CHUNK = 8192  # elements of a matrix whose squares make one partial sum of its norm


@dataclass(frozen=True)
class PolarExpress:
    """What an orthogonalisation computes; the default is the record's.

    form: "standard" or "gram": `_standard`, `_gram` and `takes_gram`. restarts: the steps before
    which the Gram form computes XXᵀ anew. norm: what bounds the singular values, ‖X‖_F or, as "s4",
    ‖XXᵀ‖_F^½, which is nearer to the largest. ValueError: a form, norm, restart or coefficients
    that can't be.
    """

    coefficients: tuple[Quintic, ...] = COEFFICIENTS
    form: Literal["standard", "gram"] = "standard"
    restarts: tuple[int, ...] = (2,)
    norm: Literal["frobenius", "s4"] = "frobenius"
    norm_factor: float = 1.02
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.coefficients or any(len(abc) != 3 for abc in self.coefficients):
            raise ValueError(
                f"PolarExpress: coefficients must be one (a, b, c) a step, got {self.coefficients}"
            )
        for name, allowed in (("form", ("standard", "gram")), ("norm", ("frobenius", "s4"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"PolarExpress: {name} must be {' or '.join(allowed)}, got "
                    f"{getattr(self, name)!r}"
                )
        if any(restart < 1 for restart in self.restarts):
            raise ValueError(
                f"PolarExpress: restarts must be steps from 1 on, counted from 0, got "
                f"{self.restarts}"
            )

    @property
    def chains(self) -> tuple[tuple[Quintic, ...], ...]:
        """The coefficients, cut before each restart."""
        steps = len(self.coefficients)
        cuts = sorted({0, steps, *(restart for restart in self.restarts if restart < steps)})
        return tuple(self.coefficients[start:end] for start, end in pairwise(cuts))


RECORD = PolarExpress()
S4 = PolarExpress(polar_coefficients(4, 5.3e-3), norm="s4")  # a step less, by the tighter norm


def polar_express(
    g_BMN: Tensor, dtype: torch.dtype | None = None, spec: PolarExpress = RECORD
) -> Tensor:
    """(B, M, N) in `dtype` (default: G's own): singular values driven to about 1.

    X = G/(‖G‖_F·norm_factor + eps) in at least fp32, rounded once; with the norm "s4" divided again
    by ‖XXᵀ‖_F^½·norm_factor + eps, and XXᵀ by its square. Then the steps.
    """
    dtype = dtype or g_BMN.dtype
    rounded = _rounding_to(dtype)
    x = rounded(normalized(g_BMN, dtype, spec))
    gram = rounded(_product_with_itself(x))
    if spec.norm == "s4":
        scale = s4_scale(gram, spec)
        x, gram = rounded(x * scale), rounded(gram * scale.square())
    iterate = _gram if takes_gram(x, spec) else _standard
    return iterate(x, gram, spec, dtype).to(dtype)


def normalized(g_BMN: Tensor, dtype: torch.dtype, spec: PolarExpress) -> Tensor:
    """G/(‖G‖_F·norm_factor + eps), computed in at least fp32 and rounded once to `dtype`."""
    g = g_BMN.to(torch.promote_types(g_BMN.dtype, torch.float32))
    return (g / (g.norm(dim=(-2, -1), keepdim=True) * spec.norm_factor + spec.eps)).to(dtype)


def s4_scale(gram: Tensor, spec: PolarExpress) -> Tensor:
    """(B, 1, 1) in at least fp32: what X is multiplied by, and XXᵀ by its square."""
    wide = torch.promote_types(gram.dtype, torch.float32)
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=wide)
    return 1 / (norm.sqrt() * spec.norm_factor + spec.eps)


def is_tall(x: Tensor) -> bool:
    """Then XᵀX, from the right, is the smaller of the two products with itself."""
    return x.shape[-2] > x.shape[-1]


def takes_gram(x: Tensor, spec: PolarExpress) -> bool:
    """Square matrices never do: it is as much work for them, and with one restart less accurate."""
    return spec.form == "gram" and x.shape[-2] != x.shape[-1]


def rounds_twice(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the standard form's X·B is rounded to `dtype` before a·X is added."""
    return is_tall(x) and x.shape[-2] > 1024 and dtype in (torch.float16, torch.bfloat16)


def _product_with_itself(x: Tensor) -> Tensor:
    return x.mT @ x if is_tall(x) else x @ x.mT


def _rounding_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounds to `dtype`; what comes out is fp32 or wider again, for the next product."""
    return lambda t: t.to(dtype).to(torch.promote_types(dtype, torch.float32))


def _standard(x: Tensor, gram: Tensor, spec: PolarExpress, dtype: torch.dtype) -> Tensor:
    """Per step A = XXᵀ, B = b·A + c·A², X ← a·X + B·X.

    Tall matrices (M > N) take A = XᵀX from the right; above 1,024 rows the product is rounded
    before a·X is added (the public kernels' order).
    """
    rounded, tall = _rounding_to(dtype), is_tall(x)
    two_roundings = rounds_twice(x, dtype)
    for step, (a, b, c) in enumerate(spec.coefficients):
        if step:
            gram = rounded(_product_with_itself(x))
        poly = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        if two_roundings:
            x = rounded(a * x + rounded(x @ poly))
        else:
            x = rounded(torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a))
    return x


def _gram(x: Tensor, r: Tensor, spec: PolarExpress, dtype: torch.dtype) -> Tensor:
    """The steps on R = XXᵀ alone (`gram_steps`), for all but two X's.

    Rounding leaves R with eigenvalues below 0, which grow by a² a step: hence the restarts, which
    multiply what there is into X and compute XXᵀ anew.
    """
    rounded = _rounding_to(dtype)
    for number, steps in enumerate(spec.chains):
        if number:
            r = rounded(_product_with_itself(x))
        q = gram_steps(r, steps, dtype)
        x = rounded(x @ q if is_tall(x) else q @ x)
    return x


def momentum_step(grad_BMN: Tensor, momentum_BMN: Tensor, mu: float | Tensor) -> Tensor:
    """M ← lerp(M, G, 1−μ) in place; returns the Nesterov gradient lerp(G, M, μ).

    In M's type; μ, a number or 0-d tensor, is rounded to it first, as in the public program.
    """
    g = grad_BMN.to(momentum_BMN.dtype)
    if not isinstance(mu, Tensor):
        mu = torch.full((), mu, dtype=torch.float64, device=g.device)
    mu = mu.to(g.dtype)
    momentum_BMN.lerp_(g, (1 - mu.double()).to(g.dtype))
    return g.lerp(momentum_BMN, mu)


def momentum_out(grad_BMN: Tensor, momentum_BMN: Tensor, mu: Tensor, sums_BP: Tensor) -> None:
    """`momentum_step`, of which only the sums of squares of each SUM_CHUNK elements are kept."""
    nesterov = momentum_step(grad_BMN, momentum_BMN, mu).flatten(1)
    nesterov = pad(nesterov, (0, -nesterov.shape[1] % SUM_CHUNK))
    sums_BP.copy_(nesterov.unflatten(1, (-1, SUM_CHUNK)).square().sum(-1))


def normalize_out(
    grad_BMN: Tensor,
    momentum_BMN: Tensor,
    mu: Tensor,
    sums_BP: Tensor,
    norm_factor: float,
    eps: float,
    x_BMN: Tensor,
) -> None:
    """Writes the Nesterov gradient over its norm: `normalized`, from what `momentum_out` left."""
    g = grad_BMN.to(momentum_BMN.dtype)
    norm = sums_BP.sum(1).sqrt().view(-1, 1, 1)
    x_BMN.copy_(g.lerp(momentum_BMN, mu.to(g.dtype)) / (norm * norm_factor + eps))
