"""The optimizer's step as a graph: launches once recorded do the work of every later step."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from numerics import assert_same_bits
from recorded_graphs import RecordedGraphs, Recording
from speedrun.comms import Comms
from speedrun.config import AdamRow, MuonRow, OptimConfig
from speedrun.optim import Optimizer
from speedrun.schedule import Schedule
from speedrun.step_graph import StepGraphs
from train_helpers import SPLIT_PLANS, add_gradients, normal

PLANS = Schedule(dataclasses.replace(SPLIT_PLANS.config, num_steps=12))  # split behind step 5

CONFIG = OptimConfig(
    muon_table=(MuonRow("wide_bank"), MuonRow("tall_bank", lr_muls=(1.0, 2.0)), MuonRow("square")),
    adam_table=(
        AdamRow("lm_head", 0.5, 0.95, wd_mul=150.0),
        AdamRow("embed", 0.5, 0.95, wd_mul=150.0),
        AdamRow("table", 0.75, 0.95, lr_mul=75.0, wd_mul=5.0, sparse=True),
        AdamRow("small_*", 0.9, 0.99, lr_mul=5.0, moments="bf16"),
    ),
)
SHAPES = {
    "wide_bank": (3, 4, 6),
    "tall_bank": (2, 9, 4),
    "square": (2, 4, 4),
    "embed": (7, 6),
    "lm_head": (6, 7),
    "table": (15, 4),
    "small_a": (5,),
    "small_b": (),
}


def run(config, dtype, num_steps, graphs=None):
    """Weights and state after the steps, from gradients that differ in every step."""
    parameters = {
        name: nn.Parameter(normal(*shape, seed=i, dtype=dtype))
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    optimizer = Optimizer(parameters.items(), config, Comms())
    optimizer.graphs = graphs
    if graphs is not None:
        optimizer.keep_gradients()
    for step in range(num_steps):
        gradients = {
            name: normal(*shape, seed=100 * step + i, dtype=dtype)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        gradients["table"][step % 15 :] = 0  # so that its rows are seen one after the other
        add_gradients(parameters, gradients)
        optimizer.step(PLANS.plan(step))
    return optimizer.snapshot()


RULES = {
    "record": {},
    "nearest": {"weight_rounding": "nearest", "cautious_decay": False},
    "gram": {
        "normuon": dataclasses.replace(CONFIG.normuon, polar_form="gram", polar_precision="fp16")
    },
    "s4": {"normuon": dataclasses.replace(CONFIG.normuon, polar_norm="s4")},
    "muon": {"matrix_rule": "muon", "vector_rule": "adamw"},
    "adamw": {"matrix_rule": "adamw", "vector_rule": "adamw"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_replayed_steps_are_the_steps(rule, dtype):
    """Across the split, bit for bit: nothing that changes from step to step is in the launches."""
    config = dataclasses.replace(CONFIG, **RULES[rule])
    graphs = RecordedGraphs()
    plain, replayed = run(config, dtype, 12), run(config, dtype, 12, graphs)
    assert set(graphs.replayed) == {(False, True), (True, True), (False, False), (True, False)}
    for expected, found in zip(plain, replayed, strict=True):
        assert_same_bits(found, expected)


def test_a_constant_of_the_host_is_noticed():
    """This file's graph is one: a number that changes behind the device's back stays as it was."""
    rate, x = 1.0, torch.zeros(2)
    with Recording() as graph:
        x += rate
    rate = 2.0
    graph.replay()
    assert x.tolist() == [2.0, 2.0]
    with pytest.raises(AssertionError, match="the host reads a number"), Recording():
        x[0].item()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("not permitted"), r"captured .*\(not permitted\).* --set some=false"),
        (torch.OutOfMemoryError("400 MiB"), "^400 MiB$"),
    ],
)
def test_what_cannot_be_captured_says_how_to_go_on(monkeypatch, error, message):
    """The work of a kind's second run fails, as what waits for the device does."""

    @contextlib.contextmanager
    def graph(*args, **options):
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    graphs, errors = StepGraphs("some"), iter([None, error])

    def work():
        if found := next(errors):
            raise found

    graphs.run("kind", work)
    with pytest.raises(RuntimeError, match=message):
        graphs.run("kind", work)
