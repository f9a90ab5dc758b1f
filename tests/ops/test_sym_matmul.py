"""`sym_matmul` on every backend that this machine has."""

import math

import pytest
import torch

from cases import SYM_MATMUL_SMALL, SymCase
from numerics import assert_accurate, assert_same_bits
from op_helpers import skips_without_cuda_kernel
from speedrun import ops
from speedrun.ops._dispatch import Unavailable
from speedrun.ops.sym_matmul import DTYPES, KERNEL_DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py

pytestmark = pytest.mark.usefixtures("backend")


def random_normal(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def circulant(batch, n, dtype, seed):
    """Symmetric circulant matrices, which commute exactly, whatever their entries' type."""
    distance = torch.arange(n) - torch.arange(n)[:, None]
    nearer = torch.minimum(distance % n, -distance % n)
    return random_normal((batch, n), dtype, seed)[:, nearer]


def operands(case: SymCase, dtype):
    """a, b or None, c or None."""
    shape = (case.batch, *((case.k, case.n) if case.trans else (case.n, case.k)))
    a, b, c = random_normal(shape, dtype), None, None
    if case.b:
        a, b = (circulant(case.batch, case.n, dtype, seed) for seed in (0, 1))
    if case.beta:
        c = random_normal((case.batch, case.n, case.n), dtype, seed=2)
        c = c + c.mT
    return a, b, c


def call(case: SymCase, a, b, c, **options):
    options = {"trans": case.trans, "alpha": case.alpha, "beta": case.beta, **options}
    with skips_without_cuda_kernel():
        return ops.sym_matmul(a, b, c=c, **options)


def expected(case: SymCase, a, b, c):
    """In plain float64."""
    a, b, c = (None if x is None else x.double() for x in (a, b, c))
    product = a.mT @ a if case.trans else a @ (a if b is None else b).mT
    return case.alpha * product + (case.beta * c if case.beta else 0)


def reference(case: SymCase, a, b, c):
    with ops.use_backend("torch"):
        return call(case, a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SYM_MATMUL_SMALL, ids=lambda case: case.name)
def test_accurate(case, dtype, backend):
    if backend != "torch" and dtype not in KERNEL_DTYPES:
        pytest.skip("16-bit types alone have kernels")
    a, b, c = operands(case, dtype)
    out = call(case, a, b, c)
    assert_accurate(out, reference(case, a, b, c), expected(case, a, b, c))
    if case.b or backend != "torch":  # which else trusts in A·Aᵀ
        assert_same_bits(out, out.mT.contiguous())


def test_rounds_once():
    """2^-9 of 256 is added to it by C: lost if the product or beta·C were rounded first."""
    a = torch.full((1, 16, 4), 8.0, dtype=torch.bfloat16, device=DEVICE)
    c = torch.full((1, 16, 16), 0.75, dtype=torch.bfloat16, device=DEVICE)
    case = SymCase("", 1, 16, 4, "", beta=1.5)  # 256 + 1.125: nearest bf16 is 258
    assert (call(case, a, None, c) == 258).all()
    a = torch.full((1, 16, 1), 1 + 2.0**-7, dtype=torch.bfloat16, device=DEVICE)
    # (1 + 2^-7)²·1.25 is nearer to 1.2734375 than what 1.015625·1.25 = 1.26953125 rounds to
    assert (call(SymCase("", 1, 16, 1, "", alpha=1.25), a, None, None) == 1.2734375).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_special_values(dtype):
    a = random_normal((1, 80, 16), dtype)
    a[0, 3, 1], a[0, 70, 2] = float("inf"), float("nan")
    case = SymCase("", 1, 80, 16, "")
    out = call(case, a, None, None)
    assert out[0, 70].isnan().all() and out[0, :, 70].isnan().all()
    assert out[0, 3, 3].isposinf() and out[0, 3].isfinite().sum() == 0
    others = [i for i in range(80) if i not in (3, 70)]
    assert out[0, others][:, others].isfinite().all()
    largest = torch.full((1, 2, 2), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    assert call(SymCase("", 1, 2, 2, ""), largest, None, None).isposinf().all()


def test_c_is_not_read_where_beta_is_0():
    a = random_normal((1, 20, 8), torch.float16)
    c = torch.full((1, 20, 20), float("nan"), dtype=torch.float16, device=DEVICE)
    case = SymCase("", 1, 20, 8, "")
    assert_same_bits(call(case, a, None, c), call(case, a, None, None))


def test_one_matrix_without_a_batch():
    a, c = random_normal((70, 24), torch.bfloat16), circulant(1, 70, torch.bfloat16, 1)[0]
    case = SymCase("", 1, 70, 24, "", alpha=2.0, beta=1.0)
    out = call(case, a, None, c)
    assert_same_bits(out, call(case, a[None], None, c[None])[0])


def test_operands_may_be_one_another():
    """b·A + c·A² of one A: what Newton–Schulz computes."""
    a = circulant(2, 72, torch.bfloat16, 0)
    case = SymCase("", 2, 72, 72, "", alpha=0.25, beta=-1.0, b=True)
    assert_same_bits(call(case, a, a, a), call(case, a, a.clone(), a.clone()))
    assert_same_bits(call(case, a, None, a), call(case, a, a, a))


@pytest.mark.parametrize("trans", [False, True])
def test_layouts(trans, backend):
    """Rows that are padded or start anywhere, one matrix for a batch, and an out with a frame."""
    whole = random_normal((4, 40, 64), torch.float16)
    for a in (whole[:, ::3], whole[:, :, 5:29], whole[1:2].expand(3, -1, -1), whole[::2, 1:]):
        n = a.shape[-1 if trans else -2]
        case = SymCase("", len(a), n, 0, "", trans=trans, alpha=0.5, beta=1.0)
        framed = torch.zeros(len(a), n + 3, n + 9, dtype=torch.float16, device=DEVICE)
        out = framed[:, 2 : n + 2, 7 : n + 7]
        c = circulant(len(a), n + 8, torch.float16, 1)[:, :n, :n]
        result = call(case, a, None, c, out=out)
        assert result is out
        assert_accurate(out, reference(case, a, None, c), expected(case, a, None, c))
        framed[:, 2 : n + 2, 7 : n + 7] = 0
        assert not framed.any()


def test_out_must_have_memory_of_its_own():
    memory = random_normal((4, 16, 16), torch.float16)
    a, others = memory[:2], memory[2:]
    case = SymCase("", 2, 16, 16, "", beta=1.0, b=True)
    for name, (b, c, out) in {
        "a": (others, others, a),
        "b": (memory[1:3], others, memory[2:4]),
        "c": (a, memory[1:3], memory[2:4]),
    }.items():
        with pytest.raises(ValueError, match=f"out shares memory with {name}; give it its own"):
            call(case, a, b, c, out=out)
    call(case, a, a, a, out=others)  # a part of the same memory that nothing else is in
    expanded = torch.zeros(1, 16, 16, dtype=torch.float16, device=DEVICE).expand(2, -1, -1)
    with pytest.raises(ValueError, match=r"out is expanded, \(2, 16, 16\) with strides \(0,"):
        call(case, a, a, a, out=expanded)


def test_refuses_readably(backend):
    a = random_normal((2, 6, 4), torch.float16)
    with pytest.raises(ValueError, match=r"a must be \(N, K\) or \(B, N, K\), got \(6,\)"):
        ops.sym_matmul(a[0, :, 0])
    with pytest.raises(TypeError, match=r"a has type torch\.int32"):
        ops.sym_matmul(a.int())
    with pytest.raises(TypeError, match=r"c has type torch\.float32 and a torch\.float16"):
        ops.sym_matmul(a, beta=1.0, c=torch.zeros(2, 6, 6, device=DEVICE))
    with pytest.raises(ValueError, match=r"c must be \(2, 6, 6\) on .*, got \(2, 4, 4\)"):
        ops.sym_matmul(a, beta=1.0, c=a[:, :4])
    with pytest.raises(ValueError, match=r"b must be \(2, 6, 4\)"):
        ops.sym_matmul(a, a[:1])
    with pytest.raises(ValueError, match=r"out must be \(2, 4, 4\)"):
        ops.sym_matmul(a, trans=True, out=a.new_empty(2, 6, 6))
    with pytest.raises(ValueError, match=r"beta is 2\.0, which needs c"):
        ops.sym_matmul(a, beta=2.0)
    with pytest.raises(ValueError, match="b can't be given with trans"):
        ops.sym_matmul(a, a, trans=True)
    with pytest.raises(ValueError, match=r"last dimension of a must be contiguous.*a\.contiguous"):
        ops.sym_matmul(a.mT)
    with pytest.raises(RuntimeError, match=r"no gradient.*no_grad"):
        ops.sym_matmul(a.requires_grad_())
    if backend != "torch":
        with pytest.raises(Unavailable, match="this call has no"):
            ops.sym_matmul(torch.zeros(2, 2, device=DEVICE))


def test_opcheck(backend):
    a, out = random_normal((2, 40, 24), torch.float16), random_normal((2, 40, 40), torch.float16)
    c = circulant(2, 40, torch.float16, 1)
    operators, options = torch.ops.speedrun, (False, 0.5, 2.0)
    torch.library.opcheck(operators.sym_matmul_out.default, (a, a, c, out, *options))
    torch.library.opcheck(operators.sym_matmul.default, (a, a, c, out, *options, backend))
    plain = (a, a, None, out, False, 0.5, 0.0, backend)
    torch.library.opcheck(operators.sym_matmul.default, plain)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_fullgraph_without_recompiling(compiler):
    def function(a, c):  # one call: between two of them Inductor need not round
        return ops.sym_matmul(a, alpha=0.5, beta=2.0, c=c)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    with skips_without_cuda_kernel(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            a = random_normal((2, 40, 24), torch.bfloat16, seed)
            c = circulant(2, 40, torch.bfloat16, seed)
            assert_same_bits(compiled(a, c), function(a, c))


def test_two_runs_are_bitwise_equal():
    case = SymCase("", 3, 150, 200, "", alpha=0.5, beta=1.0)
    a, b, c = operands(case, torch.bfloat16)
    assert_same_bits(call(case, a, b, c), call(case, a, b, c))


def test_offsets_beyond_2_31():
    """The second matrix starts at element 2^31 + 64; the memory between is never touched."""
    stride = 2**31 + 64
    case = SymCase("", 2, 20, 12, "")
    a = random_normal((2, 20, 12), torch.float16)
    memory = torch.empty(stride + math.prod((20, 12)), dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((2, 20, 12), (stride, 12, 1))
    far.copy_(a)
    assert_same_bits(call(case, far, None, None), call(case, a, None, None))
