"""`attention`: the reference against its definition, a loop over tokens, each with the list of its
keys; kernels against the reference in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cases import document_starts
from numerics import assert_accurate, assert_same_bits, attention_results
from op_helpers import run_with_gradients
from speedrun import ops
from speedrun._data_types import cu_seqlens_entries
from speedrun.ops._dispatch import Unavailable
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


# ---- Kernels: Triton, here in its interpreter -------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STARTS = [0, 0, 1, 2, 70, 70, 133, 150, 150, 150]  # lengths 0 and 1, tiles cut everywhere, padding


@pytest.fixture(params=["triton"])
def kernel(request):
    pytest.importorskip("triton")
    with ops.use_backend(request.param, "attention"):
        yield request.param


def kernel_inputs(num_tokens, head_dims, num_heads=1):
    """q, k, v and the output's gradient, bf16."""
    K, E = head_dims
    shapes = [(num_tokens, num_heads, width) for width in (K, K, E, E)]
    tensors = [normal(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(shapes)]
    return [t.to(DEVICE) for t in tensors]


def starts_tensor(starts):
    return torch.tensor(starts, dtype=torch.int32, device=DEVICE)


def run_kernel(q, k, v, starts, window, scale=None):
    head_dims = (q.shape[2], v.shape[2])
    plan = plan_attention(starts_tensor(starts), len(q), window, q.dtype, head_dims)
    return attention(q, k, v, plan, head_dims[0] ** -0.5 if scale is None else scale)


def with_gradients(q, k, v, dout, starts, window, scale=None):
    return run_with_gradients(lambda *qkv: run_kernel(*qkv, starts, window, scale), [q, k, v], dout)


def check_accuracy(tensors, starts, window):
    """Output and gradients by the law of numerics.py."""
    q, k, v, dout = tensors
    found = with_gradients(*tensors, starts, window)
    scale = q.shape[2] ** -0.5
    same, exact = attention_results(q, k, v, dout, starts_tensor(starts), window, scale)
    for mine, reference, ref64 in zip(found, same, exact, strict=True):
        assert mine.is_contiguous()
        if ref64.any():
            assert_accurate(mine, reference, ref64)
        else:  # one key each: ds is the difference of two equal sums, taken in another order
            assert mine.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("starts", "window"),
    [
        pytest.param(STARTS, 0, id="itself only"),
        pytest.param(STARTS, 5, id="shorter than a tile"),
        pytest.param(STARTS, 64, id="a tile"),
        pytest.param(STARTS, 600, id="large tiles, beyond every document"),
        pytest.param([0, 250], 100, id="one document, several tiles of keys"),
        pytest.param([0, 250], 129, id="the first tile of keys is seen by no row of some queries"),
        pytest.param([0, 192, 256], 64, id="whole tiles"),
        pytest.param([0, 1], 3, id="one token"),
        pytest.param(list(range(20)), 7, id="one token each"),
    ],
)
def test_kernel_accuracy(kernel, starts, window):
    check_accuracy(kernel_inputs(starts[-1], (16, 32), num_heads=2), starts, window)


@pytest.mark.parametrize("window", [40, 700], ids="window {}".format)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (96, 128), (48, 16)], ids=str)
def test_kernel_head_dims(kernel, head_dims, window):
    check_accuracy(kernel_inputs(150, head_dims), STARTS, window)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "max_seqlen", "window"),
    [
        pytest.param(16384, 896, 128, id="stage 1, short"),
        pytest.param(16384, 896, 384, id="stage 1, long"),
        pytest.param(49152, 2048, 640, id="stage 3, short"),
        pytest.param(49152, 2048, 1664, id="extension, long"),
    ],
)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (96, 128)], ids=str)
def test_kernel_accuracy_at_real_sizes(kernel, num_tokens, max_seqlen, window, head_dims):
    starts = document_starts(num_tokens, max_seqlen, cu_seqlens_entries(num_tokens))
    check_accuracy(kernel_inputs(num_tokens, head_dims, num_heads=2), starts, window)


@pytest.mark.parametrize("window", [30, 600])
def test_kernel_keeps_documents_apart(kernel, window):
    """Another document may be NaN: not a bit of an output or a gradient changes."""
    tensors = kernel_inputs(150, (16, 16))
    clean = with_gradients(*tensors, STARTS, window)
    for first, end in [(2, 70), (70, 133)]:
        inside = torch.zeros(150, dtype=torch.bool, device=DEVICE)
        inside[first:end] = True
        spoilt = [t.masked_fill(~inside[:, None, None], torch.nan) for t in tensors]
        for mine, expected in zip(with_gradients(*spoilt, STARTS, window), clean, strict=True):
            assert_same_bits(mine[inside], expected[inside])


@pytest.mark.parametrize("t", [70, 99, 132])
def test_kernel_sees_its_window_and_no_more(kernel, t):
    """Token t's output is the same whatever is outside t − 20 … t, and another for each inside."""
    q, k, v, _ = kernel_inputs(150, (16, 16))
    out = run_kernel(q, k, v, STARTS, 20)[t]
    first = max(70, t - 20)
    outside = torch.ones(150, dtype=torch.bool, device=DEVICE)
    outside[first : t + 1] = False
    k[outside], v[outside] = 3.0, -5.0
    assert_same_bits(run_kernel(q, k, v, STARTS, 20)[t], out)
    for key in (first, t):
        changed = v.clone()
        changed[key] += 8
        assert not torch.equal(run_kernel(q, k, changed, STARTS, 20)[t], out)


def test_kernel_gradients_reach_the_window_and_no_more(kernel):
    """A gradient of token 100's output reaches keys 80 … 100, and no query but its own."""
    q, k, v, dout = kernel_inputs(150, (16, 16))
    dout[torch.arange(150, device=DEVICE) != 100] = 0
    _, dq, dk, dv = with_gradients(q, k, v, dout, STARTS, 20)
    for grad, reached in ((dq, [100]), (dk, range(80, 101)), (dv, range(80, 101))):
        assert grad.flatten(1).any(1).nonzero().flatten().tolist() == list(reached)


def test_kernel_padding_changes_nothing(kernel):
    tensors = kernel_inputs(150, (16, 16))
    padded = with_gradients(*tensors, [*STARTS, *[150] * 40], 33)
    for mine, expected in zip(padded, with_gradients(*tensors, STARTS, 33), strict=True):
        assert_same_bits(mine, expected)


def test_kernel_twice_is_the_same(kernel):
    tensors = kernel_inputs(150, (16, 16))
    runs = [with_gradients(*tensors, STARTS, 33) for _ in range(2)]
    for mine, expected in zip(*runs, strict=True):
        assert_same_bits(mine, expected)


def test_kernel_reads_views(kernel):
    """Queries, keys and values may be slices of one product, and heads strided."""
    tensors = kernel_inputs(150, (16, 16), num_heads=2)[:3]
    whole = torch.cat(tensors, dim=-1)
    views = whole.split(16, dim=-1)
    assert not any(view.is_contiguous() for view in views)
    assert_same_bits(run_kernel(*views, STARTS, 33), run_kernel(*tensors, STARTS, 33))
    turned = [t.mT.contiguous().mT for t in tensors]  # the last dimension is strided: copied
    assert_same_bits(run_kernel(*turned, STARTS, 33), run_kernel(*tensors, STARTS, 33))


def test_kernel_bears_large_scores(kernel):
    q, k, v, dout = kernel_inputs(150, (16, 16))
    results = with_gradients(q * 100, k * 100, v, dout, STARTS, 33, 1.0)
    assert all(t.isfinite().all() for t in results)
    assert results[0].abs().max() <= v.abs().max()


def test_kernel_opcheck(kernel):
    q, k, v, dout = kernel_inputs(40, (16, 16))
    plan = plan_attention(starts_tensor([0, 7, 40, 40]), 40, 9, q.dtype, (16, 16))
    batch = (plan.cu_seqlens, plan.limits, plan.extra, 0.25, plan.backend)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.speedrun.attention.default, (*leaves, *batch))
    with torch.no_grad():
        out, lse = torch.ops.speedrun.attention(q, k, v, *batch)
        arguments = (dout, *(t.detach() for t in leaves), out, lse, *batch)
        torch.library.opcheck(torch.ops.speedrun.attention_bwd.default, arguments)


def test_kernel_compiles_once_for_all_windows_and_lengths(kernel):
    *tensors, dout = kernel_inputs(150, (16, 16))

    def function(q, k, v, plan):
        return 2 * attention(q, k + 1, v, plan, 0.25)

    def plan_of(starts, window):
        return plan_attention(starts_tensor(starts), 150, window, torch.bfloat16, (16, 16))

    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    for call, (starts, window) in enumerate(
        [(STARTS, 33), (STARTS, 0), (STARTS, 700), ([0, 30, 60, *[150] * 7], 33)]
    ):
        plan = plan_of(starts, window)
        with torch.compiler.set_stance("fail_on_recompile" if call else "default"):
            found = run_with_gradients(lambda *t, p=plan: compiled(*t, p), tensors, dout)
        expected = run_with_gradients(lambda *t, p=plan: function(*t, p), tensors, dout)
        for mine, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, eager, rtol=2**-7, atol=2**-7)


@settings(max_examples=25, deadline=None)
@given(batches(), st.sampled_from([3, 600]))
def test_triton_tiles_are_those_of_documents(batch, window):
    """Every tile of every document, in order, and else nothing; the list is long enough."""
    pytest.importorskip("triton")
    from speedrun.triton_kernels.attention import shared_bytes, tile_list, tile_rows

    starts = [37 * start for start in batch[0]]
    tiles = tile_list(starts_tensor(starts), starts[-1], window).tolist()
    rows = tile_rows(window, shared_bytes(torch.device(DEVICE)))
    expected = [
        [token, first, end]
        for first, end in itertools.pairwise(starts)
        for token in range(first, end, rows)
    ]
    assert tiles[: len(expected)] == expected
    assert all(token >= end for token, _, end in tiles[len(expected) :])


def test_kernel_refusals(kernel):
    q, k, v, _ = kernel_inputs(20, (16, 16))
    starts = starts_tensor([0, 20])
    with pytest.raises(Unavailable, match="no Triton version"):
        plan_attention(starts, 20, 3, torch.float32, (16, 16))
    plan = plan_attention(starts, 20, 3, torch.bfloat16, (16, 16))
    with pytest.raises(TypeError, match=r"needs torch\.bfloat16, got torch\.float32"):
        attention(q.float(), k.float(), v.float(), plan, 1.0)
    with pytest.raises(ValueError, match="max_seqlen=0"):
        plan_attention(starts, 20, 3, torch.bfloat16, (16, 16), max_seqlen=0)
    with pytest.raises(ValueError, match="the plan is for 20 tokens, q has 19"):
        attention(q[:19], k[:19], v[:19], plan, 1.0)


# ---- The work of the reference, which CPUs train with -----------------------------------------


def reference_cost(num_tokens, window):
    """(operations, bytes of the largest tensor that is kept for the gradient) of one call."""
    q, k, v = (t.requires_grad_() for t in inputs(num_tokens, torch.float32))
    sizes = []

    def note(t):
        sizes.append(t.untyped_storage().nbytes())
        return t

    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = attention(q, k, v, plan_attention(starts, num_tokens, window, q.dtype), 1.0)
        y.sum().backward()
    return counter.get_total_flops(), max(sizes)


def test_work_grows_with_tokens_times_window():
    """Not with T²: four times the tokens are four times the work and memory."""
    flops, num_bytes = reference_cost(256, 16)
    assert flops > 0
    assert reference_cost(1024, 16) == (4 * flops, 4 * num_bytes)
    wide_flops, wide_bytes = reference_cost(1024, 32)
    assert wide_flops == 2 * 4 * flops and wide_bytes <= 2 * 4 * num_bytes
