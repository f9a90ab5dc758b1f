"""Forward and backward passes as graphs: launches once recorded do the work of every later pass."""

import dataclasses
import math
import warnings

import pytest
import torch

from numerics import assert_same_bits
from recorded_graphs import RecordedGraphs
from speedrun import cli
from speedrun.batch import MicroBatch
from speedrun.comms import Comms
from speedrun.config import AdamRow, AttentionConfig, HeadConfig, LayerSpec, Stage
from speedrun.data import BatchShape
from speedrun.model import GPT
from speedrun.nonfinite import find
from speedrun.optim import Optimizer
from speedrun.passes import PassGraphs, forward_backward
from speedrun.schedule import Schedule
from speedrun.sources import made_up_batch
from speedrun.step_graph import StepGraphs
from train_helpers import make_batch, small_config, tiny_sets, write_text

CPU = torch.device("cpu")
BASE = small_config()
# Every role of a layer, and every technique that a pass computes.
MODEL = dataclasses.replace(
    BASE.model,
    layers=LayerSpec.parse_many("short+paired+ve+xsa+save,long+ve+gated+dc+mudd+shared+skip+post"),
    smear=True,
    key_offset=True,
    gates="network",
    residual_lambdas=True,
    attention_lambdas=True,
    attention=AttentionConfig(qkv="fp8", out="fp8", x_scale="static"),
    head=HeadConfig(fp8=True),
)
# Weights that change in each step, a window that grows, other shapes behind that.
SCHEDULE = dataclasses.replace(
    BASE.schedule,
    num_steps=8,
    adam_interval=2,
    stages=(
        Stage(512, 16, 3, 7, multi_token_weights=((1, 1), (0.5, 0.1)), prefix_weight=(0.3, 0.2)),
        Stage(1024, 24, 4, 14),
    ),
    extension_steps=0,
    extension=None,
    untie_frac=0.4,
    yarn=True,
    fp8_down_own_amax_steps=2,
)
# Of a pass: FP8, and the form of its head.
PRECISIONS = [
    pytest.param(False, "logits", id="fp32"),
    pytest.param(True, "logits", id="fp8"),
    pytest.param(True, "fused", id="fp8-fused-head"),
]
TABLE = torch.arange(-1, MODEL.padded_vocab_size - 1)
STARTS = {0: [[0, 5, 6, 19, 32], [0, 16, 17, 30, 32]], 1: [[0, 24, 25, 47, 64], [0, 3, 20, 44, 64]]}


def model_and_optimizer(fp8, sparse, config=MODEL, device=CPU):
    model = GPT(config, torch.bfloat16 if fp8 else torch.float32, fp8)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("bank", "embed", "lm_head")):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.to(device)
    names = {row.name for row in (*BASE.optim.muon_table, *BASE.optim.adam_table)}
    others = [AdamRow(n, 0.9, 0.95) for n, _ in model.named_parameters() if n not in names]
    table = [
        dataclasses.replace(row, sparse=sparse and row.name == "bigram_embed")
        for row in BASE.optim.adam_table
    ]
    optim = dataclasses.replace(
        BASE.optim, adam_table=(*table, *others), sparse_rows_threshold=int(sparse)
    )
    optimizer = Optimizer(model.named_parameters(), optim, Comms(), model.named_buffers)
    return model, optimizer


def batches_of(plan, config=MODEL, device=CPU):
    """Two micro-batches, in documents of their own."""
    for i, starts in enumerate(STARTS[plan.stage]):
        batch = make_batch(config, 1, starts, seed=10 * plan.step + i)
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        values |= {n: t.to(device) for n, t in values.items() if isinstance(t, torch.Tensor)}
        yield MicroBatch(**values | {"max_seqlen": 24 if plan.stage else 16})


def train(fp8, sparse, graphs=None, config=MODEL, device=CPU):
    """Losses of each step, and the state behind the last one."""
    model, optimizer = model_and_optimizer(fp8, sparse, config, device)
    table = TABLE.to(device)
    passes = None if graphs is None else PassGraphs(model, optimizer, graphs)
    losses = []
    for plan in Schedule(SCHEDULE):
        if not plan.last:
            batches = list(batches_of(plan, config, device))
            losses.append(forward_backward(model, optimizer, batches, plan, table, passes))
            optimizer.step(plan)
    return losses, optimizer.snapshot()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("fp8", "form"), PRECISIONS)
def test_replayed_passes_are_the_passes(fp8, form, sparse):
    """Bit for bit, over two stages: a replay finds the new batch, weights of the loss, FP8 copies
    and scales where the old ones were, and leaves gradients and scales where they belong."""
    graphs = RecordedGraphs()
    config = dataclasses.replace(MODEL, head=HeadConfig(form=form))
    losses, state = train(fp8, sparse, None, config)
    replayed_losses, replayed_state = train(fp8, sparse, graphs, config)
    assert len(graphs.graphs) == 2  # a stage
    assert len(graphs.replayed) == 2 * SCHEDULE.num_steps - 2
    assert [x.item() for x in replayed_losses] == [x.item() for x in losses]
    for found, expected in zip(replayed_state, state, strict=True):
        assert_same_bits(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("fp8", "form"), PRECISIONS)
def test_cuda_graphs(fp8, form):
    """The same on a GPU, of the kernels that serve there."""
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    sizes = dict(model_dim=64, num_heads=4, head_dim=16, mlp_hidden=128, bigram_dim=16)
    config = dataclasses.replace(MODEL, head=HeadConfig(form=form), **sizes)
    place = (config, torch.device("cuda"))
    graphs = StepGraphs("cuda_graph")
    losses, state = train(fp8, True, None, *place)
    replayed_losses, replayed_state = train(fp8, True, graphs, *place)
    assert len(graphs.graphs) == 2 and all(graphs.graphs.values())
    assert [x.item() for x in replayed_losses] == [x.item() for x in losses]
    for found, expected in zip(replayed_state, state, strict=True):
        assert_same_bits(found.cpu(), expected.cpu())


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [(40, [0, 16, 32, 40, 40]), (9, [0, 9, 9, 9, 9]), (70, [0, 16, 32, 48, 70])],
)
def test_the_warm_up_has_documents_as_training_has(tokens, starts):
    """None longer than the stage allows, so that its graphs are those of training; but the last
    one, of a part for whose documents there are too few entries."""
    made_up = made_up_batch(BASE, BatchShape(1, tokens, 16, 5), 29, world_size=4, seed=0)
    assert made_up.inputs.shape == (2, tokens)
    assert made_up.cu_seqlens.tolist() == [starts, starts]


def test_who_watches_operators_sees_a_pass():
    """A replay would show none: the step is run launch by launch."""
    model, optimizer = model_and_optimizer(fp8=False, sparse=False)
    graphs = PassGraphs(model, optimizer, RecordedGraphs())
    plan = Schedule(SCHEDULE).plan(0)
    inputs = (model, optimizer, list(batches_of(plan)), plan, TABLE, graphs)
    forward_backward(*inputs)
    assert graphs.graphs.replayed
    with torch.no_grad():
        model.w_smear[0] = float("nan")
    found = find(model, lambda: forward_backward(*inputs))
    assert found.first == "parameter w_smear (12,) float32 has NaN"
    assert found.rows[0].part == "embedding" and math.isnan(found.rows[0].largest)


def test_a_document_longer_than_the_plan_says():
    model, optimizer = model_and_optimizer(fp8=False, sparse=False)
    graphs = PassGraphs(model, optimizer, RecordedGraphs())
    plan = Schedule(SCHEDULE).plan(0)
    batch = dataclasses.replace(next(batches_of(plan)), max_seqlen=17)
    with pytest.raises(ValueError, match=r"a document of 17 tokens, .* max_seq_len=16"):
        forward_backward(model, optimizer, [batch], plan, None, graphs)


@pytest.mark.parametrize("setting", ["cuda_graph", "optim.cuda_graph"])
def test_a_run_without_a_gpu_says_that_there_are_no_graphs(tmp_path, monkeypatch, capsys, setting):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    sets = tiny_sets(**{setting: "true", "schedule__num_steps": 2, "schedule__val_interval": 2})
    words = ["--text", "text.txt", "--out", "run", "--device", "cpu", "--keep", "0", *sets]
    with warnings.catch_warnings():  # train has a way of its own to show them
        assert cli.main(["train", *words]) == 0
    assert "cuda_graph is for GPUs" in capsys.readouterr().out
