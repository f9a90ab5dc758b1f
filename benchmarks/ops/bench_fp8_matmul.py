"""The `fp8_matmul` family at the products of training, against cuBLASLt and what it leaves undone.

cuBLASLt has no relu² and writes one layout: behind an epilogue of ours its peer is the chain of its
product, the arithmetic compiled by Inductor, and a transpose. DeepGEMM, without per-tensor scales,
is timed at the bare products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun import ops
from speedrun.reference import fp8_matmul as reference
from speedrun.reference._fp8 import to_fp8
from tests.cases import FP8_MATMUL_FULL, FP8_MATMUL_SMALL, MatmulCase
from tests.numerics import (
    FP8_SUM_ERROR,
    assert_accurate_fp8_sum,
    assert_between,
    assert_same_bits,
)

E4M3, E5M2, BF16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
OURS = ("cuda", "triton", "torch")


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """The products of the stages of training; "all": also the small cases of the tests."""
    makers = {"store": store, "add": add, "relu2": relu2, "drelu2": drelu2}
    for case in FP8_MATMUL_FULL if shapes == "record" else FP8_MATMUL_FULL + FP8_MATMUL_SMALL:
        num_flops = 2 * case.m * case.n * case.k
        if too_large_for_cpu(device, 0, num_flops):
            print(f"fp8_matmul {case.name}: left out, {num_flops:.3g} operations for a CPU")
            continue
        yield makers[case.kind](case, device)


def some_of(size: int, device: torch.device) -> Tensor:
    """One row of each 64, so that every tile is looked at; 256 at least. All would take minutes."""
    step = max(1, min(64, size // 256))
    starts = torch.arange(0, size, step, device=device)
    return (starts + torch.randint_like(starts, step)).clamp(max=size - 1)


class Inputs:
    """A case's operands of random values, their scales, and rows of both to look at."""

    def __init__(self, case: MatmulCase, device: torch.device) -> None:
        def operand(rows: int, dtype: torch.dtype) -> Tensor:
            values = torch.empty(rows, case.k, dtype=dtype, device=device)
            for part in values.split(4096):  # float32 copies of all of it would not fit
                part.copy_(to_fp8(30 * torch.randn(part.shape, device=device), one, dtype))
            return values

        one = torch.ones((), device=device)
        self.case = case
        self.a, self.b = operand(case.m, case.a_dtype), operand(case.n, case.b_dtype)
        self.scales = one * 0.013, one * 0.11 / max(1, case.k) ** 0.5
        self.rows, self.cols = some_of(case.m, device), some_of(case.n, device)
        self.operand_bytes = self.a.numel() + self.b.numel()

    def seen(self, x: Tensor) -> Tensor:
        """The rows and columns of a result (M, N) that are looked at."""
        whole = x.view(torch.uint8) if x.element_size() == 1 else x
        return whole[self.rows][:, self.cols].view(x.dtype)

    def sums(self) -> tuple[Tensor, Tensor]:
        """The product there in float64, and Σ|a·b| with the scales."""
        a = self.a.view(torch.uint8)[self.rows].view(self.a.dtype).double()
        b = self.b.view(torch.uint8)[self.cols].view(self.b.dtype).double()
        product = reference.fp8_matmul(a, b, *self.scales)
        return product, reference.fp8_matmul(a.abs(), b.abs(), *self.scales)

    def scaled_mm(self, out_dtype: torch.dtype = BF16) -> Callable[[], Tensor]:
        fast = self.case.fast_accum
        return peers.scaled_mm(self.a, self.b, *self.scales, out_dtype=out_dtype, fast_accum=fast)

    def benchmark(self, call, check, out_bytes: int, others=None, **options) -> Benchmark:
        case = self.case
        return Benchmark(
            stem="fp8_matmul",
            case=case.name,
            call=call,
            check=check,
            num_bytes=self.operand_bytes + out_bytes * case.m * case.n,
            num_flops={"fp8": 2 * case.m * case.n * case.k},
            peers=others or {},
            **options,
        )


def store(case: MatmulCase, device: torch.device) -> Benchmark:
    inputs = Inputs(case, device)

    def check(name: str, result: Tensor) -> None:
        if name != "deepgemm":  # which has other scales
            assert_accurate_fp8_sum(inputs.seen(result), *inputs.sums())

    def deepgemm() -> Callable[[], Tensor]:
        out = torch.empty(case.m, case.n, dtype=BF16, device=device)
        if case.a_dtype != E4M3:
            raise peers.Missing("DeepGEMM takes e4m3 only")
        return peers.deep_gemm_fp8(inputs.a, inputs.b, out)

    def call() -> Tensor:
        return ops.fp8_matmul(inputs.a, inputs.b, *inputs.scales, fast_accum=case.fast_accum)

    others = {"cublaslt": inputs.scaled_mm, "deepgemm": deepgemm}
    return inputs.benchmark(call, check, 2, others)


def add(case: MatmulCase, device: torch.device) -> Benchmark:
    """c += product, float32; the peer adds what cuBLASLt stores in float32."""
    inputs = Inputs(case, device)
    before = torch.randn(case.m, case.n, device=device)
    c = before.clone()

    def check(name: str, result: Tensor) -> None:
        product, magnitude = inputs.sums()
        start = inputs.seen(before)
        assert_accurate_fp8_sum(inputs.seen(c), product + start, magnitude + start.abs())

    def cublaslt() -> Callable[[], Tensor]:
        multiply = inputs.scaled_mm(FP32)
        return lambda: c.add_(multiply())

    return inputs.benchmark(
        call=lambda: ops.fp8_matmul_add_(
            c, inputs.a, inputs.b, *inputs.scales, fast_accum=case.fast_accum
        ),
        check=check,
        out_bytes=8,
        others={"cublaslt+add": cublaslt},
        reset=lambda: c.copy_(before),
    )


def relu2(case: MatmulCase, device: torch.device) -> Benchmark:
    """What a layer's forward pass keeps: post in bf16, in FP8 in both layouts, and its amax."""
    inputs = Inputs(case, device)
    post_scale = torch.full((), 0.02, device=device)

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        post, post_f8, post_f8_t, amax = result
        product, magnitude = inputs.sums()
        low, high = (product + sign * FP8_SUM_ERROR * magnitude for sign in (-1, 1))
        low, high = (x.bfloat16().float().relu().square().bfloat16() for x in (low, high))
        assert_between(inputs.seen(post), low, high)
        slack = 0 if name in OURS else 2.0**-8  # Inductor leaves the rounding of post out
        low, high = (inputs.seen(post).float() * (1 + sign * slack) for sign in (-1, 1))
        bounds = fp8_bounds(low, post_scale)[0], fp8_bounds(high, post_scale)[1]
        assert_between(inputs.seen(post_f8).float(), *bounds)
        assert_same_bits(post_f8_t, transposed(post_f8))
        assert amax == post.max()

    def chain() -> Callable[[], tuple[Tensor, ...]]:
        multiply = inputs.scaled_mm()

        def finish(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            post = pre.float().relu().square().bfloat16()
            return post, to_fp8(post, post_scale, E4M3), post.amax().float()

        finish = torch.compile(finish, dynamic=False)

        def call() -> tuple[Tensor, ...]:
            post, post_f8, amax = finish(multiply())
            return post, post_f8, transposed(post_f8), amax

        call()
        return call

    return inputs.benchmark(
        call=lambda: ops.fp8_matmul_relu2(
            inputs.a,
            inputs.b,
            *inputs.scales,
            post_scale=post_scale,
            transposed=True,
            fast_accum=case.fast_accum,
        ),
        check=check,
        out_bytes=4,
        others={"cublaslt+inductor+transpose": chain},
    )


def drelu2(case: MatmulCase, device: torch.device) -> Benchmark:
    """All in FP8: post in e4m3, dpre in e5m2 in both layouts, and its amax."""
    inputs = Inputs(case, device)
    post_scale, out_scale = torch.full((2,), 0.02, device=device)
    post = torch.empty(case.m, case.n, dtype=E4M3, device=device)
    for part in post.split(4096):
        part.copy_((30 * torch.randn(part.shape, device=device)).clamp(0, 448))

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        dpre, dpre_t, amax = result
        product, magnitude = inputs.sums()
        root = 2 * (inputs.seen(post).double() * post_scale).sqrt()
        margin = (FP8_SUM_ERROR + 2.0**-20) * magnitude * root
        if name not in OURS:
            margin += 2.0**-8 * (product * root).abs()  # it rounds the product to bf16 in between
        low, high = ((product * root + sign * margin).float() for sign in (-1, 1))
        bounds = fp8_bounds(low, out_scale, E5M2)[0], fp8_bounds(high, out_scale, E5M2)[1]
        assert_between(inputs.seen(dpre).float(), *bounds)
        assert_same_bits(dpre_t, transposed(dpre))
        largest = dpre.view(torch.uint8).bitwise_and(127).max().view(E5M2).float() * out_scale
        assert largest * 0.87 <= amax and amax <= largest * 1.15

    def chain() -> Callable[[], tuple[Tensor, ...]]:
        multiply = inputs.scaled_mm()

        def finish(grad: Tensor) -> tuple[Tensor, Tensor]:
            dpre = 2 * grad.float() * (post.float() * post_scale).sqrt()
            return to_fp8(dpre, out_scale, E5M2), dpre.abs().amax()

        finish = torch.compile(finish, dynamic=False)

        def call() -> tuple[Tensor, ...]:
            dpre, amax = finish(multiply())
            return dpre, transposed(dpre), amax

        call()
        return call

    return inputs.benchmark(
        call=lambda: ops.fp8_matmul_drelu2(
            inputs.a,
            inputs.b,
            *inputs.scales,
            post,
            post_scale=post_scale,
            out_scale=out_scale,
            transposed=True,
            fast_accum=case.fast_accum,
        ),
        check=check,
        out_bytes=3,
        others={"cublaslt+inductor+transpose": chain},
    )


def fp8_bounds(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """x / scale in `dtype`, if divided, or multiplied by the reciprocal."""
    edges = [to_fp8(x, scale * (1 + e), dtype).float() for e in (-(2**-22), 2**-22)]
    return torch.minimum(*edges), torch.maximum(*edges)


def transposed(x: Tensor) -> Tensor:
    return x.view(torch.uint8).mT.contiguous().view(x.dtype)
