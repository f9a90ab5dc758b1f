"""The public program's numbers in tests/golden, which are always there: see its README."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import BACKENDS, ROWS, all_steps, write_shard
from numerics import assert_same_bits
from speedrun import data, recipes
from speedrun.data import GPT2, BatchShape
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.ops.head_loss import Fp8Head, head_loss
from speedrun.ops.qk_norm_rope import rotary_frequencies, yarn
from speedrun.ops.softcap_ce import softcap_ce_fp8
from speedrun.reference import relu2_mlp as mlp
from speedrun.schedule import Schedule
from train_helpers import from_golden

GOLDEN = Path(__file__).parent / "golden"
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
SOFTCAP = (23.0, 5.0, 7.5)  # RECIPE section 3


def load(name):
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def test_size():
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(sizes) <= 300_000, "tests/golden holds at most 300 KB"


# ---- Schedule -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    """The recipe's plans and the public program's columns."""
    return list(Schedule(recipes.load("record_089").schedule)), load("schedule.npz")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("trains", lambda plan: not plan.last),
        ("stage", lambda plan: plan.stage + 1),
        ("window_short", lambda plan: plan.windows.short),
        ("window_long", lambda plan: plan.windows.long),
        ("num_targets", lambda plan: len(plan.multi_token_weights)),
        ("validate", lambda plan: plan.validate),
    ],
)
def test_schedule_of_each_step(record, column, value):
    plans, columns = record
    assert [int(value(plan)) for plan in plans] == columns[column].tolist()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("batch_tokens", lambda plan: plan.tokens_per_step),
        ("max_seq_len", lambda plan: plan.max_seq_len),
        ("adam", lambda plan: plan.adam),
        ("tied_update", lambda plan: plan.adam and plan.tied),
        ("split_after", lambda plan: plan.split),
        ("fp8_down_own_amax", lambda plan: plan.fp8_down_own_amax),
        ("lr", lambda plan: plan.lr),
        ("momentum", lambda plan: plan.momentum),
        ("w1", lambda plan: plan.multi_token_weights[0]),
        ("w2", lambda plan: (*plan.multi_token_weights, 0, 0)[1]),
        ("w3", lambda plan: (*plan.multi_token_weights, 0, 0)[2]),
        ("prefix_weight", lambda plan: plan.prefix_weight),
    ],
)
def test_schedule_of_each_training_step(record, column, value):
    plans, columns = record
    found = [value(plan) for plan in plans[:-1]]
    np.testing.assert_allclose(found, columns[column][:-1], rtol=1e-13, atol=1e-13)


def test_schedule_of_yarn(record):
    """Where frequencies are stretched, and what they and the score scale are from there on."""
    plans, columns = record
    grown = zip(columns["yarn_from"].tolist(), columns["yarn_to"].tolist(), strict=True)
    grown = {step: growth for step, growth in enumerate(grown) if growth != (0, 0)}
    assert len(grown) == 3
    for step in range(len(plans)):
        until_then = tuple(growth for at, growth in grown.items() if at <= step)
        assert plans[step].windows.yarn == until_then
    frequencies, scale = rotary_frequencies(128, 1024.0), 0.1
    for stage in range(4):
        # The public program keeps its frequencies in float32.
        expected = torch.from_numpy(columns["rotary_freq"][stage])
        torch.testing.assert_close(frequencies, expected, rtol=2**-22, atol=0)
        assert scale == pytest.approx(columns["score_scale"][stage], rel=1e-12)
        if stage < 3:
            frequencies, factor = yarn(frequencies, *list(grown.values())[stage])
            scale *= factor


# ---- Batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_batches(tmp_path, backend):
    arrays = load("batches.npz")
    shards = [write_shard(tmp_path / "one_train_1.bin", arrays["shard"])]
    shapes = [BatchShape(1, 320, 96, 128), BatchShape(1, 400, 200, 128)]
    steps = all_steps(shards, shapes, format=GPT2, backend=backend)
    for number, (step, part) in enumerate([(0, 0), (0, 7), (1, 0), (1, 7)]):
        num_tokens = shapes[step].tokens_per_part
        for field, name in (
            ("inputs", "inputs"),
            ("targets", "targets"),
            ("bigram_rows", "bigram_row"),
            ("sign_rows", "sign_row"),
        ):
            found = getattr(steps[step], field)[part]
            np.testing.assert_array_equal(found, arrays[name][number, :num_tokens], name)
        found = steps[step].cu_seqlens[part]
        np.testing.assert_array_equal(found, arrays["cu_seqlens"][number])


def test_validation_parts(tmp_path):
    arrays = load("batches.npz")
    shards = [write_shard(tmp_path / "one_val_1.bin", arrays["val_shard"])]
    ranks = dict(rank=0, world_size=1)
    parts = list(
        data.validation_parts(
            shards, format=GPT2, tokens_per_part=400, num_tokens=800, **ROWS, **ranks
        )
    )
    assert len(parts) == 2
    for number, part in enumerate(parts):
        for field, name in (("inputs",) * 2, ("targets",) * 2, ("bigram_rows", "bigram_row")):
            expected = arrays[f"val_{name}"][number]
            np.testing.assert_array_equal(getattr(part, field), expected, name)
        np.testing.assert_array_equal(part.cu_seqlens, arrays["val_cu_seqlens"][number])


# ---- FP8 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8():
    return {key: from_golden(array) for key, array in load("fp8.npz").items()}


def assert_fp8_bytes(found, expected):
    assert_same_bits(found.view(torch.uint8), expected.contiguous())


def test_casts_of_the_head(fp8):
    x_scale, w_scale, _, _ = fp8["head/scales"].float()
    assert_fp8_bytes(fp8_quantize(fp8["head/x"], x_scale)[0], fp8["head/x_f8"])
    assert_fp8_bytes(fp8_quantize(fp8["head/w_rows"], w_scale)[0], fp8["head/w_f8"][:2])


def head_arguments(fp8):
    options = {
        "prefix_targets_T": fp8["head/prefix_targets"],
        "prefix_weight": fp8["head/prefix_weight"],
        "count_missing_targets": True,
        "round_sigmoid": True,
    }
    return (fp8["head/targets"], fp8["head/mtp_weights"], *SOFTCAP), options


def test_rows_of_the_head(fp8):
    """Losses and the gradient of x, from bf16 rows and FP8 weights; the program's grad_scale is
    what the sum of losses is multiplied by."""
    arguments, options = head_arguments(fp8)
    x_scale, w_scale, dz_scale, grad_scale = fp8["head/scales"].float()
    w_f8 = fp8["head/w_f8"].view(E4M3)
    head = Fp8Head(w_f8, w_f8.mT.contiguous(), w_scale, x_scale, dz_scale / grad_scale)
    x, w = fp8["head/x"].clone().requires_grad_(), (w_f8.float() * w_scale).to(BF16)
    losses = head_loss(x, w, *arguments, **options, fp8=head)
    (losses.sum() * grad_scale).backward()
    assert_same_bits(losses.detach(), fp8["head/losses"])
    # 512 products in another order of float32 sums can meet the rounding to bf16 elsewhere.
    differ = x.grad != fp8["head/grad_x"]
    assert differ.double().mean() < 0.01
    torch.testing.assert_close(x.grad.float(), fp8["head/grad_x"].float(), rtol=2**-7, atol=1e-9)


def test_gradient_of_the_logits(fp8):
    arguments, options = head_arguments(fp8)
    _, _, dz_scale, grad_scale = fp8["head/scales"].float()
    found = softcap_ce_fp8(fp8["head/logits"], *arguments, dz_scale / grad_scale, **options)
    assert_same_bits(found.loss_T, fp8["head/losses"])
    assert_same_bits(found.lse_T, fp8["head/lse"])
    assert_fp8_bytes(found.dz_TV, fp8["head/grad_logits_f8"])


def test_rows_of_the_mlp(fp8):
    """Each row stands for itself, once the scale of x is given, by a row that has its amax."""
    f = {key.removeprefix("mlp/"): t for key, t in fp8.items() if key.startswith("mlp/")}
    largest = torch.zeros(1, 96, dtype=BF16)
    largest[0, 0] = f["x_amax"]
    weights = [f["w_up_f8"].view(E4M3), f["up_scale"], f["w_down_f8"].view(E4M3)]
    out = mlp.relu2_mlp_fp8(
        torch.cat([f["x"], largest]), *weights, f["down_scale_used"], f["act_scale_used"]
    )
    for name in ("x_f8", "post_f8"):
        assert_fp8_bytes(getattr(out, name)[:8], f[name])
    for name in ("pre", "y"):
        assert_same_bits(getattr(out, name)[:8], f[name])
    saturated = f["post_f8"].view(E4M3).float() == 448
    assert saturated.any(1).all()  # what the rows were chosen for
    dpre = mlp.drelu2(f["grad_y"], f["w_down_rows"], out.post[:8, :8])
    # Of 96 products, in another order: one ulp of bf16, here and there.
    assert (dpre != f["dpre"]).sum() <= 1
    torch.testing.assert_close(dpre.float(), f["dpre"].float(), rtol=2**-7, atol=1e-12)


def test_casts_of_the_mlps_weights(fp8):
    """Up by bf16(W/scale), Down in float32; the scale of Down is the largest weight one step
    before times 1.12/448, and what has outgrown it is clamped."""
    up, down = fp8["mlp/w_up_rows"], fp8["mlp/w_down_rows"]
    quotient = (up.float() / fp8["mlp/up_scale"]).to(BF16)
    one = torch.ones(())
    assert_fp8_bytes(fp8_quantize(quotient, one)[0], fp8["mlp/w_up_f8"][:8])
    found = fp8_quantize(down, fp8["mlp/down_scale_used"])[0]
    assert_fp8_bytes(found.mT.contiguous(), fp8["mlp/w_down_f8"][:, :8])
    scale = fp8["mlp/17/down_scale_used"]
    assert scale.item() == pytest.approx(fp8["mlp/17/down_amax_before"].item() * 1.12 / 448)
    found = fp8_quantize(fp8["mlp/17/w_down_rows"], scale)[0]
    assert (found.float().abs() == 448).any(1).all()
    assert_fp8_bytes(found.mT.contiguous(), fp8["mlp/17/w_down_f8"])
