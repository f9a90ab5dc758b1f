"""`fp8_linear` against the budget of its roundings; compiled, repeated, empty, refused."""

import pytest
import torch
import torch.nn.functional as F

from numerics import Estimate, assert_same_bits, assert_within_budget
from op_helpers import skips_without_cuda_kernel
from speedrun.ops.fp8_linear import Fp8Weight, fp8_linear, normed_scale
from speedrun.ops.fp8_quantize import fp8_quantize, fp8_quantize_current
from train_helpers import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
T, D, N = 80, 48, 160


def tensors(num_tokens=T):
    """x (T, D), W (N, D) and a gradient of y (T, N), of sizes as in training."""
    x = F.rms_norm(normal(num_tokens, D), (D,))
    w, grad = D**-0.5 * normal(N, D, seed=1), 1e-3 * normal(num_tokens, N, seed=2)
    return [t.to(DEVICE, BF16) for t in (x, w, grad)]


def quantized(x, static=True):
    """x in e4m3 and its scale."""
    scale = normed_scale(D, x.device)
    return (fp8_quantize(x, scale)[0], scale) if static else fp8_quantize_current(x)[::2]


def run(x, w, grad, dx="fp8", static=True):
    """y and the gradients of x and W; and the weight's copies."""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    with skips_without_cuda_kernel():
        fp8 = Fp8Weight(*fp8_quantize_current(w, transposed=dx == "fp8"))
        y = fp8_linear(x, w, *quantized(x, static), fp8)
        y.backward(grad)
    return [y.detach(), x.grad, w.grad], fp8


def budgets(x, w, grad, dx, static, scale):
    """Estimates of the same three."""
    x_max = D**0.5 if static else x.abs().max().item()
    x, w, g = (Estimate.exact(t) for t in (x, w, grad))
    x_f8, w_f8 = x.rounded(E4M3, x_max / 448), w.rounded(E4M3, scale)
    g_f8 = g.rounded(E5M2, grad.abs().max().item() / 57344)
    dx = g_f8 @ w_f8 if dx == "fp8" else g @ w
    return [estimate.rounded(BF16) for estimate in (x_f8 @ w_f8.mT, dx, g.mT @ x)]


CHOICES = [("fp8", True), ("fp8", False), ("bf16", True)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dx", "static"), CHOICES)
def test_within_the_budget_of_fp8(dx, static):
    values = tensors()
    results, fp8 = run(*values, dx, static)
    for found, budget in zip(results, budgets(*values, dx, static, fp8.scale.item()), strict=True):
        assert found.dtype == BF16
        assert_within_budget(found, budget)
        with pytest.raises(AssertionError, match="rms error"):  # which is tight
            assert_within_budget(1.3 * found.double(), budget)


def test_a_factor_is_in_the_scale():
    x, w, _ = tensors()
    fp8 = Fp8Weight(*fp8_quantize_current(w))
    x_f8 = quantized(x)
    half = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    found = fp8_linear(x, w, *x_f8, fp8.times(half))
    assert_same_bits(found, 0.5 * fp8_linear(x, w, *x_f8, fp8))
    assert fp8.times(None) is fp8


def test_static_scale_fits_the_largest_number_of_a_normed_row():
    x = F.rms_norm(torch.eye(3, 64, device=DEVICE), (64,)).to(BF16)
    scale = normed_scale(64, x.device)
    x_f8, _, amax = fp8_quantize(x, scale, amax=True)
    assert x_f8.float().max() == 448 and scale == amax / 448 == 8 / 448


@pytest.mark.usefixtures("backend")
def test_one_token():
    values = tensors(1)
    results, fp8 = run(*values)
    for found, budget in zip(results, budgets(*values, "fp8", True, fp8.scale.item()), strict=True):
        assert_within_budget(found, budget)


@pytest.mark.usefixtures("backend")
def test_no_token():
    (y, dx, dw), _ = run(*tensors(0))
    assert (y.shape, dx.shape, dw.shape) == ((0, N), (0, D), (N, D))
    assert not dw.any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dx", ["fp8", "bf16"])
def test_compiles_fullgraph_to_the_same_bits(dx):
    def forward(x, w, x_f8, x_scale, *copies):
        return fp8_linear(2 * x, w, x_f8, x_scale, Fp8Weight(*copies)) * 0.5

    def results(function):
        found = []
        for seed in (1, 2):
            x, w, grad = tensors()
            copies = fp8_quantize_current(w, transposed=dx == "fp8")
            x, w = ((seed * t).detach().requires_grad_() for t in (x, w))
            y = function(x, w, *quantized(x), *copies)
            found += [y, *torch.autograd.grad(y, (x, w), grad)]
        return found

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with skips_without_cuda_kernel():
        eager = results(forward)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for mine, expected in zip(results(compiled), eager, strict=True):
                assert_same_bits(mine, expected)


@pytest.mark.usefixtures("backend")
def test_again_and_with_a_strided_gradient_the_same_bits():
    x, w, grad = tensors()
    wide = grad.repeat_interleave(2, dim=1)[:, ::2]
    for first, second in zip(run(x, w, grad)[0], run(x, w, wide)[0], strict=True):
        assert_same_bits(first, second)


def test_nan_is_not_hidden(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter reads e4m3's NaN as 480")
    x, w, grad = tensors()
    x[3, 5] = float("nan")
    y = run(x, w, grad)[0][0]
    assert y[3].isnan().all() and y[4].isfinite().all()


def test_refusals():
    x, w, _ = tensors()
    x_f8, x_scale = quantized(x)
    fp8 = Fp8Weight(*fp8_quantize_current(w, transposed=True))
    for wrong, message in (
        ((x.float(), w, x_f8, x_scale, fp8), r"x_TD must be torch\.bfloat16, got torch\.float32"),
        ((x, w.double(), x_f8, x_scale, fp8), r"w_ND must be torch\.bfloat16"),
        ((x, w, x, x_scale, fp8), r"x_f8_TD must be torch\.float8_e4m3fn"),
        ((x, w, x_f8, x_scale, fp8._replace(f8_ND=w)), r"fp8\.f8_ND must be"),
        ((x, w, x_f8, x_scale, fp8._replace(f8_DN=w.mT)), r"fp8\.f8_DN must be"),
    ):
        with pytest.raises(TypeError, match=message):
            fp8_linear(*wrong)
    for wrong in (
        (x[0], w, x_f8[0], x_scale, fp8),
        (x, w, x_f8[1:], x_scale, fp8),
        (x, w[:, 1:], x_f8, x_scale, fp8),
        (x, w, x_f8, x_scale, fp8._replace(f8_DN=fp8.f8_ND)),
        (x, w, x_f8, x_scale, fp8._replace(f8_ND=fp8.f8_ND[1:])),
    ):
        with pytest.raises(ValueError, match=r"needs x_TD and x_f8_TD \(T, D\), .*; got \("):
            fp8_linear(*wrong)
