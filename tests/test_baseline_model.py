"""BaselineGPT against the public baseline of its track (arrays in tests/golden/optimization)."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from speedrun import baseline_model
from speedrun.baseline_model import BaselineGPT
from speedrun.batch import LossWeights, MicroBatch
from speedrun.config import BaselineConfig, ConfigError, ScheduleConfig, Stage, Windows
from speedrun.config_check import check
from speedrun.overrides import apply_overrides
from train_helpers import FLOAT64_NOISE, from_golden, small_config

GOLDEN = Path(__file__).parent / "golden" / "optimization" / "model.npz"
CONFIG = BaselineConfig(
    num_layers=2, model_dim=16, head_dim=8, mlp_hidden=24, vocab_size=12, vocab_multiple=4
)
SEQUENCE = 12
WINDOWS = Windows(1, SEQUENCE)
PLAIN_LOSS = LossWeights()


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {key: from_golden(file[key]) for key in file.files if key != "names"} | {
            "names": file["names"].tolist()
        }


def by_name(golden, kind):
    """The public model's parameters or gradients, by its names for them."""
    shapes = golden["shapes"].tolist()
    pieces = golden[kind].double().split([math.prod(shape) for shape in shapes])
    return {
        name: piece.view(shape) if name.endswith("weight") else piece
        for name, shape, piece in zip(golden["names"], shapes, pieces, strict=True)
    }


def ours(public):
    """The same numbers in our banks; every one of the public model's is used."""
    public = dict(public)
    layers = range(CONFIG.num_layers)

    def stack(*names):
        return torch.stack([public.pop(f"blocks.{i}.{name}") for i in layers for name in names])

    projections = [f"attn.{name}" for name in ("q", "k", "v", "proj")]
    banks = {
        "embed": public.pop("embed.weight"),
        "embed_gain": public.pop("norm1.gains"),
        "qkvo_bank": stack(*(f"{name}.weight" for name in projections)),
        "qkvo_bias": stack(*(f"{name}.bias" for name in projections)),
        "up_bank": stack("mlp.fc.weight"),
        "up_bias": stack("mlp.fc.bias"),
        "down_bank": stack("mlp.proj.weight"),
        "down_bias": stack("mlp.proj.bias"),
        "attention_gain": stack("norm1.gains"),
        "mlp_gain": stack("norm2.gains"),
        "lm_head": public.pop("proj.weight").T,
        "head_bias": public.pop("proj.bias"),
        "head_gain": public.pop("norm2.gains"),
    }
    assert not public
    return banks


def golden_model(golden, dtype=torch.float64):
    model = BaselineGPT(CONFIG, dtype)
    model.load_state_dict(ours(by_name(golden, "params")))
    return model


def batch_of(tokens, num_parts=1):
    """Parts of consecutive tokens, cut into sequences; cu_seqlens as the loader pads them."""
    inputs, targets = (t.view(num_parts, -1) for t in (tokens[:-1], tokens[1:].long()))
    num_tokens = inputs.shape[1]
    starts = [*range(0, num_tokens, SEQUENCE), num_tokens, num_tokens]
    cu_seqlens = [part * num_tokens + start for part in range(num_parts) for start in starts]
    return MicroBatch(inputs, targets, torch.tensor(cu_seqlens, dtype=torch.int32))


def assert_gradients(model, golden):
    expected = ours(by_name(golden, "grads"))
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            expected[name],
            **FLOAT64_NOISE,
            msg=lambda problem, name=name: f"{name}: {problem}",
        )


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_public_model(golden, num_parts):
    """Logits, loss and every gradient, with both sequences in one part or one in each."""
    model, batch = golden_model(golden), batch_of(golden["tokens"], num_parts)
    plan = model.plan_windows(batch, WINDOWS)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, plan), golden["logits"], **FLOAT64_NOISE)
        torch.testing.assert_close(
            model.validation_loss(batch, plan), golden["loss"], **FLOAT64_NOISE
        )
    loss = model.training_loss(batch, plan, PLAIN_LOSS)
    torch.testing.assert_close(loss, golden["loss"], **FLOAT64_NOISE)
    loss.backward()
    assert_gradients(model, golden)


def test_positions_start_anew_in_each_sequence(golden):
    """Attention sees differences alone, but the angles of small positions are the exact ones."""
    model, batch = golden_model(golden, torch.float32), batch_of(golden["tokens"])
    plan = model.plan_windows(batch, WINDOWS)
    for table in (plan.cos, plan.sin):
        first, second = table.split(SEQUENCE)
        assert torch.equal(first, second) and not torch.equal(first[0], first[1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compiled(golden, mode):
    model, batch = golden_model(golden), batch_of(golden["tokens"])
    model.compile(mode)
    plan = model.plan_windows(batch, WINDOWS)
    model.training_loss(batch, plan, PLAIN_LOSS).backward()
    assert_gradients(model, golden)


def test_the_head_in_chunks(golden, monkeypatch):
    """Whatever the number of rows at once, of which 24 isn't a multiple: the same loss."""
    batch = batch_of(golden["tokens"])
    monkeypatch.setattr(baseline_model, "LOGITS_AT_ONCE", 7 * 12)
    model = golden_model(golden)
    loss = model.training_loss(batch, model.plan_windows(batch, WINDOWS), PLAIN_LOSS)
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"], **FLOAT64_NOISE)
    assert_gradients(model, golden)


def test_bf16_keeps_fp32_masters(golden):
    """Only the embedding is bf16. The mean of 24 losses errs by less than one bf16 number does."""
    model, batch = golden_model(golden, torch.bfloat16), batch_of(golden["tokens"])
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert types.pop("embed") == torch.bfloat16 and set(types.values()) == {torch.float32}
    loss = model.training_loss(batch, model.plan_windows(batch, WINDOWS), PLAIN_LOSS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=2**-7)
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_start_values():
    """RECIPE section 7: which are 0, which 1, and the standard deviations of the others."""
    config = dataclasses.replace(CONFIG, model_dim=64, head_dim=32, mlp_hidden=96, vocab_size=999)
    model = BaselineGPT(config)
    model.init_weights(3)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "embed": (1000, 64),
        "embed_gain": (64,),
        "qkvo_bank": (8, 64, 64),
        "qkvo_bias": (8, 64),
        "up_bank": (2, 96, 64),
        "up_bias": (2, 96),
        "down_bank": (2, 64, 96),
        "down_bias": (2, 64),
        "attention_gain": (2, 64),
        "mlp_gain": (2, 64),
        "lm_head": (64, 1000),
        "head_bias": (1000,),
        "head_gain": (64,),
    }
    std = (0.33 / 64) ** 0.5
    for weights in (*model.qkvo_bank.view(2, 4, 64, 64)[:, :3].flatten(0, 1), *model.up_bank):
        # A normal sample's std is that of the law to a few parts in √(2n).
        assert weights.std().item() == pytest.approx(std, rel=0.06)
    assert model.embed.std().item() == pytest.approx(1, rel=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name in ("lm_head", "down_bank"):
            assert (parameter == 0).all(), name
    assert (model.qkvo_bank[3::4] == 0).all()


def test_start_values_come_from_the_seed_alone():
    models = []
    for seed, global_seed in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(global_seed)
        model = BaselineGPT(CONFIG)
        model.init_weights(seed)
        models.append(model.state_dict())
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("embed", "qkvo_bank", "up_bank"):
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    "weights", [LossWeights((1.0, 0.5)), LossWeights((0.5,)), LossWeights((1.0,), prefix=0.25)]
)
def test_other_losses_are_refused(golden, weights):
    model, batch = golden_model(golden), batch_of(golden["tokens"])
    with pytest.raises(ValueError, match=r"next token alone.*set the stages' multi_token_weights"):
        model.training_loss(batch, model.plan_windows(batch, WINDOWS), weights)


def run_config(**changes):
    """A config around CONFIG that can run; `changes` are the schedule's."""
    stage = Stage(512, 64, window_short=63, window_long=63)
    schedule = ScheduleConfig(**(dict(num_steps=10, stages=(stage,)) | changes))
    return small_config(model=CONFIG, schedule=schedule)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layers=0", "model.num_layers=0: must be greater than 0"),
        ("model.head_dim=0", "model.head_dim=0: must be greater than 0"),
        ("model.head_dim=6", "model.head_dim=6: must be divisible by 4"),
        ("model.head_dim=12", "model.model_dim=16: must be divisible by head_dim = 12"),
        ("model.softcap=0", "model.softcap=0.0: must be greater than 0"),
        ("model.vocab_size=70000", "model.vocab_size=70000: must be in 1..65536"),
        ("model.embed_std=-1", "model.embed_std=-1.0: must be in 0..1e+15"),
        ("schedule.untie_frac=0.5", "schedule.untie_frac=0.5: must be 0"),
        ("schedule.yarn=true", "schedule.yarn=True: must be false"),
        (
            "schedule.stages.0.max_seq_len=65",
            "schedule.stages[0].window_long=63: must reach over a whole sequence: at least "
            "max_seq_len - 1 = 64",
        ),
        (
            "schedule.stages.0.prefix_weight=0.25,0",
            "prefix_weight=(0.25, 0.0): must be (0, 0)",
        ),
        ("model.layers=short", "no setting 'layers'; allowed here: num_layers, model_dim"),
    ],
)
def test_impossible_values(override, words):
    check(run_config())
    with pytest.raises(ConfigError) as error:
        check(apply_overrides(run_config(), [override]))
    assert words in str(error.value)


def test_multi_token_prediction_is_refused():
    stage = Stage(512, 64, 63, 63, multi_token_weights=((1.0, 1.0), (0.5, 0.0)))
    with pytest.raises(ConfigError, match="the next token is the only target"):
        check(run_config(stages=(stage,)))
    check(run_config(stages=(stage,), multi_token=False))
