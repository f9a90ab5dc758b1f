"""The casts to fp8 on every backend that this machine has: the bytes, all of them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import FP8_QUANTIZE_SMALL
from numerics import assert_accurate, assert_same_bits, bits
from speedrun import ops
from speedrun.ops.fp8_quantize import DTYPES, FP8_DTYPES
from speedrun.reference import fp8_quantize as reference
from speedrun.reference._fp8 import FP8_MAX

E4M3, E5M2 = FP8_DTYPES
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Division by zero, overflow and NaN are what some of these tests are about.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
small = pytest.mark.parametrize("case", FP8_QUANTIZE_SMALL, ids=lambda case: case.name)
input_types = pytest.mark.parametrize("dtype", DTYPES, ids=str)
fp8_types = pytest.mark.parametrize("fp8", FP8_DTYPES, ids=["e4m3", "e5m2"])


def scalar(value):
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def random_normal(shape, dtype=torch.bfloat16, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def every_bf16():
    """(256, 256): all bit patterns, NaNs, infinities and subnormals included."""
    return torch.arange(65536).to(torch.int16).view(torch.bfloat16).reshape(256, 256).to(DEVICE)


def nearest_codes(quotient, fp8):
    """(bytes, whether NaN) by search among the numbers of the type, in float64: no rounding."""
    mantissa_bits, bias, largest = (3, 7, 0x7E) if fp8 == E4M3 else (2, 15, 0x7B)
    codes = np.arange(largest + 1)
    exponents, fractions = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    whole = fractions + np.where(exponents > 0, 1 << mantissa_bits, 0)
    numbers = np.ldexp(whole.astype(np.float64), np.maximum(exponents, 1) - bias - mantissa_bits)
    middles = (numbers[1:] + numbers[:-1]) / 2
    quotient = quotient.double().cpu().numpy()
    magnitude = np.minimum(np.abs(quotient), numbers[-1])
    below, above = (np.searchsorted(middles, magnitude, side) for side in ("left", "right"))
    found = np.where(below % 2 == 0, below, above)  # they differ at ties: the even one
    return torch.from_numpy(found | np.where(np.signbit(quotient), 0x80, 0)).to(torch.uint8)


def assert_same_fp8(out, expected):
    """The same bytes, and NaN where it is NaN: which of the NaNs is free."""
    assert out.dtype == expected.dtype and out.shape == expected.shape and out.is_contiguous()
    is_nan = expected.float().isnan()
    assert torch.equal(out.float().isnan(), is_nan)
    wrong = ((bits(out) != bits(expected)) & ~is_nan).sum().item()
    assert wrong == 0, f"{wrong} of {out.numel()} bytes differ"


def assert_transposed(out_t, out):
    assert out_t.is_contiguous() and out_t.dtype == out.dtype
    assert torch.equal(bits(out_t), bits(out).mT.contiguous())
    assert out.numel() == 0 or out_t.data_ptr() != out.data_ptr()


@fp8_types
@pytest.mark.parametrize("scale", [1.0, 100 / 448, 0.37, 1e-3, 3e5, 1e-38])
def test_every_bf16_number_goes_to_the_nearest(scale, fp8):
    x = every_bf16()
    out, out_t, amax = ops.fp8_quantize(x, scalar(scale), dtype=fp8, transposed=True, amax=True)
    quotient = x.cpu().float() / torch.tensor(scale)
    expected, is_nan = nearest_codes(quotient.nan_to_num(0), fp8), quotient.isnan()
    assert torch.equal(out.cpu().float().isnan(), is_nan)
    assert torch.equal(bits(out.cpu())[~is_nan], expected[~is_nan])
    if scale == 0.37:  # all codes but the NaNs and, of e5m2, the infinities
        assert bits(out).unique().numel() >= 2 * (0x7F if fp8 == E4M3 else 0x7C)
    assert_transposed(out_t, out)
    assert amax.isnan()


@fp8_types
def test_every_code_and_every_middle_of_two(fp8):
    """All numbers of the type come back, ties go to the even one, neighbours of ties don't."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8)
    numbers = codes[codes.float().isfinite()].float().sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    x = torch.cat([numbers, middles, middles.nextafter(infinity), middles.nextafter(-infinity)])
    out, _, _ = ops.fp8_quantize(x[None].to(DEVICE), scalar(1.0), dtype=fp8)
    assert torch.equal(bits(out.cpu())[0], nearest_codes(x, fp8))


@fp8_types
def test_saturates_and_keeps_nan_and_signs(fp8):
    largest, inf, nan = FP8_MAX[fp8], float("inf"), float("nan")
    x = torch.tensor([[largest * 1.01, 1e30, inf, -inf, -1e30, nan, -0.0, 0.0]], device=DEVICE)
    out, _, amax = ops.fp8_quantize(x, scalar(1.0), dtype=fp8, amax=True)
    values = out.float().flatten().tolist()
    assert values[:5] == [largest] * 3 + [-largest] * 2 and values[5] != values[5]
    assert bits(out)[0, 6:].tolist() == [0x80, 0]
    assert amax.isnan()
    assert ops.fp8_quantize(x[:, :5], scalar(1.0), dtype=fp8, amax=True)[2].item() == inf
    assert ops.fp8_quantize(x[:, 6:], scalar(1.0), dtype=fp8, amax=True)[2].item() == 0


@small
@input_types
@fp8_types
def test_both_layouts_and_amax(case, dtype, fp8):
    x = random_normal(case.shape, dtype)
    scale = scalar(0.02 if fp8 == E4M3 else 1e-4)
    out, out_t, amax = ops.fp8_quantize(x, scale, dtype=fp8, transposed=True, amax=True)
    assert_same_fp8(out, reference.to_fp8(x, scale, fp8))
    assert_transposed(out_t, out)
    assert (amax.shape, amax.dtype) == ((), torch.float32)
    assert amax.item() == (x.abs().max().item() if x.numel() else 0)
    alone, nothing, no_amax = ops.fp8_quantize(x, scale, dtype=fp8)
    assert_same_fp8(alone, out)
    assert nothing is None and no_amax is None


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 140),
    cols=st.integers(0, 140),
    start=st.integers(0, 3),
    gap=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size_and_layout(rows, cols, start, gap, dtype):
    whole = random_normal((2, rows, start + cols + gap), dtype)
    x, scale = whole[:, :, start : start + cols], scalar(0.01)  # misaligned start, padded rows
    out, out_t, amax = ops.fp8_quantize(x, scale, transposed=True, amax=True)
    assert_same_fp8(out, reference.to_fp8(x, scale, E4M3).contiguous())
    assert_transposed(out_t, out)
    assert amax.item() == (x.abs().max().item() if x.numel() else 0)


def test_expanded_and_strided_layouts():
    x, scale = random_normal((4, 40, 64)), scalar(0.01)
    for view in (x[:, ::3], x[:, :, 5:29], x[1:2].expand(3, -1, -1), x[0, :1].expand(7, -1)):
        out, out_t, _ = ops.fp8_quantize(view, scale, transposed=True)
        assert_same_fp8(out, reference.to_fp8(view, scale, E4M3).contiguous())
        assert_transposed(out_t, out)
        y, out, _ = ops.rms_norm_fp8_quantize(view, scale, keep=True)
        assert_same_fp8(out, reference.to_fp8(y, scale, E4M3))


@fp8_types
@pytest.mark.parametrize("margin", [1.0, 1.12])
def test_current_scale(fp8, margin):
    x = random_normal((70, 150))
    out, out_t, scale = ops.fp8_quantize_current(x, dtype=fp8, margin=margin, transposed=True)
    assert scale.item() == pytest.approx(x.abs().max().item() * margin / FP8_MAX[fp8], rel=1e-6)
    assert_same_fp8(out, reference.to_fp8(x, scale, fp8))
    assert_transposed(out_t, out)
    if margin == 1:
        assert out.float().abs().max() == FP8_MAX[fp8]
    zeros, _, scale = ops.fp8_quantize_current(torch.zeros_like(x), dtype=fp8)
    assert not zeros.float().any() and scale.item() == pytest.approx(1e-12 * 1 / FP8_MAX[fp8])
    x[3, 3] = float("nan")
    assert ops.fp8_quantize_current(x, dtype=fp8)[2].isnan()


@small
@input_types
def test_rms_norm(case, dtype):
    """Sums of squares of small whole numbers are exact in any order, so every bit is the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-30, 30, case.shape, generator=generator).to(dtype).to(DEVICE)
    scale = scalar(0.07)
    y, out, out_t = ops.rms_norm_fp8_quantize(x, scale, keep=True, transposed=True)
    assert y.is_contiguous()
    assert_same_bits(y, reference.rms_norm(x).bfloat16())
    assert_same_fp8(out, reference.to_fp8(y, scale, E4M3))
    assert_transposed(out_t, out)
    none, alone, nothing = ops.rms_norm_fp8_quantize(x, scale)
    assert_same_fp8(alone, out)
    assert none is None and nothing is None


@pytest.mark.parametrize("shape", [(33, 768), (2, 70, 130)], ids=str)
def test_rms_norm_of_any_numbers(shape):
    """Here sums differ in their last bits with the order, and so may y: by the law of numerics."""
    x, scale = random_normal(shape, torch.float32), scalar(768**0.5 / 448)
    y, out, _ = ops.rms_norm_fp8_quantize(x, scale, keep=True)
    assert_accurate(y, reference.rms_norm(x).bfloat16(), reference.rms_norm(x.double()))
    assert_same_fp8(out, reference.to_fp8(y, scale, E4M3))
    usual = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=2**-23)
    torch.testing.assert_close(y.float(), usual, rtol=2**-7, atol=0)


def random_bank(num_layers, rows, cols):
    """(2L, rows, cols), each matrix of another size; layer 0's down is zero, as at the start."""
    bank = random_normal((2 * num_layers, rows, cols), torch.float32, size=0.1)
    bank *= torch.arange(1, 2 * num_layers + 1, device=DEVICE)[:, None, None]
    bank[1] = 0
    return bank.bfloat16()


@pytest.mark.parametrize("headroom", [False, True])
@pytest.mark.parametrize("shape", [(1, 33, 65), (2, 160, 272), (5, 64, 48)], ids=str)
def test_refresh_of_the_mlp_weights(shape, headroom):
    bank, old = random_bank(*shape), random_normal((shape[0],), torch.float32).abs()
    new = ops.refresh_mlp_weights(bank, old, headroom, up_t=True, down_row=True)
    up, down = bank[0::2], bank[1::2]
    expected = reference.refresh_mlp_weights(bank, old, headroom)
    for name in ("up_scale", "down_scale", "down_amax"):
        assert_same_bits(getattr(new, name), getattr(expected, name))
    assert torch.equal(new.down_amax, down.float().abs().amax((1, 2)))
    assert_same_fp8(new.up_f8, expected.up_f8)
    assert_same_fp8(new.down_f8, expected.down_f8)
    assert_transposed(new.up_f8_t, new.up_f8)
    assert_transposed(new.down_f8_t, new.down_f8)
    real = new.up_f8.float() * new.up_scale[:, None, None]
    assert ((real - up.float()).abs() <= up.float().abs() / 15 + new.up_scale.max()).all()
    few = ops.refresh_mlp_weights(bank, old, headroom)
    assert few.up_f8_t is None and few.down_f8 is None
    assert_same_fp8(few.down_f8_t, new.down_f8_t)


def test_refresh_keeps_nan_in_its_layer():
    bank, old = random_bank(3, 40, 48), torch.ones(3, device=DEVICE)
    bank[2, 5, 5] = bank[5, 1, 2] = float("nan")  # up of layer 1, down of layer 2
    new = ops.refresh_mlp_weights(bank, old, True)
    assert new.up_scale.isnan().tolist() == [False, True, False]
    assert new.down_amax.isnan().tolist() == [False, False, True]
    assert new.down_scale.isfinite().all()  # from the step before
    assert new.up_f8.float().isnan().flatten(1).sum(1).tolist() == [0, 40 * 48, 0]
    assert new.down_f8_t.float().isnan().flatten(1).sum(1).tolist() == [0, 0, 1]


@pytest.fixture(scope="module")
def golden(request):
    path = request.getfixturevalue("shared_data") / "golden_089" / "fp8_a.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return np.load(path)


def from_bf16(array):
    return torch.from_numpy((array.astype(np.uint32) << 16).view(np.float32)).bfloat16().to(DEVICE)


def assert_golden(out, array):
    wrong = (bits(out).cpu().numpy() != array).sum()
    assert out.shape == array.shape and wrong == 0, f"{wrong} of {array.size} bytes differ"


def test_golden_head(golden):
    for name, scale in zip("xw", golden["head/scales"], strict=False):
        x = from_bf16(golden[f"head/{name}"])
        assert_golden(ops.fp8_quantize(x, scalar(scale))[0], golden[f"head/{name}_f8"])


@pytest.mark.parametrize("step", [0, 1, 2, 16, 17, 18])
def test_golden_mlp(golden, step):
    arrays = {name: golden[f"mlp/{step}/{name}"] for name in ("x", "w_up", "w_down", "pre")}
    x, up, down, pre = (from_bf16(array) for array in arrays.values())
    assert_golden(ops.fp8_quantize_current(x)[0], golden[f"mlp/{step}/x_f8"])
    post, series = (pre.float().relu() ** 2).bfloat16(), "mlp/series/act_"
    scale = scalar(golden[f"{series}scale_used"][step, 0])
    out, _, amax = ops.fp8_quantize(post, scale, amax=True)
    assert_golden(out, golden[f"mlp/{step}/post_f8"])
    assert amax.item() == golden[f"{series}amax"][step, 0]
    old = torch.from_numpy(golden["mlp/series/down_amax"][step - 1, :1]).to(DEVICE)
    new = ops.refresh_mlp_weights(torch.stack([up, down]), old, step > 16)
    assert_golden(new.up_f8[0], golden[f"mlp/{step}/w_up_f8"])
    assert_golden(new.down_f8_t[0], golden[f"mlp/{step}/w_down_f8"])
    assert new.up_scale.item() == golden["mlp/series/up_scale"][step, 0]
    assert new.down_scale.item() == golden["mlp/series/down_scale_used"][step, 0]
    assert new.down_amax.item() == golden["mlp/series/down_amax"][step, 0]


def test_golden_scales_of_twenty_steps(golden):
    names = ("act_amax", "act_scale_used", "up_amax", "up_scale")
    names += ("down_amax", "down_scale_used", "down_scale_next")
    series = {n: torch.from_numpy(golden[f"mlp/series/{n}"]).to(DEVICE) for n in names}
    act = ops.delayed_scale(series["act_amax"])
    assert_same_bits(act[:-1], series["act_scale_used"][1:])
    down = ops.delayed_scale(series["down_amax"], headroom=reference.DOWN_HEADROOM)
    assert_same_bits(down, series["down_scale_next"])
    for step in (0, 1, 16, 17, 19):  # matrices of one element: each is its own amax
        up_amax, down_amax = series["up_amax"][step], series["down_amax"][step]
        assert torch.equal(down_amax, down_amax.bfloat16().float())
        bank = torch.stack([up_amax, down_amax], 1).reshape(-1, 1, 1).bfloat16()
        new = ops.refresh_mlp_weights(bank, series["down_amax"][step - 1], step > 16)
        assert_same_bits(new.up_scale, series["up_scale"][step])
        assert_same_bits(new.down_scale, series["down_scale_used"][step])


def test_no_gradient():
    x = random_normal((16, 32)).requires_grad_()
    y, out, _ = ops.rms_norm_fp8_quantize(x, scalar(0.1), keep=True)
    assert not y.requires_grad and not out.requires_grad
    out, _, scale = ops.fp8_quantize_current(x)
    assert not out.requires_grad and not scale.requires_grad


def check_op(name, arguments, backend):
    """opcheck of an operator and of its raw kernel. torch can't compare fp8 tensors, so that inputs
    stay unchanged is looked at here."""
    for operator, more in ((f"{name}_out", ()), (name, (backend,))):
        op, all_arguments = getattr(torch.ops.speedrun, operator).default, (*arguments, *more)
        tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, all_arguments, test_utils=tests)
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        op(*all_arguments)
        for x, old, argument in zip(arguments, before, op._schema.arguments, strict=False):
            if isinstance(x, torch.Tensor) and not argument.is_write:
                assert_same_bits(x, old)


def test_opcheck(backend):
    x, scale, amax = random_normal((33, 65)), scalar(0.1), torch.zeros((), device=DEVICE)
    out, out_t = torch.empty_like(x, dtype=E4M3), torch.empty(65, 33, dtype=E4M3, device=DEVICE)
    check_op("fp8_quantize", (x, scale, out, out_t, amax), backend)
    check_op("fp8_quantize", (x, scale, out, None, None), backend)
    check_op("rms_norm_fp8_quantize", (x, scale, 1e-6, torch.empty_like(x), out, out_t), backend)
    check_op("rms_norm_fp8_quantize", (x, scale, 1e-6, None, out, None), backend)


def test_opcheck_of_the_refresh(backend):
    """Of an empty bank: opcheck calls it again and again, on counters that it has used up."""
    bank, old = torch.empty(0, 16, 32, dtype=torch.bfloat16, device=DEVICE), scalar([])
    wide, tall = (bank.mT.to(E4M3).contiguous() for bank in (bank.mT, bank))
    copies = wide, tall, wide.clone(), tall.clone()
    rest = scalar([[], []]), scalar([[], []]), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for headroom in (False, True):
        check_op("fp8_refresh", (bank, old, headroom, *copies, *rest), backend)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_fullgraph_without_recompiling(compiler):
    def forward(x, bank, old, scale):
        y, x_f8, x_f8_t = ops.rms_norm_fp8_quantize(x, scale, keep=True, transposed=True)
        post = (y * y).relu()
        post_f8, _, amax = ops.fp8_quantize(post, scale, amax=True)
        now, _, now_scale = ops.fp8_quantize_current(post, dtype=E5M2)
        weights = ops.refresh_mlp_weights(bank, old, True, up_t=True)
        following = ops.delayed_scale(amax)
        return y, x_f8, x_f8_t, post_f8, now, now_scale, following, *weights

    x, bank, old = random_normal((48, 64)), random_bank(2, 32, 16), torch.ones(2, device=DEVICE)
    x = x.round()  # exact sums of squares, whatever their order
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=compiler)
    # On a GPU Inductor would take the greatest of post before it is rounded.
    rounded = torch._inductor.config.patch(emulate_precision_casts=True)
    with rounded, torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (0.01, 0.02):
            arguments = x, bank, old, scalar(scale)
            for mine, eager in zip(compiled(*arguments), forward(*arguments), strict=True):
                assert (mine is None) == (eager is None)
                if mine is not None:
                    assert_same_bits(mine, eager)


def test_two_runs_are_bitwise_equal():
    x, bank, old = random_normal((300, 200)), random_bank(4, 130, 140), torch.ones(4, device=DEVICE)

    def run():
        y, normed, _ = ops.rms_norm_fp8_quantize(x, scalar(0.1), keep=True)
        outputs = ops.fp8_quantize(x, scalar(0.1), transposed=True, amax=True)
        weights = ops.refresh_mlp_weights(bank, old, False, up_t=True, down_row=True)
        return y, normed, *outputs, *weights

    for first, second in zip(run(), run(), strict=True):
        assert_same_bits(first, second)


def test_refuses_readably():
    x, scale = random_normal((4, 6)), scalar(1.0)
    with pytest.raises(TypeError, match=r"x has type torch\.int32; allowed are float16, bfloat16"):
        ops.fp8_quantize(x.int(), scale)
    with pytest.raises(TypeError, match=r"dtype is torch\.uint8; allowed are float8_e4m3fn"):
        ops.fp8_quantize(x, scale, dtype=torch.uint8)
    for shape in [(3,), (2, 2, 2, 2)]:
        with pytest.raises(ValueError, match=r"must be \(M, N\) or \(B, M, N\)"):
            ops.fp8_quantize_current(torch.zeros(shape, device=DEVICE))
    with pytest.raises(ValueError, match=r"must be contiguous.*x\.contiguous\(\) first"):
        ops.rms_norm_fp8_quantize(x.mT, scale)
    with pytest.raises(TypeError, match=r"scale must be a float32 tensor, got float"):
        ops.fp8_quantize(x, 0.5)
    with pytest.raises(TypeError, match=r"scale must be a float32 tensor, got torch\.bfloat16"):
        ops.fp8_quantize(x, scale.bfloat16())
    with pytest.raises(ValueError, match=r"scale must have one element on .*\(2,\)"):
        ops.fp8_quantize(x, torch.ones(2, device=DEVICE))
    with pytest.raises(TypeError, match=r"wants float32 and an fp8 type"):
        ops.delayed_scale(scale.bfloat16())


def test_refresh_refuses_readably():
    bank, old = random_bank(2, 4, 6), torch.ones(2, device=DEVICE)
    with pytest.raises(TypeError, match=r"mlp_bank must be bfloat16.*got torch\.float32"):
        ops.refresh_mlp_weights(bank.float(), old, True)
    for wrong in (bank[:3], bank[0], bank.mT, bank[::2]):
        with pytest.raises(ValueError, match=r"must be \(2L, F, D\) and contiguous"):
            ops.refresh_mlp_weights(wrong, old, True)
    with pytest.raises(ValueError, match=r"down_amax must be \(2,\)"):
        ops.refresh_mlp_weights(bank, old[:1], True)
    with pytest.raises(ValueError, match="has no elements"):
        ops.refresh_mlp_weights(bank[:, :0], old, True)


COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speedrun.triton_kernels.fp8_quantize import static_variants

capability = int(sys.argv[1])
for name, kernel, signature, constexprs, options in static_variants():
    if capability < 90 and name not in ("bf16 to e4m3", "norm of bf16", "refresh"):
        continue
    names = [param.name for param in kernel.params]
    types = {n: signature.get(n, "constexpr").split(":")[0] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature.get(n, "").endswith(":16")}
    # Before Hopper fp8 is rounded on integers, as casts_in_software() says.
    constexprs = {**constexprs, "SOFTWARE": capability < 90}
    source = ASTSource(fn=kernel, signature=types, attrs=aligned, constexprs=constexprs)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    assert len(built.asm["cubin"]) > 1000
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, name
    assert "div.rn.f32" in ptx and "div.full" not in ptx, name
    cast = "cvt.rn.satfinite.e5m2x2.f32" if "e5m2" in name else "cvt.rn.satfinite.e4m3x2.f32"
    assert (cast in ptx) == (capability >= 90), name
    assert "norm" not in name or "fma" not in ptx, name
print("compiled")
"""


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("capability", [90, 89])
def test_triton_compiles_without_a_gpu(tmp_path, capability):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, str(capability)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "compiled" in run.stdout, run.stderr[-2000:]
