"""Attention's projections in FP8: the layer against float64, and what is kept between steps."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from numerics import assert_same_bits
from speedrun import ops
from speedrun.batch import LossWeights
from speedrun.comms import Comms
from speedrun.config import AdamRow, AttentionConfig, HeadConfig, LayerSpec, MLPConfig, Windows
from speedrun.gates import NO_GATES
from speedrun.layer import attend, layer_forward
from speedrun.model import GPT
from speedrun.ops.fp8_quantize import delayed_scale
from speedrun.optim import Optimizer
from speedrun.schedule import Schedule
from train_helpers import make_batch, normal, small_config

BF16, WINDOWS = torch.bfloat16, Windows(3, 7)
D, H = 64, 2
BOTH = AttentionConfig(qkv="fp8", out="fp8", dx="fp8")
CHOICES = {
    "qkv": dataclasses.replace(BOTH, out="bf16"),
    "output": dataclasses.replace(BOTH, qkv="bf16"),
    "both": BOTH,
    "gradients in bf16": dataclasses.replace(BOTH, dx="bf16"),
    "current scale": dataclasses.replace(BOTH, x_scale="current"),
}
LAYERS = "short,none,long+xsa+gated+paired"
REST = tuple(AdamRow(name, 0.9, 0.95) for name in ("lambda_*", "gate_*"))
EVERY_ROLE = "short+paired+ve+xsa+save,long+ve+gated+dc+mudd+shared+skip+post"


def a_model(attention=BOTH, dtype=BF16, **changes):
    """Numbers that bf16 has, as large as in training. Nothing else is in FP8."""
    values = dict(
        layers=LayerSpec.parse_many(LAYERS),
        model_dim=D,
        num_heads=H,
        head_dim=D // H,
        attention=attention,
        attention_lambdas=True,
        key_offset=True,
        gates="network",
        mlp=MLPConfig(up="bf16", down="bf16"),
        head=HeadConfig(fp8=False),
    )
    config = dataclasses.replace(small_config().model, **(values | changes))
    model = GPT(config, dtype, fp8=dtype == BF16)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            drawn = normal(*parameter.shape, seed=i).to(BF16)
            if parameter.dim() > 1:
                parameter.copy_(drawn * 2.0**-3)  # 1/√D
            else:
                parameter += drawn * 2.0**-3
    return model


def a_batch(model, seed=0):
    batch, device = make_batch(model.config, 2, [0, 5, 40], seed=seed), model.embed.device
    fields = dataclasses.asdict(batch).items()
    moved = {name: t.to(device) for name, t in fields if isinstance(t, torch.Tensor)}
    return dataclasses.replace(batch, **moved)


def train_once(model, seed=0):
    """The loss, with gradients in the parameters."""
    batch = a_batch(model, seed)
    model.refresh_fp8(down_own_amax=True)
    loss = model.training_loss(batch, model.plan_windows(batch, WINDOWS), LossWeights())
    loss.backward()
    return loss.item()


def attend_alone(model, i, fp8, weights=None):
    """(output, input) of layer i's attention; the same numbers in each type."""
    batch, shape = a_batch(model), (2, 40)
    h = F.rms_norm(normal(*shape, D), (D,)).to(BF16).to(model.embed).requires_grad_()
    gates = NO_GATES
    if model.layers[i].gated:
        xsa, gate = (normal(*shape, H, seed=s).to(BF16).to(model.embed) for s in (1, 2))
        gates = NO_GATES._replace(xsa=xsa, attention=gate)
    weights = model.layer_weights()[i] if weights is None else weights
    plan = model.plan_windows(batch, WINDOWS)
    return attend(model.config, model.layers[i], h, None, None, gates, weights, plan, fp8), h


def attention_results(model, i, fp8=None):
    """Output of layer i's attention, the gradients of its input and weights, and of its factors."""
    out, h = attend_alone(model, i, fp8)
    leaves = (h, model.qk_bank, model.vo_bank, model.lambda_qkv, model.lambda_o)
    grad = normal(*out.shape, seed=3).to(BF16).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("qk_head_dim", [None, 24], ids=["", "narrow"])
@pytest.mark.parametrize("i", [0, 2], ids=["plain", "xsa, gated, paired"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_layer_against_float64(choice, i, qk_head_dim, device):
    """Rounding to e4m3 errs by 2^-4/√3 in the mean square at most, 3.6 %, to e5m2 by 7.2 %. The
    output has gone through two products of two e4m3 numbers each, which is 7.2 %; a gradient
    through as many, and through two more with e5m2, which is √(7.2² + 2·(3.6² + 7.2²)) = 13.5 %.
    """
    exact = attention_results(a_model(choice, torch.float64, qk_head_dim=qk_head_dim), i)
    exact = [t.to(device) for t in exact]
    model = a_model(choice, qk_head_dim=qk_head_dim).to(device)
    model.refresh_fp8(down_own_amax=True)
    layer = model.fp8_attention.layers()[i // 2]  # layer 1 has no attention
    if layer.out is not None:  # as a forward pass before this one would leave it
        attend_alone(model, i, layer)
        layer = dataclasses.replace(layer, y_scale=delayed_scale(layer.y_amax))
    plain, found = attention_results(model, i), attention_results(model, i, layer)
    assert not torch.equal(found[0], plain[0])
    for k, (mine, bf16, expected) in enumerate(zip(found, plain, exact, strict=True)):
        if k < 4:
            limit = (0.072 if k == 0 else 0.135) * expected.norm()
            assert mine.dtype == BF16 and (mine.double() - expected).norm() <= limit
            assert (bf16.double() - expected).norm() <= 0.01 * expected.norm()
    # A factor's gradient is the sum of W·dW / factor, whose roundings to bf16 are independent.
    dqk, dvo, *factors = found[2:]
    qk, vo = model.qk_bank * dqk, model.vo_bank * dvo
    for products, grad, factor in zip(
        (torch.cat([qk.flatten(), vo[0::2].flatten()]), vo[1::2]),
        factors,
        (model.lambda_qkv[i], model.lambda_o[i]),
        strict=True,
    ):
        error = (grad[i] - products.double().sum() / factor).abs()
        assert error <= 4 * 2.0**-8 * products.double().norm() / factor


def test_kernels_around_it():
    """What only a GPU would take, in Triton's interpreter: as near to the reference as its sums."""
    pytest.importorskip("triton")
    model = a_model()
    model.refresh_fp8(down_own_amax=True)
    for i, layer in ((0, 0), (2, 1)):
        same = attention_results(model, i, model.fp8_attention.layers()[layer])
        with ops.use_backend("triton", "fp8_quantize", "fp8_matmul", "attention_epilogue"):
            found = attention_results(model, i, model.fp8_attention.layers()[layer])
        for mine, expected in zip(found[:4], same[:4], strict=True):
            # A sum that is rounded to the other side can move an FP8 number, so the norm counts.
            assert (mine - expected).norm() <= 2.0**-6 * expected.norm()


# ---- What is kept between steps ---------------------------------------------------------------


def assert_copies_are_of(model):
    weights = [w for w in model.layer_weights() if w.qk is not None]
    layers = model.fp8_attention.layers()
    assert len(layers) == len(weights) == model.config.num_attentions
    for layer, own in zip(layers, weights, strict=True):
        matrices = {"qkv": torch.cat([own.qk.flatten(0, 1), own.vo[0]]), "out": own.vo[1]}
        for name, matrix in matrices.items():
            copy = getattr(layer, name)
            assert_same_bits(copy.f8_DN, copy.f8_ND.mT.contiguous())
            error = (copy.f8_ND.float() * copy.scale - matrix.float()).abs()
            assert (error <= 2.0**-4 * matrix.abs().clamp(min=2.0**-6 * copy.scale)).all()


def test_copies_follow_the_weights():
    """Made anew where the optimizer has been, or anybody else, and only there."""
    base = small_config()
    model = a_model()
    optim = dataclasses.replace(base.optim, adam_table=(*base.optim.adam_table, *REST))
    optimizer = Optimizer(model.named_parameters(), optim, Comms(), model.named_buffers)
    snapshot = optimizer.snapshot()
    plans = [plan for plan in Schedule(base.schedule) if not plan.last][:3]
    for plan in plans:
        train_once(model, seed=plan.step)
        first = model.fp8_attention.weights
        assert_copies_are_of(model)
        model.refresh_fp8(down_own_amax=True)  # nothing has changed
        assert model.fp8_attention.weights is first
        optimizer.step(plan)
    optimizer.restore(snapshot)
    assert (model.fp8_attention.y_scale_A == 1).all()
    model.refresh_fp8(down_own_amax=True)
    assert_copies_are_of(model)
    for bank in (model.qk_bank, model.vo_bank):
        with torch.no_grad():
            bank[1].neg_()
        model.refresh_fp8(down_own_amax=True)
        assert_copies_are_of(model)


@pytest.mark.parametrize("i", [0, 2], ids=["plain", "xsa, gated, paired"])
def test_largest_output_is_known(i):
    """Of what the output weights multiply: of y behind XSA and gate, whatever the scale."""
    model = a_model(CHOICES["output"])
    model.refresh_fp8(down_own_amax=True)
    weights = model.layer_weights()[i]
    identity = torch.stack([weights.vo[0], torch.eye(D, dtype=BF16)])
    y, _ = attend_alone(model, i, None, weights._replace(vo=identity, lambda_o=None))
    for scale in (1.0, 1e-3):
        layer = model.fp8_attention.layers()[i // 2]
        layer.y_scale = torch.tensor(scale)
        attend_alone(model, i, layer)
        assert layer.y_amax == y.abs().max()


def test_each_micro_batch_sets_the_next_ones_scale():
    """1 at first; then by the forward pass before, also within a step."""
    model, scales = a_model(), []
    for seed in (1, 2, 1):
        train_once(model, seed)
        scales.append(model.fp8_attention.y_scale_A.clone())
    # A layer's input depends on the scales of the layers before it, but the first one's doesn't.
    assert scales[0][0] == scales[2][0] != scales[1][0]
    assert (scales[0] != 1).all() and scales[0][0] != scales[0][1]


def test_validation_knows_no_fp8():
    plain, model = a_model(AttentionConfig()), a_model()
    batch = a_batch(model)
    with torch.no_grad():
        losses = [m.validation_loss(batch, m.plan_windows(batch, WINDOWS)) for m in (plain, model)]
    assert losses[0] == losses[1]
    assert (model.fp8_attention.y_scale_A == 1).all()


def test_training_begins_with_a_refresh():
    model = a_model()
    batch = a_batch(model)
    with pytest.raises(RuntimeError, match="refresh_fp8 begins each step"):
        model.training_loss(batch, model.plan_windows(batch, WINDOWS), LossWeights())


def test_nothing_to_keep():
    assert a_model(AttentionConfig(dx="fp8")).fp8_attention is None
    assert a_model(layers=LayerSpec.parse_many("none,none")).fp8_attention is None


# ---- The whole model --------------------------------------------------------------------------


@pytest.mark.parametrize("qk_head_dim", [None, 24], ids=["", "narrow"])
def test_every_technique_trains_near_bf16(qk_head_dim):
    changes = dict(
        layers=LayerSpec.parse_many(EVERY_ROLE),
        smear=True,
        residual_lambdas=True,
        qk_head_dim=qk_head_dim,
    )
    plain, model = (a_model(attention, **changes) for attention in (AttentionConfig(), BOTH))
    losses = [[train_once(m) for _ in range(2)] for m in (plain, model)]
    assert losses[0][0] == losses[0][1]
    for loss in losses[1]:
        assert loss != losses[0][0] and loss == pytest.approx(losses[0][0], rel=0.01)
    for (name, parameter), same in zip(model.named_parameters(), plain.parameters(), strict=True):
        found, expected = (p.grad.double().flatten() for p in (parameter, same))
        assert found.isfinite().all()
        if found.numel() > 1:
            assert torch.cosine_similarity(found, expected, 0) > 0.9, name


def test_compiled_layers_compute_the_same():
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = a_model()
        if compiled:
            function = torch.compile(layer_forward, fullgraph=True, backend="aot_eager")
            model.layer_functions = dict.fromkeys(model.layers, function)
        losses = [train_once(model, seed) for seed in (0, 1)]
        grads = [model.qk_bank.grad, model.vo_bank.grad, model.lambda_o.grad]
        results.append([*grads, model.fp8_attention.y_scale_A, torch.tensor(losses)])
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(compiled, eager)
