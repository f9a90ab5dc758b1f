"""What `qk_norm_rope` is made of, and its tables, against RECIPE section 3, "Attention"."""

import itertools
import math

import pytest
import torch

from numerics import assert_accurate, assert_same_bits
from op_helpers import assert_compiles, assert_same_with_gradients
from speedrun.ops.attention import attention, plan_attention
from speedrun.ops.qk_norm_rope import (
    NORM_EPS,
    key_offset,
    norm_rope,
    pair_heads,
    rotary_frequencies,
    rotary_positions,
    rotary_table,
    unpair_heads,
    yarn,
)
from train_helpers import FLOAT64_NOISE, golden, normal


def definition(x_THK, positions, frequencies):
    """Element by element, in Python's floats. `positions`: of each token, or (t, h) -> number."""
    position = positions if callable(positions) else lambda t, h: positions[t]
    out = torch.zeros_like(x_THK)
    T, H, K = x_THK.shape
    for t in range(T):
        for h in range(H):
            x = x_THK[t, h].tolist()
            norm = math.sqrt(sum(value * value for value in x) / K + 2**-23)
            y = [value / norm for value in x]
            for pair in range(K // 4):
                a, b = y[2 * pair], y[2 * pair + 1]
                theta = position(t, h) * frequencies[pair]
                y[2 * pair] = a * math.cos(theta) + b * math.sin(theta)
                y[2 * pair + 1] = b * math.cos(theta) - a * math.sin(theta)
            out[t, h] = torch.tensor(y, dtype=torch.float64)
    return out


def table(num_tokens, head_dim=16, dtype=torch.float64, start=0):
    positions = torch.arange(start, start + num_tokens)[:, None]
    return rotary_table(rotary_frequencies(head_dim, 1024.0), positions, dtype)


def frequencies_of(head_dim):
    """(1/1024)^linspace(0, 1, d/4), in Python's floats."""
    return [1024 ** -(i / max(head_dim // 4 - 1, 1)) for i in range(head_dim // 4)]


@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 4), (37, 16), (5, 128)])
def test_definition(num_tokens, head_dim):
    x = normal(num_tokens, 3, head_dim)
    expected = definition(x, range(num_tokens), frequencies_of(head_dim))
    found = norm_rope(x, *table(num_tokens, head_dim))
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
    both = norm_rope(x, *table(9))
    for part in range(2):
        torch.testing.assert_close(both[part], norm_rope(x[part], *table(9)), rtol=0, atol=0)


def test_scores_depend_on_the_distance_only():
    """q·k of any two tokens stays when all positions move on by the same number."""
    q, k = normal(12, 2, 16, seed=1), normal(12, 2, 16, seed=2)

    def scores(start):
        turned = [norm_rope(x, *table(12, start=start)) for x in (q, k)]
        return torch.einsum("thk,shk->hts", *turned)

    torch.testing.assert_close(scores(0), scores(1000), **FLOAT64_NOISE)
    unturned = torch.einsum("thk,shk->hts", *(norm_rope(x, *table(1)) for x in (q, k)))
    assert (scores(0) - unturned).abs().max() > 0.1


def test_length_is_the_root_of_the_head_dim():
    x = normal(6, 2, 16) * 1000
    lengths = norm_rope(x, *table(6)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 4.0), rtol=1e-9, atol=0)


def test_zero_vector_stays_zero():
    assert norm_rope(torch.zeros(3, 1, 8), *table(3, 8, torch.float32)).eq(0).all()
    assert NORM_EPS == 2**-23


def test_bf16_is_normed_in_float32():
    """The squares of 2^70 overflow neither bf16's exponent nor the sum, and come out as ones."""
    x = torch.full((2, 1, 8), 2.0**60, dtype=torch.bfloat16)
    out = norm_rope(x, *table(2, 8, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out[0] == 1).all()


def test_gradients():
    x = normal(5, 2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm_rope(x, *table(5, 8)), x)


def test_gradient_is_the_formulas():
    """Back through the rotation, then through the norm: (g − y·mean(g·y))/√(mean(x²) + ε)."""
    x, grad = normal(4, 2, 8).requires_grad_(), normal(4, 2, 8, seed=1)
    (norm_rope(x, *table(4, 8)) * grad).sum().backward()
    for t, h in itertools.product(range(4), range(2)):
        g = grad[t, h].clone()
        for pair, f in enumerate(frequencies_of(8)):
            a, b = grad[t, h, 2 * pair : 2 * pair + 2].tolist()
            g[2 * pair] = a * math.cos(t * f) - b * math.sin(t * f)
            g[2 * pair + 1] = a * math.sin(t * f) + b * math.cos(t * f)
        root = (x[t, h].detach().square().mean() + 2**-23).sqrt()
        y = x[t, h].detach() / root
        torch.testing.assert_close(x.grad[t, h], (g - y * (g * y).mean()) / root, **FLOAT64_NOISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype):
    """Beside norm and rotation in the same type, from tables of that type."""
    x, (cos, sin) = normal(64, 3, 16, dtype=dtype), table(64, dtype=dtype)

    def formula(x, cos, sin):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = (y / (y.square().mean(-1, keepdim=True) + 2**-23).sqrt()).to(x.dtype)
        out = y.clone()
        out[..., 0:8:2] = y[..., 0:8:2] * cos + y[..., 1:8:2] * sin
        out[..., 1:8:2] = y[..., 1:8:2] * cos - y[..., 0:8:2] * sin
        return out

    exact = formula(x.double(), cos.double(), sin.double())
    assert_accurate(norm_rope(x, cos, sin), formula(x, cos, sin), exact)


def test_no_tokens():
    x = torch.zeros(0, 2, 8)
    assert norm_rope(x, *table(0, 8, torch.float32)).shape == x.shape
    assert key_offset(x[None]).shape == (1, 0, 2, 8)
    assert pair_heads(x).shape == (0, 1, 8) and unpair_heads(pair_heads(x)).shape == x.shape


def test_compiled():
    cos, sin = table(6, 8)
    assert_compiles(
        lambda x: pair_heads(key_offset(norm_rope(x, cos, sin)[None])[0]),
        [normal(6, 2, 8)],
        normal(12, 1, 8, seed=1),
    )


# ---- Partial key offset -------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, [[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]], ids=["leaks", "kept"])
def test_key_offset(first):
    """The stationary half of k_t is that of k_{t−1}; the first token of a part, and of a document
    if `first` says where those begin, keeps its own."""
    first_PT = None if first is None else torch.tensor(first, dtype=torch.bool)

    def definition(k):
        parts = []
        for p in range(2):
            for t in range(5):
                own = t == 0 or (first is not None and first[p][t])
                before = k[p, t if own else t - 1, :, 4:]
                parts.append(torch.cat([k[p, t, :, :4], before], dim=-1))
        return torch.stack(parts).view(k.shape)

    assert_same_with_gradients(
        lambda k: key_offset(k, first_PT), definition, [normal(2, 5, 3, 8)], normal(2, 5, 3, 8)
    )


def test_key_offset_of_one_token():
    k = normal(2, 1, 3, 8)
    assert_same_bits(key_offset(k), k)


# ---- Paired heads -------------------------------------------------------------------------------


def test_places_of_paired_heads():
    """Heads j and j + H/2 of token t are at 2t and 2t + 1 of sequence j."""
    x = normal(4, 6, 3)
    paired = pair_heads(x)
    assert paired.shape == (8, 3, 3)
    for t, j in itertools.product(range(4), range(3)):
        assert_same_bits(paired[2 * t, j], x[t, j])
        assert_same_bits(paired[2 * t + 1, j], x[t, j + 3])
    assert_same_bits(unpair_heads(paired), x)


def test_positions():
    assert rotary_positions(3).tolist() == [[0], [1], [2]]
    # Not the places above: of six heads, 1 and 4 are swapped.
    assert rotary_positions(2, 6).tolist() == [[0, 1, 0, 1, 0, 1], [2, 3, 2, 3, 2, 3]]


def test_paired_heads_are_turned_by_their_own_positions():
    x = normal(5, 6, 16)
    cos_sin = rotary_table(rotary_frequencies(16, 1024.0), rotary_positions(5, 6), torch.float64)
    expected = definition(x, lambda t, h: 2 * t + h % 2, frequencies_of(16))
    torch.testing.assert_close(norm_rope(x, *cos_sin), expected, **FLOAT64_NOISE)


@pytest.mark.parametrize("window", [1, 4, 30])
def test_paired_attention(window):
    """Number by number: sequence j has head j at even and head j + H/2 at odd places, documents
    are doubled, and w + 1 keys of it are seen."""
    T, H, starts = 9, 6, [0, 4, 5, 9]
    tensors = [normal(T, H, 4, seed=i) for i in range(3)]

    def by_loops(q, k, v):
        out = [[None] * H for _ in range(T)]
        for j, (t, half) in itertools.product(range(H // 2), itertools.product(range(T), range(2))):
            place = 2 * t + half
            begin = 2 * max(start for start in starts[:-1] if start <= t)
            keys = range(max(begin, place - window), place + 1)
            heads = [(key // 2, j + (H // 2) * (key % 2)) for key in keys]
            own = q[t, j + (H // 2) * half]
            exps = [(0.3 * (own * k[at]).sum()).exp() for at in heads]
            weighted = [e * v[at] for e, at in zip(exps, heads, strict=True)]
            out[t][j + (H // 2) * half] = sum(weighted) / sum(exps)
        return torch.stack([torch.stack(row) for row in out])

    plan = plan_attention(2 * torch.tensor(starts, dtype=torch.int32), 2 * T, window, torch.float64)

    def paired(q, k, v):
        return unpair_heads(attention(*(pair_heads(t) for t in (q, k, v)), plan, 0.3))

    assert_same_with_gradients(paired, by_loops, tensors, normal(T, H, 4, seed=9))


# ---- YaRN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "new_window"), [(384, 896), (96, 160), (100, 100)])
def test_yarn(window, new_window):
    """What turns less than once in the old window is slowed by the growth, what turns 32 times
    stays; d = 128 has some of each and some between."""
    frequencies, factor = yarn(rotary_frequencies(128, 1024.0), window, new_window)
    kinds = set()
    for f, found in zip(frequencies_of(128), frequencies.tolist(), strict=True):
        rotations = window * f / (2 * math.pi)
        blend = min(max((rotations - 1) / 31, 0), 1)
        kinds.add(blend if blend in (0, 1) else "between")
        expected = f * (window / new_window + blend * (1 - window / new_window))
        assert found == pytest.approx(expected, rel=1e-14)
    assert kinds >= {0, "between"} and (1 in kinds) == (window == 384)
    assert factor == pytest.approx(0.2 * math.log(new_window / window) + 1, rel=1e-14)


def test_yarn_of_the_public_program(shared_data):
    """Its frequencies are float32: some ulps after three steps."""
    schedule, io = golden(shared_data, "schedule.npz"), golden(shared_data, "io.npz")
    frequencies, scale = rotary_frequencies(128, 1024.0), 0.1
    windows = [384, 896, 1408, 1664]
    for i, expected in enumerate(schedule["rotary_freq"]):
        if i:
            frequencies, factor = yarn(frequencies, windows[i - 1], windows[i])
            scale *= factor
        tolerance = dict(rtol=2**-22, atol=0)
        torch.testing.assert_close(frequencies, torch.from_numpy(expected), **tolerance)
        assert scale == pytest.approx(schedule["score_scale"][i], rel=1e-12)
    found, factor = yarn(rotary_frequencies(16, 1024.0), 96, 160)
    torch.testing.assert_close(found, torch.from_numpy(io["rotary_freq_yarn"]), rtol=2**-22, atol=0)
    assert 0.1 * factor == pytest.approx(io["score_scale_yarn"].item(), rel=1e-12)
