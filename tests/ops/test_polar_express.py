"""`polar_express`: its coefficients, its singular values, and the public program's results."""

import numpy as np
import pytest
import torch

from speedrun.ops.polar_express import polar_express
from speedrun.reference.polar_express import COEFFICIENTS, momentum_step
from train_helpers import FLOAT64_NOISE, from_golden, golden, normal

SMALLEST, STEPS, SAFETY, CUSHION = 1e-3, 5, 1.02, 0.02  # RECIPE section 4
SHAPES = [(24, 24), (16, 48), (48, 16), (1, 9), (9, 1), (1, 1)]


def optimal_quintic(low, high):
    """Odd a, b, c with the least max|1 − ax − bx³ − cx⁵| on [low, high], by Remez' exchange."""
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error = None
    for _ in range(100):
        points = [low, *inner, high]
        rows = [[x, x**3, x**5, (-1) ** i] for i, x in enumerate(points)]
        a, b, c, new_error = np.linalg.solve(rows, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = [np.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
        if error is not None and abs(new_error - error) < 1e-15:
            break
        error = new_error
    return a, b, c


def value(x, a, b, c):
    return a * x + b * x**3 + c * x**5


def constructed_coefficients():
    """arXiv 2505.16932: each step takes what the one before left of [SMALLEST, 1] nearer to 1."""
    low, high, steps = SMALLEST, 1.0, []
    for step in range(STEPS):
        a, b, c = optimal_quintic(max(low, CUSHION * high), high)

        if CUSHION * high > low:  # centre the results of [low, high], not of the cushion, on 1
            factor = 2 / (value(low, a, b, c) + value(high, a, b, c))
            a, b, c = a * factor, b * factor, c * factor
        safety = SAFETY if step < STEPS - 1 else 1.0
        steps.append((a / safety, b / safety**3, c / safety**5))
        low = value(low, *steps[-1])
        high = 2 - low
    return steps


def test_coefficients_are_the_construction():
    # 1e-12: the exchange stops at 1e-15 in the error, of which the points are a square root away.
    np.testing.assert_allclose(COEFFICIENTS, constructed_coefficients(), rtol=1e-12)


def composed(x):
    """What the five polynomials make of a singular value."""
    for abc in COEFFICIENTS:
        x = value(x, *abc)
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_vectors_stay_and_values_go_through_the_polynomials(shape):
    """The definition: U f(S/(1.02‖G‖ + 1e−6)) Vᵀ, with f the five polynomials in turn."""
    g = normal(3, *shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    norms = g.flatten(1).norm(dim=1)[:, None] * 1.02 + 1e-6
    expected = u @ torch.diag_embed(composed(s / norms)) @ vh
    torch.testing.assert_close(polar_express(g), expected, **FLOAT64_NOISE)


def range_of_values(low):
    """The least and the largest result for singular values of `low` … 1 after normalising."""
    values = composed(torch.logspace(np.log10(low), 0, 20001, dtype=torch.float64) / 1.02)
    return values.min().item(), values.max().item()


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_singular_values_near_1(shape, dtype):
    """Matrices with singular values of 1 … 0.01, as found and as bf16 leaves them.

    The bounds are those of the polynomials themselves, and the first lines show them to be near 1.
    Noise: float32 roundings times the product of the five slopes (about 1,000); for bf16 twice the
    5 % that the public program's bf16 results are from float64 (README_optimizer).
    """
    low, high = range_of_values(0.01 / min(shape) ** 0.5)  # ‖G‖ is at most √n times its largest
    assert 0.8 < low < high < 1.2
    u, s, vh = torch.linalg.svd(normal(2, *shape), full_matrices=False)
    spectrum = torch.logspace(0, -2, s.shape[-1], dtype=torch.float64)
    out = polar_express((u * spectrum) @ vh, dtype)
    assert out.dtype == dtype
    noise = 0.1 if dtype == torch.bfloat16 else 1e-4
    found = torch.linalg.svdvals(out.double())
    assert low - noise < found.min() and found.max() < high + noise


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_matrix(shape, dtype):
    """No division by its norm; other matrices of the bank are not touched by it."""
    bank = normal(2, *shape, dtype=dtype)
    alone = polar_express(bank[1:])
    bank[0] = 0
    out = polar_express(bank)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1:], alone, rtol=0, atol=0)


def test_empty_bank():
    assert polar_express(torch.zeros(0, 4, 8)).shape == (0, 4, 8)


@pytest.mark.parametrize("scale", [1e-3, 1e15])
def test_scale_does_not_matter(scale):
    """1e−6 beside the norm is seen only in tiny gradients."""
    g = normal(2, 16, 24)
    torch.testing.assert_close(polar_express(g * scale), polar_express(g), rtol=1e-2, atol=1e-3)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("bank", ["qk_bank", "vo_bank", "mlp_bank"])
@pytest.mark.parametrize("step", range(8))
def test_public_program(shared_data, bank, step):
    """Ours rounds as the compiled program (`polar_fused`) does, not as the uncompiled one does.

    bf16 noise in small singular directions is amplified: 3 to 6 % between those two
    (README_optimizer), 0.8 % at most between ours and its match; hence the factor of 2.
    """
    a, muon = (golden(shared_data, f"optimizer_a{x}.npz") for x in ("", "_muon"))
    polar = from_golden(muon[f"{step}/{bank}/polar"])
    fused = from_golden(muon[f"{step}/{bank}/polar_fused"])
    grad = from_golden(a[f"grad/{step}/{bank}"]).view(fused.shape)
    momentum = torch.zeros(fused.shape)
    if step:
        momentum = from_golden(a[f"after/{step - 1}/{bank}/momentum"])
    out = polar_express(momentum_step(grad, momentum, a["schedule"][step, 2]), torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert 2 * relative(out, fused) < relative(out, polar)


def test_public_program_above_1024_rows(shared_data):
    """The extra rounding of X·B is there: the result with one rounding is far away (9 %)."""
    muon = golden(shared_data, "optimizer_a_muon.npz")
    grad = from_golden(muon["tall/grad"])
    mu = muon["tall/momentum_coefficient"].item()
    out = polar_express(momentum_step(grad, torch.zeros(grad.shape), mu), torch.bfloat16)
    fused = relative(out, from_golden(muon["tall/polar_fused"]))
    assert 2 * fused < relative(out, from_golden(muon["tall/polar_one_rounding"]))
    assert 2 * fused < relative(out, from_golden(muon["tall/polar"]))
