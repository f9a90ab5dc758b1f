"""When an operator's result is right: the rules that every operator test uses.

Accuracy, with `ref64` the reference in float64 and `same` the reference in the kernel's own types:
    max |out − ref64|  <=  2 · max |same − ref64| + one ulp
    mean |out − ref64| <=  2 · mean |same − ref64| + one ulp
where an ulp is that of out's type, at the largest and at the mean magnitude of ref64. So a kernel
may be twice as wrong as plain PyTorch, and no constant is tuned to make a test pass.
Data movement and casts: the same bits.

Sums of FP8 products have a law of their own, since FP8 tensor cores add numbers of about 14 bits:
    |out − ref64| <= 2^-12 · Σ|a·b| + one ulp                            element by element
What is computed from such a sum by increasing functions lies between their values at both ends.
"""

import torch
from torch import Tensor

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
    for name, reduce in (("max", Tensor.max), ("mean", Tensor.mean)):
        limit = 2 * reduce(allowed).item() + ulp(out.dtype, reduce(ref64.abs()).item())
        found = reduce(error).item()
        assert found <= limit, f"{name} error {found:.3g} above the limit {limit:.3g}"


FP8_SUM_ERROR = 2.0**-12  # share of Σ|a·b|; to be confirmed on hardware


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
