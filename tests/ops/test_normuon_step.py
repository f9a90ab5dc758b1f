"""The NorMuon step around the orthogonalisation, against RECIPE section 4 and the public run."""

import pytest
import torch

from numerics import assert_same_bits
from speedrun.ops.normuon_step import join_bits, split_bits, variance_rescale, weight_update
from speedrun.reference.polar_express import momentum_step
from train_helpers import FLOAT64_NOISE, from_golden, golden, low_bits, normal

BANKS = ["qk_bank", "vo_bank", "mlp_bank"]
STEPS = range(8)


@pytest.fixture(scope="module")
def run(shared_data):
    return golden(shared_data, "optimizer_a.npz")


@pytest.fixture(scope="module")
def inside(shared_data):
    return golden(shared_data, "optimizer_a_muon.npz")


def before(run, bank, step):
    """weight, low16, momentum, second before a step."""
    if step:
        prefix = f"after/{step - 1}/{bank}"
        state = [from_golden(run[f"{prefix}/{name}"]) for name in ("momentum", "second")]
        return from_golden(run[prefix]), low_bits(run[f"{prefix}/low16"]), *state
    shape = run[f"after/0/{bank}"].shape
    low, momentum = torch.zeros(shape, dtype=torch.int16), torch.zeros(shape)
    second = torch.zeros(run[f"after/0/{bank}/second"].shape)
    return from_golden(run[f"init/{bank}"]).view(shape), low, momentum, second


def test_momentum_definition():
    grad, momentum = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    expected = 0.9 * momentum + 0.1 * grad
    nesterov = momentum_step(grad, momentum, 0.9)
    torch.testing.assert_close(momentum, expected, **FLOAT64_NOISE)
    torch.testing.assert_close(nesterov, 0.1 * grad + 0.9 * expected, **FLOAT64_NOISE)


def test_momentum_of_the_public_program(run):
    for bank in BANKS:
        for step in STEPS:
            momentum = before(run, bank, step)[2]
            grad = from_golden(run[f"grad/{step}/{bank}"]).view(momentum.shape)
            momentum_step(grad, momentum, run["schedule"][step, 2])
            assert_same_bits(momentum, from_golden(run[f"after/{step}/{bank}/momentum"]))


def test_momentum_of_the_public_program_to_float32(run):
    """μ, 1 − μ, the difference and the sum are rounded, each to a half ulp."""
    for bank in BANKS:
        for step in STEPS:
            momentum = before(run, bank, step)[2]
            grad = from_golden(run[f"grad/{step}/{bank}"]).view(momentum.shape)
            largest = grad.abs().max().item() + momentum.abs().max().item()
            momentum_step(grad, momentum, run["schedule"][step, 2])
            expected = from_golden(run[f"after/{step}/{bank}/momentum"])
            assert (momentum - expected).abs().max() <= 2 * 2**-24 * largest


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)], ids=str)
def test_variance_definition(shape):
    """Per row where M >= N, else per column, and the matrix keeps its norm."""
    o, beta2 = normal(2, *shape), 0.9
    axis = 2 if shape[0] >= shape[1] else 1
    second = normal(*o.mean(axis, keepdim=True).shape, seed=3).abs()
    expected_second = 0.9 * second + 0.1 * (o**2).mean(axis, keepdim=True)
    scaled = o / expected_second.sqrt()
    norms = [x.flatten(1).norm(dim=1)[:, None, None] for x in (o, scaled)]
    out = variance_rescale(o, second, beta2)
    torch.testing.assert_close(second, expected_second, **FLOAT64_NOISE)
    torch.testing.assert_close(out, scaled * norms[0] / norms[1], **FLOAT64_NOISE)


def test_variance_of_zeros_is_zero():
    """Rows, or whole matrices, without a gradient: 1e−10 in the place of their variance."""
    o = torch.zeros(2, 4, 3, dtype=torch.bfloat16)
    o[0, 1] = 1
    out = variance_rescale(o, torch.zeros(2, 4, 1), 0.9)
    assert torch.equal(out, o)


def test_variance_of_the_public_program(run, inside):
    """From its polar factor; README_optimizer: all but about one element in 30,000."""
    wrong = total = 0
    for bank in BANKS:
        for step in STEPS:
            fused, expected = (
                from_golden(inside[f"{step}/{bank}/{name}_fused"]) for name in ("polar", "update")
            )
            second = before(run, bank, step)[3]
            update = variance_rescale(fused, second, 0.9)
            wrong += (update.view(torch.int16) != expected.view(torch.int16)).sum().item()
            total += update.numel()
            torch.testing.assert_close(update, expected, rtol=2**-7, atol=0)  # the next bf16
    assert wrong <= 2 * total / 30_000


def test_second_of_the_public_program(run, inside):
    """The run took the uncompiled polar factor; float32 means of 16 to 128 squares."""
    for bank in BANKS:
        for step in STEPS:
            second = before(run, bank, step)[3]
            variance_rescale(from_golden(inside[f"{step}/{bank}/polar"]), second, 0.9)
            expected = from_golden(run[f"after/{step}/{bank}/second"])
            torch.testing.assert_close(second, expected, rtol=1e-6, atol=0)


def test_update_definition():
    """Decay where O·W >= 0, from the old weight; each matrix with its own rate."""
    weight, o = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    o[0, 0, 0] = 0
    old, lr = weight.clone(), torch.tensor([0.1, 0.2], dtype=torch.float64).view(2, 1, 1)
    weight_update(weight, None, o, lr, 0.5)
    expected = torch.where(o * old >= 0, old - old * 0.5 * lr, old) - o * lr
    torch.testing.assert_close(weight, expected, **FLOAT64_NOISE)
    assert weight[0, 0, 0] == pytest.approx(old[0, 0, 0].item() * 0.95)


def updated(run, inside, bank, step):
    """Weight and low16 after the stored update, and what the public program has."""
    weight, low = before(run, bank, step)[:2]
    tall = max(1.0, weight.shape[1] / weight.shape[2]) ** 0.5
    muls = [1.0, 2.0] if bank == "mlp_bank" else [1.0, 1.0]
    muls = torch.tensor(muls * (len(weight) // 2)).view(-1, 1, 1)
    rate = 0.023 * run["schedule"][step, 1]
    update = from_golden(inside[f"{step}/{bank}/update"])
    weight_update(weight, low, update, muls * tall * rate, 1.2 * rate)
    after = from_golden(run[f"after/{step}/{bank}"])
    return (weight, low), (after, low_bits(run[f"after/{step}/{bank}/low16"]))


def test_upper_bits_of_the_public_program(run, inside):
    for bank in BANKS:
        for step in STEPS:
            found, expected = updated(run, inside, bank, step)
            assert_same_bits(found[0], expected[0])


def test_low_bits_of_the_public_program(run, inside):
    for bank in BANKS:
        for step in STEPS:
            found, expected = updated(run, inside, bank, step)
            assert_same_bits(found[1], expected[1])


def test_exact_weight_to_a_last_bit(run, inside):
    """Three roundings in float32, whose order may differ."""
    for bank in BANKS:
        for step in STEPS:
            found, expected = (join_bits(*pair) for pair in updated(run, inside, bank, step))
            torch.testing.assert_close(found, expected, rtol=2**-22, atol=2**-30)


def test_bits_come_back():
    """Every float32, NaN payloads and denormals too, cut into its halves and joined."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(2**31), 2**31, (2, 100, 100), generator=generator).to(torch.int32)
    exact = pattern.view(torch.float32)
    weight = torch.zeros(exact.shape, dtype=torch.bfloat16)
    low = torch.zeros(exact.shape, dtype=torch.int16)
    split_bits(exact, weight, low)
    assert_same_bits(join_bits(weight, low), exact)
    assert torch.equal(weight.view(torch.int16), (pattern >> 16).to(torch.int16))


def test_small_updates_add_up_in_the_low_bits():
    """1,000 updates of 1e−5 on a weight of 1: bf16 alone would not move at all."""
    weight = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    low = torch.zeros(1, 1, 1, dtype=torch.int16)
    for _ in range(1000):
        weight_update(weight, low, torch.ones_like(weight), torch.full((1, 1, 1), 1e-5), 0.0)
    assert join_bits(weight, low).item() == pytest.approx(0.99, abs=1000 * 2**-24)
