"""`residual_mix` against its definition: sums of products, number by number, and their norm."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from cases import RESIDUAL_MIX_SMALL
from numerics import assert_accurate, assert_same_bits, ulp
from op_helpers import assert_compiles, assert_same_with_gradients
from speedrun import ops
from speedrun.ops.residual_mix import NORM_EPS, residual_mix, residual_mix_norm, static_scale
from speedrun.reference import residual_mix as reference
from train_helpers import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
P, T, D = 2, 3, 6
# Interpreted kernels overflow where NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
cases = pytest.mark.parametrize("case", RESIDUAL_MIX_SMALL, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    with ops.use_backend(request.param):
        yield request.param


def streams(dtype=FP64, num_tokens=T):
    """Three of full width and one of the first four columns."""
    sizes = [(P, num_tokens, D)] * 3 + [(P, num_tokens, 4)]
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


def factors(dtype=FP64):
    """One a token, one for all tokens, a scalar. The fourth is NUMBER."""
    shapes = [(P, T, 1), (1, 1, 1), (1,)]
    one_a_token, one, scalar = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes, 7))
    return [one_a_token, one, scalar.squeeze(0)]


NUMBER = -0.7


def mix(*tensors):
    """Of the four streams and three factors."""
    return residual_mix(list(zip([*tensors[4:], NUMBER], tensors[:4], strict=True)))


def mix_norm(*tensors):
    """The same: x and its norm, side by side."""
    terms = list(zip([*tensors[4:], NUMBER], tensors[:4], strict=True))
    return torch.cat(residual_mix_norm(terms)[:2], dim=-1)


def definition(*tensors):
    """x, number by number."""
    parts, own = tensors[:4], tensors[4:]
    out = torch.zeros(P, T, D, dtype=FP64)
    for p, t, d in itertools.product(range(P), range(T), range(D)):
        out[p, t, d] = own[0][p, t, 0] * parts[0][p, t, d] + own[1][0, 0, 0] * parts[1][p, t, d]
        out[p, t, d] += own[2] * parts[2][p, t, d]
        if d < 4:
            out[p, t, d] += NUMBER * parts[3][p, t, d]
    return out


def norm_definition(*tensors):
    x = definition(*tensors)
    return torch.cat([x, x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()], dim=-1)


# ---- Formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("found, expected", [(mix, definition), (mix_norm, norm_definition)])
def test_definition(found, expected):
    """Values, and gradients of streams and of every kind of factor."""
    grad = normal(P, T, 2 * D if found is mix_norm else D, seed=5)
    assert_same_with_gradients(found, expected, [*streams(), *factors()], grad)


@pytest.mark.parametrize("function", [mix, mix_norm])
def test_gradients(function):
    tensors = [t.requires_grad_() for t in (*streams(), *factors())]
    assert torch.autograd.gradcheck(function, tensors)


def test_compiled():
    def function(*tensors):
        return torch.cat([mix_norm(*tensors), mix(*tensors)], dim=-1)

    assert_compiles(function, [*streams(), *factors()], normal(P, T, 3 * D, seed=5))


def test_wide_products_in_the_reference_only():
    """float64 has no kernel: by itself it goes to the reference, forced elsewhere it says so."""
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no Triton version"):
        mix(*streams(), *factors())


# ---- Every backend ---------------------------------------------------------------------------


def random_terms(case, dtype, seed=0):
    """Streams in `dtype`; factors are in turn one a token (every other row of a wider tensor, as
    gates come), a scalar in bf16, and a number; all ask for gradients."""
    terms = []
    for i, width in enumerate(case.widths):
        stream = normal(case.tokens, width, seed=seed + i).to(DEVICE, dtype).requires_grad_()
        gates = normal(case.tokens, 2, seed=seed + 50 + i).to(DEVICE, dtype).requires_grad_()
        scalar = normal(1, seed=seed + 70 + i)[0].to(DEVICE, BF16).requires_grad_()
        terms.append(((gates[:, 1:], scalar, 0.3)[i % 3], stream))
    return terms


def in_float64(terms):
    def wide(x):
        return x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x

    return [(wide(factor), wide(stream)) for factor, stream in terms]


def tensors_of(terms, kind):
    """The factors (kind 0) that are tensors, or the streams (1)."""
    return [term[kind] for term in terms if isinstance(term[kind], torch.Tensor)]


def assert_accurate_factor_gradient(found, same, exact, magnitude):
    """The accuracy law; but a sum's ulp is that of what it sums, `magnitude`, in float32."""
    if found.numel():
        error, allowed = ((x.double() - exact).abs().max() for x in (found, same))
        limit = 2 * allowed + ulp(found.dtype, exact.abs().max()) + ulp(FP32, magnitude)
        assert found.dtype == same.dtype and error <= limit, f"error {error} above {limit}"


@cases
@dtypes
def test_sums_have_the_reference_bits(backend, case, dtype):
    terms = random_terms(case, dtype)
    expected = reference.residual_mix(terms)
    assert_same_bits(residual_mix(terms), expected)
    assert_same_bits(residual_mix_norm(terms)[0], expected)


@cases
@dtypes
@pytest.mark.parametrize("outputs", ["x", "normed", "x and normed"])
def test_accuracy(backend, case, dtype, outputs):
    """Of the norm, and of all gradients, where x, its norm or both have one."""
    results = []
    terms = random_terms(case, dtype)
    grads = [normal(case.tokens, case.widths[0], seed=90 + i).to(DEVICE, dtype) for i in range(2)]
    chosen = slice(*{"x": (0, 1), "normed": (1, 2), "x and normed": (0, 2)}[outputs])
    for function, own in (
        (residual_mix_norm, terms),
        (lambda t: reference.residual_mix_norm(t, NORM_EPS, False), terms),
        (lambda t: reference.residual_mix_norm(t, NORM_EPS, False), in_float64(terms)),
    ):
        x, normed, _ = function(own)
        outs = [x, normed][chosen]
        own_grads = [grad.to(out.dtype) for grad, out in zip(grads[chosen], outs, strict=True)]
        wanted = tensors_of(own, 1) + tensors_of(own, 0)
        results.append([normed.detach(), *torch.autograd.grad(outs, wanted, own_grads)])
    num_exact = 1 + len(terms)
    for found, same, exact in zip(*(result[:num_exact] for result in results), strict=True):
        assert_accurate(found, same, exact)
    with_factor = [i for i, (factor, _) in enumerate(terms) if isinstance(factor, torch.Tensor)]
    for i, *gradients in zip(with_factor, *(r[num_exact:] for r in results), strict=True):
        factor, stream = terms[i]
        summed = results[2][1 + i] / factor.double() * stream.double()
        along = 1 if factor.dim() else (0, 1)
        magnitude = summed.abs().sum(along).max().item() if summed.numel() else 0
        assert_accurate_factor_gradient(*gradients, magnitude)


@cases
@dtypes
def test_fp8_copy(backend, case, dtype):
    """Of the norm as it was rounded; nothing saturates with the static scale."""
    terms = random_terms(case, dtype)
    _, normed, codes = residual_mix_norm(terms, fp8=True)
    width = case.widths[0]
    scale = torch.tensor(width**0.5) / 448
    assert static_scale(width, torch.device("cpu")) == scale
    expected = (normed.detach().float() / scale.to(DEVICE)).to(torch.float8_e4m3fn)
    assert_same_bits(codes, expected)
    assert not codes.requires_grad and normed.requires_grad
    assert residual_mix_norm(terms)[2] is None


def test_an_outlier_just_fits_the_fp8_copy(backend):
    """One number in a row of zeros: its norm is √D, the largest there is."""
    x = torch.zeros(2, 64, device=DEVICE)
    x[0, 3], x[1, 5] = 1000, -1e-10
    codes = residual_mix_norm([(1.0, x)], fp8=True, eps=0.0)[2]
    assert codes[0, 3].float() == 448 and codes.float().abs().sum() in (448, 896)


def test_one_term(backend):
    x = streams(FP32)[0].to(DEVICE)
    assert_same_bits(residual_mix([(2.0, x)]), 2 * x)


def test_bf16_is_rounded_once(backend):
    """Three terms of 2⁸ + 2⁰ and the like: each sum rounded to bf16 would lose the small ones."""
    big, one = (torch.full((1, 1, 2), x, dtype=BF16, device=DEVICE) for x in (256.0, 1.0))
    out = residual_mix([(1.0, big), (1.0, one), (1.0, one)])
    assert_same_bits(out, torch.full_like(out, 258.0))


def test_types_and_shapes(backend):
    """The first stream's; factors and other streams may have another."""
    x, other, _, narrow = (t.to(DEVICE) for t in streams(BF16))
    factor = torch.full((), 0.7, device=DEVICE, requires_grad=True)
    other = other.float().requires_grad_()
    terms = [(factor, x), (factor, other), (2.0, narrow)]
    out = residual_mix(terms)
    assert (out.dtype, out.shape) == (BF16, x.shape)
    grads = torch.autograd.grad(out, [factor, other], torch.ones_like(out))
    assert [g.dtype for g in grads] == [FP32, FP32]
    expected = (x.float() + other).sum()
    torch.testing.assert_close(grads[0], expected, rtol=1e-4, atol=1e-4)


def test_layouts(backend):
    """Transposed streams, streams cut out of others, and one factor expanded to all tokens."""
    x = normal(D, T, P, dtype=FP32).to(DEVICE).permute(2, 1, 0)
    cut = normal(P, T, 2 * D, seed=1, dtype=FP32).to(DEVICE)[..., D:]
    factor = normal(1, 1, 1, seed=2, dtype=FP32).to(DEVICE).expand(P, T, 1)
    found = residual_mix([(factor, x), (0.5, cut)])
    assert_same_bits(found, residual_mix([(factor.contiguous(), x.contiguous()), (0.5, cut + 0)]))


def test_extreme_values(backend):
    """Infinity and NaN stay in their elements; sums are of float32's range."""
    x = torch.tensor([[[math.inf, math.nan, 3e38, 1.0]]], device=DEVICE)
    out = residual_mix([(1.0, x), (-1.0, torch.full_like(x, 3e38))])
    assert out[0, 0, 0] == math.inf and out[0, 0, 1].isnan() and out[0, 0, 2] == 0
    large = torch.full((1, 1, 3), 2.0**127, dtype=BF16, device=DEVICE)
    assert_same_bits(residual_mix([(0.5, large), (0.5, large)]), large)


def test_an_infinite_factor_stays_in_its_columns(backend):
    x, narrow = torch.ones(1, 4, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    out = residual_mix([(1.0, x), (torch.full((), math.inf, device=DEVICE), narrow)])
    assert out.tolist() == [[math.inf, math.inf, 1.0, 1.0]]


def test_norm_is_that_of_x_as_rounded(backend):
    """257 becomes 256 in bf16: 1 over the RMS of (257, 1) is another number."""
    big, one = (
        torch.tensor([row], dtype=BF16, device=DEVICE) for row in ([256.0, 0.0], [1.0, 1.0])
    )
    x, normed, _ = residual_mix_norm([(1.0, big), (1.0, one)])
    assert x.tolist() == [[256.0, 1.0]]
    assert_same_bits(normed, F.rms_norm(x.double(), (2,), eps=NORM_EPS).bfloat16())


def test_norm_of_zeros_and_of_large_numbers(backend):
    x = torch.tensor([[0.0, 0.0], [3e18, -3e18], [1e-30, 0.0]], device=DEVICE, requires_grad=True)
    _, normed, _ = residual_mix_norm([(1.0, x)])
    expected = F.rms_norm(x, (2,), eps=NORM_EPS)
    torch.testing.assert_close(normed, expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(normed, x, torch.ones_like(x))
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, torch.ones_like(x))[0])


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(backend, num_tokens):
    parts = [part.to(DEVICE).requires_grad_() for part in streams(FP32, num_tokens)]
    factor = torch.full((), 0.5, device=DEVICE, requires_grad=True)
    out, normed, _ = residual_mix_norm([(factor, part) for part in parts])
    whole = torch.cat([parts[3], parts[3].new_zeros(P, num_tokens, 2)], dim=-1)
    expected = 0.5 * (parts[0] + parts[1] + parts[2] + whole)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad([out, normed], [factor, *parts], [out, normed])
    assert [g.shape for g in grads] == [(), *(part.shape for part in parts)]
    assert num_tokens or grads[0] == 0


def test_twice_the_same_bits(backend):
    terms = random_terms(RESIDUAL_MIX_SMALL[0], BF16)
    results = []
    for _ in range(2):
        outs = residual_mix_norm(terms)[:2]
        wanted = tensors_of(terms, 0) + tensors_of(terms, 1)
        results.append([*outs, *torch.autograd.grad(outs, wanted, [*outs])])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_refusals(backend):
    x = torch.zeros(2, 3, 4, device=DEVICE)
    for terms, error, message in (
        ([], ValueError, "no terms"),
        ([(1.0, x[0, 0, 0])], ValueError, r"must be \(…, D\)"),
        ([(1.0, x), (1.0, x[:1])], ValueError, r"stream 1 must be like the first, \(2, 3, 4\)"),
        ([(1.0, x[..., :2]), (1.0, x)], ValueError, r"got \(2, 3, 4\)"),
        ([(x[..., 0], x)], ValueError, r"factor 0 .* \(2, 3, 1\), one a token; got \(2, 3\)"),
        ([(1.0, x.int())], TypeError, "floating, got torch.int32"),
        ([(torch.ones((), device="meta"), x)], ValueError, "got one on meta"),
    ):
        with pytest.raises(error, match=message):
            residual_mix(terms)
        with pytest.raises(error, match=message):
            residual_mix_norm(terms)


# ---- Kernels behind operators ----------------------------------------------------------------


def test_opcheck():
    pytest.importorskip("triton")
    terms = random_terms(RESIDUAL_MIX_SMALL[1], FP32)
    has_factor = [isinstance(factor, torch.Tensor) for factor, _ in terms]
    own_streams = [stream for _, stream in terms]
    own_factors = [
        factor.detach().squeeze(-1).requires_grad_()
        for (factor, _), has in zip(terms, has_factor, strict=True)
        if has
    ]
    flat = own_streams, own_factors, has_factor, [0.3] * len(terms)
    with ops.use_backend("triton"):
        for eps in (None, NORM_EPS):
            torch.library.opcheck(torch.ops.speedrun.residual_mix.default, (*flat, eps, False))
        x, normed, _ = torch.ops.speedrun.residual_mix(*flat, NORM_EPS, False)
        detached = [t.detach() for t in (x, normed, x, *own_streams, *own_factors)]
        split = 3 + len(own_streams)
        arguments = (*detached[:3], detached[3:split], detached[split:], *flat[2:], NORM_EPS)
        torch.library.opcheck(torch.ops.speedrun.residual_mix_bwd.default, arguments)


def test_kernels_compiled():
    """As one graph the same as eager, also for other values of the factors."""
    pytest.importorskip("triton")

    def function(*tensors):
        terms = list(zip([*tensors[4:], NUMBER], tensors[:4], strict=True))
        x, normed, _ = residual_mix_norm(terms, fp8=True)
        return torch.cat([x, 3 * normed, residual_mix(terms)], dim=-1)

    tensors = [t.to(DEVICE) for t in (*streams(FP32), *factors(FP32))]
    compiled = torch.compile(function, fullgraph=True)

    def assert_same(shift):
        results = []
        for f in (function, compiled):
            own = [(t + shift).requires_grad_() for t in tensors]
            out = f(*own)
            results.append([out, *torch.autograd.grad(out.square().sum(), own)])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)

    with ops.use_backend("triton"):
        assert_same(0)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(1)
