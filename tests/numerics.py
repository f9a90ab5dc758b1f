"""When an operator's result is right: the rules that every operator test uses.

Accuracy, with `ref64` the reference in float64 and `same` the reference in the kernel's own types:
    max |out − ref64|  <=  2 · max |same − ref64| + one ulp
    mean |out − ref64| <=  2 · mean |same − ref64| + one ulp
where an ulp is that of out's type, at the largest and at the mean magnitude of ref64. So a kernel
may be twice as wrong as plain PyTorch, and no constant is tuned to make a test pass. The largest
of few errors is a matter of luck: below 1,000 numbers PyTorch's counts as an ulp at least, and a
kernel may be three times as wrong.
Data movement and casts: the same bits.

Sums of FP8 products have a law of their own, since FP8 tensor cores add numbers of about 14 bits:
    |out − ref64| <= 2^-10 · Σ|a·b| + one ulp                            element by element
What is computed from such a sum by increasing functions lies between their values at both ends.

A chain of roundings to coarse types (the MLP's FP8 gradients) has a budget: `Estimate`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.reference._blocks import block_mask
from speedrun.reference.attention import attention

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The elements as integers of their size: equal only if every bit is (NaN payloads, -0)."""
    return x.contiguous().view(_BITS[x.element_size()])


def assert_same_bits(out: Tensor, expected: Tensor) -> None:
    assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
    wrong = (bits(out) != bits(expected)).sum().item()
    assert wrong == 0, f"{wrong} of {out.numel()} elements differ"


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Distance of neighbouring numbers of `dtype` around `magnitude`."""
    info = torch.finfo(dtype)
    if magnitude < info.smallest_normal:
        return info.smallest_normal * info.eps
    return 2.0 ** torch.tensor(magnitude, dtype=torch.float64).log2().floor().item() * info.eps


def assert_accurate(out: Tensor, same: Tensor, ref64: Tensor) -> None:
    """The law above. Infinities and NaNs of `same` must be met exactly, where they are."""
    assert out.shape == same.shape == ref64.shape and out.dtype == same.dtype
    assert ref64.dtype == torch.float64
    finite = same.isfinite()
    assert torch.equal(out.isnan(), same.isnan()), "NaNs differ from the reference's"
    infinite = same.isinf()
    assert torch.equal(out[infinite], same[infinite]), "infinities differ from the reference's"
    if not finite.any():
        return
    out64, same64, ref64 = out[finite].double(), same[finite].double(), ref64[finite]
    error, allowed = (out64 - ref64).abs(), (same64 - ref64).abs()
    few = len(ref64) < 1000
    for name, reduce in (("max", Tensor.max), ("mean", Tensor.mean)):
        step = ulp(out.dtype, reduce(ref64.abs()).item())
        least = step if few else 0.0
        limit = (3 if few else 2) * max(reduce(allowed).item(), least) + step
        found = reduce(error).item()
        assert found <= limit, f"{name} error {found:.3g} above the limit {limit:.3g}"


FP8_SUM_ERROR = 2.0**-10  # share of Σ|a·b|


def assert_accurate_fp8_sum(
    out: Tensor, ref64: Tensor, magnitude64: Tensor, share: float = FP8_SUM_ERROR
) -> None:
    """The law above; `magnitude64` is Σ|a·b| with the scales. NaNs must be where ref64 has them."""
    assert out.shape == ref64.shape == magnitude64.shape and ref64.dtype == torch.float64
    info = torch.finfo(out.dtype)
    ulps = torch.exp2(ref64.abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps
    margin = share * magnitude64 + ulps
    assert_between(out, ref64 - margin, ref64 + margin)


def assert_between(out: Tensor, low: Tensor, high: Tensor) -> None:
    """low <= out <= high, elementwise, and NaN where they are."""
    values, low, high = out.double(), low.double(), high.double()
    assert torch.equal(values.isnan(), low.isnan()), "NaNs differ from the reference's"
    wrong = (values < low) | (values > high)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        value, least, most = (x[tuple(at)].item() for x in (values, low, high))
        count = f"{wrong.sum().item()} of {out.numel()}"
        raise AssertionError(
            f"{count} out of bounds; at {at}: {value:.9g}, not in {least:.9g} .. {most:.9g}"
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An exact float64 result, and the variance of its error, element by element.

    The rule: a rounding errs uniformly within half an ulp of its type (at a relative 2^-4 in e4m3,
    2^-3 in e5m2, 2^-8 in bf16 at most; half the smallest number below the normal ones), on its own,
    and errors go on through each operation by its derivative. No constant comes from a test.
    """

    value: Tensor
    variance: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Estimate:
        return cls(value.double(), torch.zeros_like(value, dtype=torch.float64))

    @property
    def mT(self) -> Estimate:
        return Estimate(self.value.mT, self.variance.mT)

    def rounded(self, dtype: torch.dtype, scale: float = 1.0) -> Estimate:
        """Stored as `dtype` times `scale`."""
        info = torch.finfo(dtype)
        size = (self.value.abs() / scale).clamp(min=info.smallest_normal)
        step = torch.exp2(size.log2().floor()) * info.eps * scale
        return Estimate(self.value, self.variance + step.square() / 12)

    def __matmul__(self, other: Estimate) -> Estimate:
        a, b = self, other
        variance = a.value.square() @ b.variance + a.variance @ b.value.square()
        return Estimate(a.value @ b.value, variance + a.variance @ b.variance)

    def __mul__(self, other: Estimate) -> Estimate:
        a, b = self, other
        variance = a.value.square() * b.variance + a.variance * b.value.square()
        return Estimate(a.value * b.value, variance + a.variance * b.variance)

    def relu(self) -> Estimate:
        """Where the value may have another sign than it should, with all of its error."""
        near = self.value.square() <= 9 * self.variance
        passed = (self.value > 0) | near
        return Estimate(self.value.relu(), torch.where(passed, self.variance, 0.0))

    def square(self) -> Estimate:
        """The second order counts too: E[(2xe + e²)²] of a uniform e."""
        v = self.variance
        return Estimate(self.value.square(), 4 * self.value.square() * v + 9 / 5 * v.square())

    def sqrt(self) -> Estimate:
        """At most that of a square root of an error alone, since |√(x + e) − √x| <= √|e|."""
        slope = self.variance / (4 * self.value).clamp(min=1e-300)
        return Estimate(self.value.sqrt(), torch.minimum(slope, self.variance.sqrt()))


def attention_results(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cu_seqlens: Tensor, window: int, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(same, ref64) of attention, each [out, dq, dk, dv], for q, k (T, H, K), v, dout (T, H, E).

    Torch multiplies in bf16 where all heads are as wide, and in float32 elsewhere, which would not
    be the kernels' own type: so zeros are added, which change nothing.
    """
    width = max(q.shape[-1], v.shape[-1])
    results = []
    for dtype in (q.dtype, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        equal = [F.pad(t, (0, width - t.shape[-1])) for t in leaves]
        mask = block_mask(cu_seqlens, len(q), window, dtype)
        out = attention(*equal, mask, scale)[..., : v.shape[-1]]
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))])
    return tuple(results)


def assert_within_budget(out: Tensor, budget: Estimate) -> None:
    """Twice the standard deviation on average; at most what a normal law of twice that allows."""
    assert out.shape == budget.value.shape and out.isfinite().all()
    error = (out.double() - budget.value).abs()
    found, expected = error.square().mean().sqrt(), budget.variance.mean().sqrt()
    assert found <= 2 * expected, f"rms error {found:.3g} above twice {expected:.3g}"
    largest = 2 * math.sqrt(2 * math.log(max(out.numel(), 2))) * budget.variance.max().sqrt()
    assert error.max() <= largest, f"max error {error.max():.3g} above the limit {largest:.3g}"


def relu2_mlp_budget(
    h: Tensor,
    up: Tensor,
    down: Tensor,
    grad: Tensor,
    gemms,
    sizes: dict[str, float],
    scales: dict[str, float],
) -> list[Estimate]:
    """Estimates of y and the gradients of h (T, D), Up and Down (F, D): ops.relu2_mlp's roundings.

    `gemms`: its Gemms. `sizes`: the largest |h|, |grad| and post of the whole call, of which these
    may be some rows; `scales`: of Up, Down and post.
    """
    e4m3, e5m2, bf16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
    x, up, down, g = (Estimate.exact(t) for t in (h, up, down, grad))
    x_max = h.shape[1] ** 0.5 if gemms.x_scale == "static" else sizes["h"]
    x_f8 = x.rounded(e4m3, x_max / 448)
    up_f8 = up.rounded(bf16).rounded(e4m3, scales["up"])
    down_f8 = down.rounded(e4m3, scales["down"])
    g_f8 = g.rounded(e5m2, sizes["grad"] / 57344)

    def pick(name: str, plain: Estimate, fp8: Estimate) -> Estimate:
        return fp8 if getattr(gemms, name) == "fp8" else plain

    pre = (pick("up", x, x_f8) @ pick("up", up, up_f8).mT).rounded(bf16)
    post = pre.relu().square().rounded(bf16)
    post_f8 = post.rounded(e4m3, scales["post"])
    y = pick("down", post, post_f8) @ pick("down", down, down_f8)
    kept = pick("post", post, post_f8.rounded(bf16))
    product = (pick("dpre", g, g_f8) @ pick("dpre", down, down_f8).mT).rounded(bf16)
    dpre = (Estimate(2 * product.value, 4 * product.variance) * kept.sqrt()).rounded(bf16)
    dpre_f8 = dpre.rounded(e5m2, dpre.value.abs().max() / 57344)
    if gemms.dpre == gemms.dx == gemms.dup == "fp8":
        bound = 2 * h.shape[1] * sizes["grad"] * 448 * scales["down"] * sizes["post"] ** 0.5
        dpre_f8 = dpre.rounded(e5m2, bound / 57344)
    dx = pick("dx", dpre, dpre_f8) @ pick("dx", up, up_f8)
    dup = pick("dup", dpre, dpre_f8).mT @ pick("dup", x, x_f8)
    ddown = pick("ddown", kept, post_f8).mT @ pick("ddown", g, g_f8)
    return [estimate.rounded(bf16) for estimate in (y, dx, dup, ddown)]
