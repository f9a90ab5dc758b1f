"""Which backend computes `attention`: the trial, with fakes of what may go wrong, and adapters."""

import warnings

import pytest
import torch

from speedrun import ops
from speedrun.ops import _attention_backends as backends
from speedrun.ops import _attention_choice as choice
from speedrun.ops import _dispatch
from speedrun.ops._dispatch import Unavailable
from speedrun.ops.attention import KernelPlan, attention, plan_attention
from speedrun.reference._blocks import BlockMask, block_mask
from speedrun.reference.attention import attention as reference
from train_helpers import normal

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HEAD_DIMS = (64, 64)


def forget():
    for function in (backends.load, choice.passes, choice.first_right):
        function.cache_clear()


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    forget()
    yield
    monkeypatch.undo()
    forget()


def computed(change=lambda q, k, v, batch, scale: (q, k, v, batch, scale), fault=lambda y: y):
    """A backend made of the reference, with `change` of its arguments, `fault` of its output."""

    def function(*arguments):
        q, k, v, batch, scale = change(*arguments)
        mask = block_mask(batch.cu_seqlens, len(q), batch.window, q.dtype)
        return fault(reference(q, k, v, mask, scale))

    return backends._by_autograd(function, backends.Backend._field_defaults["prepare"])


def wrong_gradient():
    right = computed()

    def backward(*arguments):
        dq, dk, dv = right.backward(*arguments)
        return dq, 1.1 * dk, dv

    return right._replace(backward=backward)


def missing():
    raise backends.NotInstalled("no_such_package")


def broken_import():
    raise ImportError("libcudart.so.99: cannot open shared object file")


def failing_launch():
    def fail(*arguments):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    return backends.Backend(fail, fail)


def another_window(q, k, v, batch, scale):
    return q, k, v, batch._replace(window=batch.window - 1), scale


def no_documents(q, k, v, batch, scale):
    return q, k, v, batch._replace(cu_seqlens=batch.cu_seqlens[[0, -1]]), scale


def offer(monkeypatch, **loaders):
    monkeypatch.setattr(choice, "LOADERS", loaders)
    monkeypatch.setattr(backends, "LOADERS", loaders)


@pytest.mark.parametrize("head_dims", [(64, 64), (96, 128), (128, 128)], ids=str)
def test_the_first_that_is_right(monkeypatch, head_dims):
    offer(monkeypatch, first=missing, second=computed, third=computed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is not installed is not worth a word
        assert choice.first_right(CPU, head_dims) == "second"
    assert choice.first_right(CPU, head_dims, frozenset(["second"])) == "third"


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (broken_import, r"ImportError: libcudart\.so\.99: cannot open shared object file$"),
        (failing_launch, r"RuntimeError: CUDA error: no kernel image is available$"),
        (lambda: computed(another_window), "AssertionError: out errs by"),
        (lambda: computed(no_documents), "AssertionError: out errs by"),
        (lambda: computed(fault=lambda y: y.nan_to_num() * torch.nan), "AssertionError: out errs"),
        (lambda: computed(fault=lambda y: y.float()), "AssertionError: out: "),
        (wrong_gradient, "AssertionError: dk errs by"),
    ],
    ids=["import", "launch", "window", "documents", "nan", "type", "gradient"],
)
def test_what_fails_is_passed_over_with_one_line(monkeypatch, loader, reason):
    offer(monkeypatch, bad=loader, good=computed)
    with pytest.warns(UserWarning, match=rf"bad is passed over on cpu, .*{reason}") as caught:
        assert choice.first_right(CPU, HEAD_DIMS) == "good"
        assert choice.first_right(CPU, HEAD_DIMS) == "good"
    assert len(caught) == 1  # and once


def test_nothing_right_leaves_the_reference(monkeypatch):
    offer(monkeypatch, bad=failing_launch)
    with pytest.warns(UserWarning):
        assert choice.first_right(CPU, HEAD_DIMS) == "torch"


def test_a_trial_leaves_the_random_state_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    choice.trial(computed(), CPU, HEAD_DIMS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, on which nothing is tried: the candidates that would be are noted."""
    tried = []
    monkeypatch.setattr(choice, "passes", lambda name, *rest: tried.append(name))
    verdict = {"backend": "torch"}
    monkeypatch.setattr(_dispatch, "_decide", lambda *call: verdict["backend"])
    return tried, verdict


def test_candidates_on_a_gpu(gpu):
    tried, verdict = gpu
    assert choice.choose(GPU, torch.bfloat16, 4096, HEAD_DIMS) == "torch"
    assert tried == ["fa3", "fa4", "fa2", "flex"]  # triton has no verdict, sdpa would be large
    tried.clear()
    verdict["backend"] = "triton"
    choice.choose(GPU, torch.bfloat16, 2048, HEAD_DIMS)
    assert tried == ["fa3", "fa4", "triton", "fa2", "flex", "sdpa"]
    tried.clear()
    assert choice.choose(GPU, torch.float32, 2048, HEAD_DIMS) == verdict["backend"]
    assert not tried  # of another type


def test_a_cpu_has_the_reference_and_says_so(monkeypatch):
    monkeypatch.setattr(_dispatch, "_used", {})
    starts = torch.tensor([0, 20], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        plan = plan_attention(starts, 20, 3, dtype, HEAD_DIMS)
        assert isinstance(plan, BlockMask)
    assert ops.backends_used() == {"attention": ("torch",)}
    with ops.use_backend("sdpa", "attention"):
        plan = plan_attention(starts, 20, 3, torch.bfloat16, HEAD_DIMS)
    assert isinstance(plan, KernelPlan) and plan.backend == "sdpa"
    assert ops.backends_used() == {"attention": ("sdpa", "torch")}


def test_overrides_that_cannot_serve(monkeypatch):
    def plan(dtype=torch.bfloat16):
        return plan_attention(torch.tensor([0, 9], dtype=torch.int32), 9, 3, dtype, (8, 8))

    offer(monkeypatch, fa3=missing, fa4=broken_import, flex=computed, sdpa=computed)
    monkeypatch.setattr(choice, "ON_CPUS", ("fa3", "fa4", "sdpa"))
    for name, dtype, reason in (
        ("fa3", torch.bfloat16, "no_such_package is not installed"),
        ("fa4", torch.bfloat16, "it can't be loaded: libcudart"),
        ("sdpa", torch.float32, r"the tensors are torch\.float32; it takes torch\.bfloat16"),
        ("flex", torch.bfloat16, "its tensors are on cpu"),
        ("cuda", torch.bfloat16, "this call has no CUDA kernel"),
    ):
        with ops.use_backend(name, "attention"), pytest.raises(Unavailable, match=reason):
            plan(dtype)
    with pytest.raises(ValueError, match=r"'fa3': allowed are cuda, triton, torch$"):
        with ops.use_backend("fa3", "transpose"):
            pass
    with pytest.raises(ValueError, match="'fa5': allowed are cuda, triton, torch, fa3, fa4, fa2"):
        with ops.use_backend("fa5", "attention"):
            pass


# ---- Adapters, as far as a CPU can run them ---------------------------------------------------


@pytest.mark.parametrize("head_dims", [(32, 32), (24, 32), (32, 24)], ids=str)
def test_sdpa(head_dims):
    choice.trial(backends.load("sdpa"), CPU, head_dims)


@pytest.mark.parametrize("window", [0, 5, 128, 129, 200, 900])
@pytest.mark.parametrize("starts", [[0, 0, 300, 300, 450, 451, 900], [0, 128, 256, 384, 513]])
def test_flex_blocks_against_the_dense_mask(starts, window):
    num_tokens, side = starts[-1], backends.FLEX_BLOCK
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    dense = backends.load("sdpa").prepare(cu_seqlens, num_tokens, window)
    blocks = backends.flex_blocks(cu_seqlens, num_tokens, window)
    num_blocks = -(-num_tokens // side)
    for row in range(num_blocks):
        part, full = ({*line[1 : 1 + line[0]]} for line in blocks[:, row].tolist())
        for column in range(num_blocks):
            tile = dense[row * side : (row + 1) * side, column * side : (column + 1) * side]
            whole = bool(tile.all()) and tile.shape == (side, side)
            assert (column in full) == whole
            assert (column in part) == (bool(tile.any()) and not whole)


def test_flex_output():
    """Uncompiled, forward only: torch has no gradient of it on CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        flex = backends._flex()
    starts = torch.tensor([0, 0, 30, 150, 300, 300], dtype=torch.int32)
    q, k, v = (normal(300, 2, 16, seed=i, dtype=torch.float32) for i in range(3))
    for window in (7, 150):
        batch = backends.Batch(starts, window, 300, flex.prepare(starts, 300, window))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it isn't compiled
            out, _ = flex.forward(q, k, v, batch, 0.25)
        expected = reference(q, k, v, block_mask(starts, 300, window, torch.float32), 0.25)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


class FlashAttention:
    """Functions with the names and arguments of one version, computed by the reference."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size_left):
        assert causal and q.shape[-1] == v.shape[-1]
        self.calls.append((max_seqlen_q, window_size_left))
        mask = block_mask(cu_seqlens_q, len(q), window_size_left, q.dtype)
        lse = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
        return reference(q, k, v, mask, softmax_scale), lse, None, None

    def gradients(self, dout, q, k, v, cu_seqlens_q, window, softmax_scale):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            mask = block_mask(cu_seqlens_q, len(q), window, q.dtype)
            return torch.autograd.grad(reference(*leaves, mask, softmax_scale), leaves, dout)

    def backward_in_place(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_k, softmax_scale, is_causal,
        window_size,
    ):  # fmt: skip
        assert is_causal and window_size[1] == 0 and softmax_lse.dtype == torch.float32
        found = self.gradients(dout, q, k, v, cu_seqlens_k, window_size[0], softmax_scale)
        for grad, value in zip((dq, dk, dv), found, strict=True):
            grad.copy_(value)
        return softmax_lse

    def backward_returned(
        self, q, k, v, out, dout, lse, softmax_scale, causal, window_size_left, window_size_right,
        cu_seqlens_q,
    ):  # fmt: skip
        assert causal and window_size_right == 0
        return self.gradients(dout, q, k, v, cu_seqlens_q, window_size_left, softmax_scale)


@pytest.mark.parametrize("head_dims", [(32, 32), (24, 32), (32, 24)], ids=str)
@pytest.mark.parametrize("backward", ["backward_in_place", "backward_returned"])
def test_flash_attention_in_its_versions(backward, head_dims):
    fake = FlashAttention()
    choice.trial(backends._flash(fake.forward, getattr(fake, backward)), CPU, head_dims)
    assert fake.calls == [(333, 40), (333, 128), (333, 333)]


def test_a_version_that_takes_no_window_is_found_wrong():
    def forward(q, k, v, cu_seqlens_q, softmax_scale):
        mask = block_mask(cu_seqlens_q, len(q), len(q), q.dtype)
        return reference(q, k, v, mask, softmax_scale), q.new_zeros(2, len(q)).float()

    with pytest.raises(AssertionError, match="out errs by"):
        choice.trial(backends._flash(forward, FlashAttention().backward_returned), CPU, HEAD_DIMS)


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.part", "torch.no_such_part"])
def test_what_is_not_installed(name):
    with pytest.raises(backends.NotInstalled, match=name):
        backends._module(name)


def test_max_seqlen_reaches_the_kernel(monkeypatch):
    fake = FlashAttention()
    loader = {"sdpa": lambda: backends._flash(fake.forward, fake.backward_returned)}
    offer(monkeypatch, **loader)
    starts = torch.tensor([0, 5, 9], dtype=torch.int32)
    q, k, v = (normal(9, 1, 8, seed=i, dtype=torch.bfloat16) for i in range(3))
    with ops.use_backend("sdpa", "attention"):
        attention(q, k, v, plan_attention(starts, 9, 3, q.dtype, (8, 8), max_seqlen=5), 1.0)
        attention(q, k, v, plan_attention(starts, 9, 99, q.dtype, (8, 8)), 1.0)
    assert fake.calls == [(5, 3), (9, 9)]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (96, 128)], ids=str)
@pytest.mark.parametrize("name", list(backends.LOADERS))
def test_backends_on_this_gpu(name, head_dims):
    """Ours must be right; what else is installed may be passed over, and pytest -rs says why."""
    device = torch.device("cuda", torch.cuda.current_device())
    if name == "triton":
        choice.trial(backends.load(name), device, head_dims)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        passed = choice.passes(name, device, head_dims)
    if not passed:
        pytest.skip(str(caught[-1].message) if caught else f"{name} is not installed")
