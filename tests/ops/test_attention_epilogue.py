"""`attention_epilogue` against RECIPE section 3, "XSA" and "Attention gate", on every backend."""

import math

import pytest
import torch

from cases import ATTENTION_EPILOGUE_FULL, ATTENTION_EPILOGUE_SMALL
from numerics import assert_accurate, assert_same_bits, bits
from op_helpers import assert_compiles, skips_without_cuda_kernel
from speedrun import ops
from speedrun.ops._dispatch import Unavailable
from speedrun.ops.attention_epilogue import (
    KERNEL_DTYPES,
    attention_epilogue,
    attention_epilogue_fp8,
)
from speedrun.reference import attention_epilogue as reference
from train_helpers import FLOAT64_NOISE, normal

T, H, E = 7, 3, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CASES = {case.name: case for case in ATTENTION_EPILOGUE_SMALL}
small = pytest.mark.parametrize("case", ATTENTION_EPILOGUE_SMALL, ids=lambda case: case.name)
types = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
# Interpreted kernels overflow and divide where NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


def inputs(dtype=torch.float64):
    """y, v (T, H, E), α and gate (T, H)."""
    sizes = [(T, H, E), (T, H, E), (T, H), (T, H)]
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


def definition(y_THE, v_THE, alpha_TH, gate_TH):
    """y −= tanh(α)·(⟨y,v⟩/max(|v|²,1e−8))·v; y ← gate·y. Number by number, in Python's floats."""
    out = torch.zeros_like(y_THE)
    for t, (ys, vs) in enumerate(zip(y_THE.tolist(), v_THE.tolist(), strict=True)):
        for h, (y, v) in enumerate(zip(ys, vs, strict=True)):
            if alpha_TH is not None:
                inner = sum(a * b for a, b in zip(y, v, strict=True))
                share = inner / max(sum(b * b for b in v), 1e-8)
                factor = math.tanh(alpha_TH[t, h].item()) * share
                y = [a - factor * b for a, b in zip(y, v, strict=True)]
            gate = 1.0 if gate_TH is None else gate_TH[t, h].item()
            out[t, h] = torch.tensor([gate * a for a in y], dtype=torch.float64)
    return out


@pytest.mark.parametrize("parts", ["neither", "xsa", "gate", "both"])
def test_definition(parts):
    y, v, alpha, gate = inputs()
    v[2, 1] *= 1e-6  # |v|² below 1e−8
    v[4, 0] = 0
    alpha = alpha if parts in ("xsa", "both") else None
    gate = gate if parts in ("gate", "both") else None
    expected = definition(y, v, alpha, gate)
    torch.testing.assert_close(attention_epilogue(y, v, alpha, gate), expected, **FLOAT64_NOISE)


def test_full_strength_leaves_nothing_along_v():
    y, v, _, _ = inputs()
    out = attention_epilogue(y, v, torch.full((T, H), 30.0, dtype=torch.float64))
    torch.testing.assert_close((out * v).sum(-1), torch.zeros(T, H).double(), **FLOAT64_NOISE)
    assert (out - y).abs().max() > 0.1


def test_gradients():
    tensors = [t.requires_grad_() for t in inputs()]
    assert torch.autograd.gradcheck(attention_epilogue, tensors)


def test_gradient_is_the_formulas():
    """With s = ⟨y,v⟩/|v|², τ = tanh(α), z = y − τ·s·v and G = gate·g, g the gradient of the output:
    dgate = ⟨g,z⟩, dα = −(1 − τ²)·s·⟨G,v⟩, dy = G − τ·(⟨G,v⟩/|v|²)·v,
    dv = −τ·(s·G + (⟨G,v⟩/|v|²)·(y − 2·s·v))."""
    tensors = [t.requires_grad_() for t in inputs()]
    upstream = normal(T, H, E, seed=9)
    (attention_epilogue(*tensors) * upstream).sum().backward()
    for t in range(T):
        for h in range(H):
            y, v, alpha, gate = (x[t, h].detach() for x in tensors)
            g, tau, s = upstream[t, h], torch.tanh(alpha), (y @ v) / (v @ v)
            G = gate * g
            along = (G @ v) / (v @ v)
            expected = (
                G - tau * along * v,
                -tau * (s * G + along * (y - 2 * s * v)),
                -(1 - tau**2) * s * (G @ v),
                g @ (y - tau * s * v),
            )
            for tensor, value in zip(tensors, expected, strict=True):
                torch.testing.assert_close(tensor.grad[t, h], value, **FLOAT64_NOISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype):
    """As if only the result were rounded; in bf16 it is, and few elements lie near a tie."""
    y, v, alpha, gate = (normal(512, *t.shape[1:], seed=i) for i, t in enumerate(inputs()))
    tensors = [t.to(dtype) for t in (y, v, alpha, gate)]
    exact = definition(*(t.double() for t in tensors))
    found = attention_epilogue(*tensors)
    assert found.dtype == dtype
    assert_accurate(found, exact.to(dtype), exact)
    if dtype == torch.bfloat16:
        assert (found != exact.to(dtype)).double().mean() < 1e-3


def test_extreme_values(backend):
    """Squares near float32's largest; α beyond tanh's reach; v too small to count."""
    large = torch.full((1, 1, 8), 1e15, device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    for alpha in (100.0, -100.0):
        out = attention_epilogue(large, large, alpha * one)
        expected = 0 if alpha > 0 else 2e15
        assert ((out - expected).abs() <= 1e15 * 2**-21).all()
    tiny = torch.full_like(large, 1e-20)
    assert_same_bits(attention_epilogue(large, tiny, one), large)
    assert_same_bits(attention_epilogue(large, 0 * large, one), large)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    tensors = [t[:num_tokens] for t in inputs()]
    out = attention_epilogue(*tensors)
    torch.testing.assert_close(out, definition(*tensors), **FLOAT64_NOISE)


def test_one_gate_for_all_tokens(backend):
    """Constant gates come as one row, expanded, and get the sum of all tokens' gradients."""
    y, v, alpha, gate = (t.float().to(DEVICE).requires_grad_() for t in inputs())
    results = []
    for contiguous in (False, True):
        one = [t[:1].expand(T, H) for t in (alpha, gate)]
        with skips_without_cuda_kernel():
            out = attention_epilogue(y, v, *([t.contiguous() for t in one] if contiguous else one))
        results.append([out, *torch.autograd.grad(out.sum(), (y, v, alpha, gate))])
    for few, many in zip(*results, strict=True):
        assert_same_bits(few.detach(), many.detach())


def test_compiled():
    assert_compiles(attention_epilogue, inputs(), normal(T, H, E, seed=9))


# ---- Kernels ------------------------------------------------------------------------------------


class Inputs:
    """Random tensors of a case and the gradient of its result."""

    def __init__(self, case, dtype, seed=0):
        self.case, rows = case, (case.tokens, case.heads)
        sizes = [(*rows, case.dim)] * (1 + case.xsa) + [rows] * (case.xsa + case.gate)
        self.tensors = [
            normal(*size, seed=seed + i, dtype=dtype).to(DEVICE) for i, size in enumerate(sizes)
        ]
        if case.xsa and case.tokens > 2:
            self.tensors[1][2] *= 1e-6  # |v|² below 1e−8
            self.tensors[1][1, 0] = 0
        self.grad = normal(*rows, case.dim, seed=seed + 9, dtype=dtype).to(DEVICE)

    def named(self, tensors):
        """y, v, α and gate; where there is no XSA, v is y."""
        tensors = list(tensors)
        y, v = tensors[0], tensors[1 if self.case.xsa else 0]
        return y, v, tensors[2] if self.case.xsa else None, tensors[-1] if self.case.gate else None

    def results(self, function, dtype=None):
        """The output and the gradients, of tensors of `dtype`."""
        leaves = [t.to(dtype or t.dtype).clone().requires_grad_() for t in self.tensors]
        out = function(*self.named(leaves))
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(out.dtype))]


def skip_if_cuda_does_not_take(case, backend):
    if backend == "cuda" and case.dim % 8:
        pytest.skip("the CUDA kernel takes no such width")


def assert_law(case, dtype):
    inputs = Inputs(case, dtype)
    found = inputs.results(attention_epilogue)
    same = inputs.results(reference.attention_epilogue)
    exact = inputs.results(reference.attention_epilogue, FP64)
    for mine, other, wide in zip(found, same, exact, strict=True):
        assert_accurate(mine, other, wide)


@small
@types
def test_accuracy_of_values_and_gradients(case, dtype, backend):
    skip_if_cuda_does_not_take(case, backend)
    assert_law(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ATTENTION_EPILOGUE_FULL, ids=lambda case: case.name)
def test_accuracy_at_the_records_shapes(case, backend):
    assert_law(case, BF16)


@small
def test_formulas_of_the_gradients(case):
    """The reference's, which kernels follow, are autograd's, also where |v|² is below 1e−8."""
    inputs = Inputs(case, FP64)
    named = inputs.named(inputs.tensors)
    grads = [None if x is None else torch.empty_like(x) for x in named]
    reference.attention_epilogue_bwd_out(*named, inputs.grad, *grads)
    grads = [g for i, g in enumerate(grads) if g is not None and (i != 1 or case.xsa)]
    expected = inputs.results(reference.attention_epilogue)[1:]
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64_NOISE)


@small
@types
def test_fp8_copy(case, dtype, backend):
    """The very bytes of a cast of out, its greatest number, and out's own gradient."""
    skip_if_cuda_does_not_take(case, backend)
    inputs, scale = Inputs(case, dtype), torch.tensor(0.003, device=DEVICE)
    y, v, alpha, gate = inputs.named(t.requires_grad_() for t in inputs.tensors)
    out, out_f8, amax = attention_epilogue_fp8(y, v, scale, alpha, gate)
    plain = attention_epilogue(y, v, alpha, gate).detach()
    if backend == "triton" and DEVICE == "cuda":  # another program, contracted in another way
        torch.testing.assert_close(out.detach(), plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert_same_bits(out.detach(), plain)
    rows = (-1, max(1, case.dim))
    expected, _, greatest = ops.fp8_quantize(out.reshape(rows), scale, amax=True)
    assert_same_bits(bits(out_f8), bits(expected).view(out.shape))
    assert amax.shape == () and amax.item() == greatest.item()
    assert case.tokens < 2 or (out_f8.float().abs() == 448).any()  # some are beyond
    assert out.requires_grad and not out_f8.requires_grad and not amax.requires_grad
    grads = torch.autograd.grad(out, inputs.tensors, inputs.grad)
    for mine, other in zip(grads, inputs.results(attention_epilogue)[1:], strict=True):
        assert_same_bits(mine, other)


def test_fp8_copy_alone(backend):
    """Of a layer without XSA and gate."""
    y = normal(9, 3, 64, dtype=BF16).to(DEVICE)
    out, out_f8, amax = attention_epilogue_fp8(y, y, torch.tensor(0.1, device=DEVICE))
    assert_same_bits(out, y)
    expected, _, greatest = ops.fp8_quantize(y, torch.tensor(0.1, device=DEVICE), amax=True)
    assert_same_bits(bits(out_f8), bits(expected))
    assert amax.item() == greatest.item()
    y[4, 1, 7] = float("nan")
    out, out_f8, amax = attention_epilogue_fp8(y, y, torch.tensor(0.1, device=DEVICE))
    assert amax.isnan() and out_f8.float().isnan().sum() == 1


def test_neither_part_is_no_work(backend):
    y = normal(9, 3, 64).to(DEVICE)
    assert attention_epilogue(y, y) is y


def test_leading_dims_and_layouts(backend):
    """Parts in front of tokens; y and v of any layout; α and gate transposed."""
    inputs = Inputs(CASES["cut"], FP32)
    y, v, alpha, gate = inputs.named(inputs.tensors)
    expected = attention_epilogue(y, v, alpha, gate)
    parts = [torch.stack([t, t]) for t in (y, v, alpha, gate)]
    assert_same_bits(attention_epilogue(*parts)[1], expected)
    spread = [torch.stack([t, t], dim=-1)[..., 0] for t in (y, v)]
    turned = [t.T.contiguous().T for t in (alpha, gate)]
    assert_same_bits(attention_epilogue(*spread, *turned).contiguous(), expected)


def test_two_runs_are_bitwise_equal(backend):
    inputs = Inputs(CASES["whole_block"], BF16)
    for first, second in zip(*(inputs.results(attention_epilogue) for _ in range(2)), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("name", ["reduced", "xsa", "gate"])
def test_opcheck(name, backend):
    if backend == "torch":
        pytest.skip("not behind an operator")
    operators, inputs = torch.ops.speedrun, Inputs(CASES[name], FP32)
    y, v, alpha, gate = inputs.named(inputs.tensors)
    call = (y, v if inputs.case.xsa else None, alpha, gate)
    leaves = [None if x is None else x.clone().requires_grad_() for x in call]
    check = torch.library.opcheck
    check(operators.attention_epilogue.default, (*leaves, None, backend))
    check(operators.attention_epilogue_bwd.default, (*call, inputs.grad, backend))
    empty = [None if x is None else torch.empty_like(x) for x in call]
    check(operators.attention_epilogue_out.default, (*call, None, empty[0], None, None))
    check(operators.attention_epilogue_bwd_out.default, (*call, inputs.grad, *empty))
    scale, amax = torch.tensor(0.1, device=DEVICE), torch.zeros((), device=DEVICE)
    out_f8 = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    # Not all tests: torch can't compare fp8 tensors.
    tests = ("test_autograd_registration", "test_faketensor")
    for op, more in (
        (operators.attention_epilogue_out, (scale, empty[0], out_f8, amax)),
        (operators.attention_epilogue, (scale, backend)),
    ):
        check(op.default, (*call, *more), test_utils=tests)


def test_compiles_without_recompiling(backend):
    """Both front doors, in float32: in bf16 Inductor leaves roundings out that it fuses away."""
    scale = torch.tensor(0.01, device=DEVICE)

    def call(y, v, alpha, gate):
        out, out_f8, amax = attention_epilogue_fp8(y, v, scale, alpha, gate)
        more = out_f8.float().mean() + amax  # not for the gradient
        return attention_epilogue(out, v, alpha, gate) + more

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            inputs = Inputs(CASES["cut"], FP32, seed=seed)
            eager = inputs.results(call)
            for mine, other in zip(inputs.results(compiled), eager, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_refuses_readably():
    y, v, alpha, gate = inputs(FP32)
    with pytest.raises(TypeError, match=r"y_THE has type torch\.int32; allowed are float16"):
        attention_epilogue(y.int(), v)
    with pytest.raises(ValueError, match=r"y_THE must be \(\.\.\., T, H, E\), got \(3, 5\)"):
        attention_epilogue(y[0], v[0])
    with pytest.raises(ValueError, match=r"v_THE must be \(7, 3, 5\) on cpu, got \(6, 3, 5\)"):
        attention_epilogue(y, v[:6], alpha)
    with pytest.raises(TypeError, match=r"xsa_TH must be torch\.float32, got torch\.bfloat16"):
        attention_epilogue(y, v, alpha.bfloat16())
    with pytest.raises(ValueError, match=r"gate_TH must be \(7, 3\) on cpu, got \(7, 1\)"):
        attention_epilogue(y, v, None, gate[:, :1])
    with pytest.raises(TypeError, match=r"scale must be torch\.float32, got torch\.float64"):
        attention_epilogue_fp8(y, v, torch.tensor(0.1).double())
    with pytest.raises(ValueError, match=r"scale must be \(\) on cpu, got \(2,\)"):
        attention_epilogue_fp8(y, v, torch.ones(2))
    with ops.use_backend("triton"), pytest.raises(Unavailable, match="no Triton version"):
        attention_epilogue(y.double(), v.double(), alpha.double())
