"""`normuon_step` against RECIPE section 4, IEEE arithmetic in every bit, and the public run."""

import math

import numpy as np
import pytest
import torch

from cases import NORMUON_STEP_SMALL
from numerics import assert_accurate, assert_same_bits, bits
from speedrun import ops
from speedrun.ops._dispatch import Unavailable
from speedrun.ops.normuon_step import (
    Fp8Copies,
    join_bits,
    normuon_step,
    split_bits,
    variance_rescale,
    weight_update,
)
from speedrun.reference import normuon_step as reference
from speedrun.reference.polar_express import momentum_step
from train_helpers import FLOAT64_NOISE, from_golden, golden, low_bits, normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
E4M3 = torch.float8_e4m3fn
BETA2 = 0.9
BANKS = ["qk_bank", "vo_bank", "mlp_bank"]
STEPS = range(8)
# Interpreted kernels overflow and divide where NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
shapes = pytest.mark.parametrize("shape", [shape for shape, _ in NORMUON_STEP_SMALL], ids=str)
# Type of the weights, "exact" with low bits, and of O.
KINDS = [("exact", BF16), ("exact", FP16), (BF16, BF16), (BF16, FP16), (FP32, FP32), (FP32, BF16)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")


@pytest.fixture(scope="module")
def run(shared_data):
    return golden(shared_data, "optimizer_a.npz")


@pytest.fixture(scope="module")
def inside(shared_data):
    return golden(shared_data, "optimizer_a_muon.npz")


def doubles(*values):
    return torch.tensor(values, dtype=FP64, device=DEVICE)


def line_shape(shape):
    B, M, N = shape
    return (B, M, 1) if M >= N else (B, 1, N)


def random_bank(shape, kind=("exact", BF16), seed=0):
    """weight, low, o, second, lr_B, wd: in the midst of training, with another rate a matrix."""
    dtype = BF16 if kind[0] == "exact" else kind[0]
    weight, o, second = (
        normal(*size, seed=3 * seed + i).to(DEVICE)
        for i, size in enumerate((shape, shape, line_shape(shape)))
    )
    low = None
    if kind[0] == "exact":
        generator = torch.Generator().manual_seed(seed)
        low = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        low = low.to(DEVICE)
    lr_B = 0.01 * torch.arange(1, shape[0] + 1, dtype=FP64, device=DEVICE)
    second = second.square().to(torch.promote_types(dtype, FP32))
    return [weight.to(dtype), low, o.to(kind[1]), second, lr_B, doubles(0.3)[0]]


def clone(bank):
    return [None if x is None else x.clone() for x in bank]


def advance(bank, **options):
    normuon_step(*bank, beta2=BETA2, **options)
    return bank[:2]


def without_state(bank):
    return [*bank[:3], None, *bank[4:]]


def assert_same_weights(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one, other)


def fp8_copies(shape, row=True, transposed=True):
    B, M, N = shape
    scale = 0.001 * torch.arange(1, B + 1, dtype=FP32, device=DEVICE)
    one, other = (torch.zeros(s, dtype=E4M3, device=DEVICE) for s in ((B, M, N), (B, N, M)))
    amax = torch.full((B,), 1e9, device=DEVICE)  # of earlier weights
    return Fp8Copies(scale, one if row else None, other if transposed else None, amax)


def ieee_weights(bank, decay_lr_B=None, cautious=True, nearest=False):
    """The formula's operations in NumPy's float32, each rounded once; O is taken as it is."""
    weight, low, o, _, lr_B, wd = bank
    lr, decay_lr = (
        x.float().cpu().numpy()[:, None, None]
        for x in (lr_B, lr_B if decay_lr_B is None else decay_lr_B)
    )
    exact, o = weight.float().cpu().numpy(), o.float().cpu().numpy()
    if low is not None:
        low = low.cpu().numpy().astype(np.int32)
        low = low if nearest else low & 0xFFFF
        exact = (exact.view(np.int32) + low).view(np.float32)
    shrinks = np.where(o * exact >= 0, exact, np.float32(0)) if cautious else exact
    exact = exact - shrinks * np.float32(wd.item()) * decay_lr - o * lr
    if low is None:
        return torch.from_numpy(exact).to(weight.dtype).to(DEVICE), None
    found = exact.view(np.int32)
    upper = (found + 0x8000 if nearest else found) >> 16
    halves = (torch.from_numpy(x.astype(np.int16)).to(DEVICE) for x in (upper, found))
    return next(halves).view(BF16), next(halves)


# ---- Formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)], ids=str)
def test_variance_definition(shape):
    """Per row where M >= N, else per column, and the matrix keeps its norm."""
    o, beta2 = normal(2, *shape), 0.9
    axis = 2 if shape[0] >= shape[1] else 1
    second = normal(*o.mean(axis, keepdim=True).shape, seed=3).abs()
    expected_second = 0.9 * second + 0.1 * (o**2).mean(axis, keepdim=True)
    scaled = o / expected_second.sqrt()
    norms = [x.flatten(1).norm(dim=1)[:, None, None] for x in (o, scaled)]
    out = variance_rescale(o, second, beta2)
    torch.testing.assert_close(second, expected_second, **FLOAT64_NOISE)
    torch.testing.assert_close(out, scaled * norms[0] / norms[1], **FLOAT64_NOISE)


def test_update_definition():
    """Decay where O·W >= 0, from the old weight; each matrix with its own rate."""
    weight, o = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    o[0, 0, 0] = 0
    old, lr = weight.clone(), torch.tensor([0.1, 0.2], dtype=FP64).view(2, 1, 1)
    weight_update(weight, None, o, lr, 0.5)
    expected = torch.where(o * old >= 0, old - old * 0.5 * lr, old) - o * lr
    torch.testing.assert_close(weight, expected, **FLOAT64_NOISE)
    assert weight[0, 0, 0] == pytest.approx(old[0, 0, 0].item() * 0.95)


@pytest.mark.parametrize("cautious", [True, False])
def test_step_definition(cautious):
    """Both in float64, which only the reference computes, with a rate for the decay alone."""
    weight, o, second = normal(2, 5, 3), normal(2, 5, 3, seed=1), normal(2, 5, 1, seed=2).abs()
    rescaled = variance_rescale(o, second.clone(), BETA2)
    decays = (rescaled * weight >= 0) | (not cautious)
    lr_B, decay_lr_B = torch.tensor([[0.1, 0.2], [0.3, 0.5]], dtype=FP64)
    expected = weight - decays * weight * 0.3 * decay_lr_B.view(2, 1, 1)
    expected -= rescaled * lr_B.view(2, 1, 1)
    state = weight, None, o, second, lr_B, 0.3
    with ops.use_backend("torch"):
        normuon_step(*state, beta2=BETA2, decay_lr_B=decay_lr_B, cautious=cautious)
    torch.testing.assert_close(weight, expected, **FLOAT64_NOISE)


def test_bits_come_back():
    """Every float32, NaN payloads and denormals too, cut into its halves and joined."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(2**31), 2**31, (2, 100, 100), generator=generator).to(torch.int32)
    exact = pattern.view(FP32)
    weight = torch.zeros(exact.shape, dtype=BF16)
    low = torch.zeros(exact.shape, dtype=torch.int16)
    split_bits(exact, weight, low)
    assert_same_bits(join_bits(weight, low), exact)
    assert torch.equal(weight.view(torch.int16), (pattern >> 16).to(torch.int16))


def test_momentum_definition():
    """What comes before the orthogonalisation."""
    grad, momentum = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    expected = 0.9 * momentum + 0.1 * grad
    nesterov = momentum_step(grad, momentum, 0.9)
    torch.testing.assert_close(momentum, expected, **FLOAT64_NOISE)
    torch.testing.assert_close(nesterov, 0.1 * grad + 0.9 * expected, **FLOAT64_NOISE)


# ---- Every backend ---------------------------------------------------------------------------


@shapes
@kinds
@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize("nearest", [True, False])
def test_every_operation_is_ieee(backend, shape, kind, cautious, nearest):
    bank = without_state(random_bank(shape, kind))
    options = dict(decay_lr_B=3 * bank[4], cautious=cautious, nearest=nearest)
    expected = ieee_weights(bank, **options)
    assert_same_weights(advance(bank, **options), expected)


@shapes
@kinds
def test_accuracy_against_float64(backend, shape, kind):
    assert_accurate_step(random_bank(shape, kind))


@pytest.mark.parametrize("shape", [(1, 2064, 2), (1, 2, 2064)], ids=str)
def test_more_lines_than_a_block_adds_at_once(backend, shape):
    """129 partial sums."""
    assert_accurate_step(random_bank(shape))


def assert_accurate_step(bank):
    """By the law of numerics: exact weights and the state."""
    same, exact = clone(bank), clone(bank)
    weight = exact[0].float() if exact[1] is None else join_bits(*exact[:2])
    exact[:4] = weight.double(), None, exact[2].double(), exact[3].double()
    advance(bank)
    if same[0].numel():
        for one in (same, exact):
            reference.normuon_step(*one, beta2=BETA2)
    found, expected = (
        x[0] if x[1] is None else join_bits(x[0].clone(), x[1]) for x in (bank, same)
    )
    assert_accurate(found, expected, exact[0])
    assert_accurate(bank[3], same[3], exact[3])


@shapes
@pytest.mark.parametrize("kind", KINDS[:1] + KINDS[2:5:2], ids=lambda kind: f"{kind[0]}")
def test_fp8_copies(backend, shape, kind):
    """Of the weights as they are stored, which stay the same; amax starts anew."""
    bank = random_bank(shape, kind)
    bank[0].view(-1)[:3] *= 500  # beyond e4m3
    plain, copies = clone(bank), fp8_copies(shape)
    advance(plain)
    assert_same_weights(advance(bank, fp8=copies), plain[:2])
    scale = copies.scale[:, None, None]
    codes = (bank[0].float() / scale).clamp(-448, 448).to(E4M3)
    assert_same_bits(copies.row, codes)
    assert_same_bits(copies.transposed, codes.mT.contiguous())
    if bank[0].numel():
        assert torch.equal(copies.amax, bank[0].float().abs().amax((1, 2)))
    else:
        assert not copies.amax.any()
    for row in (True, False):
        one = fp8_copies(shape, row, not row)
        advance(clone(bank), fp8=one)
        assert (one.row is None, one.transposed is None) == (not row, row)
    assert one.transposed.numel() == 0 or bits(one.transposed).any()


def test_decays_only_where_the_update_shrinks_the_weight(backend):
    o = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], device=DEVICE).view(1, 1, 5)
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], device=DEVICE).view(1, 1, 5)
    normuon_step(weight, None, o, None, doubles(0.25), 0.5, beta2=BETA2)
    assert weight.flatten().tolist() == [0.625, 1.25, -1.25, -0.625, 0.875]


def rescaled(o, second, beta2=BETA2):
    """O with the state's variance: the step from weights of 0 at rate -1, without decay."""
    weight = torch.zeros(o.shape, device=DEVICE)
    minus_one = torch.full((len(o),), -1.0, dtype=FP64, device=DEVICE)
    normuon_step(weight, None, o.to(DEVICE), second, minus_one, 0.0, beta2=beta2)
    assert_same_bits(weight.to(o.dtype).float(), weight)  # it was rounded to its type
    return weight.to(o.dtype)


@pytest.mark.parametrize("beta2", [0.0, 0.3, 0.95])
def test_state_follows_at_any_rate(backend, beta2):
    """beta2 0: the state is the mean of squares, whatever it was."""
    o = normal(2, 40, 24, dtype=FP32).to(DEVICE)
    second = torch.full((2, 40, 1), 1e8, device=DEVICE)
    rescaled(o, second, beta2)
    expected = (1 - beta2) * o.double().square().mean(2, keepdim=True) + beta2 * 1e8
    torch.testing.assert_close(second.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_variance_of_zeros_is_zero(backend, dtype):
    """Rows, or whole matrices, without a gradient: 1e−10 in the place of their variance."""
    o = torch.zeros(2, 4, 3, dtype=dtype)
    o[0, 1] = 1
    second = torch.zeros(2, 4, 1, device=DEVICE)
    torch.testing.assert_close(rescaled(o, second).cpu(), o, rtol=1e-6, atol=0)
    assert (second > 0).flatten().tolist() == [False, True] + 6 * [False]


def test_least_variance(backend):
    """A row of 1e−6 is divided by √1e−10, not by its own √1e−13."""
    o = torch.ones(1, 4, 2)
    o[0, 1] = 1e-6
    found = rescaled(o, torch.zeros(1, 4, 1, device=DEVICE)).cpu()
    expected = (1e-6 / 1e-10**0.5) / (1 / 0.1**0.5)
    assert (found[0, 1] / found[0, 0]).tolist() == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30, 1e-30, 1e-44, -0.0])
def test_extreme_updates(backend, value):
    """The second matrix must not see what is in the first."""
    bank = random_bank((2, 48, 40), (FP32, FP32))
    bank[2][0, 3, 5], bank[2][0, 7] = value, 0
    same, copies, expected = clone(bank), fp8_copies((2, 48, 40)), fp8_copies((2, 48, 40))
    advance(bank, fp8=copies)
    reference.normuon_step(*same, beta2=BETA2, fp8=expected)
    for found, right in ((bank[0], same[0]), (bank[3], same[3]), (copies.amax, expected.amax)):
        torch.testing.assert_close(found, right, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38, 1e-40, -0.0])
def test_extreme_weights(backend, value):
    bank = without_state(random_bank((2, 24, 40), (FP32, FP32)))
    bank[0][1, ::5] = value
    with np.errstate(all="ignore"):
        expected, _ = ieee_weights(bank)
    found, _ = advance(bank)
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_bits(found.nan_to_num(0), expected.nan_to_num(0))


# ---- The public program ----------------------------------------------------------------------


def before(run, bank, step):
    """weight, low16, second before a step."""
    if step:
        prefix = f"after/{step - 1}/{bank}"
        weight, second = from_golden(run[prefix]), from_golden(run[f"{prefix}/second"])
        return weight.to(DEVICE), low_bits(run[f"{prefix}/low16"]).to(DEVICE), second.to(DEVICE)
    shape = run[f"after/0/{bank}"].shape
    weight = from_golden(run[f"init/{bank}"]).view(shape).to(DEVICE)
    low = torch.zeros(shape, dtype=torch.int16, device=DEVICE)
    return weight, low, torch.zeros(line_shape(shape), device=DEVICE)


def test_momentum_of_the_public_program(run):
    for bank in BANKS:
        for step in STEPS:
            after = from_golden(run[f"after/{step}/{bank}/momentum"])
            momentum = torch.zeros_like(after)
            if step:
                momentum = from_golden(run[f"after/{step - 1}/{bank}/momentum"])
            grad = from_golden(run[f"grad/{step}/{bank}"]).view(after.shape)
            momentum_step(grad, momentum, run["schedule"][step, 2])
            assert_same_bits(momentum, after)


def test_variance_of_the_public_program(backend, run, inside):
    """From its polar factor; README_optimizer: all but about one element in 30,000."""
    wrong = total = 0
    for bank in BANKS:
        for step in STEPS:
            fused, expected = (
                from_golden(inside[f"{step}/{bank}/{name}_fused"]) for name in ("polar", "update")
            )
            update = rescaled(fused, before(run, bank, step)[2]).cpu()
            wrong += (bits(update) != bits(expected)).sum().item()
            total += update.numel()
            torch.testing.assert_close(update, expected, rtol=2**-7, atol=0)  # the next bf16
    assert wrong <= 2 * total / 30_000


def test_second_of_the_public_program(backend, run, inside):
    """The run took the uncompiled polar factor; float32 means of 16 to 128 squares."""
    for bank in BANKS:
        for step in STEPS:
            second = before(run, bank, step)[2]
            rescaled(from_golden(inside[f"{step}/{bank}/polar"]), second)
            expected = from_golden(run[f"after/{step}/{bank}/second"])
            torch.testing.assert_close(second.cpu(), expected, rtol=1e-6, atol=0)


def public_step(run, inside, bank, step):
    """Weight and low16 after the stored update, and what the public program has."""
    weight, low, _ = before(run, bank, step)
    tall = max(1.0, weight.shape[1] / weight.shape[2]) ** 0.5
    muls = [1.0, 2.0] if bank == "mlp_bank" else [1.0, 1.0]
    muls = torch.tensor(muls * (len(weight) // 2))
    rate = 0.023 * run["schedule"][step, 1]
    lr_B = (muls * tall * rate).double().to(DEVICE)  # float32 products, as there
    update = from_golden(inside[f"{step}/{bank}/update"]).to(DEVICE)
    normuon_step(weight, low, update, None, lr_B, 1.2 * rate, beta2=BETA2)
    after = from_golden(run[f"after/{step}/{bank}"])
    return (weight.cpu(), low.cpu()), (after, low_bits(run[f"after/{step}/{bank}/low16"]))


def test_weights_of_the_public_program(backend, run, inside):
    """bf16 halves and low halves, bit for bit."""
    for bank in BANKS:
        for step in STEPS:
            assert_same_weights(*public_step(run, inside, bank, step))


# ---- As an operator --------------------------------------------------------------------------


def arguments_of(bank, copies):
    """Of the operators."""
    weight, low, o, second, lr_B, wd = bank
    partials = torch.empty(len(weight), -(-max(weight.shape[1:]) // 16), 2, device=DEVICE)
    return weight, low, o, second, partials, lr_B, lr_B, wd, BETA2, True, False, *copies


def test_opcheck(backend):
    """torch can't compare fp8 tensors, so with them the schema is not looked at."""
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, more in (("normuon_step_out", ()), ("normuon_step", (backend,))):
        op = getattr(torch.ops.speedrun, op).default
        for copies, schema in ((fp8_copies((2, 32, 48)), ()), ((None,) * 4, ("test_schema",))):
            arguments = (*arguments_of(random_bank((2, 32, 48)), copies), *more)
            torch.library.opcheck(op, arguments, test_utils=(*schema, *tests))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_fullgraph_without_recompiling(backend, compiler):
    if (backend, compiler) == ("torch", "inductor"):
        pytest.skip("Inductor sums and contracts the reference its own way")
    compiled = torch.compile(normuon_step, fullgraph=True, backend=compiler)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            bank, copies = random_bank((2, 40, 48), seed=seed), fp8_copies((2, 40, 48))
            other, other_copies = clone(bank), fp8_copies((2, 40, 48))
            compiled(*bank, beta2=BETA2, fp8=copies)
            normuon_step(*other, beta2=BETA2, fp8=other_copies)
            for mine, eager in zip((*bank, *copies), (*other, *other_copies), strict=True):
                assert_same_bits(mine, eager)


def test_two_runs_are_bitwise_equal(backend):
    bank, copies = random_bank((2, 200, 130)), fp8_copies((2, 200, 130))
    other, other_copies = clone(bank), fp8_copies((2, 200, 130))
    advance(bank, fp8=copies)
    advance(other, fp8=other_copies)
    for first, second in zip((*bank, *copies), (*other, *other_copies), strict=True):
        assert_same_bits(first, second)


def test_shards_and_layouts(backend):
    """Matrices of a larger bank, a wd that is a number, and O and rates in any layout."""
    whole = random_bank((5, 24, 40))
    expected = clone(whole)
    advance(expected)
    for part in (slice(0, 2), slice(2, 5)):
        weight, low, o, second, lr_B = (x[part] for x in whole[:5])
        o, lr_B = o.mT.contiguous().mT, lr_B.repeat_interleave(2)[::2]
        normuon_step(weight, low, o, second, lr_B, whole[5].item(), beta2=BETA2)
    assert_same_weights(whole[:2], expected[:2])


def test_starts_that_are_not_aligned(backend):
    bank = random_bank((2, 32, 48))
    expected = clone(bank)
    advance(expected, fp8=fp8_copies((2, 32, 48)))
    for i in range(4):
        room = bank[i].new_empty(bank[i].numel() + 1)
        room[1:] = bank[i].flatten()
        bank[i] = room[1:].view_as(bank[i])
    advance(bank)
    assert_same_weights(bank[:2], expected[:2])


def test_refuses_readably():
    good = random_bank((2, 4, 6))
    names = ("weight", "low", "o", "second", "lr", "wd")

    def refuse(error, pattern, beta2=BETA2, decay_lr_B=None, fp8=None, **changes):
        bank = [changes.get(name, x) for name, x in zip(names, good, strict=True)]
        with pytest.raises(error, match=pattern):
            normuon_step(*bank, beta2=beta2, decay_lr_B=decay_lr_B, fp8=fp8)

    weight, low, o, second, lr_B, _ = good
    refuse(TypeError, r"must be bfloat16.*got torch\.float16 and", weight=weight.half())
    refuse(TypeError, r"got torch\.bfloat16 and torch\.int16", o=low)
    refuse(TypeError, r"low_BMN goes with bfloat16 weights, not torch\.float32", weight=o.float())
    refuse(ValueError, r"weight_BMN must be \(B, M, N\), got \(4, 6\)", weight=weight[0])
    refuse(TypeError, r"low_BMN must be torch\.int16, got torch\.int32", low=low.int())
    refuse(ValueError, r"o_BMN must be \(2, 4, 6\) on .*, got \(2, 6, 4\)", o=o.mT)
    refuse(
        ValueError, r"second must be \(2, 1, 6\) on .*, got \(2, 4, 1\)", second=second[..., :4].mT
    )
    refuse(TypeError, r"second must be torch\.float32, got torch\.float64", second=second.double())
    refuse(TypeError, r"lr_B must be torch\.float64, got torch\.float32", lr=lr_B.float())
    refuse(ValueError, r"lr_B must be \(2,\) on .*, got \(1,\)", lr=lr_B[:1])
    refuse(ValueError, r"decay_lr_B must be \(2,\) on .*, got \(1,\)", decay_lr_B=lr_B[:1])
    refuse(ValueError, r"wd must be \(\) on .*, got \(2,\)", wd=lr_B)
    strided = torch.zeros(2, 6, 4, dtype=BF16, device=DEVICE).mT
    refuse(ValueError, r"weight_BMN must be contiguous, got strides \(24, 1, 4\)", weight=strided)
    copies = fp8_copies((2, 4, 6))
    refuse(ValueError, r"fp8\.scale must be \(2,\)", fp8=copies._replace(scale=copies.scale[0]))
    refuse(
        ValueError,
        r"fp8\.transposed must be \(2, 6, 4\)",
        fp8=copies._replace(transposed=copies.row),
    )
    refuse(TypeError, r"fp8\.row must be torch\.float8_e4m3fn, got", fp8=copies._replace(row=low))
    refuse(ValueError, r"beta2 must be in \[0, 1\), got 1\.0", beta2=1.0)
    refuse(RuntimeError, r"call it under torch\.no_grad", weight=weight.clone().requires_grad_())


def test_only_the_reference_computes_in_float64():
    wide = random_bank((2, 4, 6), (FP64, FP64))
    with ops.use_backend("triton"), pytest.raises(Unavailable, match=r"has no Triton version"):
        advance(without_state(wide))
