"""`residual_mix` against its definition: sums of products, number by number."""

import itertools
import math

import pytest
import torch

from numerics import assert_accurate, assert_same_bits
from op_helpers import assert_compiles, assert_same_with_gradients
from speedrun.ops.residual_mix import residual_mix
from train_helpers import FLOAT64_NOISE, normal

P, T, D = 2, 3, 6


def streams(dtype=torch.float64, num_tokens=T):
    """Three of full width and one of the first four columns."""
    sizes = [(P, num_tokens, D)] * 3 + [(P, num_tokens, 4)]
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


def factors(dtype=torch.float64):
    """One a token, one for all tokens, a scalar. The fourth is NUMBER."""
    shapes = [(P, T, 1), (1, 1, 1), (1,)]
    one_a_token, one, scalar = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes, 7))
    return [one_a_token, one, scalar.squeeze(0)]


NUMBER = -0.7


def mix(*tensors):
    """Of the four streams and three factors."""
    return residual_mix(list(zip([*tensors[4:], NUMBER], tensors[:4], strict=True)))


def definition(*tensors):
    """The same, number by number."""
    parts, own = tensors[:4], tensors[4:]
    out = torch.zeros(P, T, D, dtype=torch.float64)
    for p, t, d in itertools.product(range(P), range(T), range(D)):
        out[p, t, d] = own[0][p, t, 0] * parts[0][p, t, d] + own[1][0, 0, 0] * parts[1][p, t, d]
        out[p, t, d] += own[2] * parts[2][p, t, d]
        if d < 4:
            out[p, t, d] += NUMBER * parts[3][p, t, d]
    return out


def test_definition():
    """Values, and gradients of streams and of every kind of factor."""
    grad = normal(P, T, D, seed=5)
    assert_same_with_gradients(mix, definition, [*streams(), *factors()], grad)


def test_one_term():
    x = streams()[0]
    assert_same_bits(residual_mix([(2.0, x)]), 2 * x)


def test_gradients():
    tensors = [t.requires_grad_() for t in (*streams(), *factors())]
    assert torch.autograd.gradcheck(mix, tensors)


def test_bf16_is_rounded_once():
    """Three terms of 2⁸ + 2⁰ and the like: each sum rounded to bf16 would lose the small ones."""
    big, one = (torch.full((1, 1, 2), x, dtype=torch.bfloat16) for x in (256.0, 1.0))
    out = residual_mix([(1.0, big), (1.0, one), (1.0, one)])
    assert_same_bits(out, torch.full_like(out, 258.0))
    tensors = [*streams(torch.bfloat16), *factors(torch.bfloat16)]
    exact = definition(*(t.double() for t in tensors))
    found = mix(*tensors)
    assert_accurate(found, exact.bfloat16(), exact)
    assert_same_bits(found, exact.bfloat16())  # none of these lies so near a tie


def test_type_and_shape_are_the_first_streams():
    x, other, _, narrow = streams(torch.bfloat16)
    factor = torch.ones((), dtype=torch.float32)
    out = residual_mix([(factor, x), (factor, other.float()), (2.0, narrow)])
    assert (out.dtype, out.shape) == (torch.bfloat16, x.shape)


def test_extreme_values():
    """Infinity and NaN stay in their elements; sums are of float32's range."""
    x = torch.tensor([[[math.inf, math.nan, 3e38, 1.0]]], dtype=torch.float32)
    out = residual_mix([(1.0, x), (-1.0, torch.full_like(x, 3e38))])
    assert out[0, 0, 0] == math.inf and out[0, 0, 1].isnan() and out[0, 0, 2] == 0
    large = torch.full((1, 1, 3), 2.0**127, dtype=torch.bfloat16)
    assert_same_bits(residual_mix([(0.5, large), (0.5, large)]), large)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    parts = streams(num_tokens=num_tokens)
    out = residual_mix([(0.5, part) for part in parts])
    whole = torch.cat([parts[3], torch.zeros(P, num_tokens, 2).double()], dim=-1)
    expected = 0.5 * (parts[0] + parts[1] + parts[2] + whole)
    torch.testing.assert_close(out, expected, **FLOAT64_NOISE)


def test_compiled():
    assert_compiles(mix, [*streams(), *factors()], normal(P, T, D, seed=5))
