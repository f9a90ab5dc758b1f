"""`dc_attention` against RECIPE section 3, "DC": loops over tokens, heads and keys."""

import pytest
import torch

from numerics import assert_accurate, assert_same_bits
from op_helpers import assert_compiles, assert_same_with_gradients
from speedrun.ops.attention import plan_attention
from speedrun.ops.dc_attention import dc_attention
from train_helpers import FLOAT64_NOISE, normal

H, K, E, SCALE = 3, 4, 5, 0.3


def inputs(num_tokens, dtype=torch.float64):
    """q, k (T, H, K), v (T, H, E), w1, w2 (T, H): widths that differ, so that none is confused."""
    sizes = [(H, K), (H, K), (H, E), (H,), (H,)]
    return [normal(num_tokens, *size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


def run(q, k, v, w1, w2, cu_seqlens, seen):
    """`seen`: positions that DC sees, the own one included."""
    starts = torch.tensor(cu_seqlens, dtype=torch.int32)
    plan = plan_attention(starts, cu_seqlens[-1], seen - 1, q.dtype)
    return dc_attention(q, k, v, w1, w2, plan, SCALE)


def definition(q, k, v, w1, w2, cu_seqlens, seen):
    """A[t,s] = Σ_h w1[t,h]·P_h[t,s]; y_h[t] = w2[t,h]·Σ_s A[t,s]·v_h[s]."""
    rows = []
    for t in range(len(q)):
        start = max(s for s in cu_seqlens[:-1] if s <= t)
        keys = range(max(start, t - seen + 1), t + 1)
        w1_H = w1[t] / (w1[t].square().sum() / H + 1e-6).sqrt()
        shares = []
        for s in keys:
            total = 0.0
            for h in range(H):
                exps = [(SCALE * (q[t, h] * k[r, h]).sum()).exp() for r in keys]
                total = total + w1_H[h] * exps[s - keys.start] / sum(exps)
            shares.append(total)
        heads = [
            w2[t, h] * sum(share * v[s, h] for share, s in zip(shares, keys, strict=True))
            for h in range(H)
        ]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("cu_seqlens", "seen"),
    [
        pytest.param([0, 11], 4, id="a part of the document"),
        pytest.param([0, 9], 9, id="all of the document"),
        pytest.param([0, 3, 4, 10, 10], 5, id="documents"),
        pytest.param([0, 6], 1, id="only itself"),
        pytest.param([0, 1], 112, id="one token"),
    ],
)
def test_definition(cu_seqlens, seen):
    """Values and gradients."""
    assert_same_with_gradients(
        lambda *tensors: run(*tensors, cu_seqlens, seen),
        lambda *tensors: definition(*tensors, cu_seqlens, seen),
        inputs(cu_seqlens[-1]),
        normal(cu_seqlens[-1], H, E, seed=9),
    )


def test_gradients():
    tensors = [t.requires_grad_() for t in inputs(6)]
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors, [0, 4, 6], 3), tensors)


def test_the_length_of_w1_does_not_count():
    q, k, v, w1, w2 = inputs(8)
    found = run(q, k, v, 1000 * w1, w2, [0, 8], 4)
    torch.testing.assert_close(found, run(q, k, v, w1, w2, [0, 8], 4), rtol=1e-4, atol=1e-4)
    assert run(q, k, v, torch.zeros_like(w1), w2, [0, 8], 4).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype):
    """Beside the formula in the same type, with w1's norm, scores and softmax in float32."""
    cu_seqlens, seen = [0, 20, 96], 16
    tensors = inputs(96, dtype)
    exact = definition(*(t.double() for t in tensors), cu_seqlens, seen)
    q, k, v, w1, w2 = tensors
    t = torch.arange(96)
    distance, doc = t[:, None] - t, (t >= 20)
    hidden = (distance < 0) | (distance >= seen) | (doc[:, None] != doc)
    scores = torch.einsum("thk,shk->hts", q, k).float() * SCALE
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    w1 = (w1.float() / (w1.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(dtype)
    mixed = torch.einsum("hts,th->ts", weights, w1.float()).to(dtype)
    same = torch.einsum("ts,she->the", mixed, v) * w2[..., None]
    found = run(*tensors, cu_seqlens, seen)
    assert found.dtype == dtype
    assert_accurate(found, same, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores(dtype):
    """Scores in the thousands: a head's weight goes to one key, nothing overflows."""
    q, k, v, w1, w2 = inputs(20, dtype)
    out = run(q * 100, k * 100, v, w1, w2, [0, 6, 20], 8)
    assert out.dtype == dtype and out.isfinite().all()
    # |w1| sums to H at most, after its norm.
    largest = H * v.abs().max() * w2.abs().max()
    assert out.abs().max() <= largest * (1 + 4 * torch.finfo(dtype).eps)


def test_twice_the_same_bits():
    tensors = inputs(40, torch.float32)
    assert_same_bits(run(*tensors, [0, 9, 40], 16), run(*tensors, [0, 9, 40], 16))


def test_compiled():
    starts = torch.tensor([0, 3, 10], dtype=torch.int32)
    plan = plan_attention(starts, 10, 4, torch.float64)
    tensors, grad = inputs(10), normal(10, H, E, seed=9)
    assert_compiles(lambda *tensors: dc_attention(*tensors, plan, SCALE), tensors, grad)


def test_refusals():
    q, k, v, w1, w2 = inputs(6)
    plan = plan_attention(torch.tensor([0, 6], dtype=torch.int32), 6, 2, torch.float64)
    with pytest.raises(ValueError, match=r"the same tokens and heads, q has \(6, 3\)"):
        dc_attention(q, k[:5], v, w1, w2, plan, SCALE)
    with pytest.raises(ValueError, match="the same tokens and heads"):
        dc_attention(q, k, v[:, :2], w1, w2, plan, SCALE)
    with pytest.raises(ValueError, match="the same tokens and heads"):
        dc_attention(q, k, v, w1, w2[:1], plan, SCALE)
    with pytest.raises(ValueError, match=r"w1 and w2 need shape \(6, 3\)"):
        dc_attention(q, k, v, w1[:, :2], w2[:, :2], plan, SCALE)


def test_constant_weights_of_all_tokens():
    """One row of w1 and w2, expanded, as constant gates come."""
    q, k, v, w1, w2 = inputs(9)
    one = [t[:1].expand(9, H) for t in (w1, w2)]
    found = run(q, k, v, *one, [0, 9], 4)
    expected = definition(q, k, v, *(t.contiguous() for t in one), [0, 9], 4)
    torch.testing.assert_close(found, expected, **FLOAT64_NOISE)
