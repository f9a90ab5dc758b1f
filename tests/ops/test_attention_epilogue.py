"""`attention_epilogue` against RECIPE section 3, "XSA" and "Attention gate"."""

import math

import pytest
import torch

from numerics import assert_accurate, assert_same_bits
from op_helpers import assert_compiles
from speedrun.ops.attention_epilogue import attention_epilogue
from train_helpers import FLOAT64_NOISE, normal

T, H, E = 7, 3, 5


def inputs(dtype=torch.float64):
    """y, v (T, H, E), α and gate (T, H)."""
    sizes = [(T, H, E), (T, H, E), (T, H), (T, H)]
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


def definition(y_THE, v_THE, alpha_TH, gate_TH):
    """y −= tanh(α)·(⟨y,v⟩/max(|v|²,1e−8))·v; y ← gate·y. Number by number, in Python's floats."""
    out = torch.zeros_like(y_THE)
    for t, (ys, vs) in enumerate(zip(y_THE.tolist(), v_THE.tolist(), strict=True)):
        for h, (y, v) in enumerate(zip(ys, vs, strict=True)):
            if alpha_TH is not None:
                inner = sum(a * b for a, b in zip(y, v, strict=True))
                share = inner / max(sum(b * b for b in v), 1e-8)
                factor = math.tanh(alpha_TH[t, h].item()) * share
                y = [a - factor * b for a, b in zip(y, v, strict=True)]
            gate = 1.0 if gate_TH is None else gate_TH[t, h].item()
            out[t, h] = torch.tensor([gate * a for a in y], dtype=torch.float64)
    return out


@pytest.mark.parametrize("parts", ["neither", "xsa", "gate", "both"])
def test_definition(parts):
    y, v, alpha, gate = inputs()
    v[2, 1] *= 1e-6  # |v|² below 1e−8
    v[4, 0] = 0
    alpha = alpha if parts in ("xsa", "both") else None
    gate = gate if parts in ("gate", "both") else None
    expected = definition(y, v, alpha, gate)
    torch.testing.assert_close(attention_epilogue(y, v, alpha, gate), expected, **FLOAT64_NOISE)


def test_full_strength_leaves_nothing_along_v():
    y, v, _, _ = inputs()
    out = attention_epilogue(y, v, torch.full((T, H), 30.0, dtype=torch.float64))
    torch.testing.assert_close((out * v).sum(-1), torch.zeros(T, H).double(), **FLOAT64_NOISE)
    assert (out - y).abs().max() > 0.1


def test_gradients():
    tensors = [t.requires_grad_() for t in inputs()]
    assert torch.autograd.gradcheck(attention_epilogue, tensors)


def test_gradient_is_the_formulas():
    """With s = ⟨y,v⟩/|v|², τ = tanh(α), z = y − τ·s·v and G = gate·g, g the gradient of the output:
    dgate = ⟨g,z⟩, dα = −(1 − τ²)·s·⟨G,v⟩, dy = G − τ·(⟨G,v⟩/|v|²)·v,
    dv = −τ·(s·G + (⟨G,v⟩/|v|²)·(y − 2·s·v))."""
    tensors = [t.requires_grad_() for t in inputs()]
    upstream = normal(T, H, E, seed=9)
    (attention_epilogue(*tensors) * upstream).sum().backward()
    for t in range(T):
        for h in range(H):
            y, v, alpha, gate = (x[t, h].detach() for x in tensors)
            g, tau, s = upstream[t, h], torch.tanh(alpha), (y @ v) / (v @ v)
            G = gate * g
            along = (G @ v) / (v @ v)
            expected = (
                G - tau * along * v,
                -tau * (s * G + along * (y - 2 * s * v)),
                -(1 - tau**2) * s * (G @ v),
                g @ (y - tau * s * v),
            )
            for tensor, value in zip(tensors, expected, strict=True):
                torch.testing.assert_close(tensor.grad[t, h], value, **FLOAT64_NOISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype):
    """As if only the result were rounded; in bf16 it is, and few elements lie near a tie."""
    y, v, alpha, gate = (normal(512, *t.shape[1:], seed=i) for i, t in enumerate(inputs()))
    tensors = [t.to(dtype) for t in (y, v, alpha, gate)]
    exact = definition(*(t.double() for t in tensors))
    found = attention_epilogue(*tensors)
    assert found.dtype == dtype
    assert_accurate(found, exact.to(dtype), exact)
    if dtype == torch.bfloat16:
        assert (found != exact.to(dtype)).double().mean() < 1e-3


def test_extreme_values():
    """Squares near float32's largest; α beyond tanh's reach; v too small to count."""
    large = torch.full((1, 1, 4), 1e15)
    out = attention_epilogue(large, large, torch.full((1, 1), 100.0))
    assert (out.abs() <= 1e15 * 2**-22).all()
    tiny = torch.full((1, 1, 4), 1e-20)
    assert_same_bits(attention_epilogue(large, tiny, torch.ones(1, 1)), large)
    zero = torch.zeros(1, 1, 4)
    assert_same_bits(attention_epilogue(large, zero, torch.ones(1, 1)), large)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    tensors = [t[:num_tokens] for t in inputs()]
    out = attention_epilogue(*tensors)
    torch.testing.assert_close(out, definition(*tensors), **FLOAT64_NOISE)


def test_one_gate_for_all_tokens():
    """Constant gates come as one row, expanded."""
    y, v, alpha, gate = inputs()
    one = [alpha[:1].expand(T, H), gate[:1].expand(T, H)]
    many = [t.contiguous() for t in one]
    assert_same_bits(attention_epilogue(y, v, *one), attention_epilogue(y, v, *many))


def test_compiled():
    assert_compiles(attention_epilogue, inputs(), normal(T, H, E, seed=9))
