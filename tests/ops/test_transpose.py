"""`transpose` and `transpose_add_` on every backend that this machine has."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import TRANSPOSE_SMALL
from numerics import assert_accurate, assert_same_bits, bits
from speedrun import ops
from speedrun.ops.transpose import ADD_DTYPES, DTYPES
from speedrun.reference import transpose as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py

pytestmark = pytest.mark.usefixtures("backend")


def random_bits(shape, dtype, seed=0):
    """Every bit pattern may come, NaNs and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape).to(DEVICE)


def random_normal(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def transposed_bits(x):
    return bits(x).mT.contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRANSPOSE_SMALL, ids=lambda case: case.name)
def test_moves_every_bit(case, dtype):
    x = random_bits(case.shape, dtype)
    out = ops.transpose(x)
    assert out.is_contiguous() and out.dtype == dtype
    assert torch.equal(bits(out), transposed_bits(x))
    assert out.numel() == 0 or out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", ADD_DTYPES, ids=str)
@pytest.mark.parametrize("case", TRANSPOSE_SMALL, ids=lambda case: case.name)
def test_adds(case, dtype, backend):
    x = random_normal(case.shape, dtype)
    old = random_normal(x.mT.shape, dtype, seed=1)
    out = old.clone()
    assert ops.transpose_add_(out, x) is out
    same = reference.transpose_add_(old.clone(), x)
    assert_accurate(out, same, reference.transpose_add_(old.double(), x.double()))
    interpreted = backend == "triton" and DEVICE == "cpu"
    if not (interpreted and dtype == torch.bfloat16):  # the interpreter cuts bf16 off, GPUs round
        assert_same_bits(out, (old.float() + x.mT.float()).to(dtype))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 140),
    cols=st.integers(0, 140),
    start=st.integers(0, 3),
    gap=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size_and_layout(rows, cols, start, gap, dtype):
    whole = random_bits((2, rows, start + cols + gap), dtype)
    x = whole[:, :, start : start + cols]  # misaligned start, padded rows
    assert torch.equal(bits(ops.transpose(x)), transposed_bits(x))


def test_special_values_survive():
    # A signalling NaN, a quiet one with payload and sign, both infinities, -0, a subnormal.
    patterns = [0x7F800001, -0x3FFFFFF, 0x7F800000, -0x800000, -(2**31), 1, 0, 0x3F800000]
    x = torch.tensor(patterns, dtype=torch.int32, device=DEVICE).view(torch.float32).reshape(2, 4)
    assert bits(ops.transpose(x)).mT.flatten().tolist() == patterns
    half = torch.tensor([0x7F81, -1, 0x7F80, -(2**15)], dtype=torch.int16, device=DEVICE)
    x = half.view(torch.bfloat16).reshape(2, 2)
    assert bits(ops.transpose(x)).mT.flatten().tolist() == half.tolist()


def test_add_at_the_limits():
    largest = torch.finfo(torch.float16).max
    x = torch.tensor([[largest, float("inf"), float("nan"), -0.0]], device=DEVICE).half()
    out = torch.tensor([[largest], [1.0], [1.0], [-0.0]], device=DEVICE).half()
    ops.transpose_add_(out, x)
    values = out.flatten().tolist()
    assert values[:2] == [float("inf")] * 2 and out[2].isnan() and bits(out[3]).item() == -(2**15)


def test_padded_and_expanded_layouts():
    x = random_normal((4, 40, 64), torch.bfloat16)
    for view in (x[:, ::3], x[:, :, 5:29], x[1:2].expand(3, -1, -1), x[0, :1].expand(7, -1)):
        assert_same_bits(ops.transpose(view), view.mT.contiguous())
    out = torch.zeros(4, 64, 48, dtype=torch.bfloat16, device=DEVICE)
    ops.transpose_add_(out[:, :, 4:44], x)  # rows of `out` may be padded, too
    assert_same_bits(out[:, :, 4:44].contiguous(), x.mT.contiguous())
    assert not out[:, :, :4].any() and not out[:, :, 44:].any()


@pytest.mark.parametrize("shape", [(33, 65), (2, 16, 8)], ids=str)
def test_gradient(shape):
    x = random_normal(shape, torch.float32).requires_grad_()
    weight = random_normal((*shape[:-2], shape[-1], shape[-2]), torch.float32, seed=1)
    (ops.transpose(x) * weight).sum().backward()
    assert_same_bits(x.grad, weight.mT.contiguous())
    x.grad = None
    ops.transpose(x).sum().backward()  # its gradient is an expanded scalar
    assert_same_bits(x.grad, torch.ones_like(x))
    x.grad = None
    ops.transpose(x).mT.backward(gradient=weight.mT)  # and here it is not contiguous
    assert_same_bits(x.grad, weight.mT.contiguous())


def test_opcheck(backend):
    x, out = random_normal((33, 65), torch.float32), random_normal((65, 33), torch.float32)
    operators = torch.ops.speedrun
    torch.library.opcheck(operators.transpose.default, (x.requires_grad_(), backend))
    torch.library.opcheck(operators.transpose_add_.default, (out, x.detach(), backend))
    torch.library.opcheck(operators.transpose_out.default, (x.detach(), out, True))


def compiles_to_the_same(compiler):
    def forward(x, weight, total):
        with torch.no_grad():
            ops.transpose_add_(total, x)
        return ops.transpose(x) * weight

    def run(function):
        x = random_normal((32, 64), torch.float32).requires_grad_()
        weight = random_normal((64, 32), torch.float32, seed=1)
        total = weight.clone()
        out = function(x, weight, total)
        out.square().sum().backward()
        return out.detach(), x.grad, total

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for mine, eager in zip(run(compiled), run(forward), strict=True):
                assert_same_bits(mine, eager)


def test_compiles_fullgraph_without_recompiling():
    compiles_to_the_same("aot_eager")


def test_compiles_with_inductor():
    compiles_to_the_same("inductor")


def test_refuses_readably():
    with pytest.raises(TypeError, match=r"x has type torch\.int64; allowed are uint8, int8"):
        ops.transpose(torch.zeros(2, 2, dtype=torch.int64, device=DEVICE))
    with pytest.raises(TypeError, match=r"torch\.int32; allowed are float16, bfloat16, float32"):
        ops.transpose_add_(*torch.zeros(2, 2, 2, dtype=torch.int32, device=DEVICE))
    for shape in [(3,), (2, 2, 2, 2)]:
        with pytest.raises(ValueError, match=r"must be \(M, N\) or \(B, M, N\)"):
            ops.transpose(torch.zeros(shape, device=DEVICE))
    x = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"must be contiguous.*x\.contiguous\(\) first"):
        ops.transpose(x.mT)
    with pytest.raises(ValueError, match=r"like x transposed, \(6, 4\)"):
        ops.transpose_add_(torch.zeros(4, 6, device=DEVICE), x)
    with pytest.raises(ValueError, match=r"like x transposed, \(6, 4\) torch\.float32"):
        ops.transpose_add_(torch.zeros(6, 4, device=DEVICE).half(), x)
    with pytest.raises(RuntimeError, match=r"no gradient.*no_grad"):
        ops.transpose_add_(torch.zeros(6, 4, device=DEVICE), x.requires_grad_())


def test_two_runs_are_bitwise_equal():
    x, out = random_normal((300, 200), torch.bfloat16), random_normal((200, 300), torch.bfloat16)
    assert_same_bits(ops.transpose(x), ops.transpose(x))
    first, second = ops.transpose_add_(out.clone(), x), ops.transpose_add_(out.clone(), x)
    assert_same_bits(first, second)


COMPILE_FOR_HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speedrun.triton_kernels.transpose import tile_size, transpose_kernel

names = [param.name for param in transpose_kernel.params]
for type_name, size, add in (("u8", 1, False), ("i16", 2, False), ("i32", 4, False),
                             ("fp16", 2, True), ("bf16", 2, True), ("fp32", 4, True)):
    signature = dict.fromkeys(names, "i32")
    signature.update(x_ptr=f"*{type_name}", out_ptr=f"*{type_name}", x_batch_stride="i64",
                     out_batch_stride="i64", ADD="constexpr", TILE="constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(8)}
    source = ASTSource(fn=transpose_kernel, signature=signature, attrs=aligned,
                       constexprs={"ADD": add, "TILE": tile_size(size)})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, type_name
print("compiled")
"""


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_triton_compiles_for_hopper_without_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE_FOR_HOPPER]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "compiled" in run.stdout, run.stderr[-2000:]
