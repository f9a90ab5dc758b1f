"""`adam_step` against RECIPE section 4 in float64, IEEE arithmetic in every bit, the public run.

R rows, C columns.
"""

import math

import numpy as np
import pytest
import torch

from cases import ADAM_STEP_SMALL
from numerics import assert_accurate, assert_same_bits
from speedrun import ops
from speedrun.ops._dispatch import Unavailable
from speedrun.ops.adam_step import KERNEL_DTYPES, AdamTensor, adam_step
from speedrun.reference import adam_step as reference
from train_helpers import FLOAT64_NOISE, from_golden, golden, normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU: conftest.py
BF16, FP32 = KERNEL_DTYPES
HYPER = dict(lr=0.01, decay=0.003, beta1=0.9, beta2=0.99)
EPS = 1e-10
# Interpreted kernels compute what is masked, too: 0/0 and more.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
kernel_types = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
moment_types = pytest.mark.parametrize("moments", KERNEL_DTYPES, ids=["m_bf16", "m_fp32"])


def scalars(step=1, *, lr, decay, beta1, beta2):
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return torch.tensor([step_size, decay], dtype=torch.float64, device=DEVICE)


def definition(w, grads, lr, decay, beta1, beta2, eps=EPS):
    """One number through updates with `grads` in turn."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        update = m / (math.sqrt(v) + eps) * lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        w = w - update - (decay * w if update * w > 0 else 0.0)
    return w, m, v


def run(param, grads, cautious=True, **changes):
    """(param, exp_avg, exp_avg_sq) after updates with `grads` in turn, moments in fp32 or wider."""
    hyper = HYPER | changes
    moments = [torch.zeros_like(param, dtype=torch.promote_types(param.dtype, FP32))]
    moments.append(moments[0].clone())
    for step, grad in enumerate(grads, start=1):
        numbers, betas = scalars(step, **hyper), (hyper["beta1"], hyper["beta2"])
        adam_step([AdamTensor(param, grad, *moments, numbers, *betas)], eps=EPS, cautious=cautious)
    return param, *moments


def random_tensor(shape, dtype=FP32, moments=FP32, seed=0, beta1=0.9, beta2=0.99, **changes):
    """In the midst of training: moments of gradients like the one that comes."""
    param, grad, exp_avg, exp_avg_sq = (
        normal(*shape, seed=4 * seed + i, dtype=FP32) for i in range(4)
    )
    numbers = scalars(3, **(HYPER | {"beta1": beta1, "beta2": beta2} | changes))
    tensors = (param.to(dtype), grad.to(dtype), exp_avg.to(moments), (exp_avg_sq**2).to(moments))
    return AdamTensor(*(x.to(DEVICE) for x in tensors), numbers, beta1, beta2)


def clone(tensor):
    return tensor._replace(
        **{
            name: getattr(tensor, name).clone()
            for name in ("param", "grad", "exp_avg", "exp_avg_sq", "seen")
            if getattr(tensor, name) is not None
        }
    )


def results(tensor):
    return tensor.param, tensor.exp_avg, tensor.exp_avg_sq


def ieee_results(tensor, cautious=True):
    """The formula's operations in NumPy's float32, each rounded once."""
    step_size, decay = tensor.scalars.float().cpu().numpy()
    eps, weight1, beta2, weight2 = (
        np.float32(x) for x in (EPS, 1 - tensor.beta1, tensor.beta2, 1 - tensor.beta2)
    )
    w, g, m, v = (x.float().cpu().numpy() for x in tensor[:4])
    m = (g - m) * weight1 + m
    v = g * weight2 * g + v * beta2
    update = m / (np.sqrt(v) + eps) * step_size
    decayed = w * decay + update
    w = w - (np.where(update * w > 0, decayed, update) if cautious else decayed)
    exact = (torch.as_tensor(np.asarray(x, dtype=np.float32)).to(DEVICE) for x in (w, m, v))
    return [x.to(like.dtype) for x, like in zip(exact, results(tensor), strict=True)]


def assert_ieee(tensor, before, backend, cautious=True):
    """Every bit; but of weights on torch on a CPU, whose square root isn't IEEE's, an ulp.

    It errs by an ulp, hence updates by less than 8 roundings.
    """
    expected = ieee_results(before, cautious)
    for found, right in zip(results(tensor)[1:], expected[1:], strict=True):
        assert_same_bits(found, right)
    if backend == "torch" and DEVICE == "cpu":
        moved = (tensor.param.float() - before.param.float()).abs()
        slack = torch.finfo(FP32).eps * 8 * moved
        slack += torch.finfo(tensor.param.dtype).eps * expected[0].float().abs()
        assert ((tensor.param.float() - expected[0].float()).abs() <= slack).all()
    else:
        assert_same_bits(tensor.param, expected[0])


# ---- The formula -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.003])
def test_definition(decay):
    """In float64, which only the reference computes."""
    param, grads = normal(20), [normal(20, seed=s) for s in (1, 2, 3)]
    grads[2][:5] = 0
    hyper = HYPER | {"decay": decay}
    columns = [
        definition(w, [g[i].item() for g in grads], **hyper) for i, w in enumerate(param.tolist())
    ]
    with ops.use_backend("torch"):
        found = run(param.to(DEVICE), [g.to(DEVICE) for g in grads], decay=decay)
    for tensor, expected in zip(found, zip(*columns, strict=True), strict=True):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(tensor.cpu(), expected, **FLOAT64_NOISE)


@pytest.mark.parametrize("cautious", [True, False])
def test_decays_only_where_the_update_shrinks_the_weight(backend, cautious):
    param = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], device=DEVICE)
    grad = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], device=DEVICE)
    param, *_ = run(param, [grad], cautious, lr=1e-3, decay=0.1)
    expected = [1 - 1e-3 - 0.1, -1 - 1e-3, 1 + 1e-3, -1 + 1e-3 + 0.1, -1e-3]
    if not cautious:
        expected[1:3] = [-1 - 1e-3 + 0.1, 1 + 1e-3 - 0.1]
    torch.testing.assert_close(param.cpu(), torch.tensor(expected), rtol=1e-6, atol=0)


def test_no_gradient_no_move(backend):
    """Neither update nor decay, and no division of 0 by 0."""
    param = torch.ones(4, device=DEVICE)
    param, *moments = run(param, [torch.zeros_like(param)] * 2)
    assert (param == 1).all() and all((m == 0).all() for m in moments)


@pytest.mark.parametrize("shape", [shape for shape, _ in ADAM_STEP_SMALL], ids=str)
@kernel_types
@moment_types
@pytest.mark.parametrize("cautious", [True, False])
def test_every_operation_is_ieee(backend, shape, dtype, moments, cautious):
    tensor = random_tensor(shape, dtype, moments)
    before = clone(tensor)
    adam_step([tensor], eps=EPS, cautious=cautious)
    assert_ieee(tensor, before, backend, cautious)


@kernel_types
def test_many_tensors_in_one_call(backend, dtype):
    """More than a table of kernel parameters holds: sizes, types, rates and starts of any kind."""
    tensors = []
    for i in range(90):
        shape = (1 + i * i % 700,)
        betas = {"beta1": i % 4 / 4, "beta2": 1 - 1 / (2 + i)}
        tensor = random_tensor(shape, dtype, KERNEL_DTYPES[i % 2], seed=i, **betas, lr=0.01 * i)
        if i % 3 == 0:  # starts that are no multiple of 16 bytes
            tensor = tensor._replace(**{n: shifted(getattr(tensor, n)) for n in tensor._fields[:4]})
        if i % 5 == 0:
            tensor = tensor._replace(seen=torch.ones(1, dtype=torch.bool, device=DEVICE))
        tensors.append(tensor)
    olds = [clone(tensor) for tensor in tensors]
    adam_step(tensors, eps=EPS)
    for tensor, before in zip(tensors, olds, strict=True):
        assert_ieee(tensor, before, backend)


def shifted(x):
    """The same numbers one element behind an aligned address."""
    room = x.new_empty(x.numel() + 1)
    room[1:] = x.flatten()
    return room[1:].view_as(x)


def test_tensors_of_several_types_in_one_call(backend):
    kinds = [(BF16, FP32), (FP32, FP32), (BF16, BF16), (FP32, BF16)]
    tensors = [random_tensor((300,), *kind, seed=i) for i, kind in enumerate(kinds)]
    olds = [clone(tensor) for tensor in tensors]
    adam_step(tensors, eps=EPS)
    for tensor, before in zip(tensors, olds, strict=True):
        assert_ieee(tensor, before, backend)


@moment_types
def test_accuracy_against_float64(backend, moments):
    """Twenty steps: bf16 moments are rounded once a step, and updates use them unrounded."""
    tensor = random_tensor((40, 64), FP32, moments)
    same, exact = clone(tensor), AdamTensor(*(x.double() for x in tensor[:5]), *tensor[5:7])
    for seed in range(20):
        grad = normal(40, 64, seed=100 + seed, dtype=FP32).to(DEVICE)
        adam_step([tensor._replace(grad=grad)], eps=EPS)
        reference.adam_step([same._replace(grad=grad)], eps=EPS)
        reference.adam_step([exact._replace(grad=grad.double())], eps=EPS)
    for found, expected, right in zip(*map(results, (tensor, same, exact)), strict=True):
        assert_accurate(found, expected, right)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38, 1e-30, 1e-44, -0.0])
def test_extreme_gradients(backend, value):
    tensor = random_tensor((4, 40))
    tensor.grad[1, ::3] = value
    tensor.exp_avg[2], tensor.exp_avg_sq[2] = 0, 0
    tensor.grad[2] = value
    expected = ieee_results(tensor)
    adam_step([tensor], eps=EPS)
    for found, right in zip(results(tensor), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=0, equal_nan=True)


# ---- Rows that have never had a gradient -----------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 65), (2, 9, 16), (3, 700), (1, 1)], ids=str)
@kernel_types
@pytest.mark.parametrize("cautious", [True, False])
def test_seen_changes_nothing(backend, shape, dtype, cautious):
    """Rows touched at random, over many steps: the same bits as without, and the right flags."""
    num_rows = math.prod(shape[:-1])
    seen = torch.zeros(num_rows, dtype=torch.bool, device=DEVICE)
    fresh = random_tensor(shape, dtype)
    moments = {n: torch.zeros_like(getattr(fresh, n)) for n in ("exp_avg", "exp_avg_sq")}
    sparse = clone(fresh._replace(**moments, seen=seen))
    dense = clone(sparse)._replace(seen=None)
    generator, ever = torch.Generator().manual_seed(0), torch.zeros(num_rows, dtype=torch.bool)
    for step in range(8):
        touched = torch.rand(num_rows, generator=generator) < 0.15
        grad = normal(*shape, seed=step, dtype=FP32).to(dtype).view(num_rows, -1)
        grad[~touched] = 0
        grad[touched, : shape[-1] // 2] = 0  # a row may begin with zeros
        grad, ever = grad.view(shape).to(DEVICE), ever | touched
        numbers = scalars(step + 1, **HYPER)
        for tensor in (sparse, dense):
            adam_step([tensor._replace(grad=grad, scalars=numbers)], eps=EPS, cautious=cautious)
        for found, expected in zip(results(sparse), results(dense), strict=True):
            assert_same_bits(found, expected)
        assert torch.equal(sparse.seen.cpu(), ever if cautious else torch.ones_like(ever))


def test_rows_never_seen_are_left_alone(backend):
    """What stands in such a row is not even read; a gradient of NaN is one, of -0 is none."""
    if backend == "torch":
        pytest.skip("the reference computes these rows too: it must not wait for the device")
    tensor = random_tensor((6, 24))
    tensor.exp_avg.fill_(math.nan)
    tensor.grad[:] = -0.0
    tensor.grad[4, 23], tensor.grad[5, 0] = math.nan, 1e-45
    seen = torch.tensor([False, False, False, True, False, False], device=DEVICE)
    before = tensor.param.clone()
    adam_step([tensor._replace(seen=seen)], eps=EPS)
    assert seen.tolist() == [False, False, False, True, True, True]
    assert_same_bits(tensor.param[:3], before[:3])
    assert tensor.param[3:].isnan().all()


# ---- The public program ----------------------------------------------------------------------

# Its label -> learning rate and decay relative to the base, β1, β2 (RECIPE section 4).
PUBLIC_ROWS = {
    "lm_head": (1, 150, 0.5, 0.95),
    "value_embeds": (75, 5, 0.75, 0.95),
    "bigram_embed": (75, 5, 0.75, 0.95),
    "scalars": (5, 0, 0.9, 0.99),
    "smear_gate": (0.01, 0, 0.9, 0.99),
    "ve_gate_bank": (1, 1, 0.9, 0.99),
    "post_lambdas": (1, 0, 0.9, 0.95),
    "resid_lambdas": (5, 0, 0.9, 0.95),
    "mudd_w1": (0.25, 1, 0.9, 0.99),
    "mudd_b2": (0.25, 0, 0.9, 0.99),
    "_mudd_gate_scale": (0.1, 0, 0.9, 0.99),
}


def summed_gradient(arrays, step, label):
    """Of the step before and of this one."""
    before, now = (from_golden(arrays[f"grad/{s}/{label}"]) for s in (step - 1, step))
    return before + now


def public_tensor(arrays, step, label):
    """What Adam has at an odd step, with the stored state of the odd step before it."""
    lr_mul, wd_mul, beta1, beta2 = PUBLIC_ROWS[label]
    before = f"after/{step - 2}/{label}" if step > 1 else f"init/{label}"
    param = from_golden(arrays[before])
    moments = [torch.zeros_like(param, dtype=FP32) for _ in range(2)]
    if step > 1:
        moments = [from_golden(arrays[f"{before}/{kind}"]) for kind in ("exp_avg", "exp_avg_sq")]
    grad = summed_gradient(arrays, step, label)
    if label == "lm_head" and arrays["schedule"][step][4]:  # tied
        grad = summed_gradient(arrays, step, "embed").mT + grad
    lr = 0.008 * arrays["schedule"][step][1] * lr_mul
    numbers = scalars(
        (step + 1) // 2, lr=lr, decay=lr * lr * 0.005 * wd_mul, beta1=beta1, beta2=beta2
    )
    tensors = (x.contiguous().view(param.shape).to(DEVICE) for x in (param, grad, *moments))
    return AdamTensor(*tensors, numbers, beta1, beta2)


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_golden(backend, shared_data, step):
    """bf16 in every bit; fp32 weights to 2e-8, moments to 1e-7 of the largest, as README says."""
    arrays = golden(shared_data, "optimizer_a.npz")
    tensors = {label: public_tensor(arrays, step, label) for label in PUBLIC_ROWS}
    adam_step(list(tensors.values()), eps=EPS)
    for label, tensor in tensors.items():
        kinds = ("", "/exp_avg", "/exp_avg_sq")
        for kind, found in zip(kinds, results(tensor), strict=True):
            expected = from_golden(arrays[f"after/{step}/{label}{kind}"]).view(found.shape)
            if found.dtype == BF16:
                assert_same_bits(found.cpu(), expected)
            else:
                limit = (1e-7 if kind else 2e-8) + 2 * torch.finfo(FP32).eps
                error = (found.cpu() - expected).abs().max()
                assert error <= limit * expected.abs().max(), (label, kind)


# ---- As an operator --------------------------------------------------------------------------


def columns_of(tensors):
    """Arguments of the operators; every tensor has `seen`."""
    *columns, beta1s, beta2s, seen = (list(column) for column in zip(*tensors, strict=True))
    return (*columns, seen, beta1s, beta2s, EPS, True)


def test_opcheck(backend):
    seen = torch.tensor([True, False, False], device=DEVICE)
    nothing = torch.zeros(0, dtype=torch.bool, device=DEVICE)
    tensors = [
        random_tensor((3, 40), BF16)._replace(seen=seen),
        random_tensor((7,))._replace(seen=nothing),
    ]
    arguments = columns_of(tensors)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    for op, more in (("adam_step_out", ()), ("adam_step", (backend,))):
        op = getattr(torch.ops.speedrun, op).default
        torch.library.opcheck(op, (*arguments, *more), test_utils=tests)


def test_compiles_fullgraph_without_recompiling(backend):
    compiler = "aot_eager" if backend == "torch" else "inductor"  # which rounds the formula its way
    compiled = torch.compile(adam_step, fullgraph=True, backend=compiler)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            seen = torch.zeros(9, dtype=torch.bool, device=DEVICE)
            tensors = [random_tensor((9, 40), BF16, seed=seed)._replace(seen=seen)]
            tensors.append(random_tensor((30,), seed=seed, lr=0.1 * seed))
            others = [clone(tensor) for tensor in tensors]
            compiled(tensors, eps=EPS)
            adam_step(others, eps=EPS)
            for found, expected in zip(tensors, others, strict=True):
                for mine, eager in zip(results(found), results(expected), strict=True):
                    assert_same_bits(mine, eager)
            assert torch.equal(tensors[0].seen, others[0].seen) and seen.all()


def test_two_runs_are_bitwise_equal(backend):
    tensors = [random_tensor((200, 130), BF16), random_tensor((5000,))]
    others = [clone(tensor) for tensor in tensors]
    adam_step(tensors, eps=EPS)
    adam_step(others, eps=EPS)
    for found, expected in zip(tensors, others, strict=True):
        for first, second in zip(results(found), results(expected), strict=True):
            assert_same_bits(first, second)


def test_gradients_of_any_layout(backend):
    tensor = random_tensor((24, 40), BF16)
    other = clone(tensor)
    adam_step([tensor._replace(grad=tensor.grad.mT.contiguous().mT)], eps=EPS)
    adam_step([other], eps=EPS)
    assert_same_bits(tensor.param, other.param)


def test_nothing_to_do(backend):
    adam_step([], eps=EPS)


def test_refuses_readably():
    tensor = random_tensor((4, 6))

    def refuse(error, pattern, eps=EPS, **changes):
        with pytest.raises(error, match=pattern):
            adam_step([random_tensor((3,)), tensor._replace(**changes)], eps=eps)

    double, half, bf16 = (tensor.grad.to(t) for t in (torch.float64, torch.float16, BF16))
    refuse(TypeError, r"tensor 1: param has type torch\.float16; allowed are bfloat16", param=half)
    refuse(TypeError, r"exp_avg has type torch\.float16; allowed", exp_avg=half)
    refuse(TypeError, r"tensor 1: grad must be torch\.float32, got torch\.bfloat16", grad=bf16)
    refuse(TypeError, r"exp_avg_sq must be torch\.float32, got torch\.float64", exp_avg_sq=double)
    refuse(TypeError, r"scalars must be torch\.float64, got", scalars=tensor.scalars.float())
    refuse(ValueError, r"grad must be \(4, 6\) on .*, got \(6, 4\)", grad=tensor.grad.mT)
    refuse(ValueError, r"scalars must be \(2,\) on", scalars=tensor.scalars[:1])
    refuse(ValueError, r"seen must be \(4,\) on", seen=torch.ones(6, dtype=torch.bool))
    refuse(TypeError, r"seen must be torch\.bool, got torch\.float32", seen=torch.ones(4))
    strided = torch.zeros(6, 4, device=DEVICE).mT
    refuse(ValueError, r"param must be contiguous, got strides \(1, 4\)", param=strided)
    refuse(ValueError, r"exp_avg must be contiguous", exp_avg=strided)
    refuse(ValueError, r"beta1 must be in \[0, 1\), got 1\.5", beta1=1.5)
    refuse(ValueError, r"beta2 must be in \[0, 1\), got 1\.0", beta2=1.0)
    refuse(ValueError, r"eps must be above 0, got 0\.0", eps=0.0)
    refuse(RuntimeError, r"call it under torch\.no_grad", param=tensor.param.requires_grad_())


def test_only_the_reference_computes_in_float64():
    tensor = random_tensor((4, 6))
    wide = AdamTensor(*(x.double() for x in tensor[:4]), *tensor[4:])
    with ops.use_backend("triton"), pytest.raises(Unavailable, match=r"has no Triton version"):
        adam_step([wide], eps=EPS)
