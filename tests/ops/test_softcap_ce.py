"""`softcap_ce` against its definition and the public program's losses."""

import math

import pytest
import torch

from speedrun.ops.softcap_ce import NO_TARGET, softcap, softcap_ce
from train_helpers import FLOAT64_NOISE, golden, normal

A, B, C = 23.0, 5.0, 7.5  # RECIPE section 3


def definition(z_TV, targets_TN, weights_N):
    losses = []
    for z, targets in zip(z_TV.tolist(), targets_TN.tolist(), strict=True):
        logits = [A / (1 + math.exp(-(value + B) / C)) for value in z]
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        pairs = zip(targets, weights_N.tolist(), strict=True)
        losses.append(sum(w * (log_sum - logits[n]) for n, w in pairs if n != NO_TARGET))
    return torch.tensor(losses, dtype=torch.float64)


def run(z, targets, weights):
    return softcap_ce(z, targets, weights, A, B, C)


TARGETS = torch.tensor([[0, 1, -1], [4, 4, 4], [6, -1, -1], [-1, 2, 0], [-1, -1, -1]])
WEIGHTS = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)


def test_definition():
    z = normal(5, 7) * 20
    expected = definition(z, TARGETS, WEIGHTS)
    torch.testing.assert_close(run(z, TARGETS, WEIGHTS), expected, **FLOAT64_NOISE)
    assert expected[-1] == 0 and (expected[:-1] > 0).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values(dtype):
    """Saturated logits: the loss is 0 or the cap, the gradient 0, both finite."""
    z = torch.full((2, 4), -1e30, dtype=dtype)
    z[:, 1] = 1e30
    z.requires_grad_()
    losses = run(z, torch.tensor([[1], [2]]), torch.ones(1))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.log1p(3 * math.exp(-A)), A], rel=1e-6, abs=1e-6)
    assert z.grad.isfinite().all()


def test_gradients():
    z = (normal(5, 7) * 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: run(z, TARGETS, WEIGHTS), z)


def golden_losses(shared_data):
    """z that the stored float64 logits come from, the four targets a position, the arrays."""
    io = golden(shared_data, "io.npz")
    logits = torch.from_numpy(io["logits"])
    z = C * torch.logit(logits / A) - B
    targets = torch.from_numpy(io["targets"])
    padded = torch.cat([targets, torch.full((2,), NO_TARGET)])
    prefixes = torch.from_numpy(io["prefix_table"]).long()[targets]
    columns = [padded[n : n + len(targets)] for n in range(3)]
    return z, torch.stack([*columns, prefixes], dim=1), io


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("loss_val", (1.0, 0.0, 0.0, 0.0)),
        ("loss_train", (1.0, 0.5, 0.25, 0.25)),
        ("loss_train_2", (1.0, 0.375, 0.0, 0.125)),
    ],
)
def test_losses_of_the_public_program(shared_data, name, weights):
    """Prefix targets are a fourth column; a missing one is −1 in the table as here."""
    z, targets, io = golden_losses(shared_data)
    found = run(z, targets, torch.tensor(weights, dtype=torch.float64))
    torch.testing.assert_close(found, torch.from_numpy(io[name]), **FLOAT64_NOISE)


def test_gradient_of_the_public_loss_at_the_batch_end(shared_data):
    z, targets, io = golden_losses(shared_data)
    z.requires_grad_()
    run(z, targets, torch.tensor([1.0, 0.5, 0.25, 0.25], dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(z.grad[-2:], torch.from_numpy(io["dz_last2"]), **FLOAT64_NOISE)
