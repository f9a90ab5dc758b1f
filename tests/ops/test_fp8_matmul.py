"""The `fp8_matmul` family on every backend that this machine has."""

import itertools

import pytest
import torch

from cases import FP8_MATMUL_SMALL
from numerics import (
    FP8_SUM_ERROR,
    assert_accurate,
    assert_accurate_fp8_sum,
    assert_between,
    assert_same_bits,
    bits,
)
from op_helpers import skips_without_cuda_kernel
from speedrun import ops
from speedrun.ops import _dispatch
from speedrun.reference import fp8_matmul as reference
from speedrun.reference._fp8 import FP8_MAX, to_fp8

E4M3, E5M2, BF16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
BACKENDS = ["torch", "triton", pytest.param("cuda", marks=pytest.mark.sm90)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BY_NAME = {case.name: case for case in FP8_MATMUL_SMALL}
FEW = [BY_NAME[name] for name in ("edges", "unaligned", "one_row", "no_rows", "no_k")]

small = pytest.mark.parametrize("case", FP8_MATMUL_SMALL, ids=lambda case: case.name)
few = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
pairs = pytest.mark.parametrize(
    "pair",
    list(itertools.product((E4M3, E5M2), repeat=2)),
    ids=lambda pair: "-".join(str(dtype).removeprefix("torch.float8_") for dtype in pair),
)
fast_or_not = pytest.mark.parametrize("fast", [False, True], ids=["precise", "fast"])


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("Triton has no e4m3 before compute capability 8.9")
    if request.param == "cuda" and _dispatch.library_problem():
        pytest.skip(_dispatch.library_problem())
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def share(backend):
    """Of Σ|a·b|, the error that a backend's sums may have: float32 sums are held to far less."""
    return FP8_SUM_ERROR if DEVICE == "cuda" and backend != "torch" else 2.0**-20


def call(op, *args, **options):
    with skips_without_cuda_kernel():
        return op(*args, **options)


def scalar(value):
    return torch.tensor(value, dtype=FP32, device=DEVICE)


def random_fp8(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = 30 * torch.randn(shape, generator=generator)
    return to_fp8(values, torch.tensor(1.0), dtype).to(DEVICE)


def make_inputs(case, pair=(E4M3, E4M3), batch=()):
    """a, b, scale_a, scale_b: sums of the order of 1."""
    a = random_fp8((*batch, case.m, case.k), pair[0], 0)
    b = random_fp8((*batch, case.n, case.k), pair[1], 1)
    return a, b, scalar(0.013), scalar(0.11 / max(1, case.k) ** 0.5)


def sum_and_magnitude(a, b, scale_a, scale_b, row_scale=None):
    """The product in float64, and Σ|a·b| with all the scales."""
    a, b = a.double(), b.double()
    row_size = None if row_scale is None else row_scale.abs()
    return (
        reference.fp8_matmul(a, b, scale_a, scale_b, row_scale=row_scale),
        reference.fp8_matmul(a.abs(), b.abs(), scale_a, scale_b, row_scale=row_size),
    )


@fast_or_not
@small
def test_product(case, fast, backend, share):
    check_product(case, (E4M3, E4M3), fast, BF16, backend, share)


@pytest.mark.parametrize("out_dtype", [BF16, FP32], ids=str)
@pairs
def test_product_of_other_types(pair, out_dtype, backend, share):
    check_product(BY_NAME["edges"], pair, False, out_dtype, backend, share)


def check_product(case, pair, fast, out_dtype, backend, share):
    inputs = make_inputs(case, pair)
    out = call(ops.fp8_matmul, *inputs, out_dtype=out_dtype, fast_accum=fast)
    assert out.shape == (case.m, case.n) and out.dtype == out_dtype and out.is_contiguous()
    ref64, magnitude64 = sum_and_magnitude(*inputs)
    assert_accurate_fp8_sum(out, ref64, magnitude64, share)
    # The usual law, for float32 sums. Torch's and the interpreter's order of them differs.
    in_float32 = DEVICE == "cpu" or backend == "torch"
    if in_float32 and out.numel() and (out_dtype == BF16 or backend == "torch"):
        assert_accurate(out, reference.fp8_matmul(*inputs, out_dtype=out_dtype), ref64)


@pytest.mark.parametrize("out_dtype", [E4M3, E5M2], ids=str)
@few
def test_fp8_product(case, out_dtype, share):
    inputs, out_scale = make_inputs(case), scalar(0.05)
    out = call(ops.fp8_matmul, *inputs, out_dtype=out_dtype, out_scale=out_scale)
    assert out.dtype == out_dtype
    ref64, magnitude64 = sum_and_magnitude(*inputs)
    assert_accurate_fp8_sum(out, ref64 / out_scale, magnitude64 / out_scale, share)


@few
def test_batches(case, share):
    inputs = make_inputs(case, batch=(3,))
    out = call(ops.fp8_matmul, *inputs)
    assert out.shape == (3, case.m, case.n)
    assert_accurate_fp8_sum(out, *sum_and_magnitude(*inputs), share)
    for matrix in range(3):
        one = ops.fp8_matmul(inputs[0][matrix], inputs[1][matrix], *inputs[2:])
        assert_same_bits(out[matrix], one)


@pytest.mark.parametrize("out_dtype", [BF16, FP32, E4M3], ids=str)
@few
def test_row_scale(case, out_dtype, share):
    inputs = make_inputs(case)
    row_scale = torch.randn(case.m, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    out_scale = scalar(0.05) if out_dtype == E4M3 else None
    options = {"out_dtype": out_dtype, "row_scale": row_scale, "out_scale": out_scale}
    out = call(ops.fp8_matmul, *inputs, **options)
    bounds = sum_and_magnitude(*inputs, row_scale=row_scale)
    if out_scale is not None:
        bounds = [x / out_scale for x in bounds]
    assert_accurate_fp8_sum(out, *bounds, share)


@small
def test_accumulates(case, backend, share):
    check_accumulates(case, (E5M2, E4M3), False, backend, share)


@fast_or_not
@pairs
def test_accumulates_other_types(pair, fast, backend, share):
    check_accumulates(BY_NAME["edges"], pair, fast, backend, share)


def check_accumulates(case, pair, fast, backend, share):
    inputs = make_inputs(case, pair)
    before = torch.randn(case.m, case.n, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    c = before.clone()
    assert call(ops.fp8_matmul_add_, c, *inputs, fast_accum=fast) is c
    ref64, magnitude64 = sum_and_magnitude(*inputs)
    assert_accurate_fp8_sum(c, ref64 + before, magnitude64 + before.abs(), share)
    if backend == "torch":
        assert_same_bits(c, reference.fp8_matmul_add_(before.clone(), *inputs))


def relu2_bounds(low64, high64):
    """The least and the largest post of sums in these bounds: every step is increasing."""
    rounded = (x.float().bfloat16().float() for x in (low64, high64))
    return tuple(x.relu().square().bfloat16() for x in rounded)


def fp8_bounds(low, high, scale, dtype):
    """The same of quantised values, which may be divided by the scale or times its reciprocal."""
    edges = [to_fp8(x, scale * (1 + e), dtype) for x in (low, high) for e in (-(2**-22), 2**-22)]
    edges = [edge.float() for edge in edges]
    return torch.minimum(*edges[:2]), torch.maximum(*edges[2:])


@small
def test_relu2(case, share):
    check_relu2(case, share)


@pytest.mark.parametrize("keep_post", [True, False], ids=["post", "no_post"])
@pytest.mark.parametrize("transposed", [True, False], ids=["both_layouts", "rows"])
@fast_or_not
def test_relu2_options(fast, transposed, keep_post, share):
    check_relu2(BY_NAME["wide_tile"], share, keep_post, transposed, fast)


def check_relu2(case, share, keep_post=True, transposed=True, fast=True):
    inputs, post_scale = make_inputs(case), scalar(0.02)
    options = {"keep_post": keep_post, "transposed": transposed, "fast_accum": fast}
    results = call(ops.fp8_matmul_relu2, *inputs, post_scale=post_scale, **options)
    post, post_f8, post_f8_t, amax = results
    assert (post is not None, post_f8_t is not None) == (keep_post, transposed)

    ref64, magnitude64 = sum_and_magnitude(*inputs)
    low, high = relu2_bounds(ref64 - share * magnitude64, ref64 + share * magnitude64)
    if keep_post:
        assert post.dtype == BF16
        assert_between(post, low, high)
        low = high = post  # what follows is of this post
    assert post_f8.dtype == E4M3 and post_f8.is_contiguous()
    assert_between(post_f8.float(), *fp8_bounds(low, high, post_scale, E4M3))
    assert (amax.shape, amax.dtype) == ((), FP32)
    if post_f8.numel():
        assert low.max() <= amax <= high.max()
    else:
        assert amax == 0
    if transposed:
        assert_same_bits(post_f8_t, post_f8.mT.contiguous())


@small
def test_drelu2(case, share):
    check_drelu2(case, share)


@pytest.mark.parametrize("out", ["bf16", "fp8", "fp8_transposed"])
@pytest.mark.parametrize("post_dtype", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("pair", [(E5M2, E4M3), (E4M3, E4M3)], ids=["e5m2", "e4m3"])
@fast_or_not
def test_drelu2_options(fast, pair, post_dtype, out, share):
    check_drelu2(BY_NAME["edges"], share, fast, pair, post_dtype, out)


def check_drelu2(case, share, fast=False, pair=(E5M2, E4M3), post_dtype=E4M3, out="fp8_transposed"):
    inputs = make_inputs(case, pair)
    post = random_fp8((case.m, case.n), E4M3, 4).float().relu()
    post_scale = scalar(0.03) if post_dtype == E4M3 else None
    post = post.to(post_dtype)
    transposed, out_scale = out == "fp8_transposed", None if out == "bf16" else scalar(0.001)
    scales = {"post_scale": post_scale, "out_scale": out_scale}
    options = {"transposed": transposed, "fast_accum": fast}
    results = call(ops.fp8_matmul_drelu2, *inputs, post, **scales, **options)
    dpre, dpre_t, amax = results

    ref64, magnitude64 = sum_and_magnitude(*inputs)
    root = 2 * (post.double() * (1 if post_scale is None else post_scale)).sqrt()
    ref64, margin = ref64 * root, (share + 2.0**-20) * magnitude64 * root
    low, high = ref64 - margin, ref64 + margin
    assert dpre.shape == (case.m, case.n) and dpre.is_contiguous()
    if out_scale is None:
        assert dpre.dtype == BF16 and dpre_t is None and amax is None
        assert_between(dpre, low.float().bfloat16(), high.float().bfloat16())
        return
    assert dpre.dtype == E5M2
    assert_between(dpre.float(), *fp8_bounds(low.float(), high.float(), out_scale, E5M2))
    if dpre.numel():
        largest = torch.maximum(low.abs(), high.abs()).max()
        assert ref64.abs().max() - margin.max() <= amax <= largest
    else:
        assert amax == 0
    assert (dpre_t is not None) == transposed
    if transposed:
        assert_same_bits(dpre_t, dpre.mT.contiguous())


VIEWS = {
    "aligned_rows": lambda x: x[1, :, 16:80],
    "batches_apart": lambda x: x[:, 3:, 16:80],
    "unaligned_rows": lambda x: x[1, :, 5:44],
    "one_row_repeated": lambda x: x[0, :1].expand(x.shape[1], -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_rows_may_be_apart(view):
    whole = random_fp8((3, 70, 96), E4M3, 5), random_fp8((3, 43, 96), E4M3, 6)
    a, b = map(VIEWS[view], whole)
    scales = scalar(0.5), scalar(0.25)
    out = call(ops.fp8_matmul, a, b, *scales)
    assert_same_bits(out, ops.fp8_matmul(a.contiguous(), b.contiguous(), *scales))


@pytest.mark.parametrize("which", ["scale_a", "scale_b", "row_scale", "out_scale"])
def test_nan_in_a_scale_is_nan_in_the_result(which):
    a, b = random_fp8((32, 48), E4M3, 7), random_fp8((16, 48), E4M3, 8)
    scales = {"scale_a": scalar(1.0), "scale_b": scalar(1.0), "out_scale": scalar(1.0)}
    scales["row_scale"] = torch.ones(32, device=DEVICE)
    scales[which] = scales[which] * float("nan")
    out = call(ops.fp8_matmul, a, b, **scales, out_dtype=E4M3)
    assert out.isnan().all()


def test_nan_reaches_amax():
    a, b = random_fp8((32, 48), E4M3, 7), random_fp8((16, 48), E4M3, 8)
    one, nan = scalar(1.0), scalar(float("nan"))
    post, post_f8, post_f8_t, amax = call(
        ops.fp8_matmul_relu2, a, b, one, nan, post_scale=one, transposed=True
    )
    assert all(x.isnan().all() for x in (post, post_f8, post_f8_t, amax))
    grad = random_fp8((32, 48), E5M2, 7)
    some = torch.ones(32, 16, device=DEVICE).to(E4M3)
    scales = {"post_scale": one, "out_scale": one}
    dpre, _, amax = call(ops.fp8_matmul_drelu2, grad, b, one, nan, some, **scales)
    assert dpre.isnan().all() and amax.isnan()


def test_largest_values_saturate():
    largest = torch.full((32, 256), 448.0, device=DEVICE).to(E4M3)
    one, tiny = scalar(1.0), scalar(1e-3)
    total = 448.0**2 * 256
    out = call(ops.fp8_matmul, largest, largest, one, one)
    assert torch.equal(out, torch.full((32, 32), total, device=DEVICE).bfloat16())
    out = call(ops.fp8_matmul, largest, largest, one, one, out_dtype=E4M3, out_scale=tiny)
    assert (out.float() == FP8_MAX[E4M3]).all()
    _, post_f8, _, amax = call(ops.fp8_matmul_relu2, largest, largest, one, one, post_scale=one)
    assert (post_f8.float() == FP8_MAX[E4M3]).all()
    assert amax == scalar(total).bfloat16().float().square().bfloat16().float()  # not clamped
    grads = (-largest.float()).to(E5M2)
    some = torch.ones(32, 32, device=DEVICE).to(E4M3)
    scales = {"post_scale": one, "out_scale": tiny}
    dpre, _, amax = call(ops.fp8_matmul_drelu2, grads, largest, one, one, some, **scales)
    assert (dpre.float() == -FP8_MAX[E5M2]).all() and amax == 2 * total


def test_two_runs_are_bitwise_equal(backend):
    case = BY_NAME["edges"]
    a, b, *scales = make_inputs(case)
    assert_same_bits(ops.fp8_matmul(a, b, *scales), ops.fp8_matmul(a, b, *scales))
    fused = {"post_scale": scalar(0.02), "transposed": True}
    runs = [call(ops.fp8_matmul_relu2, a, b, *scales, **fused) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)
    grad, post = random_fp8(a.shape, E5M2, 9), runs[0][1]
    fused["out_scale"] = scalar(0.001)
    runs = [call(ops.fp8_matmul_drelu2, grad, b, *scales, post, **fused) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)
    if backend == "torch":  # elsewhere parts of K may be added in any order
        c = torch.ones(case.m, case.n, device=DEVICE)
        first, second = (ops.fp8_matmul_add_(c.clone(), a, b, *scales) for _ in range(2))
        assert_same_bits(first, second)


def example():
    """Inputs that every backend takes: grads (E5M2), a, b, three scales, post, c."""
    case = BY_NAME["edges"]
    a, b, scale_a, scale_b = make_inputs(case)
    post = random_fp8((case.m, case.n), E4M3, 4).float().relu().to(E4M3)
    c = torch.ones(case.m, case.n, device=DEVICE)
    return random_fp8(a.shape, E5M2, 9), a, b, scale_a, scale_b, scalar(0.02), post, c


def check_op(op, arguments):
    """opcheck; but torch can't compare FP8 tensors, so unchanged inputs are looked at here."""
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=tests)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    op(*arguments)
    for x, old, argument in zip(arguments, before, op._schema.arguments, strict=True):
        if isinstance(x, torch.Tensor) and not argument.is_write:
            assert_same_bits(x, old)


def test_opcheck(backend):
    grad, a, b, scale_a, scale_b, scale, post, c = example()
    ab, gb, both = (a, b, scale_a, scale_b), (grad, b, scale_a, scale_b), (scale, scale)
    operators = torch.ops.speedrun
    check_op(operators.fp8_matmul.default, (*ab, None, None, BF16, True, backend))
    check_op(operators.fp8_matmul.default, (*ab, None, scale, E4M3, False, backend))
    check_op(operators.fp8_matmul_add_.default, (c, *gb, False, backend))
    check_op(operators.fp8_matmul_relu2.default, (*ab, scale, True, True, True, backend))
    check_op(operators.fp8_matmul_relu2.default, (*ab, scale, False, False, True, backend))
    check_op(operators.fp8_matmul_drelu2.default, (*gb, post, *both, True, False, backend))


def test_opcheck_of_the_raw_kernels(backend):
    if backend == "triton":
        pytest.skip("the raw kernels are CUDA's and the reference's")
    grad, a, b, scale_a, scale_b, scale, post, c = example()
    ab, gb, both = (a, b, scale_a, scale_b), (grad, b, scale_a, scale_b), (scale, scale)
    (m, n), amax = c.shape, scalar(0.0)
    bf16, f8 = c.new_empty((m, n), dtype=BF16), c.new_empty((m, n), dtype=E4M3)
    f8_t, e5m2, e5m2_t = (
        c.new_empty(s, dtype=d) for s, d in (((n, m), E4M3), ((m, n), E5M2), ((n, m), E5M2))
    )
    operators = torch.ops.speedrun
    check_op(operators.fp8_matmul_out.default, (*ab, None, None, bf16, True, False))
    check_op(operators.fp8_matmul_out.default, (*ab, None, scale, f8, False, False))
    check_op(operators.fp8_matmul_out.default, (*gb, None, None, c, False, True))
    check_op(operators.fp8_matmul_relu2_out.default, (*ab, scale, bf16, f8, f8_t, amax, True))
    outs = (e5m2, e5m2_t, amax)
    check_op(operators.fp8_matmul_drelu2_out.default, (*gb, post, *both, *outs, False))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_to_the_same_without_recompiling(compiler, backend):
    def forward(grad, a, b, scale_a, scale_b, scale, post, c):
        scales = (scale_a, scale_b)
        ops.fp8_matmul_add_(c, grad, b, *scales)
        fused = {"post_scale": scale, "transposed": True}
        return (
            ops.fp8_matmul(a, b, *scales, fast_accum=True),
            *ops.fp8_matmul_relu2(a, b, *scales, **fused),
            *ops.fp8_matmul_drelu2(grad, b, *scales, post, out_scale=scale, **fused),
            ops.fp8_matmul_drelu2(grad, b, *scales, post.bfloat16())[0],
            c,
        )

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for mine, eager in zip(compiled(*example()), forward(*example()), strict=True):
                assert_same_bits(mine, eager)


def test_refuses_readably():
    a, b = random_fp8((4, 32), E4M3, 0), random_fp8((8, 32), E4M3, 1)
    one = scalar(1.0)
    with pytest.raises(TypeError, match=r"a must be float8_e4m3fn or float8_e5m2, got .*bfloat16"):
        ops.fp8_matmul(a.bfloat16(), b, one, one)
    with pytest.raises(ValueError, match=r"b must be K-major .* contiguous.* strides \(1, 8\)"):
        ops.fp8_matmul(a, b.view(torch.uint8).T.contiguous().T.view(E4M3), one, one)
    with pytest.raises(ValueError, match=r"agree in all but the rows, got \(4, 32\) and \(8, 16\)"):
        ops.fp8_matmul(a, b[:, :16], one, one)
    with pytest.raises(ValueError, match=r"agree in all but the rows"):
        ops.fp8_matmul(a[None].expand(2, -1, -1), b[None], one, one)
    with pytest.raises(ValueError, match=r"a must be \(rows, K\) or \(L, rows, K\), got \(32,\)"):
        ops.fp8_matmul(a[0], b, one, one)
    with pytest.raises(ValueError, match=r"a must be \(rows, K\), got \(1, 4, 32\)"):
        ops.fp8_matmul_relu2(a[None], b[None], one, one, post_scale=one)
    for bad in (2.0, one.double(), torch.ones(2, device=DEVICE)):
        with pytest.raises(TypeError, match="scale_b must be a float32 tensor of one element, got"):
            ops.fp8_matmul(a, b, one, bad)
    with pytest.raises(ValueError, match=r"scale_a must be on \w+.* like a, got meta"):
        ops.fp8_matmul(a, b, one.to("meta"), one)
    with pytest.raises(TypeError, match=r"out_dtype must be one of .*got torch\.float16"):
        ops.fp8_matmul(a, b, one, one, out_dtype=torch.float16)
    for options in ({"out_dtype": E4M3}, {"out_scale": one}):
        with pytest.raises(ValueError, match="out_scale belongs to an FP8 out_dtype"):
            ops.fp8_matmul(a, b, one, one, **options)
    with pytest.raises(ValueError, match=r"row_scale must be \(4,\), contiguous.* got \(8,\)"):
        ops.fp8_matmul(a, b, one, one, row_scale=torch.ones(8, device=DEVICE))
    with pytest.raises(TypeError, match=r"c must be torch\.float32, got torch\.bfloat16"):
        ops.fp8_matmul_add_(torch.ones(4, 8, device=DEVICE).bfloat16(), a, b, one, one)
    with pytest.raises(ValueError, match=r"c must be \(4, 8\), contiguous.* strides \(1, 4\)"):
        ops.fp8_matmul_add_(torch.ones(8, 4, device=DEVICE).T, a, b, one, one)
    post = torch.ones(4, 8, device=DEVICE)
    with pytest.raises(TypeError, match=r"post must be torch\.bfloat16, got torch\.float8_e4m3fn"):
        ops.fp8_matmul_drelu2(a, b, one, one, post.to(E4M3))
    with pytest.raises(TypeError, match=r"post must be torch\.float8_e4m3fn, got torch\.bfloat16"):
        ops.fp8_matmul_drelu2(a, b, one, one, post.bfloat16(), post_scale=one)
    with pytest.raises(ValueError, match="give an out_scale"):
        ops.fp8_matmul_drelu2(a, b, one, one, post.bfloat16(), transposed=True)
    with pytest.raises(RuntimeError, match=r"fp8_matmul has no gradient.*no_grad"):
        ops.fp8_matmul(a, b, one.clone().requires_grad_(), one)


def golden_tensor(array, dtype=None):
    """Of fp8_a.npz: uint16 is bf16, uint8 is FP8 of `dtype`."""
    x = torch.from_numpy(array.copy())
    if array.dtype.itemsize == 2:
        return x.view(BF16).to(DEVICE)
    return (x if dtype is None else x.view(dtype)).to(DEVICE)


def t(x):
    """A contiguous transposed copy."""
    return x.view(torch.uint8).T.contiguous().view(x.dtype)


@pytest.fixture(scope="module")
def golden(shared_data):
    import numpy

    return numpy.load(shared_data / "golden_089" / "fp8_a.npz")


def assert_same_but_for_the_order_of_sums(out, expected):
    """Equal, but that one number in a hundred may be the neighbouring one."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    steps = (bits(out).int() - bits(expected).int()).abs()
    assert steps.max() <= 1 and (steps != 0).float().mean() <= 0.01


def test_golden_head(golden):
    x, w = (golden_tensor(golden[f"head/{name}_f8"], E4M3) for name in "xw")
    grad = golden_tensor(golden["head/grad_logits_f8"], E5M2)
    x_scale, w_scale, grad_scale, _ = (scalar(float(s)) for s in golden["head/scales"])
    logits = call(ops.fp8_matmul, x, t(w), x_scale, w_scale, fast_accum=True)
    assert_same_but_for_the_order_of_sums(logits, golden_tensor(golden["head/logits"]))
    grad_x = call(ops.fp8_matmul, grad, w, grad_scale, w_scale)
    assert_same_but_for_the_order_of_sums(grad_x, golden_tensor(golden["head/grad_x"]))
    grad_w = torch.zeros(w.shape, device=DEVICE)
    call(ops.fp8_matmul_add_, grad_w, t(x), t(grad), x_scale, grad_scale)
    torch.testing.assert_close(
        grad_w, golden_tensor(golden["head/grad_w"]), rtol=1e-5, atol=1e-5 * grad_w.abs().max()
    )
    expected = golden_tensor(golden["head/grad_w_bf16"])
    assert_same_but_for_the_order_of_sums(grad_w.bfloat16(), expected)


@pytest.mark.parametrize("step", [0, 1, 2, 16, 17, 18])
def test_golden_mlp(golden, step):
    def array(name, dtype=None):
        return golden_tensor(golden[f"mlp/{step}/{name}"], dtype)

    def series(name):
        return scalar(float(golden[f"mlp/series/{name}"][step, 0]))

    act_scale, ours = (
        series("act_scale_used"),
        call(
            ops.fp8_matmul_relu2,
            array("x_f8", E4M3),
            array("w_up_f8", E4M3),
            series("dequant"),
            scalar(1.0),
            post_scale=series("act_scale_used"),
            transposed=True,
        ),
    )
    post, post_f8, post_f8_t, amax = ours
    expected = array("pre").float().relu().square().bfloat16()
    steps = (bits(post).int() - bits(expected).int()).abs()
    assert (steps != 0).float().mean() <= 0.01  # a neighbouring pre is two or three of post away
    torch.testing.assert_close(amax, series("act_amax"), rtol=2**-6, atol=0)
    assert_same_but_for_the_order_of_sums(post_f8, array("post_f8", E4M3))
    assert_same_bits(post_f8_t, t(post_f8))
    # The rest from the stored bytes, so that it doesn't inherit a difference.
    inputs = array("post_f8", E4M3), array("w_down_f8", E4M3), act_scale, series("down_scale_used")
    y = call(ops.fp8_matmul, *inputs, fast_accum=True)
    assert_same_but_for_the_order_of_sums(y, array("y"))
