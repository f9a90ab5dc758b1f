"""`head_logits` and `head_loss(form="fused")`: the head's loss and gradients without its logits."""

import functools
import math

import pytest
import torch

from benchmarks import head_error
from numerics import FP8_SUM_ERROR, assert_accurate, assert_same_bits, bits
from op_helpers import skips_without_cuda_kernel
from speedrun.ops import head_logits as ops
from speedrun.ops.head_logits import LARGEST_SOFTCAP, HeadLogits, factor_scale
from speedrun.ops.head_loss import head_loss as head_loss_of_any_backend
from speedrun.ops.head_loss import quantize_head
from speedrun.reference import head_logits as reference
from speedrun.reference import softcap_ce as definition
from speedrun.reference._fp8 import to_fp8
from train_helpers import FLOAT64_NOISE
from train_helpers import normal as normal_on_cpu

SOFTCAP = (23.0, 5.0, 7.5)  # RECIPE section 3
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
T, D, V, M = 32, 16, 272, 4  # two whole blocks of columns and a part of one


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py


@pytest.fixture
def backend(backend):
    """Of new tensors, where there is a GPU, the device too."""
    with torch.device(DEVICE):
        yield backend


def served(function):
    """Skips the test at a call that has no CUDA kernel."""

    @functools.wraps(function)
    def call(*arguments, **options):
        with skips_without_cuda_kernel():
            return function(*arguments, **options)

    return call


head_logits, target_terms_ = map(served, (ops.head_logits, ops.target_terms_))
add_target_rows_, add_target_columns_ = map(served, (ops.add_target_rows_, ops.add_target_columns_))
head_loss = served(head_loss_of_any_backend)


def here(tensor):
    """On the device of new tensors: generators are the CPU's, so that numbers are the same."""
    return tensor.to(torch.get_default_device())


def normal(*shape, **options):
    with torch.device("cpu"):
        tensor = normal_on_cpu(*shape, **options)
    return here(tensor)


def scales():
    return torch.tensor(0.25), torch.tensor(0.002)


def weights_of_targets():
    return torch.tensor([1.0, 0.5, 0.25, 0.3])


def fp8_operands(num_tokens=T, num_columns=V, dim=D):
    x = (normal(num_tokens, dim) * 40).to(E4M3)
    return x, (normal(num_columns, dim, seed=1) * 100 * (D / dim) ** 0.5).to(E4M3)


def targets(num_tokens=T, num_columns=V):
    """Some missing, some twice or three times."""
    generator = torch.Generator().manual_seed(2)
    found = torch.randint(-1, num_columns, (num_tokens, M), generator=generator, device="cpu")
    found[1::4, 2] = found[1::4, 0]
    found[2::4] = found[2::4, :1]
    found[3] = -1
    return here(found)


# ---- The product and what is fused behind it -------------------------------------------------


def test_factors_are_their_definition():
    """In float64; the largest g of all σ, whatever `a` is, is e5m2's largest number."""
    for a in (0.5, 2.0, 23.0, LARGEST_SOFTCAP):
        sigmoid = torch.linspace(0, 1, 10**6 + 1, dtype=torch.float64)
        g = (a * (sigmoid - 1)).exp() * sigmoid * (1 - sigmoid)
        assert math.isclose(g.max().item() / factor_scale(a), 57344, rel_tol=1e-9)
    z = normal(5, 7) * 8
    logits = definition.softcap(z, *SOFTCAP)
    sigmoid, e, g = reference.factors(z, *SOFTCAP)
    torch.testing.assert_close(e, (logits - 23).exp(), **FLOAT64_NOISE)
    torch.testing.assert_close(g, e * sigmoid * (1 - sigmoid), **FLOAT64_NOISE)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("softcap", [SOFTCAP, (1.5, 0.0, 0.7), (LARGEST_SOFTCAP, -3.0, 4.0)])
@pytest.mark.parametrize("shape", [(T, V), (144, 16), (16, 400), (16, 144, 272)])
def test_sums_and_factors(shape, softcap):
    """Between their values at both ends of what a sum of FP8 products may be."""
    x, w = fp8_operands(*shape)
    sums, g_TV, g_VT = head_logits(x, w, *scales(), *softcap)
    z, spread = (of(x.double()) @ of(w.double()).mT * 0.25 * 0.002 for of in (torch.clone, abs))
    ends = [reference.factors(z + sign * FP8_SUM_ERROR * spread, *softcap) for sign in (-1, 0, 1)]
    e, g = (torch.stack([end[i] for end in ends]) for i in (1, 2))
    sums_of = [torch.stack([part.sum(1) for part in of.split(128, dim=1)]) for of in e]
    assert sums.shape == (math.ceil(shape[1] / 128), shape[0])
    assert (sums >= sums_of[0] * (1 - 1e-5)).all() and (sums <= sums_of[2] * (1 + 1e-5)).all()
    scale = factor_scale(softcap[0])
    rounding = 2**-3 * 1.001 * g + 2**-22 * e + 2**-17 * scale  # e5m2; 1 − σ in fp32
    top = torch.where(((e - e[1]) * (g - g[1]) < 0).any(0), 57344 * scale, 0)  # σ crosses the top
    found = g_TV.double() * scale
    assert (found >= (g - rounding).amin(0)).all()
    assert (found <= torch.maximum((g + rounding).amax(0), top)).all()
    assert_same_bits(g_VT, g_TV.mT.contiguous())


def test_reference_sums_and_factors():
    """In float64 to e5m2's rounding; the sums in float32 too."""
    x, w = fp8_operands()
    exact = reference.head_logits(x.double(), w.double(), *scales(), *SOFTCAP, rows=T)
    _, e, g = reference.factors(x.double() @ w.double().mT * 0.25 * 0.002, *SOFTCAP)
    torch.testing.assert_close(exact.sums_BT.sum(0), e.sum(1), rtol=1e-6, atol=0)
    assert_same_bits(exact.g_TV, to_fp8(g, torch.tensor(factor_scale(23.0)), E5M2))
    for rows in (7, T):
        same = reference.head_logits(x, w, *scales(), *SOFTCAP, rows=rows)
        torch.testing.assert_close(same.sums_BT.double(), exact.sums_BT, rtol=1e-5, atol=0)
        steps = bits(same.g_TV).int() - bits(exact.g_TV).int()
        assert steps.abs().max() <= 1 and (steps != 0).double().mean() < 0.001


def test_extreme_logits(backend):
    """Far beyond the cap on both sides, and NaN: sums are finite, factors 0 or what is left."""
    x = torch.zeros(16, D, dtype=E4M3)
    x[:, 0] = torch.tensor([448.0, -448.0, 0.0, torch.nan] * 4).to(E4M3)
    w = torch.zeros(16, D, dtype=E4M3)
    w[:, 0] = 448.0
    sums, g_TV, _ = head_logits(x, w, torch.ones(()), torch.ones(()), *SOFTCAP)
    torch.testing.assert_close(sums[0, 0::4], torch.full((4,), 16.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        sums[0, 1::4], torch.full((4,), 16 * math.exp(-23)), rtol=1e-5, atol=0
    )
    assert (g_TV[0].float() == 0).all() and (g_TV[1].float() == 0).all()
    if backend != "triton" or torch.cuda.is_available():  # its interpreter takes e4m3's NaN for 480
        assert sums[0, 3::4].isnan().all() and g_TV[3].isnan().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (16, 0)])
def test_few_tokens_or_columns(shape):
    x, w = fp8_operands(*shape)
    sums, g_TV, g_VT = head_logits(x, w, *scales(), *SOFTCAP)
    assert sums.shape == (math.ceil(shape[1] / 128), shape[0])
    assert g_TV.shape == shape and g_VT.shape == shape[::-1]


# ---- Targets ---------------------------------------------------------------------------------


def test_terms_are_the_definitions():
    """In float64: loss, gradient of the logits at the targets, and elsewhere row factor times g."""
    x, w = normal(T, D), normal(V, D, seed=1)
    ones = (torch.ones(()), torch.ones(()))
    logits = reference.head_logits(x, w, *ones, *SOFTCAP, rows=7)
    z = x @ w.mT
    operands = (x, w, x, w, *ones)
    loss, rows, sides = reference.target_terms_(
        logits, *operands, targets(), weights_of_targets(), *SOFTCAP
    )
    exact = definition.softcap_ce_grad(z, targets(), weights_of_targets().double(), *SOFTCAP)
    torch.testing.assert_close(loss, exact.loss_T, **FLOAT64_NOISE)
    found = rows[:, None] * reference.factors(z, *SOFTCAP)[2]
    is_target = torch.zeros(T, V + 1, dtype=torch.bool).scatter_(1, targets() % (V + 1), True)
    is_target = is_target[:, :V]
    at_targets = torch.zeros(T, V, dtype=torch.float64)
    at_targets.scatter_add_(1, targets().clamp(min=0), sides)
    found = torch.where(is_target, at_targets, found)
    torch.testing.assert_close(found, exact.dz_TV, **FLOAT64_NOISE)
    assert (at_targets[~is_target] == 0).all()
    assert ((logits.g_TV.float() == 0) == is_target).all()
    assert_same_bits(logits.g_VT, logits.g_TV.mT.contiguous())


def test_targets_count_by_the_numbers_that_are_not_quantised():
    """So their logits, also in Σe, whatever the FP8 copies say."""
    x, w = normal(T, D), normal(V, D, seed=1)
    wrong, wrong_w = x + 0.1 * normal(T, D, seed=3), w + 0.1 * normal(V, D, seed=4)
    ones = (torch.ones(()), torch.ones(()))
    logits = reference.head_logits(wrong, wrong_w, *ones, *SOFTCAP, rows=T)
    operands = (x, w, wrong, wrong_w, *ones)
    columns_TM = targets().clamp(min=0)
    found = reference.target_terms_(logits, *operands, columns_TM, weights_of_targets(), *SOFTCAP)
    mixed = (wrong @ wrong_w.mT).scatter(1, columns_TM, (x @ w.mT).gather(1, columns_TM))
    exact = definition.softcap_ce_grad(mixed, columns_TM, weights_of_targets().double(), *SOFTCAP)
    torch.testing.assert_close(found.loss_T, exact.loss_T, **FLOAT64_NOISE)
    dz_TV = torch.zeros(T, V, dtype=torch.float64).scatter_add_(1, columns_TM, found.sides_TM)
    at_targets = exact.dz_TV.gather(1, columns_TM)
    torch.testing.assert_close(dz_TV.gather(1, columns_TM), at_targets, **FLOAT64_NOISE)


@pytest.mark.usefixtures("backend")
def test_sides_of_dx_and_dw():
    x, w = normal(T, D, dtype=BF16), normal(V, D, seed=1, dtype=BF16)
    sides = normal(T, M, seed=5, dtype=torch.float32) * (targets() >= 0)
    dense = torch.zeros(T, V, dtype=torch.float64)
    dense.scatter_add_(1, targets().clamp(min=0), sides.double())
    start_dx, start_dw = normal(T, D, seed=6, dtype=BF16), normal(D, V, seed=7).float()
    dx = add_target_rows_(start_dx.clone(), w, targets(), sides)
    exact = start_dx.double() + dense @ w.double()
    assert_accurate(dx, exact.to(BF16), exact)
    dw = add_target_columns_(start_dw.clone(), x, targets(), sides)
    exact = start_dw.double() + x.double().mT @ dense
    assert_accurate(dw, (start_dw + x.float().mT @ dense.float()), exact)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("num_tokens", "dim", "num_targets"), [(200, 136, 2), (1, 8, 1), (9, 16, 0)]
)
def test_targets_on_each_backend(num_tokens, dim, num_targets):
    """One of the columns for most positions, missing ones, none at all: by the reference's terms,
    which are float32's there, and the same twice."""
    x = normal(num_tokens, dim, dtype=BF16)
    w = (normal(V, dim, seed=1) / dim**0.5).to(BF16)
    (x_f8, w_f8), both = ((t * 20).to(E4M3) for t in (x, w)), (torch.tensor(1 / 16),) * 2
    found = torch.randint(-1, V, (num_tokens, num_targets))
    if num_targets > 0:
        found[: num_tokens * 3 // 4, 0] = 3
        found[::4] = found[::4, :1]
    weights = torch.linspace(1, 0.5, num_targets)
    logits = reference.head_logits(x_f8, w_f8, *both, *SOFTCAP, rows=num_tokens)
    operands = (x, w, x_f8, w_f8, *both, found, weights, *SOFTCAP)
    copies = [HeadLogits(*(t.clone() for t in logits)) for _ in range(2)]
    terms = target_terms_(copies[0], *operands)
    expected = reference.target_terms_(copies[1], *operands)
    for mine, same in zip(terms, expected, strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-4, atol=1e-6)
    for mine, same in zip(copies[0], copies[1], strict=True):
        assert_same_bits(mine, same)
    sides = normal(num_tokens, num_targets, seed=5, dtype=torch.float32) * (found >= 0)
    start = normal(dim, V, seed=7).float()
    dw, again = (add_target_columns_(start.clone(), x, found, sides) for _ in range(2))
    assert_same_bits(dw, again)
    exact = reference.add_target_columns_(start.double(), x.double(), found, sides.double())
    torch.testing.assert_close(dw.double(), exact, rtol=1e-4, atol=1e-4)
    dx = add_target_rows_(x.clone(), w, found, sides)
    same = reference.add_target_rows_(x.clone(), w, found, sides)
    torch.testing.assert_close(dx, same, rtol=2**-7, atol=1e-6)


# ---- The whole head --------------------------------------------------------------------------


def problem(num_tokens=64, dim=32, num_columns=272):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(num_columns, (num_tokens + 2,), generator=generator, device="cpu")
    tokens[num_tokens:] = definition.NO_TARGET
    shifted = torch.stack([tokens[n : n + num_tokens] for n in range(3)], dim=1)
    prefixes = torch.randint(-1, num_columns, (num_tokens,), generator=generator, device="cpu")
    x = torch.nn.functional.rms_norm(normal(num_tokens, dim), (dim,)).to(BF16)
    w = (normal(dim, num_columns, seed=2) * 0.3).to(BF16)
    arguments = (here(shifted), torch.tensor([1.0, 0.5, 0.25]), *SOFTCAP)
    return x, w, arguments, {"prefix_targets_T": here(prefixes), "prefix_weight": 0.3}


def run(x, w, arguments, options, grad_T=None, form="fused", function=head_loss, **more):
    """Loss, dX and dW of Σ grad[t]·loss[t]."""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    fp8 = quantize_head(w) if form == "fused" else None
    loss = function(x, w, *arguments, **options, fp8=fp8, form=form, **more)
    loss.backward(torch.ones_like(loss) if grad_T is None else grad_T)
    return loss.detach(), x.grad, w.grad


def relative_errors(found, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("grad", "softcap"),
    [
        ("ones", SOFTCAP),
        ("factor", SOFTCAP),
        ("each", SOFTCAP),
        ("each", (15.0, 0.0, 10.0)),
        ("ones", (30.0, 2.0, 9.0)),
    ],
)
def test_is_near_the_exact_gradient(grad, softcap):
    """With three targets and a prefix, for any losses' weights: within FP8's error of W, 3 %."""
    x, w, (targets_TN, weights, *_), options = problem()
    grad_T = {"ones": None, "factor": torch.full((64,), -0.125), "each": normal(64).float()}[grad]
    arguments = (targets_TN, weights, *softcap)
    found = run(x, w, arguments, options, grad_T)
    wide = None if grad_T is None else grad_T.double()
    exact = run(x.double(), w.double(), arguments, options, wide, form="logits")
    assert [t.dtype for t in found] == [torch.float32, BF16, BF16]
    loss, dx, dw = relative_errors(found, exact)
    assert loss < 0.003 and 1e-4 < dx < 0.03 and 1e-4 < dw < 0.03


@pytest.mark.parametrize("targets", ["drawn", "likeliest"])
def test_errors_of_a_trained_model(targets):
    """Where a target is likely, the gradient is a small difference: what e5m2 would lose."""
    made_up = head_error.made_up(head_error.HEADS["aligned"], targets, 128, 1024)
    options = made_up.loss._asdict()
    exact = head_error.differentiated(made_up, torch.float64)
    x, w = (t.clone().requires_grad_() for t in made_up[:2])
    loss = head_loss(x, w, **options, fp8=quantize_head(w), form="fused")
    found = (loss.detach(), *torch.autograd.grad(loss.sum(), (x, w)))
    assert all(error < 0.03 for error in relative_errors(found, exact))


@pytest.mark.usefixtures("backend")
def test_weight_gradients_add_up_unrounded():
    x, w, arguments, options = problem()
    start = normal(32, 272, seed=5).float()
    found = start.clone()
    grads = [torch.full((64,), 0.25), normal(64).float()]
    for grad_T in grads:
        loss, dx, dw = run(x, w, arguments, options, grad_T, dw_sum_DV=found)
        expected = run(x, w, arguments, options, grad_T)
        assert dw is None
        assert_same_bits(loss, expected[0])
        assert_same_bits(dx, expected[1])
    parts = [run(x, w, arguments, options, grad_T)[2].double() for grad_T in grads]
    error = (found.double() - start.double() - sum(parts)).abs()
    assert (error <= 1.01 * 2**-8 * sum(part.abs() for part in parts) + 1e-6).all()
    assert (found - start != (found - start).bfloat16()).any()


@pytest.mark.usefixtures("backend")
def test_missing_targets_and_zero_gradients():
    x, w, (targets_TN, *others), _ = problem()
    nothing = (torch.full_like(targets_TN, -1), *others)
    for arguments, grad_T in ((nothing, None), ((targets_TN, *others), torch.zeros(64))):
        loss, dx, dw = run(x, w, arguments, {}, grad_T)
        assert (dx == 0).all() and (dw == 0).all()
        assert (loss == 0).all() == (grad_T is None)


def test_a_prefix_of_no_weight_is_none():
    """But for its column, which is then in bf16."""
    x, w, arguments, options = problem()
    expected = run(x, w, arguments, {})
    found = run(x, w, arguments, options | {"prefix_weight": 0.0})
    assert all(error < 0.02 for error in relative_errors(found, [t.double() for t in expected]))
    none = torch.full((64,), -1)
    for mine, same in zip(
        run(x, w, arguments, {"prefix_targets_T": none, "prefix_weight": 0.3}),
        expected,
        strict=True,
    ):
        assert_same_bits(mine, same)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_few_positions(rows):
    """They don't see each other."""
    x, w, (targets_TN, *others), options = problem()
    whole = run(x, w, (targets_TN, *others), options)
    options |= {"prefix_targets_T": options["prefix_targets_T"][:rows]}
    loss, dx, dw = run(x[:rows], w, (targets_TN[:rows], *others), options)
    torch.testing.assert_close(loss, whole[0][:rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, whole[1][:rows], rtol=2**-7, atol=2**-9)
    assert dw.shape == w.shape and (dw != 0).any() == (rows > 0)


def test_keeps_one_byte_a_logit():
    """Until backward, beside what has a model dim or a row; no more than 2 at any time."""
    x, w, arguments, options = problem(64, 16, 4096)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x, w, arguments, options)
    large = [t for t in kept if t.numel() >= 64 * 4096]
    assert [(t.dtype, t.shape) for t in large] == [(E5M2, (4096, 64))]


def test_not_contiguous():
    x, w, arguments, options = problem()
    expected = run(x, w, arguments, options)
    wide_x = torch.cat([x, x], dim=1).requires_grad_()
    w_t = w.mT.contiguous().requires_grad_()
    fp8 = quantize_head(w)
    loss = head_loss(wide_x[:, :32], w_t.mT, *arguments, **options, fp8=fp8, form="fused")
    loss.sum().backward()
    found = (loss.detach(), wide_x.grad[:, :32].contiguous(), w_t.grad.mT.contiguous())
    for mine, same in zip(found, expected, strict=True):
        assert_same_bits(mine, same)


@pytest.mark.usefixtures("backend")
def test_two_runs_are_bitwise_equal():
    first, second = (run(*problem()) for _ in range(2))
    for mine, same in zip(first, second, strict=True):
        assert_same_bits(mine, same)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_fullgraph_without_recompiling(compiler):
    x, w, arguments, options = problem()

    def results(function):
        found = []
        for scale in (1, 2):
            more = options | {"prefix_weight": torch.tensor(0.5 / scale)}
            found += run(x * scale, w, arguments, more, function=function)
        return found

    expected = results(head_loss)
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch._inductor.config.patch(emulate_precision_casts=True),
    ):
        found = results(torch.compile(head_loss, fullgraph=True, backend=compiler))
    for mine, same in zip(found, expected, strict=True):
        assert_same_bits(mine, same)


def test_opcheck():
    """But for its test of schemas, for which torch can't compare FP8 tensors."""
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, w = fp8_operands()
    plain, operators = (x.to(BF16), w.to(BF16)), torch.ops.speedrun
    arguments = (x, w, *scales(), *SOFTCAP)
    logits = operators.head_logits(*arguments, "torch")
    terms = (*logits, *plain, x, w, *scales(), targets(), weights_of_targets(), *SOFTCAP)
    sides = normal(T, M).float()
    calls = {
        operators.head_logits: arguments,
        operators.head_target_terms_: terms,
        operators.head_add_target_rows_: (*plain, targets(), sides),
        operators.head_add_target_columns_: (
            normal(D, V).float(),
            *plain[:1],
            targets(),
            sides,
        ),
    }
    for operator, call in calls.items():
        torch.library.opcheck(operator.default, (*call, "torch"), test_utils=tests)


def test_refusals():
    x, w, arguments, options = problem()
    fp8 = quantize_head(w)
    with pytest.raises(ValueError, match=r"form='fast': must be \"logits\", or \"fused\""):
        head_loss(x, w, *arguments, fp8=fp8, form="fast")
    with pytest.raises(ValueError, match=r"form='fused': .* needs fp8"):
        head_loss(x, w, *arguments, form="fused")
    for name in ("round_sigmoid", "count_missing_targets"):
        with pytest.raises(ValueError, match=rf"{name}=True is the public kernel's"):
            head_loss(x, w, *arguments, **options, fp8=fp8, form="fused", **{name: True})
    for a in (0.0, 32.5, math.nan):
        with pytest.raises(ValueError, match=rf"a={a}: must be above 0 and at most 32"):
            head_loss(x, w, *arguments[:2], a, 5.0, 7.5, fp8=fp8, form="fused")
    with pytest.raises(ValueError, match=r"head_loss: c=0\.0: must be above 0"):
        head_loss(x, w, *arguments[:2], 23.0, 5.0, 0.0, fp8=fp8, form="fused")
    x_f8, w_f8 = fp8_operands()
    with pytest.raises(ValueError, match=r"x_f8_TD \(T, D\) and w_f8_VD \(V, D\), got \(32, 16\)"):
        head_logits(x_f8, w_f8[:, :8], *scales(), *SOFTCAP)
    with pytest.raises(TypeError, match=r"x_f8_TD must be torch\.float8_e4m3fn, got torch\.float8"):
        head_logits(x_f8.to(E5M2), w_f8, *scales(), *SOFTCAP)
    with pytest.raises(ValueError, match=r"w_f8_VD must be contiguous"):
        head_logits(x_f8, w_f8.mT.contiguous().mT, *scales(), *SOFTCAP)
    logits = head_logits(x_f8, w_f8, *scales(), *SOFTCAP)
    operands = (x_f8.to(BF16), w_f8.to(BF16), x_f8, w_f8, *scales())
    with pytest.raises(ValueError, match=r"targets_TM must be \(T, M\), got \(32,\)"):
        target_terms_(logits, *operands, targets()[:, 0], weights_of_targets(), *SOFTCAP)
    wrong = HeadLogits(logits.sums_BT, logits.g_TV, logits.g_TV)
    with pytest.raises(ValueError, match=r"g_VT must be \(272, 32\)"):
        target_terms_(wrong, *operands, targets(), weights_of_targets(), *SOFTCAP)
