"""`record_089` at full size on a CPU: real tokens, every technique, FP8, one step of training."""

import dataclasses
import math
import resource
import sys

import numpy as np
import pytest
import torch

from speedrun import recipes
from speedrun.batch import LossWeights
from speedrun.comms import Comms
from speedrun.model import GPT
from speedrun.optim import Optimizer
from speedrun.prefix_table import build_prefix_table
from speedrun.schedule import Schedule
from speedrun.tokenizer import GPT2Tokenizer
from train_helpers import micro_batch

TOKENS = 1024
BOS = 50256


@pytest.mark.slow
def test_one_step(shared_data):
    """The first loss is a guess's; every parameter has a finite gradient, and the large ones move.

    Seen: 15 GB of memory at most, 1.3 of them the copy that this test keeps.
    """
    recipe = recipes.load("record_089")
    config = dataclasses.replace(recipe.model, vocab_size=50257)
    model = GPT(config, torch.bfloat16, fp8=True)
    model.init_weights(0)
    shard = shared_data / "fineweb_sample" / "fineweb_legal_train_000001.bin"
    tokens = np.fromfile(shard, np.uint16, count=100_000, offset=1024)
    tokens = tokens[np.flatnonzero(tokens == BOS)[0] :][: TOKENS + 1].astype(np.int32)
    starts = [*np.flatnonzero(tokens[:TOKENS] == BOS).tolist(), TOKENS]
    batch = micro_batch(config, tokens[None], starts)
    tokenizer = GPT2Tokenizer(shared_data / "gpt2_bpe" / "gpt2.tiktoken")
    prefixes = torch.from_numpy(build_prefix_table(tokenizer, config.padded_vocab_size))

    step = Schedule(recipe.schedule).plan(1)  # the first with an Adam update
    plan = model.plan_windows(batch, step.windows)
    with torch.no_grad():
        guess = model.validation_loss(batch, plan).item() / TOKENS
    assert guess == pytest.approx(math.log(config.padded_vocab_size), abs=0.02)

    optimizer = Optimizer(model.named_parameters(), recipe.optim, Comms(), model.named_buffers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.refresh_fp8(step.fp8_down_own_amax)
    weights = LossWeights(step.multi_token_weights, step.prefix_weight, prefixes)
    loss = model.training_loss(batch, plan, weights)
    (loss / 8).backward()
    assert loss.item() / TOKENS == pytest.approx(sum(weights.multi_token) * guess, rel=0.2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step(step)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # Others start behind a factor 0 (W1, w_smear), or move by less than a bf16 ulp.
    assert {"lm_head", "embed", "vo_bank", "mlp_bank", "value_embeds", "bigram_embed"} <= moved
    assert torch.equal(model.embed, model.lm_head.T)
    assert all(p.isfinite().all() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    print(f"peak memory {peak / 1e9:.1f} GB")
    assert peak < 20e9
