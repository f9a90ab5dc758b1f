"""`qk_norm_rope`, from the projection to attention's inputs, on every backend that is here.

What it is made of has its own tests: test_rotary.py.
"""

import pytest
import torch

from cases import QK_NORM_ROPE_FULL, QK_NORM_ROPE_SMALL
from numerics import assert_accurate, assert_same_bits
from op_helpers import run_with_gradients
from speedrun import ops
from speedrun.ops._dispatch import Unavailable
from speedrun.ops.qk_norm_rope import (
    KERNEL_DTYPES,
    pair_heads,
    qk_norm_rope,
    rotary_frequencies,
    rotary_positions,
    rotary_table,
    unpair_heads,
)
from speedrun.reference import qk_norm_rope as reference
from train_helpers import FLOAT64_NOISE, normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CASES = {case.name: case for case in QK_NORM_ROPE_SMALL}
small = pytest.mark.parametrize("case", QK_NORM_ROPE_SMALL, ids=lambda case: case.name)
types = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
# Interpreted kernels overflow and divide where NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


class Inputs:
    """Random tensors of a case: those with gradients, the tables, and first tokens."""

    def __init__(self, case, dtype, seed=0):
        P, T, H, K, E = case.parts, case.tokens, case.heads, case.head_dim, case.value_dim
        sizes = [(P, T, H * (2 * K + E))]
        sizes += [(P, T, H * E)] * case.ve + [(P, T, H)] * case.gate
        self.tensors = [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(sizes)]
        self.grads = [normal(P, T, H, e, seed=seed + 9 + e, dtype=dtype) for e in (K, K, E)]
        positions = rotary_positions(T, H if case.paired else 0)
        self.tables = rotary_table(rotary_frequencies(K, 1024.0), positions, dtype)
        self.first = None
        if case.first:
            generator = torch.Generator().manual_seed(seed)
            self.first = (torch.rand(P, T, generator=generator) < 0.3).to(DEVICE)
        for name in ("tensors", "grads", "tables"):
            setattr(self, name, [x.to(DEVICE) for x in getattr(self, name)])
        self.case = case

    def call(self, qkv, ve=None, gate=None):
        options = {"offset_keys": self.case.offset, "first_PT": self.first}
        extra = {"ve_PTD": ve, "ve_gate_PTH": gate}
        return qk_norm_rope(qkv, *self.tables, self.case.heads, **options, **extra)

    def reference(self, qkv, ve=None, gate=None):
        cos, sin = (t.to(qkv.dtype) for t in self.tables)
        keys = (self.case.offset, self.first)
        return reference.qk_norm_rope(qkv, cos, sin, self.case.heads, *keys, ve, gate)

    def results(self, function, dtype=None):
        """q, k, v and the gradients, of tensors of `dtype`."""
        tensors, grads = ([x.to(dtype or x.dtype) for x in t] for t in (self.tensors, self.grads))
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        return [x.detach() for x in out] + list(torch.autograd.grad(out, leaves, grads))


def skip_if_cuda_does_not_take(case, backend):
    if backend == "cuda" and (case.head_dim % 16 or case.value_dim % 8):
        pytest.skip("the CUDA kernel takes no such widths")


def assert_law(case, dtype):
    inputs = Inputs(case, dtype)
    found = inputs.results(inputs.call)
    same, exact = inputs.results(inputs.reference), inputs.results(inputs.reference, FP64)
    assert len(found) == 3 + len(inputs.tensors)
    for mine, other, wide in zip(found, same, exact, strict=True):
        assert_accurate(mine, other, wide)


@small
@types
def test_accuracy_of_values_and_gradients(case, dtype, backend):
    skip_if_cuda_does_not_take(case, backend)
    assert_law(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", QK_NORM_ROPE_FULL, ids=lambda case: case.name)
def test_accuracy_at_the_records_shapes(case, backend):
    assert_law(case, BF16)


def test_definition():
    """Number by number: where each head lies in the projection, whose key is whose, v + gate·ve."""
    case = CASES["all"]
    inputs = Inputs(case, FP64)
    qkv, ve, gate = inputs.tensors
    q, k, v = inputs.call(qkv, ve, gate)
    H, K, E = case.heads, case.head_dim, case.value_dim
    for p in range(case.parts):
        for t in range(case.tokens):
            own = t == 0 or inputs.first[p, t]
            for h in range(H):
                table = [x[t : t + 1, h : h + 1] for x in inputs.tables]
                row = qkv[p, t, h * K : (h + 1) * K].view(1, 1, K)
                expected = reference.norm_rope(row, *table).flatten()
                torch.testing.assert_close(q[p, t, h], expected, **FLOAT64_NOISE)
                start = (H + h) * K
                row = qkv[p, t, start : start + K].view(1, 1, K)
                expected = reference.norm_rope(row, *table).flatten()
                x = qkv[p, t if own else t - 1, start : start + K]
                expected[K // 2 :] = (x / (x.square().mean() + 2**-23).sqrt())[K // 2 :]
                torch.testing.assert_close(k[p, t, h], expected, **FLOAT64_NOISE)
                expected = (
                    qkv[p, t, 2 * H * K + h * E :][:E] + gate[p, t, h] * ve[p, t, h * E :][:E]
                )
                torch.testing.assert_close(v[p, t, h], expected, **FLOAT64_NOISE)


@small
def test_formulas_of_the_gradients(case):
    """The reference's, which kernels follow, are autograd's."""
    inputs = Inputs(case, FP64)
    expected = inputs.results(inputs.reference)[3:]
    qkv, ve, gate = [*inputs.tensors, None, None][:3]
    found = [torch.empty_like(x) for x in inputs.tensors]
    own = found[1:] if case.gate else (None, None)
    reference.qk_norm_rope_bwd_out(
        qkv, *inputs.tables, case.heads, case.offset, inputs.first, ve, gate, *inputs.grads,
        found[0], *own,
    )  # fmt: skip
    if case.ve and not case.gate:
        found[1] = inputs.grads[2].flatten(-2)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64_NOISE)


def test_results_pair_without_a_copy(backend):
    if backend == "torch":
        pytest.skip("the reference's v may be a view of the projection")
    inputs = Inputs(CASES["paired"], FP32)
    for x in inputs.call(*inputs.tensors):
        rows = x.flatten(0, 1)
        paired = pair_heads(rows)
        assert paired.data_ptr() == unpair_heads(paired).data_ptr() == rows.data_ptr()
        assert_same_bits(unpair_heads(paired), rows)


def test_extreme_values(backend):
    """Squares beyond fp16's and near fp32's range; rows of zeros; a NaN stays in its row, and in
    the stationary half of the key behind."""
    case = CASES["offset"]
    inputs = Inputs(case, BF16)
    (qkv,) = inputs.tensors
    qkv[0, 0] = 2.0**60
    qkv[0, 1] = 0
    qkv[1, 5, case.heads * 128] = float("nan")  # the first key's first number
    q, k, v = inputs.call(qkv)
    assert (q[0, 0].float().square().mean(-1) - 1).abs().max() < 2**-6 and (
        v[0, 0] == 2.0**60
    ).all()
    assert (q[0, 1] == 0).all() and (k[0, 1, :, :64] == 0).all() and (k[0, 2, :, 64:] == 0).all()
    assert q.isfinite().all() and v.isfinite().all()
    expected = torch.zeros(k.shape, dtype=torch.bool)
    expected[1, 5, 0, :64] = expected[1, 6, 0, 64:] = True
    assert torch.equal(k.isnan().cpu(), expected)
    for grad in torch.autograd.grad(inputs.call(qkv.requires_grad_()), qkv, inputs.grads):
        assert grad[0].isfinite().all()


def test_other_layouts_are_copied(backend):
    inputs = Inputs(CASES["gated"], BF16)
    usual = inputs.results(inputs.call)
    spread = [torch.stack([x, x], dim=-1) for x in inputs.tensors]
    assert not spread[0][..., 0].is_contiguous()
    inputs.tensors = spread
    strided = inputs.results(lambda *tensors: inputs.call(*(t[..., 0] for t in tensors)))
    for mine, other in zip(strided[:3], usual[:3], strict=True):
        assert_same_bits(mine.contiguous(), other.contiguous())
    for mine, other in zip(strided[3:], usual[3:], strict=True):
        assert_same_bits(mine[..., 0], other)


def test_gradients_of_expanded_gradients(backend):
    """A sum's gradient has strides of 0."""
    inputs = Inputs(CASES["gated"], FP32)
    leaves = [t.requires_grad_() for t in inputs.tensors]
    sum(x.sum() for x in inputs.call(*leaves)).backward()
    inputs.grads = [torch.ones_like(g) for g in inputs.grads]
    for leaf, expected in zip(leaves, inputs.results(inputs.call)[3:], strict=True):
        assert_same_bits(leaf.grad, expected)


def test_one_result_alone_has_a_gradient(backend):
    inputs = Inputs(CASES["offset"], FP32)
    (qkv,) = inputs.tensors
    found = run_with_gradients(lambda x: inputs.call(x)[1], [qkv], inputs.grads[1])[1]
    inputs.grads = [torch.zeros_like(inputs.grads[0]), inputs.grads[1], inputs.grads[2] * 0]
    assert torch.equal(found, inputs.results(inputs.call)[3])


def test_two_runs_are_bitwise_equal(backend):
    inputs = Inputs(CASES["all"], BF16)
    for first, second in zip(*(inputs.results(inputs.call) for _ in range(2)), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("name", ["all", "added", "cut"])
def test_opcheck(name, backend):
    if backend == "torch":
        pytest.skip("not behind an operator")
    inputs = Inputs(CASES[name], FP32)
    qkv, ve, gate = [*inputs.tensors, None, None][:3]
    case = inputs.case
    first = inputs.first if case.offset else None
    call = (qkv, *inputs.tables, case.heads, case.offset, first, ve, gate)
    leaves = tuple(
        x.clone().requires_grad_() if any(x is t for t in inputs.tensors) else x for x in call
    )
    torch.library.opcheck(torch.ops.speedrun.qk_norm_rope.default, (*leaves, backend))
    grads = tuple(inputs.grads)
    torch.library.opcheck(torch.ops.speedrun.qk_norm_rope_bwd.default, (*call, *grads, backend))
    outs = [torch.empty_like(g) for g in grads]
    torch.library.opcheck(torch.ops.speedrun.qk_norm_rope_out.default, (*call, *outs))
    own = [torch.empty_like(x) for x in inputs.tensors] if gate is not None else [None] * 2
    dqkv = torch.empty_like(qkv)
    bwd = (*call, *grads, dqkv, *own[-2:])
    torch.library.opcheck(torch.ops.speedrun.qk_norm_rope_bwd_out.default, bwd)


@pytest.mark.parametrize("name", ["all", "added"])
def test_compiles_without_recompiling(name, backend):
    inputs = Inputs(CASES[name], FP32)
    torch._dynamo.reset()
    compiled = torch.compile(inputs.call, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            inputs.tensors = Inputs(CASES[name], FP32, seed=seed).tensors
            eager = inputs.results(inputs.call)
            for mine, other in zip(inputs.results(compiled), eager, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_refuses_readably():
    inputs = Inputs(CASES["gated"], FP32)
    qkv, ve, gate = inputs.tensors
    H, (cos, sin) = 3, inputs.tables
    with pytest.raises(TypeError, match=r"qkv_PTN has type torch\.int32; allowed are float16"):
        qk_norm_rope(qkv.int(), cos, sin, H)
    with pytest.raises(TypeError, match=r"cos must be torch\.float32, got torch\.float64"):
        qk_norm_rope(qkv, cos.double(), sin, H)
    with pytest.raises(ValueError, match=r"needs qkv_PTN \(P, T, N\).*num_heads=0"):
        qk_norm_rope(qkv, cos, sin, 0)
    with pytest.raises(ValueError, match=r"needs qkv_PTN \(P, T, N\).*got \(7, 1152\)"):
        qk_norm_rope(qkv[0], cos, sin, H)
    with pytest.raises(ValueError, match=r"1152 columns .* 5 heads' queries and keys of 128"):
        qk_norm_rope(qkv, cos, sin, 5)
    with pytest.raises(ValueError, match=r"sin must be \(7, 1, 32\)"):
        qk_norm_rope(qkv, cos, sin[:5], H)
    with pytest.raises(ValueError, match=r"ve_PTD must be \(2, 7, 384\)"):
        qk_norm_rope(qkv, cos, sin, H, ve_PTD=ve[..., :380])
    with pytest.raises(ValueError, match=r"ve_gate_PTH must be \(2, 7, 3\)"):
        qk_norm_rope(qkv, cos, sin, H, ve_PTD=ve, ve_gate_PTH=gate[..., :1])
    with pytest.raises(ValueError, match="ve_gate_PTH without ve_PTD: give both"):
        qk_norm_rope(qkv, cos, sin, H, ve_gate_PTH=gate)
    with pytest.raises(TypeError, match=r"first_PT must be torch\.bool, got torch\.int64"):
        qk_norm_rope(qkv, cos, sin, H, offset_keys=True, first_PT=torch.zeros(2, 7).long())
    with ops.use_backend("triton"), pytest.raises(Unavailable, match="no Triton version"):
        qk_norm_rope(qkv.double(), cos.double(), sin.double(), H)
