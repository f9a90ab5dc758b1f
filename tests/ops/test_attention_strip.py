"""The strip form of `attention`'s backward pass: by the law and cases of the plain form's test."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    DEVICE,
    STARTS,
    check_accuracy,
    kernel_inputs,
    starts_tensor,
    with_gradients,
)

from cases import document_starts
from numerics import assert_same_bits
from speedrun import ops
from speedrun._data_types import cu_seqlens_entries
from speedrun.ops import _attention_backends as backends
from speedrun.ops import _dispatch
from speedrun.ops.attention import attention, plan_attention

triton = pytest.importorskip("triton")

from speedrun.triton_kernels import attention as plain  # noqa: E402
from speedrun.triton_kernels import attention_strip as strip  # noqa: E402


@pytest.fixture(params=["triton"])
def kernel(request, monkeypatch):
    """The strip form; the plain one fails the test, so that it can't pass in its place."""

    def refuse(*arguments):
        raise AssertionError("the plain form was called")

    with ops.use_backend("triton", "attention"), ops.use_backend("triton", "attention_strip"):
        monkeypatch.setattr(plain, "attention_backward", refuse)
        yield request.param


LONG = [0, 700, 700, 1000, 1003, 1300]  # more than two strips, and tiles cut at odd places
SHORT = [0, 150, 150, 300, 303, 400]  # the same for strips of two tiles


@pytest.mark.parametrize(
    ("starts", "window"),
    [
        pytest.param(STARTS, 0, id="itself only", marks=pytest.mark.slow),
        pytest.param(STARTS, 5, id="shorter than a tile"),
        pytest.param([0, 250], 129, id="one key into another tile", marks=pytest.mark.slow),
        pytest.param([0, 192, 256], 64, id="whole tiles", marks=pytest.mark.slow),
        pytest.param([0, 1], 3, id="one token"),
        pytest.param(list(range(12)), 7, id="one token each, more documents than a strip"),
        pytest.param(LONG, 128, id="strips within documents", marks=pytest.mark.slow),
        pytest.param(LONG, 384, id="the longest window", marks=pytest.mark.slow),
    ],
)
def test_accuracy(kernel, starts, window):
    check_accuracy(kernel_inputs(starts[-1], (16, 32), num_heads=2), starts, window)


@pytest.mark.parametrize("window", [64, 130], ids="window {}".format)
def test_accuracy_where_strips_are_cut(kernel, monkeypatch, window):
    monkeypatch.setattr(strip, "STRIP", 2)
    check_accuracy(kernel_inputs(400, (16, 16)), SHORT, window)


@pytest.mark.parametrize(
    "head_dims",
    [(64, 64), (128, 128), (96, 128), pytest.param((48, 16), marks=pytest.mark.slow)],
    ids=str,
)
def test_head_dims(kernel, head_dims):
    check_accuracy(kernel_inputs(90, head_dims), [0, 0, 1, 70, 90, 90], 70)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "max_seqlen", "window"),
    [(16384, 896, 128), (16384, 896, 384), (32768, 2048, 384), (49152, 2048, 320)],
)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (96, 128)], ids=str)
def test_accuracy_at_real_sizes(kernel, num_tokens, max_seqlen, window, head_dims):
    starts = document_starts(num_tokens, max_seqlen, cu_seqlens_entries(num_tokens))
    check_accuracy(kernel_inputs(num_tokens, head_dims, num_heads=2), starts, window)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 400), min_size=1, max_size=5))
    starts = [0, *itertools.accumulate(lengths)]
    return starts if starts[-1] else [0, 1], draw(st.integers(0, backends.STRIP_WINDOW))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_triton_accuracy_anywhere(batch):
    starts, window = batch
    with ops.use_backend("triton", "attention"), ops.use_backend("triton", "attention_strip"):
        check_accuracy(kernel_inputs(starts[-1], (16, 16)), starts, window)


def test_any_strip_gives_the_same_bits(kernel, monkeypatch):
    """Gradients don't depend on where strips are cut: what is computed again is equal, and nothing
    is read of the ring that its own program has not written, since it is full of NaN before."""
    tensors = kernel_inputs(400, (16, 16))
    expected = with_gradients(*tensors, SHORT, 130)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for strip_tiles in (1, 2):
            monkeypatch.setattr(strip, "STRIP", strip_tiles)
            for mine, other in zip(with_gradients(*tensors, SHORT, 130), expected, strict=True):
                assert_same_bits(mine, other)
    finally:
        torch.use_deterministic_algorithms(False)


def test_documents_are_apart(kernel, monkeypatch):
    """Another document may be NaN: not a bit of a gradient changes."""
    monkeypatch.setattr(strip, "STRIP", 2)
    tensors = kernel_inputs(400, (16, 16))
    clean = with_gradients(*tensors, SHORT, 80)
    inside = torch.zeros(400, dtype=torch.bool, device=DEVICE)
    inside[150:300] = True
    spoilt = [t.masked_fill(~inside[:, None, None], torch.nan) for t in tensors]
    for mine, expected in zip(with_gradients(*spoilt, SHORT, 80), clean, strict=True):
        assert_same_bits(mine[inside], expected[inside])


def test_gradients_reach_the_window_and_no_more(kernel, monkeypatch):
    """A gradient of token 280's output reaches keys 150 … 280, and no query but its own."""
    monkeypatch.setattr(strip, "STRIP", 2)
    q, k, v, dout = kernel_inputs(300, (16, 16))
    dout[torch.arange(300, device=DEVICE) != 280] = 0
    _, dq, dk, dv = with_gradients(q, k, v, dout, [0, 300], 130)
    for grad, reached in ((dq, [280]), (dk, range(150, 281)), (dv, range(150, 281))):
        assert grad.flatten(1).any(1).nonzero().flatten().tolist() == list(reached)


def test_padding_and_a_second_run_change_nothing(kernel):
    tensors = kernel_inputs(150, (16, 16))
    expected = with_gradients(*tensors, STARTS, 33)
    for starts in (STARTS, [*STARTS, *[150] * 40]):
        for mine, other in zip(with_gradients(*tensors, starts, 33), expected, strict=True):
            assert_same_bits(mine, other)


def test_views_are_read(kernel):
    """Queries, keys and values may be slices of one product."""
    *tensors, dout = kernel_inputs(150, (16, 16), num_heads=2)
    views = torch.cat(tensors, dim=-1).split(16, dim=-1)
    plan = plan_attention(starts_tensor(STARTS), 150, 33, dout.dtype, (16, 16))
    results = []
    for inputs in (tensors, views):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = attention(*leaves, plan, 0.25)
        results.append(torch.autograd.grad(out, leaves, dout))
    for mine, other in zip(*results, strict=True):
        assert_same_bits(mine, other)


# ---- When it serves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "window", "expected"),
    [
        ([("triton", "attention")], 128, False),
        ([("triton",)], 128, False),
        ([("triton", "attention"), ("torch", "attention_strip")], 128, False),
        ([("triton", "attention"), ("triton", "attention_strip")], 128, True),
        ([("triton",), ("triton", "attention_strip")], 384, True),
        ([("triton",), ("triton", "attention_strip")], 385, False),
    ],
)
def test_which_form_serves(monkeypatch, overrides, window, expected):
    """The strip form only for who names it, and for short windows; what served is noted."""
    forms = []
    monkeypatch.setattr(_dispatch, "_used", {})
    for module in (plain, strip):
        monkeypatch.setattr(module, "attention_backward", lambda *a, m=module: forms.append(m))
    batch = backends.Batch(starts_tensor([0, 8]), window, 8, starts_tensor([0]))
    with contextlib.ExitStack() as stack:
        for override in overrides:
            stack.enter_context(ops.use_backend(*override))
        backends.load("triton").backward(*kernel_inputs(8, (16, 16)), None, None, batch, 1.0)
    assert forms == [strip if expected else plain]
    assert ("attention_strip" in ops.backends_used()) == expected


def test_a_verdict_of_its_own_makes_it_the_default(monkeypatch):
    asked = []
    monkeypatch.setattr(
        _dispatch, "_decide", lambda op, *call: asked.append((op, call[3])) or "triton"
    )
    assert backends.strip_serves(torch.device("cuda", 0))
    assert asked == [("attention_strip", True)]


def test_long_windows_are_refused():
    q, k, v, dout = kernel_inputs(20, (16, 16))
    lse = torch.zeros(1, 20, device=DEVICE)
    with pytest.raises(ValueError, match="window=512: the strip form needs tiles of 64 rows"):
        strip.attention_backward(dout, q, k, v, v, lse, starts_tensor([0, 20]), 512, 1.0)
