"""`dc_attention` against RECIPE section 3, "DC": loops over tokens, heads and keys."""

import itertools

import pytest
import torch

from cases import DC_ATTENTION_SMALL
from numerics import assert_accurate, assert_same_bits
from op_helpers import assert_compiles, assert_same_with_gradients
from speedrun import ops
from speedrun.ops.dc_attention import dc_attention, plan_dc_attention
from train_helpers import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
H, K, E, SCALE = 3, 4, 5, 0.3
# Scores of keys that aren't seen may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
cases = pytest.mark.parametrize("case", DC_ATTENTION_SMALL, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    with ops.use_backend(request.param):
        yield request.param


def inputs(num_tokens, dtype=FP64, heads=H, key_dim=K, value_dim=E):
    """q, k (T, H, K), v (T, H, E), w1, w2 (T, H): widths that differ, so that none is confused."""
    sizes = [(heads, key_dim), (heads, key_dim), (heads, value_dim), (heads,), (heads,)]
    tensors = [normal(num_tokens, *size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]
    return [t.to(DEVICE) for t in tensors]


def inputs_of(case, dtype):
    """Those of a case, and a gradient of the output."""
    tensors = inputs(case.cu_seqlens[-1], dtype, case.heads, case.key_dim, case.value_dim)
    tensors[3] += 2  # around 1 in training; the norm of two numbers around 0 has any gradient
    grad = normal(*tensors[2].shape, seed=9, dtype=dtype).to(DEVICE)
    return tensors, grad


def run(q, k, v, w1, w2, cu_seqlens, window):
    starts = torch.tensor(cu_seqlens, dtype=torch.int32, device=q.device)
    return dc_attention(q, k, v, w1, w2, plan_dc_attention(starts, len(q), window), SCALE)


def with_gradients(tensors, grad, *where):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = run(*tensors, *where)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def definition(q, k, v, w1, w2, cu_seqlens, window):
    """A[t,s] = Σ_h w1[t,h]·P_h[t,s]; y_h[t] = w2[t,h]·Σ_s A[t,s]·v_h[s]."""
    rows = []
    for t in range(len(q)):
        start = max(s for s in cu_seqlens[:-1] if s <= t)
        keys = range(max(start, t - window + 1), t + 1)
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


# ---- Formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cu_seqlens", "window"),
    [
        pytest.param([0, 11], 4, id="a part of the document"),
        pytest.param([0, 9], 9, id="all of the document"),
        pytest.param([0, 3, 4, 10, 10], 5, id="documents"),
        pytest.param([0, 6], 1, id="only itself"),
        pytest.param([0, 1], 112, id="one token"),
    ],
)
def test_definition(cu_seqlens, window):
    """Values and gradients."""
    assert_same_with_gradients(
        lambda *tensors: run(*tensors, cu_seqlens, window),
        lambda *tensors: definition(*tensors, cu_seqlens, window),
        inputs(cu_seqlens[-1]),
        normal(cu_seqlens[-1], H, E, seed=9).to(DEVICE),
    )


def test_gradients():
    tensors = [t.requires_grad_() for t in inputs(6)]
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors, [0, 4, 6], 3), tensors)


def test_compiled():
    plan = plan_dc_attention(torch.tensor([0, 3, 10], dtype=torch.int32, device=DEVICE), 10, 5)
    tensors, grad = inputs(10), normal(10, H, E, seed=9).to(DEVICE)
    assert_compiles(lambda *tensors: dc_attention(*tensors, plan, SCALE), tensors, grad)


# ---- Every backend ---------------------------------------------------------------------------


@cases
@dtypes
def test_accuracy(backend, case, dtype):
    """Of values and all gradients, beside the reference in the same type."""
    tensors, grad = inputs_of(case, dtype)
    where = case.cu_seqlens, case.window
    found = with_gradients(tensors, grad, *where)
    with ops.use_backend("torch"):
        same = with_gradients(tensors, grad, *where)
        exact = with_gradients([t.double() for t in tensors], grad.double(), *where)
    for mine, reference, ref64 in zip(found, same, exact, strict=True):
        if ref64.any():
            assert_accurate(mine, reference, ref64)
        else:  # rows of one key: terms cancel, in the reference to the last bit
            q, k, v = (t.double().abs() for t in tensors[:3])
            terms = (grad.double().abs() * v).sum(-1).max() * torch.maximum(q.max(), k.max())
            assert mine.abs().max() <= 4 * torch.finfo(torch.float32).eps * terms


def test_one_token(backend):
    """All weight is on it: its heads' values times w2 and the sum of the normed w1."""
    q, k, v, w1, w2 = inputs(1, FP32)
    expected = w2[..., None] * v * (w1 / (w1.square().mean() + 1e-6).sqrt()).sum()
    torch.testing.assert_close(run(q, k, v, w1, w2, [0, 1], 112), expected)


def changed_rows(base, other):
    return (base != other).flatten(1).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("changed", [0, 63, 71, 80])
def test_who_sees_whom(backend, changed):
    """A key and value changes its own and later tokens, within window and document, and no other;
    so does its query's gradient reach exactly those keys that it sees."""
    cu_seqlens, window = [0, 1, 71, 120], 24
    tensors, grad = inputs(120, FP32, heads=1), normal(120, 1, E, seed=9, dtype=FP32).to(DEVICE)
    base = with_gradients(tensors, grad, cu_seqlens, window)
    start, end = next((a, b) for a, b in itertools.pairwise(cu_seqlens) if a <= changed < b)
    for index in (1, 2):
        moved = [t.clone() for t in tensors]
        moved[index][changed] += 1
        out = with_gradients(moved, grad, cu_seqlens, window)[0]
        expected = list(range(changed, min(end, changed + window)))
        if expected == [start] and index == 1:
            expected = []  # the only key has all the weight, whatever it is
        elif index == 1 and changed == start:
            expected = expected[1:]
        assert changed_rows(base[0], out) == expected
    grad = grad.clone()
    grad[changed] += 1
    dv = with_gradients(tensors, grad, cu_seqlens, window)[3]
    assert changed_rows(base[3], dv) == list(range(max(start, changed - window + 1), changed + 1))


def test_the_length_of_w1_does_not_count(backend):
    q, k, v, w1, w2 = inputs(8, FP32)
    found = run(q, k, v, 1000 * w1, w2, [0, 8], 4)
    torch.testing.assert_close(found, run(q, k, v, w1, w2, [0, 8], 4), rtol=1e-4, atol=1e-4)
    assert run(q, k, v, torch.zeros_like(w1), w2, [0, 8], 4).eq(0).all()


@dtypes
def test_large_scores(backend, dtype):
    """Scores in the thousands: a head's weight goes to one key, nothing overflows."""
    q, k, v, w1, w2 = inputs(20, dtype)
    out = run(q * 100, k * 100, v, w1, w2, [0, 6, 20], 8)
    assert out.dtype == dtype and out.isfinite().all()
    # |w1| sums to H at most, after its norm.
    largest = H * v.abs().max() * w2.abs().max()
    assert out.abs().max() <= largest * (1 + 4 * torch.finfo(dtype).eps)


def test_twice_the_same_bits(backend):
    case = next(case for case in DC_ATTENTION_SMALL if case.name == "one_block_back")
    tensors, grad = inputs_of(case, BF16)
    where = case.cu_seqlens, case.window
    results = [with_gradients(tensors, grad, *where) for _ in range(2)]
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_layouts(backend):
    """Heads cut out of one projection, transposed ones, and a row of weights for all tokens."""
    q, k, v, w1, w2 = inputs(9, FP32, key_dim=16, value_dim=16)
    one = [t[:1].expand(9, H) for t in (w1, w2)]
    expected = run(q, k, v, *(t.contiguous() for t in one), [0, 9], 4)
    cut = torch.cat([q, k], dim=1)
    columns_first = v.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = run(cut[:, :H], cut[:, H:], columns_first, *one, [0, 9], 4)
    assert_same_bits(found, expected)


def test_refusals():
    q, k, v, w1, w2 = inputs(6)
    starts = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
    plan = plan_dc_attention(starts, 6, 3)
    for tensors, message in (
        ((q, k[:5], v, w1, w2), r"same tokens and heads, got \(6, 3, 4\), \(5, 3, 4\)"),
        ((q, k, v[:, :2], w1, w2), "the same tokens and heads"),
        ((q, k, v, w1, w2[:1]), r"w1 and w2 need shape \(6, 3\)"),
        ((q, k, v, w1[:, :2], w2), r"w1 and w2 need shape \(6, 3\)"),
        ((q, k, v.to("meta"), w1, w2), "v is on meta"),
        ([t[:5] for t in (q, k, v, w1, w2)], "the plan is for 6 tokens, q has 5"),
    ):
        with pytest.raises(ValueError, match=message):
            dc_attention(*tensors, plan, SCALE)
    with pytest.raises(TypeError, match="1-D int32"):
        plan_dc_attention(starts.long(), 6, 3)
    for num_tokens, window in ((6, 0), (0, 6)):
        with pytest.raises(ValueError, match=f"window={window}, num_tokens={num_tokens}: both"):
            plan_dc_attention(starts, num_tokens, window)


def test_float64_has_no_kernel():
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no Triton version"):
        run(*inputs(6), [0, 6], 3)


# ---- Kernels behind operators ----------------------------------------------------------------


def test_opcheck():
    pytest.importorskip("triton")
    tensors = [t.requires_grad_() for t in inputs(70, FP32)]
    starts = torch.tensor([0, 30, 70], dtype=torch.int32, device=DEVICE)
    where = plan_dc_attention(starts, 70, 5).start_T, 5, SCALE
    torch.library.opcheck(torch.ops.speedrun.dc_attention.default, (*tensors, *where))
    tensors = [t.detach() for t in tensors]
    y, *softmaxes = torch.ops.speedrun.dc_attention(*tensors, *where)
    arguments = (y, *tensors, *where, *softmaxes)
    torch.library.opcheck(torch.ops.speedrun.dc_attention_bwd.default, arguments)


def test_kernels_compiled():
    """As one graph the same as eager; other lengths of documents don't compile it again."""
    pytest.importorskip("triton")

    def function(cu_seqlens, *tensors):
        plan = plan_dc_attention(cu_seqlens, 40, 9)
        return torch.cos(dc_attention(*tensors, plan, SCALE))

    compiled = torch.compile(function, fullgraph=True)

    def assert_same(cu_seqlens):
        starts = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
        results = []
        for f in (function, compiled):
            own = [t.requires_grad_() for t in inputs(40, FP32)]
            out = f(starts, *own)
            results.append([out, *torch.autograd.grad(out.sum(), own)])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other)

    with ops.use_backend("triton"):
        assert_same([0, 7, 40])
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same([0, 21, 40])
