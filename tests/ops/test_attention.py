"""`attention` against its definition: a loop over tokens, each with the list of its keys."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.ops.attention import attention, plan_attention
from train_helpers import FLOAT64_NOISE, normal


def definition(q_THK, k_THK, v_THE, cu_seqlens, window, scale):
    """RECIPE section 3: token t sees keys t−window … t of its own document."""
    out = torch.zeros_like(v_THE)
    for start, end in itertools.pairwise(cu_seqlens):
        for t in range(start, end):
            keys = slice(max(start, t - window), t + 1)
            for head in range(q_THK.shape[1]):
                scores = [scale * (q_THK[t, head] @ k) for k in k_THK[keys, head]]
                weights = torch.stack(scores).exp()
                out[t, head] = (weights / weights.sum()) @ v_THE[keys, head]
    return out


def run(q, k, v, cu_seqlens, window, scale=0.3):
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    return attention(q, k, v, plan_attention(cu_seqlens, len(q), window, q.dtype), scale)


def inputs(num_tokens, dtype=torch.float64):
    """q, k (T, 2, 4) and v (T, 2, 3): widths that differ, so that they can't be confused."""
    sizes = [(num_tokens, 2, 4), (num_tokens, 2, 4), (num_tokens, 2, 3)]
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("cu_seqlens", "window"),
    [
        pytest.param([0, 13, 13], 1, id="itself and one before"),
        pytest.param([0, 13], 5, id="window does not divide T"),
        pytest.param([0, 13], 6, id="T is a multiple of the window plus one"),
        pytest.param([0, 12], 4, id="window divides T"),
        pytest.param([0, 7], 7, id="window of T"),
        pytest.param([0, 7], 100, id="window beyond T"),
        pytest.param([0, 4, 9, 13, 13, 13], 6, id="documents end between blocks"),
        pytest.param([0, 0, 5, 5, 5, 11], 4, id="documents of length 0"),
        pytest.param([0, 1, 2, 3, 8, 9], 4, id="documents of length 1"),
        pytest.param([0, 1], 3, id="one token"),
    ],
)
def test_definition(cu_seqlens, window):
    q, k, v = inputs(cu_seqlens[-1])
    expected = definition(q, k, v, cu_seqlens, window, 0.3)
    torch.testing.assert_close(run(q, k, v, cu_seqlens, window), expected, **FLOAT64_NOISE)


@st.composite
def batches(draw):
    num_tokens = draw(st.integers(1, 24))
    starts = sorted(draw(st.lists(st.integers(0, num_tokens), max_size=6)))
    return [0, *starts, num_tokens], draw(st.integers(0, 30))


@settings(max_examples=100, deadline=None)
@given(batches())
def test_definition_anywhere(batch):
    cu_seqlens, window = batch
    q, k, v = inputs(cu_seqlens[-1])
    expected = definition(q, k, v, cu_seqlens, window, 0.3)
    torch.testing.assert_close(run(q, k, v, cu_seqlens, window), expected, **FLOAT64_NOISE)


def test_equal_values_come_back():
    """Weights sum to 1 over real keys only: where all values are 1, so is every output."""
    q, k, v = inputs(40)
    out = run(q, k, torch.ones_like(v), [0, 3, 40, 40], 16)
    torch.testing.assert_close(out, torch.ones_like(v), **FLOAT64_NOISE)


def test_window_0_is_the_own_value():
    q, k, v = inputs(9)
    torch.testing.assert_close(run(q, k, v, [0, 4, 9], 0), v, **FLOAT64_NOISE)


@pytest.mark.parametrize("window", [2, 30])
def test_gradients(window):
    tensors = [t.requires_grad_() for t in inputs(7)]
    assert torch.autograd.gradcheck(lambda *t: run(*t, [0, 3, 4, 7], window), tensors)


def test_gradients_are_the_definitions():
    """gradcheck compares with the operator itself; this compares with the definition."""
    cu_seqlens, window, upstream = [0, 3, 4, 11], 5, normal(11, 2, 3, seed=9)
    grads = []
    for function in (run, definition):
        q, k, v = (t.requires_grad_() for t in inputs(11))
        (function(q, k, v, cu_seqlens, window, 0.3) * upstream).sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, **FLOAT64_NOISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores(dtype):
    """Scores in the thousands: one key takes all the weight, nothing overflows."""
    q, k, v = inputs(20, dtype)
    out = run(q * 100, k * 100, v, [0, 6, 20], 8)
    assert out.dtype == dtype and out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 2 * torch.finfo(dtype).eps)


def test_refusals():
    q, k, v = inputs(6)
    starts = torch.tensor([0, 6], dtype=torch.int32)
    plan = plan_attention(starts, 6, 2, torch.float64)
    with pytest.raises(TypeError, match=r"1-D int32 tensor, got 1-D torch\.int64"):
        plan_attention(starts.long(), 6, 2, torch.float64)
    with pytest.raises(TypeError, match="got 2-D"):
        plan_attention(starts[None], 6, 2, torch.float64)
    with pytest.raises(ValueError, match="window=-1"):
        plan_attention(starts, 6, -1, torch.float64)
    with pytest.raises(ValueError, match="the plan is for 6 tokens, q has 5"):
        attention(q[:5], k[:5], v[:5], plan, 1.0)
    with pytest.raises(ValueError, match=r"got \(6, 2, 4\), \(6, 1, 4\), \(6, 2, 3\)"):
        attention(q, k[:, :1], v, plan, 1.0)
