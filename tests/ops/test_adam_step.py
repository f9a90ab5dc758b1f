"""`adam_step` against RECIPE section 4 in float64, number by number, and the public run."""

import math

import pytest
import torch

from numerics import assert_same_bits
from speedrun.ops.adam_step import adam_step
from train_helpers import FLOAT64_NOISE, normal

HYPER = dict(lr=0.01, decay=0.003, beta1=0.9, beta2=0.99, eps=1e-10)


def definition(w, grads, lr, decay, beta1, beta2, eps):
    """One number through updates with `grads` in turn."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        update = m / (math.sqrt(v) + eps) * lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        w = w - update - (decay * w if update * w > 0 else 0.0)
    return w, m, v


def run(param, grads, **changes):
    moments = [torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))]
    moments.append(moments[0].clone())
    for step, grad in enumerate(grads, start=1):
        adam_step(param, grad, *moments, step=step, **(HYPER | changes))
    return param, *moments


@pytest.mark.parametrize("decay", [0.0, 0.003])
def test_definition(decay):
    param, grads = normal(20), [normal(20, seed=s) for s in (1, 2, 3)]
    grads[2][:5] = 0
    hyper = HYPER | {"decay": decay}
    columns = [
        definition(w, [g[i].item() for g in grads], **hyper) for i, w in enumerate(param.tolist())
    ]
    found = run(param, grads, decay=decay)
    for tensor, expected in zip(found, zip(*columns, strict=True), strict=True):
        torch.testing.assert_close(
            tensor, torch.tensor(expected, dtype=torch.float64), **FLOAT64_NOISE
        )


def test_decays_only_where_the_update_shrinks_the_weight():
    param = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    grad = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    param, *_ = run(param, [grad], lr=1e-3, decay=0.1)
    expected = torch.tensor([1 - 1e-3 - 0.1, -1 - 1e-3, 1 + 1e-3, -1 + 1e-3 + 0.1, -1e-3])
    torch.testing.assert_close(param, expected.double(), rtol=1e-6, atol=0)


def test_no_gradient_no_move():
    """Neither update nor decay, and no division of 0 by 0."""
    param, *moments = run(torch.ones(4), [torch.zeros(4)] * 2)
    assert (param == 1).all() and all((m == 0).all() for m in moments)


def test_bf16_is_rounded_once():
    """The float32 result of the same numbers, rounded to nearest."""
    param = normal(1000, dtype=torch.bfloat16)
    grads = [normal(1000, seed=s, dtype=torch.bfloat16) for s in (1, 2)]
    for grad in grads:
        moments = [torch.zeros(1000), torch.zeros(1000)]
        exact, exact_moments = param.float(), [m.clone() for m in moments]
        adam_step(param, grad, *moments, step=1, **HYPER)
        adam_step(exact, grad.float(), *exact_moments, step=1, **HYPER)
        assert_same_bits(param, exact.to(torch.bfloat16))
        assert_same_bits(moments[1], exact_moments[1])
