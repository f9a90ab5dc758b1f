"""--compile: each kind of layer once, or the whole trunk; the same numbers as without."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from speedrun.batch import LossWeights
from speedrun.config import LayerSpec, Windows
from speedrun.model import GPT
from train_helpers import make_batch, normal, small_config

CONFIG = dataclasses.replace(
    small_config().model,
    smear=True,
    key_offset=True,
    gates="network",
    residual_lambdas=True,
    attention_lambdas=True,
)
# Two kinds of layer, one of them twice; and every role.
FEW = "short,long+xsa+post,long+xsa+post"
ALL = "short+paired+ve+xsa+save,long+ve+gated+dc+mudd+shared+skip+post"


def losses_and_gradients(layers, mode):
    torch._dynamo.reset()
    config = dataclasses.replace(CONFIG, layers=LayerSpec.parse_many(layers))
    model = GPT(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * normal(parameter.numel(), seed=i).view(parameter.shape))
    model.compile(mode)
    losses = []
    for seed in (0, 1):
        batch = make_batch(CONFIG, 2, [0, 5, 6, 19], seed=seed)
        plan = model.plan_windows(batch, Windows(3, 7))
        loss = model.training_loss(batch, plan, LossWeights((1.0, 0.5)))
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("layers", "mode", "graphs"),
    [
        (FEW, "regional", 2),
        pytest.param(ALL, "regional", 2, marks=SLOW),
        pytest.param(ALL, "full", 1, marks=SLOW),
    ],
)
def test_compiled_numbers(layers, mode, graphs):
    """One compilation a kind, no break in the graph, none again for the second batch.

    float32: a compiler sums in another order, some hundred ulps in three layers.
    """
    losses, gradients = losses_and_gradients(layers, "off")
    counters.clear()
    compiled_losses, compiled_gradients = losses_and_gradients(layers, mode)
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            compiled_gradients[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item()
        )
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs
