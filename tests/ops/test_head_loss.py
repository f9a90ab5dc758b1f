"""`head_loss`: plain and in chunks against its definition; FP8 against the public program."""

import importlib

import pytest
import torch
import torch._inductor.config

from numerics import assert_accurate, assert_same_bits
from speedrun import ops
from speedrun.ops.fp8_matmul import fp8_matmul
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.ops.head_loss import Fp8Head, head_loss, quantize_head
from speedrun.ops.softcap_ce import NO_TARGET, softcap_ce, softcap_ce_fp8
from speedrun.reference import softcap_ce as reference
from train_helpers import FLOAT64_NOISE, from_golden, golden, normal

SOFTCAP = (23.0, 5.0, 7.5)  # RECIPE section 3
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
softcap_module = importlib.import_module("speedrun.ops.softcap_ce")


def problem(T=13, D=8, V=21, dtype=torch.float64):
    """x, W, and the arguments behind them: three targets and a prefix, some of them missing."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, V, (T + 2,), generator=generator)
    targets[T:] = NO_TARGET
    shifted = torch.stack([targets[n : n + T] for n in range(3)], dim=1)
    prefixes = torch.randint(-1, V, (T,), generator=generator)
    weights = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    options = {"prefix_targets_T": prefixes, "prefix_weight": 0.3}
    x, w = normal(T, D, dtype=dtype), normal(D, V, seed=2, dtype=dtype)
    return x, w, (shifted, weights, *SOFTCAP), options


def run(x, w, arguments, options, grad_T=None):
    """Loss, dX and dW of Σ grad[t]·loss[t]; the loss is summed if there is no grad."""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    loss = head_loss(x, w, *arguments, **options)
    loss.backward(torch.ones_like(loss) if grad_T is None else grad_T)
    return loss.detach(), x.grad, w.grad


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of 4 rows of problem()'s 21 columns; what computed each loss, of which logits."""
    seen = []

    def spied(name, function):
        def spy(z, *arguments, **options):
            seen.append((name, *z.shape))
            return function(z, *arguments, **options)

        return spy

    for name in ("softcap_ce", "softcap_ce_grad"):
        monkeypatch.setattr(reference, name, spied(name, getattr(reference, name)))
    monkeypatch.setitem(softcap_module.LOGITS_AT_ONCE, "cpu", 4 * 21 + 20)
    return seen


SWITCHES = [
    {},
    {"count_missing_targets": True},
    {"round_sigmoid": True},
    {"count_missing_targets": True, "round_sigmoid": True},
]


# ---- Without FP8 ------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_definition(switches):
    x, w, arguments, options = problem()
    options |= switches
    found = run(x, w, arguments, options)
    loss, _, dz, _ = reference.softcap_ce_grad(x @ w, *arguments, **options)
    for mine, expected in zip(found, (loss, dz @ w.T, x.T @ dz), strict=True):
        torch.testing.assert_close(mine, expected, **FLOAT64_NOISE)


@pytest.mark.parametrize("grad", ["sum", "mean", "each"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_chunks_are_the_same_in_float64(monkeypatch, switches, grad):
    """However the losses are weighed."""
    x, w, arguments, options = problem()
    options |= switches
    grad_T = {"sum": torch.ones(13), "mean": torch.full((13,), 1 / 13), "each": torch.arange(13.0)}
    grad_T = grad_T[grad].double()
    expected = run(x, w, arguments, options, grad_T)
    for rows in (1, 4, 12):
        monkeypatch.setitem(softcap_module.LOGITS_AT_ONCE, "cpu", 21 * rows)
        found = run(x, w, arguments, options, grad_T)
        for mine, same in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, same, **FLOAT64_NOISE)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_chunks_are_as_accurate(chunks, dtype):
    x, w, arguments, options = problem(dtype=dtype)
    exact = run(x.double(), w.double(), arguments, options)
    found = run(x, w, arguments, options)
    assert max(chunks) == ("softcap_ce_grad", 4, 21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(softcap_module.LOGITS_AT_ONCE, "cpu", 1 << 20)
        same = run(x, w, arguments, options)
    assert chunks[-1] == ("softcap_ce", 13, 21)
    for mine, plain, ref64 in zip(found, same, exact, strict=True):
        assert_accurate(mine, plain, ref64)


def test_never_holds_more_logits(chunks):
    """Forward, backward, without gradients; up to the limit all at once, by autograd."""
    x, w, arguments, options = problem()
    run(x, w, arguments, options)
    once = [("softcap_ce_grad", 4, 21)] * 3 + [("softcap_ce_grad", 1, 21)]
    assert chunks == once
    chunks.clear()
    run(x, w, arguments, options, torch.arange(13.0, dtype=torch.float64))
    assert chunks == 2 * once
    chunks.clear()
    loss = head_loss(x, w, *arguments, **options)
    assert chunks == [("softcap_ce", 4, 21)] * 3 + [("softcap_ce", 1, 21)]
    torch.testing.assert_close(loss, softcap_ce(x @ w, *arguments, **options), **FLOAT64_NOISE)
    chunks.clear()
    run(*problem(4))
    assert chunks == [("softcap_ce", 4, 21)]


@pytest.mark.usefixtures("chunks")
def test_the_host_waits_only_for_losses_that_are_weighed_apart(monkeypatch):
    """A sum's gradient is one number, expanded, whatever it is multiplied by."""
    x, w, arguments, options = problem()
    expected = run(x, w, arguments, options, torch.full((13,), 0.125, dtype=torch.float64))

    def read(tensor):
        raise AssertionError("the host reads a number")

    leaves = [t.clone().requires_grad_() for t in (x, w)]
    loss = head_loss(*leaves, *arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", read)
        with pytest.raises(AssertionError, match="the host reads"):
            loss.backward(torch.ones_like(loss), retain_graph=True)
        (loss.sum() / 8).backward()
    for leaf, same in zip(leaves, expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, same, **FLOAT64_NOISE)


def test_chunks_gradcheck(chunks):
    x, w, arguments, options = problem(6, 3)
    inputs = [t.requires_grad_() for t in (x, w)]
    assert torch.autograd.gradcheck(lambda x, w: head_loss(x, w, *arguments, **options), inputs)
    assert max(chunks) == ("softcap_ce_grad", 4, 21)


def test_chunks_with_one_gradient_wanted(chunks):
    x, w, arguments, options = problem()
    expected = run(x, w, arguments, options)
    for index, tensor in enumerate((x, w)):
        tensor.requires_grad_()
        head_loss(x, w, *arguments, **options).sum().backward()
        assert torch.equal(tensor.grad, expected[index + 1])
        tensor.requires_grad_(False)
    assert max(chunks) == ("softcap_ce_grad", 4, 21)


@pytest.mark.usefixtures("chunks")
def test_opcheck_of_chunks():
    x, w, (targets, weights, *softcap), options = problem(dtype=torch.float32)
    weight = torch.tensor(0.3)
    for prefixes in (None, options["prefix_targets_T"]):
        arguments = (x, w, targets, weights, *softcap, prefixes, weight, True, False)
        operators = torch.ops.speedrun
        torch.library.opcheck(operators.linear_softcap_ce.default, arguments)
        torch.library.opcheck(operators.linear_softcap_ce_grad.default, arguments)
        for grad_T in (torch.ones(13), torch.arange(13.0)):
            backward = (grad_T, x.clone(), w.clone(), *arguments)
            torch.library.opcheck(operators.linear_softcap_ce_backward.default, backward)


# ---- With FP8 ---------------------------------------------------------------------------------

ALL = SWITCHES[-1]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Of the GEMMs, casts and the transpose."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with ops.use_backend(request.param):
        yield request.param


def fp8_problem(T=32, D=16, V=48):
    """As in training: x is RMS-normed, W small, and scales fit."""
    x, w, arguments, options = problem(T, D, V, BF16)
    x = torch.nn.functional.rms_norm(x, (D,))
    return x, (w * 0.3).to(BF16), arguments, options | ALL


def run_fp8(x, w, arguments, options, grad_T=None):
    return run(x, w, arguments, options | {"fp8": quantize_head(w)}, grad_T)


def golden_head(shared_data):
    arrays = golden(shared_data, "fp8_a.npz")
    h = {key[5:]: from_golden(array) for key, array in arrays.items() if key.startswith("head/")}
    targets = torch.cat([h["targets"], torch.full((2,), NO_TARGET)])
    shifted = torch.stack([targets[n : n + 64] for n in range(3)], dim=1)
    options = {
        "prefix_targets_T": h["prefix_targets"],
        "prefix_weight": h["prefix_weight"],
        "count_missing_targets": True,
        "round_sigmoid": True,
    }
    return h, (shifted, h["mtp_weights"], *SOFTCAP), options


def test_casts_and_logits_of_the_public_program(shared_data):
    h, _, _ = golden_head(shared_data)
    head = quantize_head(h["w"])
    x_f8 = fp8_quantize(h["x"], head.x_scale)[0]
    assert_same_bits(x_f8.view(torch.uint8), h["x_f8"])
    assert_same_bits(head.w_f8_DV.view(torch.uint8), h["w_f8"])
    assert_same_bits(head.w_f8_VD.view(torch.uint8), h["w_f8"].mT.contiguous())
    x_scale, w_scale, dz_scale, grad_scale = h["scales"].float()
    assert (head.x_scale, head.w_scale) == (x_scale, w_scale)
    assert head.dz_scale * grad_scale == dz_scale
    z = fp8_matmul(x_f8, head.w_f8_VD, head.x_scale, head.w_scale, fast_accum=True)
    assert_same_bits(z, h["logits"])


def test_losses_and_gradients_of_the_public_program(shared_data, backend):
    """Its grad_scale is what the sum of losses is multiplied by. All exact; but Triton has another
    order of sums: there losses to float32's rounding, gradients as near to the exact products as
    the public numbers."""
    h, arguments, options = golden_head(shared_data)
    grad_T = h["scales"][3].float().expand(64)
    loss, dx, dw = run_fp8(h["x"], h["w"], arguments, options, grad_T)
    if backend == "torch":
        assert_same_bits(loss, h["losses"])
        assert_same_bits(dx, h["grad_x"])
        assert_same_bits(dw, h["grad_w_bf16"])
    exact = reference.softcap_ce_grad(h["logits"].double(), *arguments, **options)
    assert_accurate(loss, h["losses"], exact.loss_T)
    dz, w, x = golden_operands(h)
    assert_accurate(dx, h["grad_x"], dz @ w.mT)
    assert_accurate(dw, h["grad_w_bf16"], x.mT @ dz)


def golden_operands(h):
    """Gradient of the logits, W and x from the stored bytes, in float64."""
    x_scale, w_scale, dz_scale, _ = h["scales"]
    dz = h["grad_logits_f8"].view(torch.float8_e5m2).double() * dz_scale
    return dz, h["w_f8"].view(E4M3).double() * w_scale, h["x_f8"].view(E4M3).double() * x_scale


def test_weight_gradient_of_the_public_program_before_its_rounding(shared_data):
    """From its bytes, to float32's order of sums of 64 products."""
    h, _, _ = golden_head(shared_data)
    x_scale, _, dz_scale, _ = h["scales"].float()
    x_f8_t = h["x_f8"].view(E4M3).mT.contiguous()
    dz_f8_t = h["grad_logits_f8"].view(torch.float8_e5m2).mT.contiguous()
    dw = fp8_matmul(x_f8_t, dz_f8_t, x_scale, dz_scale, out_dtype=torch.float32)
    dz, _, x = golden_operands(h)
    bound = x.mT.abs() @ dz.abs()
    assert ((dw.double() - h["grad_w"].double()).abs() <= 2 * 64 * 2.0**-24 * bound).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("grad", ["ones", "factor", "each"])
def test_fp8_is_the_product_of_its_fp8_numbers(grad):
    """dX and dW from the bytes, in float64; how the losses are weighed doesn't change these."""
    x, w, arguments, options = fp8_problem()
    grad_T = {"ones": torch.ones(32), "factor": torch.full((32,), -0.3), "each": normal(32)}
    grad_T = grad_T[grad].float()
    loss, dx, dw = run_fp8(x, w, arguments, options, grad_T)
    head = quantize_head(w)
    x_f8 = fp8_quantize(x, head.x_scale)[0]
    z = fp8_matmul(x_f8, head.w_f8_VD, head.x_scale, head.w_scale, fast_accum=True)
    expected, _, dz_f8, _ = softcap_ce_fp8(z, *arguments, head.dz_scale, **options)
    assert_same_bits(loss, expected)
    share = (grad_T / grad_T.abs().max())[:, None]
    x_f8 = fp8_quantize(x * share, head.x_scale)[0]
    dz64, dz_scale = dz_f8.double(), head.dz_scale.double()
    w64, x64 = head.w_f8_DV.double() * head.w_scale, x_f8.double() * head.x_scale
    exact_dx = dz64 @ w64.mT * dz_scale * grad_T[:, None]
    exact_dw = x64.mT @ dz64 * dz_scale * grad_T.abs().max()
    for found, exact in ((dx, exact_dx), (dw, exact_dw)):
        assert found.dtype == BF16
        assert_accurate(found, exact.bfloat16(), exact)


@pytest.mark.usefixtures("backend")
def test_weight_gradients_add_up_unrounded():
    """Of micro-batches of two steps, weighed differently, on top of what the buffer holds."""
    x, w, arguments, options = fp8_problem()
    options |= {"fp8": quantize_head(w)}
    grads = [torch.full((32,), 0.25), normal(32).float()]
    start = normal(16, 48, seed=5).float()
    found = start.clone()
    for grad_T in grads:
        loss, dx, dw = run(x, w, arguments, options | {"dw_sum_DV": found}, grad_T)
        expected = run(x, w, arguments, options, grad_T)
        assert dw is None
        assert_same_bits(loss, expected[0])
        assert_same_bits(dx, expected[1])
    parts = [run(x, w, arguments, options, grad_T)[2].double() for grad_T in grads]
    unrounded = 2**-8 * sum(part.abs() for part in parts)
    error = (found.double() - start.double() - sum(parts)).abs()
    assert (error <= 1.01 * unrounded + 1e-6).all()
    assert (found - start != (found - start).bfloat16()).any()


@pytest.mark.usefixtures("backend")
def test_fp8_of_micro_batches_is_that_of_the_whole():
    """Positions don't see each other, nor how the batch was cut or the sum of losses scaled."""
    x, w, (targets, *others), options = fp8_problem()
    prefixes = options.pop("prefix_targets_T")
    options |= {"fp8": quantize_head(w)}

    def part(rows, grad):
        dw_sum = torch.zeros(w.shape)
        more = {"prefix_targets_T": prefixes[rows], "dw_sum_DV": dw_sum}
        grad_T = torch.full((len(x[rows]),), grad)
        loss, dx, _ = run(x[rows], w, (targets[rows], *others), options | more, grad_T)
        return loss, dx, dw_sum.double()

    loss, dx, dw = part(slice(None), 1.0)
    for grad in (1.0, 0.125):
        first, second = part(slice(8), grad), part(slice(8, None), grad)
        assert_same_bits(torch.cat([first[0], second[0]]), loss)
        assert_same_bits(torch.cat([first[1], second[1]]), dx * grad)
        torch.testing.assert_close(first[2] + second[2], dw * grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", ["factor", "each"])
def test_fp8_is_near_the_exact_gradient(grad):
    """Within what e4m3 (2^-4 at most) of two operands and e5m2 (2^-3) of the third can do."""
    x, w, arguments, options = fp8_problem(256, 64, 512)
    grad_T = torch.full((256,), 0.125) if grad == "factor" else normal(256).float()
    options |= {"round_sigmoid": False}
    found = run_fp8(x, w, arguments, options, grad_T)
    exact = run(x.double(), w.double(), arguments, options, grad_T.double())
    limits = (2**-4, 2**-3, 2**-3)
    for mine, ref64, limit in zip(found, exact, limits, strict=True):
        error = (mine.double() - ref64).norm() / ref64.norm()
        assert 1e-4 < error < limit


def test_fp8_of_a_zero_gradient_is_zero():
    _, dx, dw = run_fp8(*fp8_problem(), torch.zeros(32))
    assert (dx == 0).all() and (dw == 0).all()


def test_fp8_copies_are_of_their_own():
    """Quantised once a step: a later change of the weight reaches neither losses nor dX."""
    x, w, arguments, options = fp8_problem()
    expected = run_fp8(x, w, arguments, options)
    head = quantize_head(w)
    found = run(x, torch.zeros_like(w), arguments, options | {"fp8": head})
    for mine, same in zip(found, expected, strict=True):
        assert_same_bits(mine, same)


def test_quantize_head_takes_the_largest_values():
    x, w, arguments, options = fp8_problem()
    head = quantize_head(w, x_amax=7.0, w_amax=0.5, grad_amax=2.0)
    limits = torch.tensor([7.0, 0.5, 2.0]) / 448
    assert_same_bits(torch.stack([head.x_scale, head.w_scale, head.dz_scale]), limits)
    expected = (w.float() / limits[1]).clamp(-448, 448).to(E4M3)
    assert_same_bits(head.w_f8_DV, expected)
    assert (expected.float().abs() == 448).any()
    x64 = fp8_quantize(x, head.x_scale)[0].double() * head.x_scale.double()
    z = x64 @ (expected.double() * limits[1].double())
    loss = run(x, w, arguments, options | {"fp8": head})[0]
    same = softcap_ce(z.bfloat16(), *arguments, **options)
    assert_accurate(loss, same, softcap_ce(z, *arguments, **options))


def test_the_transposed_weight_is_made_once_where_the_copies_have_it(monkeypatch):
    """For the form without logits in memory; a later change of the weight reaches it neither."""
    x, w, arguments, options = fp8_problem()
    options |= dict.fromkeys(ALL, False) | {"form": "fused", "fp8": quantize_head(w)}
    expected = run(x, w, arguments, options)
    assert options["fp8"].w_VD is None
    head = quantize_head(w, form="fused")
    assert_same_bits(head.w_VD, w.mT.contiguous())
    monkeypatch.delattr("speedrun.ops._fused_head_loss.transpose")
    found = run(x, torch.zeros_like(w), arguments, options | {"fp8": head})
    for mine, same in zip(found, expected, strict=True):
        assert_same_bits(mine, same)
    for fp8 in (head, quantize_head(w)):  # and the other form is the same with it and without
        results = run(x, w, arguments, options | {"form": "logits", "fp8": fp8})
        same_form = run_fp8(x, w, arguments, options | {"form": "logits"})
        for mine, same in zip(results, same_form, strict=True):
            assert_same_bits(mine, same)


@pytest.mark.usefixtures("backend")
def test_fp8_without_prefix_targets():
    """The last stage's: a prefix target of weight 0 is the same."""
    x, w, (targets, weights, *softcap), options = fp8_problem()
    arguments = (targets[:, :1].contiguous(), weights[:1], *softcap)
    expected = run_fp8(x, w, arguments, options | {"prefix_weight": 0.0})
    for mine, same in zip(run_fp8(x, w, arguments, ALL), expected, strict=True):
        assert_same_bits(mine, same)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("rows", [0, 1])
def test_few_positions(rows, fp8):
    x, w, (targets, *others), options = fp8_problem()
    prefixes = options["prefix_targets_T"][:rows]
    options |= {"prefix_targets_T": prefixes, "fp8": quantize_head(w) if fp8 else None}
    loss, dx, dw = run(x[:rows], w, (targets[:rows], *others), options)
    assert loss.shape == (rows,) and dx.shape == (rows, 16) and dw.shape == w.shape
    assert loss.isfinite().all() and ((dw != 0).any() == bool(rows))


def compiles_to_the_same(compiler, kind):
    if kind == "fp8":
        x, w, arguments, options = fp8_problem()
    else:
        x, w, arguments, options = problem(dtype=torch.float32)

    def forward(x, w, prefix_weight, fp8):
        more = options | {"prefix_weight": prefix_weight, "fp8": fp8}
        return head_loss(x * 2, w, *arguments, **more)

    def results(function):
        found = []
        for seed in (1, 2):
            tensors = [t.detach().clone().requires_grad_() for t in (x * seed, w)]
            head = quantize_head(w) if kind == "fp8" else None
            loss = function(*tensors, torch.tensor(0.5 / seed), head)
            (loss.sum() / 8).backward()
            found += [loss.detach(), *(t.grad for t in tensors)]
        return found

    expected = results(forward)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = results(torch.compile(forward, fullgraph=True, backend=compiler))
    for mine, same in zip(found, expected, strict=True):
        assert_same_bits(mine, same)


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_compiles_fullgraph_without_recompiling(kind):
    compiles_to_the_same("aot_eager", kind)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_chunks_compile(chunks, compiler):
    compiles_to_the_same(compiler, "chunks")
    assert max(chunks) == ("softcap_ce_grad", 4, 21)


def test_compiled_code_leaves_adding_weight_gradients_to_eager_code():
    x, w, arguments, options = fp8_problem()
    options |= {"fp8": quantize_head(w)}
    sums = torch.zeros(2, *w.shape)
    torch._dynamo.reset()
    functions = (head_loss, torch.compile(head_loss, backend="aot_eager"))
    for dw_sum, function in zip(sums, functions, strict=True):
        leaf = x.clone().requires_grad_()
        function(leaf, w, *arguments, **options, dw_sum_DV=dw_sum).sum().backward()
    assert_same_bits(sums[1], sums[0])
    torch._dynamo.reset()
    whole = torch.compile(head_loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(x, w, *arguments, **options, dw_sum_DV=sums[0])


def test_fp8_compiles_with_inductor():
    """It leaves out roundings to bf16 that it has fused over, unless it is told to keep them."""
    with torch._inductor.config.patch(emulate_precision_casts=True):
        compiles_to_the_same("inductor", "fp8")


@pytest.mark.parametrize("kind", ["plain", "chunks", "fp8"])
def test_two_runs_are_bitwise_equal(kind, monkeypatch):
    x, w, arguments, options = fp8_problem(96, 64, 160)
    if kind == "chunks":
        monkeypatch.setitem(softcap_module.LOGITS_AT_ONCE, "cpu", 160 * 20)
    function = run_fp8 if kind == "fp8" else run
    for first, second in zip(*(function(x, w, arguments, options) for _ in range(2)), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("kind", ["plain", "chunks", "fp8"])
def test_not_contiguous(kind, monkeypatch):
    """W stored the other way round, rows of x out of a wider tensor."""
    x, w, arguments, options = fp8_problem()
    if kind == "chunks":
        monkeypatch.setitem(softcap_module.LOGITS_AT_ONCE, "cpu", 48 * 8)
    wide_x = torch.cat([x, x], dim=1).requires_grad_()
    w_t = w.mT.contiguous().requires_grad_()
    if kind == "fp8":
        options |= {"fp8": quantize_head(w)}
    loss = head_loss(wide_x[:, :16], w_t.mT, *arguments, **options)
    loss.sum().backward()
    expected = run(x, w, arguments, options)
    found = (loss.detach(), wide_x.grad[:, :16], w_t.grad.mT)
    exact = run(x.double(), w.double(), arguments, options | {"fp8": None})
    for mine, same, ref64 in zip(found, expected, exact, strict=True):
        assert_accurate(mine, same, ref64)
    assert (wide_x.grad[:, 16:] == 0).all()


def test_refusals():
    x, w, arguments, _ = fp8_problem()
    head = quantize_head(w)
    with pytest.raises(TypeError, match=r"x_TD and w_DV must be of one type, got torch\.float32"):
        head_loss(x.float(), w, *arguments)
    with pytest.raises(
        TypeError, match=r"of bfloat16 with fp8, got torch\.float32 and torch\.float"
    ):
        head_loss(x.float(), w.float(), *arguments, fp8=head)
    with pytest.raises(TypeError, match=r"head_loss: x_TD has type torch\.int64"):
        head_loss(x.long(), w, *arguments)
    with pytest.raises(
        ValueError, match=r"x_TD \(T, D\) and w_DV \(D, V\), got \(32, 16\) and \(15"
    ):
        head_loss(x, w[1:], *arguments)
    with pytest.raises(ValueError, match=r"head_loss needs x_TD with 2 dimensions, targets_TN"):
        head_loss(x[1:], w, *arguments)
    with pytest.raises(
        ValueError, match=r"fp8 is of a weight \(16, 48\), w_DV has shape \(16, 40\)"
    ):
        head_loss(x, w[:, :40], *arguments, fp8=head)
    with pytest.raises(ValueError, match=r"dw_sum_DV is of the FP8 head: give fp8 too"):
        head_loss(x, w, *arguments, dw_sum_DV=torch.zeros(16, 48))
    with pytest.raises(TypeError, match=r"dw_sum_DV must be float32, got torch\.bfloat16"):
        head_loss(x, w, *arguments, fp8=head, dw_sum_DV=torch.zeros_like(w))
    for wrong in (torch.zeros(48, 16), torch.zeros(48, 16).mT):
        with pytest.raises(ValueError, match=r"dw_sum_DV must be contiguous and \(16, 48\) like"):
            head_loss(x, w, *arguments, fp8=head, dw_sum_DV=wrong)
    with pytest.raises(TypeError, match=r"w_DV must be bfloat16 \(D, V\), got torch\.float32"):
        quantize_head(w.float())
    for wrong in ("x_amax", "w_amax", "grad_amax"):
        with pytest.raises(ValueError, match=rf"quantize_head: {wrong}=0\.0: must be above 0"):
            quantize_head(w, **{wrong: 0.0})
    with pytest.raises(ValueError, match=r"quantize_head: form='fast': must be logits or fused"):
        quantize_head(w, form="fast")
    assert isinstance(head, Fp8Head)
