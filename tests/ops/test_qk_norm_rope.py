"""`qk_norm_rope` and its tables against RECIPE section 3, "Attention"."""

import math

import pytest
import torch

from speedrun.ops.qk_norm_rope import NORM_EPS, qk_norm_rope, rotary_frequencies, rotary_table
from train_helpers import FLOAT64_NOISE, golden, normal


def definition(x_THK, positions, frequencies):
    """Element by element, in Python's floats."""
    out = torch.zeros_like(x_THK)
    T, H, K = x_THK.shape
    for t in range(T):
        for h in range(H):
            x = x_THK[t, h].tolist()
            norm = math.sqrt(sum(value * value for value in x) / K + 2**-23)
            y = [value / norm for value in x]
            for pair in range(K // 4):
                a, b = y[2 * pair], y[2 * pair + 1]
                theta = positions[t] * frequencies[pair]
                y[2 * pair] = a * math.cos(theta) + b * math.sin(theta)
                y[2 * pair + 1] = b * math.cos(theta) - a * math.sin(theta)
            out[t, h] = torch.tensor(y, dtype=torch.float64)
    return out


def table(num_tokens, head_dim=16, dtype=torch.float64, start=0):
    positions = torch.arange(start, start + num_tokens)[:, None]
    return rotary_table(rotary_frequencies(head_dim, 1024.0), positions, dtype)


@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 4), (37, 16), (5, 128)])
def test_definition(num_tokens, head_dim):
    x = normal(num_tokens, 3, head_dim)
    frequencies = [1024 ** -(i / max(head_dim // 4 - 1, 1)) for i in range(head_dim // 4)]
    expected = definition(x, range(num_tokens), frequencies)
    found = qk_norm_rope(x, *table(num_tokens, head_dim))
    torch.testing.assert_close(found, expected, **FLOAT64_NOISE)


def test_frequencies_of_the_public_program(shared_data):
    schedule, io = golden(shared_data, "schedule.npz"), golden(shared_data, "io.npz")
    for head_dim, expected in ((128, schedule["rotary_freq"][0]), (16, io["rotary_freq"])):
        found = rotary_frequencies(head_dim, 1024.0)
        # The public program keeps its frequencies in float32.
        torch.testing.assert_close(
            found, torch.from_numpy(expected), rtol=torch.finfo(torch.float32).eps, atol=0
        )


def test_leading_dims_share_the_positions():
    x = normal(2, 9, 3, 16)
    both = qk_norm_rope(x, *table(9))
    for part in range(2):
        torch.testing.assert_close(both[part], qk_norm_rope(x[part], *table(9)), rtol=0, atol=0)


def test_scores_depend_on_the_distance_only():
    """q·k of any two tokens stays when all positions move on by the same number."""
    q, k = normal(12, 2, 16, seed=1), normal(12, 2, 16, seed=2)

    def scores(start):
        turned = [qk_norm_rope(x, *table(12, start=start)) for x in (q, k)]
        return torch.einsum("thk,shk->hts", *turned)

    torch.testing.assert_close(scores(0), scores(1000), **FLOAT64_NOISE)
    unturned = torch.einsum("thk,shk->hts", *(qk_norm_rope(x, *table(1)) for x in (q, k)))
    assert (scores(0) - unturned).abs().max() > 0.1


def test_length_is_the_root_of_the_head_dim():
    x = normal(6, 2, 16) * 1000
    lengths = qk_norm_rope(x, *table(6)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 4.0), rtol=1e-9, atol=0)


def test_zero_vector_stays_zero():
    assert qk_norm_rope(torch.zeros(3, 1, 8), *table(3, 8, torch.float32)).eq(0).all()
    assert NORM_EPS == 2**-23


def test_bf16_is_normed_in_float32():
    """The squares of 2^70 overflow neither bf16's exponent nor the sum, and come out as ones."""
    x = torch.full((2, 1, 8), 2.0**60, dtype=torch.bfloat16)
    out = qk_norm_rope(x, *table(2, 8, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out[0] == 1).all()


def test_gradients():
    x = normal(5, 2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: qk_norm_rope(x, *table(5, 8)), x)
