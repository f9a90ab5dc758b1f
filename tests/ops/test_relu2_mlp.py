"""`relu2_mlp` against its definition."""

import pytest
import torch

from speedrun.ops.relu2_mlp import relu2_mlp
from train_helpers import FLOAT64_NOISE, normal


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
