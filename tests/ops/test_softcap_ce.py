"""`softcap_ce` against its definition and the public program's losses and gradients."""

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
import torch._inductor.config

from cases import SOFTCAP_CE_SMALL
from numerics import assert_accurate, assert_same_bits
from speedrun import ops
from speedrun.ops._dispatch import Unavailable
from speedrun.ops.softcap_ce import NO_TARGET, softcap, softcap_ce, softcap_ce_fp8
from speedrun.reference import softcap_ce as reference
from train_helpers import FLOAT64_NOISE, from_golden, golden, normal

A, B, C = 23.0, 5.0, 7.5  # RECIPE section 3
E5M2 = torch.float8_e5m2
SCALE = torch.tensor(0.75 / 448)  # of the gradient, in FP8
# Interpreted kernels compute what is masked, too; and overflow is how σ becomes 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


def definition(z_TV, targets_TN, weights_N, prefixes=None, prefix_weight=0.0):
    losses = []
    prefixes = [NO_TARGET] * len(z_TV) if prefixes is None else prefixes.tolist()
    weights = [*weights_N.tolist(), prefix_weight]
    for z, targets, prefix in zip(z_TV.tolist(), targets_TN.tolist(), prefixes, strict=True):
        logits = [A / (1 + math.exp(-(value + B) / C)) for value in z]
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        pairs = zip([*targets, prefix], weights, strict=True)
        losses.append(sum(w * (log_sum - logits[n]) for n, w in pairs if n != NO_TARGET))
    return torch.tensor(losses, dtype=torch.float64)


def run(z, targets, weights, **options):
    return softcap_ce(z, targets, weights, A, B, C, **options)


# Missing ones, one target three times, none at all.
TARGETS = torch.tensor([[0, 1, -1], [4, 4, 4], [6, -1, -1], [-1, 2, 0], [-1, -1, -1]])
WEIGHTS = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
PREFIXES = torch.tensor([3, 4, -1, 2, -1])  # also one that is a target; none; alone
PREFIX = {"prefix_targets_T": PREFIXES, "prefix_weight": 0.3}


def test_definition():
    z = normal(5, 7) * 20
    expected = definition(z, TARGETS, WEIGHTS)
    torch.testing.assert_close(run(z, TARGETS, WEIGHTS), expected, **FLOAT64_NOISE)
    assert expected[-1] == 0 and (expected[:-1] > 0).all()


def test_prefix_is_one_more_target():
    z = normal(5, 7) * 20
    expected = definition(z, TARGETS, WEIGHTS, PREFIXES, 0.3)
    torch.testing.assert_close(run(z, TARGETS, WEIGHTS, **PREFIX), expected, **FLOAT64_NOISE)
    weight = torch.tensor([0.3], dtype=torch.float64)
    found = run(z, TARGETS, WEIGHTS, prefix_targets_T=PREFIXES, prefix_weight=weight)
    assert torch.equal(found, run(z, TARGETS, WEIGHTS, **PREFIX))
    assert (
        expected[-1] == 0
        and (expected[[0, 1, 3]] > definition(z, TARGETS, WEIGHTS)[[0, 1, 3]]).all()
    )


def test_every_column_takes_part():
    """Columns beyond the vocabulary are in the softmax: a high one makes each loss larger."""
    z = normal(5, 7)
    wider = torch.cat([z, torch.full((5, 1), 30.0, dtype=torch.float64)], dim=1)
    before, after = run(z, TARGETS, WEIGHTS), run(wider, TARGETS, WEIGHTS)
    assert (after[:-1] > before[:-1] + 1).all()


def test_equal_logits_cost_the_log_of_the_vocabulary():
    loss = run(torch.zeros(1, 50304), torch.tensor([[17]]), torch.ones(1))
    assert loss.item() == pytest.approx(math.log(50304), rel=1e-6)


def test_softcap():
    z = torch.tensor([-1e30, -5.0, 1e30])
    assert softcap(z, A, B, C).tolist() == [0.0, A / 2, A]


@pytest.mark.parametrize("size", [1e4, 1e30, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values(dtype, size):
    """Saturated logits: the loss is 0 or the cap, the gradient 0, both finite."""
    z = torch.full((2, 4), -size, dtype=dtype)
    z[:, 1] = size
    z.requires_grad_()
    losses = run(z, torch.tensor([[1], [2]]), torch.ones(1))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.log1p(3 * math.exp(-A)), A], rel=1e-6, abs=1e-6)
    assert z.grad.isfinite().all()
    fp8 = softcap_ce_fp8(z.detach(), torch.tensor([[1], [2]]), torch.ones(1), A, B, C, SCALE)
    assert torch.equal(fp8.loss_T, losses) and (fp8.dz_TV.float() == 0).all()


# ---- Gradients --------------------------------------------------------------------------------


def gradient(z_TV, targets_TN, weights_N, prefixes, prefix_weight, counted, rounded):
    """RECIPE's and the public kernel's, position by position and column by column."""
    dz_TV = torch.zeros_like(z_TV)
    for t, (z, targets) in enumerate(zip(z_TV.tolist(), targets_TN.tolist(), strict=True)):
        sigmoid = [1 / (1 + math.exp(-(value + B) / C)) for value in z]
        if rounded:
            sigmoid = torch.tensor(sigmoid).bfloat16().tolist()
        total = sum(math.exp(A * s) for s in sigmoid)
        weights = [*weights_N.tolist(), prefix_weight]
        pairs = list(zip([*targets, prefixes[t].item()], weights, strict=True))
        counts = [w for n, w in pairs if n != NO_TARGET]
        if counted and targets[0] != NO_TARGET:
            counts += [w for n, w in pairs[:-1] if n == NO_TARGET]
        for v, s in enumerate(sigmoid):
            own = sum(w for n, w in pairs if n == v)
            dz_TV[t, v] = (sum(counts) * math.exp(A * s) / total - own) * A / C * s * (1 - s)
    return dz_TV


SWITCHES = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize(("counted", "rounded"), SWITCHES)
def test_gradient_by_autograd_and_explicit(counted, rounded):
    z = (normal(5, 7) * 20).requires_grad_()
    options = {**PREFIX, "count_missing_targets": counted, "round_sigmoid": rounded}
    expected = gradient(z.detach(), TARGETS, WEIGHTS, PREFIXES, 0.3, counted, rounded)
    losses = run(z, TARGETS, WEIGHTS, **options)
    losses.sum().backward()
    torch.testing.assert_close(z.grad, expected, **FLOAT64_NOISE)
    explicit = reference.softcap_ce_grad(z, TARGETS, WEIGHTS, A, B, C, **options)
    torch.testing.assert_close(explicit.dz_TV, expected, **FLOAT64_NOISE)
    assert torch.equal(explicit.loss_T, losses.detach())
    lse = softcap(z.detach(), A, B, C, rounded).exp().sum(1).log()
    torch.testing.assert_close(explicit.lse_T, lse, **FLOAT64_NOISE)


@pytest.mark.parametrize("counted", [False, True])
def test_counting_missing_targets_keeps_the_loss(counted):
    """And a position without its first target, such as padding, stays without a gradient."""
    z = (normal(5, 7) * 5).requires_grad_()
    losses = run(z, TARGETS, WEIGHTS, count_missing_targets=counted)
    assert torch.equal(losses, run(z, TARGETS, WEIGHTS))
    losses.sum().backward()
    assert (z.grad[-1] == 0).all() and (z.grad[:-1] != 0).all()


def test_rounded_sigmoid_is_a_bf16_number():
    z = normal(5, 7) * 20
    sigmoid = softcap(z, A, B, C, True) / A
    torch.testing.assert_close(sigmoid, sigmoid.bfloat16().double(), rtol=2**-50, atol=0)
    assert (sigmoid - softcap(z, A, B, C) / A).abs().max() > 2**-12
    losses = run(z, TARGETS, WEIGHTS, round_sigmoid=True)
    assert (losses - run(z, TARGETS, WEIGHTS))[:-1].abs().min() > 2**-12


@pytest.mark.parametrize("options", [{}, PREFIX], ids=["targets", "prefix"])
def test_gradcheck(options):
    z = (normal(5, 7) * 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: run(z, TARGETS, WEIGHTS, **options), z)


# ---- The public program -----------------------------------------------------------------------


def golden_losses(shared_data):
    """z that the stored float64 logits come from, the targets, the prefixes, the arrays."""
    io = golden(shared_data, "io.npz")
    z = C * torch.logit(torch.from_numpy(io["logits"]) / A) - B
    targets = torch.from_numpy(io["targets"])
    prefixes = torch.from_numpy(io["prefix_table"]).long()[targets]
    return z, shifted(targets), prefixes, io


def shifted(targets):
    padded = torch.cat([targets, torch.full((2,), NO_TARGET)])
    return torch.stack([padded[n : n + len(targets)] for n in range(3)], dim=1)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("loss_val", (1.0, 0.0, 0.0, 0.0)),
        ("loss_train", (1.0, 0.5, 0.25, 0.25)),
        ("loss_train_2", (1.0, 0.375, 0.0, 0.125)),
    ],
)
def test_losses_of_the_public_program(shared_data, name, weights):
    z, targets, prefixes, io = golden_losses(shared_data)
    *weights, prefix_weight = weights
    options = {"prefix_targets_T": prefixes, "prefix_weight": prefix_weight}
    found = run(z, targets, torch.tensor(weights, dtype=torch.float64), **options)
    torch.testing.assert_close(found, torch.from_numpy(io[name]), **FLOAT64_NOISE)


def test_gradients_of_the_public_program_at_the_batch_end(shared_data):
    """Of the loss, and what its kernel has instead: they differ only in the last two positions."""
    z, targets, prefixes, io = golden_losses(shared_data)
    grads = {}
    for name, counted in (("dz_last2", False), ("dz_last2_all_weights", True)):
        options = {"prefix_targets_T": prefixes, "prefix_weight": 0.25}
        options["count_missing_targets"] = counted
        x = z.clone().requires_grad_()
        run(x, targets, WEIGHTS, **options).sum().backward()
        explicit = reference.softcap_ce_grad(z, targets, WEIGHTS, A, B, C, **options).dz_TV
        for grad in (x.grad, explicit):
            torch.testing.assert_close(grad[-2:], torch.from_numpy(io[name]), **FLOAT64_NOISE)
        grads[counted] = explicit
    assert torch.equal(grads[False][:-2], grads[True][:-2])
    assert (grads[False][-2:] - grads[True][-2:]).abs().amax(1).min() > 1e-3


def golden_head(shared_data):
    """Its arrays; FP8 ones stay bytes."""
    prefix, arrays = "head/", golden(shared_data, "fp8_a.npz")
    return {
        key.removeprefix(prefix): from_golden(array)
        for key, array in arrays.items()
        if key.startswith(prefix)
    }


def test_fp8_kernel_of_the_public_program(shared_data):
    """From its bf16 logits: σ, the log-sum-exp, losses and the gradient's bytes, all exact."""
    h = golden_head(shared_data)
    sigmoid = torch.sigmoid((h["logits"].float() + B) / C).bfloat16()
    assert_same_bits(sigmoid, h["softcap_sigmoid"])
    assert torch.equal(softcap(h["logits"], A, B, C, True), A * sigmoid.float())
    grad_scale, dz_scale = h["scales"][3].float(), h["scales"][2].float()
    loss, lse, dz, _ = softcap_ce_fp8(
        h["logits"],
        shifted(h["targets"]),
        h["mtp_weights"],
        A,
        B,
        C,
        dz_scale / grad_scale,  # a power of two: both bytes are those of the gradient of the sum
        prefix_targets_T=h["prefix_targets"],
        prefix_weight=h["prefix_weight"],
        count_missing_targets=True,
        round_sigmoid=True,
    )
    assert_same_bits(lse, h["lse"])
    assert_same_bits(loss, h["losses"])
    assert_same_bits(dz.view(torch.uint8), h["grad_logits_f8"])


# ---- With the gradient in FP8 -----------------------------------------------------------------

ALL = {**PREFIX, "count_missing_targets": True, "round_sigmoid": True}
ops_module = importlib.import_module("speedrun.ops.softcap_ce")


def run_fp8(z, targets=TARGETS, weights=WEIGHTS, scale=SCALE, **options):
    """With both layouts of the gradient, which are the same."""
    arguments = (z, targets, weights.float(), A, B, C, scale)
    found = softcap_ce_fp8(*arguments, transposed=True, **options)
    assert_same_bits(found.dz_VT, found.dz_TV.mT.contiguous())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_is_the_gradient_over_its_scale(dtype):
    z = normal(5, 7, dtype=dtype) * 5
    exact = reference.softcap_ce_grad(z.double(), TARGETS, WEIGHTS, A, B, C, **ALL)
    found = run_fp8(z, **ALL)
    assert (found.dz_TV.dtype, found.loss_T.dtype, found.lse_T.dtype) == (
        E5M2,
        torch.float32,
        torch.float32,
    )
    # σ in float32 may be rounded to the other bf16 number, 2^-9 away, if it lies between two.
    torch.testing.assert_close(found.loss_T.double(), exact.loss_T, rtol=1e-5, atol=1e-5)
    size = (exact.dz_TV / SCALE.double()).abs()
    half_step = torch.exp2(size.clamp(min=2.0**-14).log2().floor()) * 2.0**-3
    error = (found.dz_TV.double() - exact.dz_TV / SCALE.double()).abs()
    assert (error <= half_step + 1e-4 * size).all()
    assert error.max() > 0


def test_fp8_saturates():
    z = torch.zeros(1, 4)
    found = run_fp8(z, torch.tensor([[1]]), torch.ones(1), scale=SCALE * 1e-8)
    assert found.dz_TV.float().tolist() == [[57344.0, -57344.0, 57344.0, 57344.0]]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fp8_in_chunks_of_rows(monkeypatch, rows):
    z = normal(5, 7, dtype=torch.bfloat16) * 5
    expected, seen, original = run_fp8(z, **ALL), [], reference.softcap_ce_grad

    def spy(z, *arguments, **options):
        seen.append(len(z))
        return original(z, *arguments, **options)

    monkeypatch.setitem(ops_module.LOGITS_AT_ONCE, "cpu", 7 * rows)
    monkeypatch.setattr(reference, "softcap_ce_grad", spy)
    for mine, same in zip(run_fp8(z, **ALL), expected, strict=True):
        assert_same_bits(mine, same)
    assert max(seen) == rows and sum(seen) == 5


@pytest.mark.parametrize("rows", [0, 1])
def test_few_positions(rows):
    z, targets = normal(5, 7, dtype=torch.bfloat16)[:rows], TARGETS[:rows]
    found = run_fp8(z, targets)
    assert [x.shape for x in found[:3]] == [(rows,), (rows,), (rows, 7)]
    assert_same_bits(found.loss_T, run(z, targets, WEIGHTS.float()))
    assert found.dz_VT.shape == (7, rows)
    all_rows = run_fp8(normal(5, 7, dtype=torch.bfloat16))
    for mine, expected in zip(found[:3], all_rows[:3], strict=True):
        assert_same_bits(mine, expected[:rows])


def test_not_contiguous():
    z, targets = normal(5, 7) * 5, TARGETS
    wide, wide_targets = z.repeat_interleave(2, 1)[:, ::2], targets.mT.contiguous().mT
    prefixes = PREFIXES.repeat_interleave(3)[::3]
    options = {**ALL, "prefix_targets_T": prefixes}
    assert not wide.is_contiguous() and not wide_targets.is_contiguous()
    assert torch.equal(run(wide, wide_targets, WEIGHTS, **options), run(z, targets, WEIGHTS, **ALL))
    found = run_fp8(wide.float(), wide_targets, **options)
    for mine, expected in zip(found, run_fp8(z.float(), **ALL), strict=True):
        assert mine.is_contiguous()
        assert_same_bits(mine, expected)


def test_opcheck():
    z = normal(5, 7, dtype=torch.bfloat16)
    weight = torch.tensor(0.3)
    for prefixes in (None, PREFIXES):
        loss = (TARGETS, WEIGHTS.float(), A, B, C, prefixes, weight, True, True)
        for transposed in (False, True):
            arguments = (z, *loss, SCALE, transposed, "torch")
            torch.library.opcheck(torch.ops.speedrun.softcap_ce_fp8.default, arguments)


def test_two_runs_are_bitwise_equal():
    z = normal(64, 300, dtype=torch.bfloat16) * 5
    targets = torch.from_numpy(np.random.default_rng(0).integers(-1, 4, (64, 3)))
    for first, second in zip(*(run_fp8(z, targets) for _ in range(2)), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_fullgraph_without_recompiling(compiler):
    """With another weight of the prefix at each call, a tensor; σ is rounded in there too."""

    def function(z, weight):
        options = {**ALL, "prefix_weight": weight, "transposed": True}
        return softcap_ce_fp8(z * 2, TARGETS, WEIGHTS.float(), A, B, C, SCALE, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            z, weight = normal(5, 7, seed=seed, dtype=torch.float32), torch.tensor(0.25 - seed / 8)
            for mine, expected in zip(compiled(z, weight), function(z, weight), strict=True):
                assert_same_bits(mine, expected)


# ---- Kernels ----------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BF16 = torch.bfloat16


def problem(case):
    """z (T, V), targets, weights and the prefix: rows that are hard come first, where there are
    enough; the last ones lack targets, as at a batch's end."""
    T, V, N = case.rows, case.cols, case.num_targets
    z = normal(T, V) * 20
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.integers(0, V, (T, N)))
    prefixes = torch.from_numpy(rng.integers(-1, V, T))
    for n in range(1, min(T, N)):
        targets[-n:, n] = NO_TARGET
    for t, row in enumerate(z[: max(0, T - N)]):
        kind = t % 8
        if kind == 0:
            row[:] = 3  # all equal
        elif kind == 1:
            row[:] = -1000  # σ is 0
        elif kind == 2:
            row[-1] = 1000  # one has it all, and is the target
            targets[t] = V - 1
        elif kind == 3:
            row[0] = math.inf
        elif kind == 4:
            targets[t] = targets[t, :1]  # one column for all, the prefix too
            prefixes[t] = targets[t, 0]
        elif kind == 5:
            targets[t] = NO_TARGET  # the prefix alone, or none
            prefixes[t] = t % 16 - 6
    weights = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.1, 0.05, 0.3, 0.7])[:N]
    options = {"prefix_targets_T": prefixes, "prefix_weight": torch.tensor(0.3)}
    options = {name: value.to(DEVICE) for name, value in options.items()} if case.prefix else {}
    return z.to(BF16).to(DEVICE), (targets.to(DEVICE), weights.to(DEVICE), A, B, C), options


@pytest.mark.parametrize("public", [False, True], ids=["exact", "public"])
@pytest.mark.parametrize("case", SOFTCAP_CE_SMALL, ids=lambda case: case.name)
def test_kernels_by_the_accuracy_law(backend, case, public):
    """Losses; bytes: e5m2's nearest, or next where the exact number is near the middle of two."""
    z, arguments, options = problem(case)
    options |= {"count_missing_targets": public, "round_sigmoid": public}
    scale = SCALE.to(DEVICE)
    same = reference.softcap_ce_grad(z, *arguments, **options)
    exact = reference.softcap_ce_grad(z.double(), *arguments, **options)
    for transposed in (False, True):
        found = softcap_ce_fp8(z, *arguments, scale, transposed=transposed, **options)
        assert_accurate(found.loss_T, same.loss_T, exact.loss_T)
        assert_accurate(found.lse_T, same.lse_T, exact.lse_T)
        assert_e5m2(found.dz_TV, same.dz_TV / scale, exact.dz_TV / scale.double())
        if transposed:
            assert_same_bits(found.dz_VT, found.dz_TV.mT.contiguous())
        else:
            assert found.dz_VT is None


def test_kernels_have_the_public_program_s_numbers(backend, shared_data):
    """Losses by the law, bytes but for one in fifty, which is the next number."""
    h = {name: array.to(DEVICE) for name, array in golden_head(shared_data).items()}
    options = {"prefix_targets_T": h["prefix_targets"], "prefix_weight": h["prefix_weight"]}
    options |= {"count_missing_targets": True, "round_sigmoid": True}
    arguments = (shifted(h["targets"].cpu()).to(DEVICE), h["mtp_weights"], A, B, C)
    scale = h["scales"][2].float() / h["scales"][3].float()
    found = softcap_ce_fp8(h["logits"], *arguments, scale, **options)
    exact = reference.softcap_ce_grad(h["logits"].double(), *arguments, **options)
    assert_accurate(found.loss_T, h["losses"], exact.loss_T)
    steps = found.dz_TV.view(torch.uint8).int() - h["grad_logits_f8"].view(torch.uint8).int()
    assert steps.abs().max() <= 1 and (steps != 0).double().mean() < 0.02


def assert_e5m2(found, same, exact):
    """Half a step off at most, and what the kernels' bf16 factor (2^-9) and the reference in
    float32 are off before that; saturated."""
    exact, size = exact.clamp(-57344, 57344), exact.abs().clamp(2.0**-14, 57344)
    half_step = torch.exp2(size.log2().floor()) * 2.0**-3
    limit = half_step + 2.0**-8 * exact.abs() + 2 * (same.double() - exact).abs()
    assert ((found.double() - exact).abs() <= limit).all()
    nearest = exact.float().to(E5M2)
    assert (found.view(torch.uint8) != nearest.view(torch.uint8)).double().mean() < 0.03


@pytest.mark.parametrize("rows", [0, 1])
def test_kernels_take_few_rows(backend, rows):
    z, targets = normal(rows, 48, dtype=BF16).to(DEVICE), TARGETS[:rows].to(DEVICE)
    found = run_fp8(z, targets, WEIGHTS.to(DEVICE), SCALE.to(DEVICE))
    assert [x.shape for x in found] == [(rows,), (rows,), (rows, 48), (48, rows)]
    assert found.loss_T.isfinite().all()


def test_kernels_give_the_same_bits_twice(backend):
    z, arguments, options = problem(SOFTCAP_CE_SMALL[0])
    for first, second in zip(
        *(softcap_ce_fp8(z, *arguments, SCALE.to(DEVICE), **options)[:3] for _ in range(2)),
        strict=True,
    ):
        assert_same_bits(first, second)


def test_kernels_take_float_weights_and_other_strides(backend):
    """A number for the prefix's weight, float64 weights, z and targets out of wider tensors."""
    z, (targets, weights, *softcap), options = problem(SOFTCAP_CE_SMALL[1])
    expected = softcap_ce_fp8(z, targets, weights, *softcap, SCALE.to(DEVICE), **options)
    options |= {"prefix_weight": float(options["prefix_weight"])}
    wide, targets = torch.cat([z, z], dim=1)[:, : z.shape[1]], targets.mT.contiguous().mT
    found = softcap_ce_fp8(wide, targets, weights.double(), *softcap, SCALE.to(DEVICE), **options)
    for mine, same in zip(found[:3], expected[:3], strict=True):
        assert_same_bits(mine, same)


def test_kernels_make_losses_of_wrong_targets_nan(backend):
    if backend == "torch":
        pytest.skip("it raises: test_refusals")
    z, targets = normal(2, 48, dtype=BF16).to(DEVICE), torch.tensor([[48], [47]], device=DEVICE)
    found = run_fp8(z, targets, torch.ones(1, device=DEVICE), SCALE.to(DEVICE))
    assert found.loss_T.isnan().tolist() == [True, False] and found.lse_T.isfinite().all()


def test_triton_compiles_fullgraph():
    pytest.importorskip("triton")
    z, arguments, options = problem(SOFTCAP_CE_SMALL[1])

    def function(z):
        return softcap_ce_fp8(z * 2, *arguments, SCALE.to(DEVICE), transposed=True, **options)

    torch._dynamo.reset()
    with ops.use_backend("triton"):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for mine, expected in zip(compiled(z), function(z), strict=True):
            assert_same_bits(mine, expected)


def test_what_no_kernel_takes():
    z, weights = normal(5, 48, dtype=BF16), WEIGHTS.float()
    for wrong, cap in ((z.float(), A), (z, 141.0), (z[:, :0], A)):
        softcap_ce_fp8(wrong[:0], TARGETS[:0], weights, cap, B, C, SCALE)
        with ops.use_backend("triton"), pytest.raises(Unavailable, match="no Triton version"):
            softcap_ce_fp8(wrong, TARGETS, weights, cap, B, C, SCALE)
    with ops.use_backend("cuda"), pytest.raises(Unavailable, match="this call has no CUDA kernel"):
        softcap_ce_fp8(z[:, :47], TARGETS, weights, A, B, C, SCALE)


def test_refusals():
    z, weights = normal(5, 7), WEIGHTS
    with pytest.raises(
        TypeError, match=r"softcap_ce: z_TV has type torch\.int64; allowed are float"
    ):
        run(z.long(), TARGETS, weights)
    with pytest.raises(TypeError, match=r"softcap_ce_fp8: z_TV has type torch\.float64"):
        run_fp8(z)
    with pytest.raises(TypeError, match=r"targets_TN must be int64, got torch\.int32"):
        run(z, TARGETS.int(), weights)
    with pytest.raises(TypeError, match=r"prefix_targets_T must be int64, got torch\.float64"):
        run(z, TARGETS, weights, prefix_targets_T=PREFIXES.double(), prefix_weight=1.0)
    with pytest.raises(TypeError, match=r"weights_N must be floating, got torch\.int64"):
        run(z, TARGETS, weights.long())
    for wrong in [(z[0], TARGETS, weights), (z, TARGETS[:4], weights), (z, TARGETS, weights[:2])]:
        with pytest.raises(ValueError, match=r"targets_TN \(T, N\) and weights_N \(N,\), got"):
            run(*wrong)
    with pytest.raises(ValueError, match=r"targets_TN \(T, N\)"):
        run(z, TARGETS[:, 0], weights[0])
    with pytest.raises(ValueError, match=r"prefix_targets_T must be \(5,\) like z_TV's rows, got"):
        run(z, TARGETS, weights, prefix_targets_T=PREFIXES[:4], prefix_weight=1.0)
    with pytest.raises(ValueError, match=r"prefix_weight=0\.5 without prefix_targets_T"):
        run(z, TARGETS, weights, prefix_weight=0.5)
    for wrong in (SCALE.double(), SCALE.expand(2)):
        with pytest.raises(TypeError, match="dz_scale must be a float32 tensor of one element"):
            run_fp8(z.float(), scale=wrong)
    with pytest.raises(RuntimeError, match="softcap_ce_fp8 has no gradient"):
        run_fp8(z.float().requires_grad_())
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(z, TARGETS + 4, weights)
