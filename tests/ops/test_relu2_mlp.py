"""`relu2_mlp`: plain against its definition; FP8 against its budget and the public program."""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config

from numerics import (
    assert_accurate,
    assert_same_bits,
    assert_within_budget,
    relu2_mlp_budget,
)
from op_helpers import skips_without_cuda_kernel
from speedrun import ops
from speedrun.ops._dispatch import library_problem
from speedrun.ops._relu2_mlp_kernels import drelu2, relu2_up
from speedrun.ops.fp8_quantize import delayed_scale, refresh_mlp_weights
from speedrun.ops.relu2_mlp import Fp8Layer, Gemms, relu2_mlp
from speedrun.reference import relu2_mlp as reference
from train_helpers import FLOAT64_NOISE, from_golden, golden, normal


def definition(h_TD, up_FD, down_FD):
    out = torch.zeros_like(h_TD)
    for t, h in enumerate(h_TD):
        for up, down in zip(up_FD, down_FD, strict=True):
            out[t] += max((h * up).sum().item(), 0.0) ** 2 * down
    return out


@pytest.mark.parametrize(("T", "D", "F"), [(1, 1, 1), (7, 5, 12), (0, 4, 8)])
def test_definition(T, D, F):
    h, up, down = normal(T, D), normal(F, D, seed=1), normal(F, D, seed=2)
    torch.testing.assert_close(relu2_mlp(h, up, down), definition(h, up, down), **FLOAT64_NOISE)


def test_parts_are_independent():
    h, up, down = normal(2, 3, 5), normal(8, 5, seed=1), normal(8, 5, seed=2)
    for part, out in zip(h, relu2_mlp(h, up, down), strict=True):
        torch.testing.assert_close(out, relu2_mlp(part, up, down), **FLOAT64_NOISE)


def test_scale():
    """relu² is homogeneous: twice the input is four times the output."""
    h, up, down = normal(4, 5), normal(8, 5, seed=1), normal(8, 5, seed=2)
    torch.testing.assert_close(
        relu2_mlp(2 * h, up, down), 4 * relu2_mlp(h, up, down), rtol=0, atol=0
    )


def test_gradients():
    tensors = [normal(3, 4), normal(6, 4, seed=1), normal(6, 4, seed=2)]
    assert torch.autograd.gradcheck(relu2_mlp, [t.requires_grad_() for t in tensors])


def test_gradient_is_the_definitions():
    grads = []
    upstream = normal(4, 5, seed=7)
    for function in (relu2_mlp, lambda h, up, down: (h @ up.T).clamp(min=0).pow(2) @ down):
        tensors = [normal(4, 5), normal(8, 5, seed=1), normal(8, 5, seed=2)]
        tensors = [t.requires_grad_() for t in tensors]
        (function(*tensors) * upstream).sum().backward()
        grads.append([t.grad for t in tensors])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, **FLOAT64_NOISE)


# ---- The GEMMs with relu² behind them: bf16, on every backend ---------------------------------

BACKENDS = ["torch", "triton", pytest.param("cuda", marks=pytest.mark.sm90)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cuda" and library_problem():
        pytest.skip(library_problem())
    with ops.use_backend(request.param):
        yield request.param


def bf16(*shape, seed=0, size=1.0):
    return (size * normal(*shape, seed=seed)).to(BF16).to(DEVICE)


def matrices(T, D, F):
    """h, Up, Down and a gradient of the output, of the sizes that they have in training."""
    h = torch.nn.functional.rms_norm(bf16(T, D), (D,))
    up, down = bf16(F, D, seed=1, size=D**-0.5), bf16(F, D, seed=2, size=F**-0.5)
    return h, up, down, bf16(T, D, seed=3, size=1e-3)


SHAPES = {
    "a tile": (128, 64, 256),
    "cut on all sides": (136, 72, 264),
    "several row groups": (1100, 16, 24),
    "one row": (1, 8, 8),
    "the smallest": (1, 1, 1),
    "odd": (7, 5, 13),
    "no tokens": (0, 8, 16),
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_fused_gemms(sizes, backend):
    if backend == "cuda" and any(size % 8 for size in sizes[1:]):
        pytest.skip("rows that TMA can't load: the front door takes another backend")
    h, up, down, grad = matrices(*sizes)
    post = relu2_up(h, up)
    assert_accurate(post, reference.relu2_up(h, up), reference.relu2_up(h.double(), up.double()))
    post = reference.relu2_up(h, up)
    exact = reference.drelu2(grad.double(), down.double(), post.double())
    assert_accurate(drelu2(grad, down, post), reference.drelu2(grad, down, post), exact)


@pytest.mark.usefixtures("backend")
def test_fused_gemms_at_the_limits():
    """Largest numbers overflow to infinity, NaN stays, a negative product is 0 both ways."""
    h = torch.tensor([[1.0], [-1.0], [float("nan")], [0.0]]).to(DEVICE, BF16).expand(4, 8)
    up = torch.full((16, 8), 1e30, dtype=BF16, device=DEVICE)
    post = relu2_up(h.contiguous(), up)
    assert post[0].isinf().all() and (post[1] == 0).all() and post[2].isnan().all()
    assert (post[3] == 0).all()
    dpre = drelu2(torch.ones_like(up[:4]), torch.ones_like(up), post)
    assert dpre[0].isinf().all() and (dpre[1] == 0).all() and dpre[2].isnan().all()


def test_opcheck(backend):
    h, up, down, grad = matrices(24, 16, 32)
    post = reference.relu2_up(h, up)
    operators = torch.ops.speedrun
    if backend != "torch":  # the reference isn't behind these
        torch.library.opcheck(operators.relu2_up.default, (h, up, backend))
        torch.library.opcheck(operators.drelu2.default, (grad, down, post, backend))
    torch.library.opcheck(operators.relu2_up_out.default, (h, up, torch.empty_like(post)))
    torch.library.opcheck(operators.drelu2_out.default, (grad, down, post, torch.empty_like(post)))


# ---- With FP8 ---------------------------------------------------------------------------------

RECORD = Gemms()
ALL_FP8 = Gemms(*["fp8"] * 7)
NAMES = ("up", "down", "dpre", "dx", "dup", "ddown", "post")
CHOICES = {
    "record_089": RECORD,
    "record_089, post in fp8": RECORD._replace(post="fp8"),
    "all fp8": ALL_FP8,
    "all fp8, static": ALL_FP8._replace(x_scale="static"),
    "all fp8, post in bf16": ALL_FP8._replace(post="bf16"),
    "forward in bf16": ALL_FP8._replace(up="bf16", down="bf16"),
    "forward static": RECORD._replace(x_scale="static"),
    **{f"only {name}": Gemms("bf16", "bf16")._replace(**{name: "fp8"}) for name in NAMES},
    **{f"all but {name}": ALL_FP8._replace(**{name: "bf16"}) for name in NAMES},
}


def layer_of(up, down, gemms, post_scale=1.0):
    """The weights by their own amax, as in the first step."""
    w = refresh_mlp_weights(
        torch.stack([up, down]), up.new_zeros(1).float(), False, up_t=True, down_row=True
    )
    tensors = (w.up_f8, w.up_f8_t, w.up_scale, w.down_f8, w.down_f8_t, w.down_scale)
    scale = torch.tensor(post_scale, device=up.device)
    return Fp8Layer(gemms, *(t[0] for t in tensors), scale)


def post_scale_of(h, up):
    """What a forward pass leaves to the next: room for 1.8 times the largest number."""
    post = reference.relu2_up(h, up)
    return (post.float().amax() * (1.80 / 448)).item() if post.numel() else 1.0


def run(h, up, down, grad, layer):
    """y and the gradients of h, Up and Down."""
    tensors = [t.detach().clone().requires_grad_() for t in (h, up, down)]
    with skips_without_cuda_kernel():
        y = relu2_mlp(*tensors, layer)
        y.backward(grad)
    return y.detach(), *(t.grad for t in tensors)


def budgets(h, up, down, grad, layer, post_scale):
    """Estimates of the same four."""
    post_max = (h.double() @ up.double().mT).relu().square().max().item()
    sizes = {"h": h.abs().max().item(), "grad": grad.abs().max().item(), "post": post_max}
    scales = {"up": layer.up_scale, "down": layer.down_scale, "post": post_scale}
    return relu2_mlp_budget(h, up, down, grad, layer.gemms, sizes, scales)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gemms", CHOICES.values(), ids=CHOICES)
def test_within_the_budget_of_fp8(gemms):
    h, up, down, grad = matrices(80, 48, 160)
    post_scale = post_scale_of(h, up)
    layer = layer_of(up, down, gemms, post_scale)
    expected = budgets(h, up, down, grad, layer, post_scale)
    for found, budget in zip(run(h, up, down, grad, layer), expected, strict=True):
        assert found.dtype == BF16
        assert_within_budget(found, budget)


def test_every_choice_of_gemms():
    """All 128, on the reference: none needs what another one would have made."""
    h, up, down, grad = matrices(32, 16, 48)
    post_scale = post_scale_of(h, up)
    for words in itertools.product(["bf16", "fp8"], repeat=7):
        layer = layer_of(up, down, Gemms(*words), post_scale)
        expected = budgets(h, up, down, grad, layer, post_scale)
        for found, budget in zip(run(h, up, down, grad, layer), expected, strict=True):
            assert_within_budget(found, budget)


def test_the_budget_is_tight():
    """A tenth of one operand's size, or a scale that is off by a tenth, is seen in all results."""
    h, up, down, grad = matrices(80, 48, 160)
    post_scale = post_scale_of(h, up)
    layer = layer_of(up, down, ALL_FP8, post_scale)
    expected = budgets(h, up, down, grad, layer, post_scale)
    results = run(h, up, down, grad, layer)
    for found, budget in zip(results, expected, strict=True):
        # 2·std is about 0.25 of the result at most: four FP8 operands of 2^-4/√3 or 2^-3/√3.
        assert budget.variance.mean().sqrt() < 0.15 * budget.value.square().mean().sqrt()
        with pytest.raises(AssertionError, match="rms error"):
            assert_within_budget(1.4 * found.double(), budget)


def test_bound_of_dpre_is_met_and_not_passed(backend):
    """All terms of a sum equal: the bound is reached; saturation would lose half or more."""
    h, up, down, grad = (torch.ones_like(t) for t in matrices(16, 16, 32))
    post_scale = post_scale_of(h, up)
    layer = layer_of(up, down, ALL_FP8, post_scale)
    _, dx, dup, ddown = run(h, up, down, grad, layer)
    # post = 16², dpre = 2·16·16. Every number is the largest that its scale is for, so it is exact
    # in FP8, but post, whose scale has headroom; and there are fewer than 8 roundings to bf16.
    for found, exact in ((dx, 512 * 32), (dup, 512 * 16), (ddown, 256 * 16)):
        assert ((found.double() / exact - 1).abs() < 2.0**-4 + 8 * 2.0**-8).all()


@pytest.mark.usefixtures("backend")
def test_amax_is_not_clamped():
    """Whatever the scale, and the old scale stays for the backward pass."""
    h, up, down, grad = matrices(32, 16, 48)
    largest = reference.relu2_up(h, up).float().amax().item()
    for scale in (1.0, largest / 448 / 8):
        layer = layer_of(up, down, RECORD, scale)
        run(h, up, down, grad, layer)
        assert layer.post_scale == scale
        # pre has four operands' roundings to e4m3, two of them in the worst case at once; squared.
        assert layer.post_amax.item() == pytest.approx(largest, rel=4 * 2.0**-4)


GOLDEN_STEPS = (0, 1, 2, 16, 17, 18)


def golden_step(shared_data, step):
    """Arrays of one step by name, and the scales of layer 0."""
    arrays = golden(shared_data, "fp8_a.npz")
    prefix = f"mlp/{step}/"
    found = {
        key.removeprefix(prefix): torch.from_numpy(a.copy()).view(E4M3)
        if a.dtype == np.uint8
        else from_golden(a)
        for key, a in arrays.items()
        if key.startswith(prefix)
    }
    series = {
        key.removeprefix("mlp/series/"): torch.from_numpy(a.copy())[:, 0]
        for key, a in arrays.items()
        if key.startswith("mlp/series/")
    }
    return {key: t.to(DEVICE) for key, t in found.items()}, {
        key: t.to(DEVICE) for key, t in series.items()
    }


def assert_same_but_for_the_order_of_sums(found, expected, a, b, found_a=None):
    """bf16 of A·B in two orders of float32 sums, or of A that differs itself in last bits."""
    a64, b64 = a.double(), b.double()
    moved = torch.zeros_like(a64) if found_a is None else (found_a.double() - a64).abs()
    error = 2 * a.shape[1] * 2.0**-24 * (a64.abs() @ b64.abs()) + moved @ b64.abs()
    size = torch.maximum(found.abs(), expected.abs()).double().clamp(min=2.0**-126)
    step = torch.exp2(size.log2().floor()) * 2.0**-7
    assert ((found.double() - expected.double()).abs() <= error + step).all()
    assert (found != expected).double().mean() < 0.01 or moved.any()


@pytest.mark.parametrize("step", GOLDEN_STEPS)
def test_reference_is_the_public_program(shared_data, step):
    """The forward pass bit for bit, FP8 bytes included; gradients but for the order of sums."""
    a, s = golden_step(shared_data, step)
    scales = s["up_scale"][step], s["down_scale_used"][step], s["act_scale_used"][step]
    out = reference.relu2_mlp_fp8(
        a["x"], a["w_up_f8"], scales[0], a["w_down_f8"], scales[1], scales[2]
    )
    for name in ("x_f8", "pre", "post_f8", "y"):
        assert_same_bits(getattr(out, name), a[name])
    assert out.post_amax == s["act_amax"][step]
    assert out.x_scale * 448 == s["x_amax"][step]
    dpre, *grads = reference.relu2_mlp_backward(
        a["grad_y"], a["x"], a["w_up"], a["w_down"], out.post
    )
    assert ((dpre != a["dpre"]).sum() <= 2).all()
    assert_gradients_are_the_public_programs(a, out.post, dpre, grads)


def assert_gradients_are_the_public_programs(a, post, dpre, grads):
    check = assert_same_but_for_the_order_of_sums
    check(grads[0], a["grad_x"], a["dpre"], a["w_up"], dpre)
    check(grads[1], a["grad_w_up"], a["dpre"].mT, a["x"], dpre.mT)
    check(grads[2], a["grad_w_down"], post.mT, a["grad_y"])


@pytest.mark.parametrize("step", GOLDEN_STEPS)
def test_front_door_is_the_public_program(shared_data, step, backend):
    """y bit for bit, the next scale, gradients as above (dpre may lack one of two roundings)."""
    a, s = golden_step(shared_data, step)
    layer = Fp8Layer(
        RECORD,
        a["w_up_f8"],
        None,
        s["up_scale"][step],
        None,
        a["w_down_f8"],
        s["down_scale_used"][step],
        s["act_scale_used"][step].clone(),
    )
    y, *grads = run(a["x"], a["w_up"], a["w_down"], a["grad_y"], layer)
    if backend == "cuda":  # fast sums, of about 14 bits
        weights, scale = (a["w_up"], a["w_down"]), s["act_scale_used"][step].item()
        estimates = budgets(a["x"], *weights, a["grad_y"], layer, scale)
        assert_within_budget(y, estimates[0])
        return
    assert_same_bits(y, a["y"])
    assert delayed_scale(layer.post_amax) == s["act_scale_used"][step + 1]
    post = a["pre"].relu().square()
    dpre = drelu2(a["grad_y"], a["w_down"], post)
    step_of_dpre = torch.exp2(a["dpre"].double().abs().clamp(min=2.0**-126).log2().floor()) * 2**-7
    assert ((dpre.double() - a["dpre"].double()).abs() <= step_of_dpre).all()
    assert_gradients_are_the_public_programs(a, post, dpre, grads)


# ---- Compiled, repeated, empty, refused -------------------------------------------------------


def compiles_to_the_same(compiler, gemms):
    h, up, down, grad = matrices(32, 16, 48)

    def forward(h, up, down, layer):
        return relu2_mlp(h * 2, up, down, layer) * 0.5

    def results(function):
        layer = layer_of(up, down, gemms) if gemms else None
        found = []
        for seed in (1, 2):  # the second call has the scale that the first one left
            tensors = [t.clone().requires_grad_() for t in (h * seed, up, down)]
            y = function(*tensors, layer)
            y.backward(grad)
            found += [y.detach(), *(t.grad for t in tensors)]
            if gemms:
                found.append(layer.post_amax)
                layer.post_scale = delayed_scale(layer.post_amax)
        return found

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=compiler)
    eager = results(forward)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mine, expected in zip(results(compiled), eager, strict=True):
            assert_same_bits(mine, expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gemms", [None, RECORD, ALL_FP8], ids=["no fp8", "record_089", "all fp8"])
def test_compiles_fullgraph_without_recompiling(gemms):
    compiles_to_the_same("aot_eager", gemms)


@pytest.mark.parametrize("gemms", [RECORD, ALL_FP8], ids=["record_089", "all fp8"])
def test_compiles_with_inductor(gemms):
    """It leaves out roundings to bf16 that it has fused over, unless it is told to keep them."""
    with torch._inductor.config.patch(emulate_precision_casts=True):
        compiles_to_the_same("inductor", gemms)


@pytest.mark.parametrize("gemms", [None, RECORD, ALL_FP8], ids=["no fp8", "record_089", "all fp8"])
def test_two_runs_are_bitwise_equal(gemms, backend):
    h, up, down, grad = matrices(80, 48, 160)
    runs = [run(h, up, down, grad, layer_of(up, down, gemms) if gemms else None) for _ in range(2)]
    for i, (first, second) in enumerate(zip(*runs, strict=True)):
        if gemms == ALL_FP8 and i >= 2 and DEVICE == "cuda":
            continue  # gradients of weights: sums over parts of T, in any order
        assert_same_bits(first, second)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gemms", [None, RECORD, ALL_FP8], ids=["no fp8", "record_089", "all fp8"])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (3, 0)], ids=str)
def test_any_number_of_tokens(shape, gemms):
    h, up, down, grad = matrices(math.prod(shape), 16, 32)
    layer = layer_of(up, down, gemms, post_scale_of(h, up)) if gemms else None
    flat = run(h, up, down, grad, layer)
    layer = layer_of(up, down, gemms, post_scale_of(h, up)) if gemms else None
    out = run(h.view(*shape, 16), up, down, grad.view(*shape, 16), layer)
    assert out[0].shape == out[1].shape == (*shape, 16)
    for found, expected in zip(out, flat, strict=True):
        assert found.isfinite().all()
        assert_same_bits(found.reshape(expected.shape), expected)


@pytest.mark.usefixtures("backend")
def test_gradient_that_is_not_contiguous():
    h, up, down, grad = matrices(32, 16, 48)
    wide = grad.repeat_interleave(2, dim=1)[:, ::2]
    for layer in (layer_of(up, down, RECORD), layer_of(up, down, RECORD)):
        expected = run(h, up, down, grad, layer_of(up, down, RECORD))
        for found, same in zip(run(h, up, down, wide, layer), expected, strict=True):
            assert_same_bits(found, same)


def test_nan_is_not_hidden(backend):
    """In one token: everything that token reaches is NaN, and so is the amax."""
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter reads e4m3's NaN as 480")
    h, up, down, grad = matrices(32, 16, 48)
    h[3, 5] = float("nan")
    layer = layer_of(up, down, RECORD)
    y, *_ = run(h, up, down, grad, layer)
    assert y[3].isnan().all() and layer.post_amax.isnan()


@pytest.mark.usefixtures("backend")
def test_refusals():
    h, up, down, _ = matrices(16, 16, 32)
    layer = layer_of(up, down, RECORD)
    with pytest.raises(TypeError, match=r"h has type torch\.float32; this path takes bfloat16"):
        relu2_mlp(h.float(), up, down, layer)
    with pytest.raises(TypeError, match="down_FD has type"):
        relu2_mlp(h, up, down.float(), layer)
    with pytest.raises(ValueError, match=r"up_FD must be contiguous.*up_FD\.contiguous\(\) first"):
        relu2_mlp(h, up.mT.contiguous().mT, down, layer)
    for wrong in [(h, up[:, :8].contiguous(), down), (h, up, down[:16]), (h[0], up, down)]:
        with pytest.raises(ValueError, match=r"needs h \(\.\.\., D\), up_FD and down_FD \(F, D\)"):
            relu2_mlp(*wrong, layer)
    with pytest.raises(ValueError, match="of Fp8Layer is missing: dx is fp8"):
        relu2_mlp(h, up, down, replace(layer, gemms=RECORD._replace(dx="fp8"), up_f8_DF=None))
    with pytest.raises(ValueError, match="of Fp8Layer is missing: dpre is fp8"):
        relu2_mlp(h, up, down, replace(layer, gemms=RECORD._replace(dpre="fp8"), down_f8_FD=None))
    with pytest.raises(ValueError, match=r"Gemms: dup='fp16'; allowed are bf16 and fp8"):
        relu2_mlp(h, up, down, replace(layer, gemms=RECORD._replace(dup="fp16")))
    with pytest.raises(ValueError, match=r"Gemms: x_scale='fp8'; allowed are current and static"):
        relu2_mlp(h, up, down, replace(layer, gemms=RECORD._replace(x_scale="fp8")))


COMPILE = """
from benchmarks import triton_compile
from speedrun.triton_kernels.relu2_mlp import static_variants
for capability in (90, 80):
    triton_compile.HOPPER = ("cuda", capability, 32)
    for name, *variant in static_variants():
        kernel = triton_compile.compile_variant(*variant)
        limit = (227 if "144" in name else 99) << 10
        assert kernel.metadata.shared <= limit, (name, capability, kernel.metadata.shared)
        wanted = "wgmma.mma_async" if capability == 90 else "mma.sync"
        assert wanted in kernel.asm["ptx"], (name, capability)
print("compiled")
"""


def test_triton_compiles_for_hopper_and_ampere_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0 and "compiled" in run.stdout, run.stderr[-2000:]
