"""`speedrun explain`: parameters, work, memory and messages against hand counts and real runs."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from speedrun import estimate, recipes
from speedrun.batch import LossWeights
from speedrun.commands.explain import explain
from speedrun.config import AttentionConfig, BaselineConfig, HeadConfig, LayerSpec, Windows
from speedrun.estimate import Precision, Work
from speedrun.model import GPT
from speedrun.ops.attention import plan_attention
from speedrun.schedule import Schedule
from train_helpers import make_batch, small_config, train

FLOAT32, BF16 = Precision(torch.float32, False), Precision(torch.bfloat16, False)
RECIPE = Precision(torch.bfloat16, True)
V = 50_304


def with_vocabulary(config, vocab_size=50_257):
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size)
    )


def small_record(**changes):
    """A model with every technique."""
    model = with_vocabulary(recipes.load("record_089"), 77).model
    sizes = dict(
        model_dim=32,
        num_heads=4,
        head_dim=8,
        mlp_hidden=48,
        vocab_multiple=16,
        bigram_rows=31,
        bigram_dim=12,
        sign_rows=8,
        dc_window=6,
        gate_hidden=5,
    )
    return dataclasses.replace(model, **(sizes | changes))


def test_parameters_of_record_089():
    """RECIPE section 3."""
    config = with_vocabulary(recipes.load("record_089"))
    rows = estimate.parameter_rows(estimate.meta_model(config.model, RECIPE), config.optim)
    by_name = {row.name: row for row in rows}
    shapes = {
        "embed": (V, 768),
        "lm_head": (768, V),
        "value_embeds": (5, V, 768),
        "bigram_embed": (377_280, 768),
        "qk_bank": (60, 256, 768),
        "vo_bank": (20, 768, 768),
        "mlp_bank": (22, 3072, 768),
        "w_smear": (12,),
        "ve_gate": (4, 6, 12),
        "lambda_skip": (),
    }
    small = {"gate_pre": 26, "gate_post": 41, "mudd_layer": 14, "mudd_out": 5}
    for net, outputs in small.items():
        shapes |= {f"{net}_W1": (64, 768), f"{net}_W2": (outputs, 64), f"{net}_c": (outputs,)}
    for name, shape in shapes.items():
        assert by_name[name].shape == shape, name
        assert by_name[name].count == torch.Size(shape).numel()
        size = 4 if name == "lambda_skip" else 2
        assert by_name[name].num_bytes == size * by_name[name].count
    assert sum(row.count for row in rows) == (
        7 * V * 768
        + 377_280 * 768
        + 10 * 4 * 768 * 768  # attention
        + 11 * 2 * 768 * 3072  # MLP
        + 4 * 64 * 768  # networks
        + (26 + 41 + 14 + 5) * (64 + 1)
        + 12  # smear
        + 4 * 6 * 12  # value embeddings' gates
        + 6 * 11  # lambda_qkv, lambda_o, r and p of attention and MLP
        + 3  # lambda_smear, lambda_skip, s
    )
    assert by_name["mlp_bank"].rule == "normuon, lr × 1, 2"
    assert by_name["value_embeds"].rule == "adam 0.75 0.95, lr × 75, decay × 5"
    assert (by_name["gate_pre_c"].kind, by_name["qk_bank"].kind) == ("replicated", "matrices")


def counted_flops(work):
    """What it returns, and the FLOPs of matrix products in it, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    counts = {op.__name__: n for op, n in counter.get_flop_counts()["Global"].items()}
    return result, sum(n for op, n in counts.items() if op.startswith(("mm", "addmm", "mv")))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gates": "constant"},
        {"mudd": False},
        {"smear": False, "value_embeds": False},
        {"qk_head_dim": 4},
    ],
    ids=str,
)
def test_products_against_torch(changes):
    """Exactly, forward and backward, of every product with a weight."""
    config = small_record(**changes)
    model = GPT(config)
    model.init_weights(0)
    num_tokens = 24
    batch = make_batch(config, 1, [0, 10, num_tokens])
    plan = model.plan_windows(batch, Windows(4, 8))
    loss, forward = counted_flops(lambda: model.training_loss(batch, plan, LossWeights((1.0,))))
    _, backward = counted_flops(loss.backward)
    gemms = estimate.gemms(estimate.meta_model(config, FLOAT32), FLOAT32)
    work = sum((estimate.gemm_work(gemm, num_tokens, FLOAT32) for gemm in gemms), Work())
    assert (forward, backward) == (
        num_tokens * work.forward_flops,
        num_tokens * work.backward_flops,
    )


@pytest.mark.parametrize("paired", [1, 2])
@pytest.mark.parametrize("window", [0, 3, 15, 16, 40])
def test_mean_keys_against_the_mask(paired, window):
    length = 16 * paired
    ends = torch.tensor([0, length], dtype=torch.int32)
    mask = plan_attention(ends, length, window, torch.float32)
    keys = (mask.bias_B1wx == 0).flatten(0, 2).sum(1)[:length].sum().item()
    assert estimate.mean_keys(length, window) * length == pytest.approx(keys, rel=1e-12)


def test_attention_by_hand():
    """H 2, K 8: 4·16 FLOPs a key. A document of 4: windows of 1 show 7 keys, of 2 show 9."""
    layers = LayerSpec.parse_many("short,short+paired,none,long+dc")
    config = dataclasses.replace(small_config().model, layers=layers, gates="constant", dc_window=2)
    work = estimate.attention_work(config, Windows(1, 2), 4, BF16)
    once = 4 * 16 * 2  # q, k, v, y
    assert work == {
        "attention: short, 1 back": Work(64 * 7 / 4, 2 * 64 * 7 / 4, once, 2 * once),
        # A sequence of 8 in which each query sees itself and one more, but the first.
        "attention: short, 1 back, paired": Work(64 * 15 / 8, 2 * 64 * 15 / 8, once, 2 * once),
        "attention: long, 2 back": Work(64 * 9 / 4, 2 * 64 * 9 / 4, once, 2 * once),
        "attention: DC": Work(68 * 7 / 4, 2 * 68 * 7 / 4, once, 2 * once),
    }
    narrow = dataclasses.replace(config, qk_head_dim=4)  # 2·8 + 2·16 FLOPs a key
    work = estimate.attention_work(narrow, Windows(1, 2), 4, BF16)
    once = (2 * 8 + 2 * 16) * 2
    assert work["attention: short, 1 back"] == Work(48 * 7 / 4, 2 * 48 * 7 / 4, once, 2 * once)
    assert work["attention: DC"] == Work(52 * 7 / 4, 2 * 52 * 7 / 4, once, 2 * once)


def test_bytes_of_a_product_by_hand():
    gemm = estimate.Gemm("", 3, 10, 20, forward_bytes=1, dx_bytes=2, dw_bytes=2)
    assert estimate.gemm_work(gemm, 100, RECIPE) == Work(
        2 * 600,
        4 * 600,
        30 * 1 + 6 * 1 + 60 * 2,  # x and W in FP8, y in bf16
        (60 + 6 + 30) * 2 + (60 + 30 + 6) * 2,  # dY, W, dX; dY, x, dW
    )


def test_types_of_the_products():
    model = estimate.meta_model(small_record(), RECIPE)

    def sizes(precision):
        return {gemm.group: gemm[-3:] for gemm in estimate.gemms(model, precision)}

    recipe = sizes(RECIPE)
    assert recipe["MLP: up"] == recipe["MLP: down"] == (1, 2, 2)
    assert (recipe["head"], recipe["attention: QKV"]) == ((1, 1, 1), (2, 2, 2))
    assert set(sizes(BF16).values()) == {(2, 2, 2)}
    assert set(sizes(FLOAT32).values()) == {(4, 4, 4)}
    attention = AttentionConfig(qkv="fp8", dx="fp8")
    model = estimate.meta_model(small_record(attention=attention), RECIPE)
    assert sizes(RECIPE)["attention: QKV"] == (1, 1, 2)
    assert sizes(RECIPE)["attention: output"] == (2, 2, 2)
    model = estimate.meta_model(small_record(attention=AttentionConfig(out="fp8")), RECIPE)
    assert sizes(RECIPE)["attention: output"] == (1, 2, 2)
    assert set(sizes(BF16).values()) == {(2, 2, 2)}


def test_rows_of_tables_by_hand():
    """Embedding 32, five value embeddings 32, bigram 12 numbers: read and written; then dY too."""
    model = estimate.meta_model(small_record(), BF16)
    numbers = 32 + 5 * 32 + 12
    assert estimate.lookup_work(model, BF16) == Work(0, 0, 2 * 2 * numbers, 3 * 2 * numbers)


def test_the_baseline_model():
    """Parameters and work of the track `optimization`."""
    config = with_vocabulary(recipes.load("optimization"))
    precision = Precision.of(config)
    assert precision == BF16
    model = estimate.meta_model(config.model, precision)
    weights = sum(gemm.num_weights for gemm in estimate.gemms(model, precision))
    assert weights == 12 * 12 * 768 * 768 + 768 * V
    work = estimate.attention_work(config.model, Windows(1024, 1024), 1024, precision)
    assert sum(w.forward_flops for w in work.values()) == 12 * 4 * 768 * (1024 + 1) / 2
    assert isinstance(config.model, BaselineConfig)


def saved_numbers(model, batch, windows):
    """What autograd keeps of a forward pass, in numbers, besides parameters and logits."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        if x.is_floating_point() and model.config.padded_vocab_size not in x.shape:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no address comes twice
        return x

    plan = model.plan_windows(batch, windows)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.training_loss(batch, plan, LossWeights((1.0,)))
    assert loss.requires_grad
    return sum(x.untyped_storage().nbytes() // 4 for at, x in kept.items() if at not in known)


@pytest.mark.parametrize("layers", ["short*3", None], ids=["plain", "record"])
def test_activations_against_autograd(layers):
    """Eager kernels keep more than the estimate's, and not twice as much (measured: 1.3, 1.6)."""
    config = small_record()
    if layers:
        off = dict(smear=False, gates="none", residual_lambdas=False, attention_lambdas=False)
        config = small_record(layers=LayerSpec.parse_many(layers), bigram_rows=0, **off)
        config = dataclasses.replace(config, bigram_dim=0, sign_rows=0)
    model = GPT(config)
    model.init_weights(0)
    num_tokens = 64
    kept = saved_numbers(model, make_batch(config, 1, [0, num_tokens]), Windows(4, 8))
    estimated = num_tokens * estimate.activation_numbers(config)
    assert estimated < kept < 2 * estimated


def test_memory_by_hand():
    """Two layers of D 16, F 24, H 2; V 32, 31 bigram rows of 12, 8 sign rows; at most 1,024 tokens
    a step."""
    config = small_config(precision="recipe", micro_batch_parts=2)
    model = estimate.meta_model(config.model, RECIPE)
    attention, mlp, head, bigram = 2 * 4 * 16 * 16, 2 * 2 * 24 * 16, 16 * 32, 31 * 12
    weights = attention + mlp + 2 * head + bigram
    # Momentum and low bits, the second moment of each row or column; two moments and t of Adam.
    second = 4 * (4 * 16 + 4 * 16 + 4 * 24)
    normuon = (4 + 2) * (attention + mlp) + second
    adam = 2 * 4 * (2 * head + bigram) + 3 * 8
    num_tokens = 1024 // 8 * 2
    memory = estimate.memory_bytes(config, model, RECIPE, world_size=1)
    numbers = 4 * 16 + 2 * 12 + 2 * (8 * 16 + 2 * 16 + 24)
    assert memory == {
        "parameters": 2 * weights,
        "gradients": 2 * weights,
        "optimizer state": normuon + adam,
        "fixed tables": 2 * 8 * 12,
        "FP8 weights": mlp + 2 * head,
        "activations": 2 * num_tokens * numbers,
        "logits": (2 + 2) * num_tokens * 32,  # bf16, and their gradient in two layouts
    }
    fused = dataclasses.replace(config.model, head=HeadConfig(form="fused"))
    assert estimate.head_bytes(fused, num_tokens, RECIPE) == 2 * num_tokens * 32
    fp8 = estimate.fp8_copies_bytes(estimate.meta_model(fused, RECIPE), RECIPE)
    assert fp8 == memory["FP8 weights"] + 2 * head  # a copy in bf16
    for switches, copies in (
        (dict(qkv="fp8", out="fp8", dx="fp8"), 2 * attention),  # row by row and transposed
        (dict(qkv="fp8"), 3 * attention // 4),
        (dict(out="fp8"), attention // 4),
    ):
        changed = dataclasses.replace(config.model, attention=AttentionConfig(**switches))
        fp8 = estimate.fp8_copies_bytes(estimate.meta_model(changed, RECIPE), RECIPE)
        assert fp8 == memory["FP8 weights"] + copies
    two = estimate.memory_bytes(config, model, RECIPE, world_size=2)
    # Two matrices of four on each rank, half of the head's rows; the bigram table is small: whole.
    assert two["optimizer state"] == normuon // 2 + 4 * (2 * head) + 8 * bigram + 3 * 8
    assert two["activations"] == memory["activations"]
    eight = estimate.memory_bytes(config, model, RECIPE, world_size=8)
    assert eight["activations"] == memory["activations"] // 2


def test_memory_without_fp8():
    """Float32 logits in chunks, with a sum of the weight's gradient beside them."""
    config = with_vocabulary(recipes.load("record_089")).model
    rows = (1 << 26) // V
    assert estimate.head_bytes(config, rows, BF16) == 2 * rows * V * 4
    assert estimate.head_bytes(config, rows + 1, BF16) == 2 * rows * V * 4 + 768 * V * 4
    assert estimate.fp8_copies_bytes(estimate.meta_model(config, BF16), BF16) == 0


def test_messages_by_hand():
    config = small_config()
    rows = [
        dataclasses.replace(row, sparse=row.name == "bigram_embed")
        for row in config.optim.adam_table
    ]
    optim = dataclasses.replace(
        config.optim, adam_table=tuple(rows), replicate_below=300, sparse_rows_threshold=31
    )
    config = dataclasses.replace(config, optim=optim)
    model = estimate.meta_model(config.model, FLOAT32)
    plan = dataclasses.replace(Schedule(config.schedule).plan(1), tied=False)
    assert plan.adam and plan.tokens_per_step == 512
    banks, head, row = 4 * (2 * 4 * 16 * 16 + 2 * 2 * 24 * 16), 4 * 16 * 32, 4 * 12
    both_ways = banks + 2 * head  # a rank of two sends half of what it sums, or collects
    # 31 rows are 16 and 15, padded to 32; it touched at most the 15 of the other rank.
    assert estimate.step_messages(config, model, plan, 2) == {
        "reduce_scatter": both_ways // 2,
        "all_gather": both_ways // 2 + 32 * row // 2,
        "all_to_all": 8 + 15 * (4 + row),
    }
    few_tokens = dataclasses.replace(plan, tokens_per_step=8)
    # 8 tokens in each of two steps, on two ranks: 8 rows.
    messages = estimate.step_messages(config, model, few_tokens, 2)
    assert messages["all_to_all"] == 8 + 8 * (4 + row)
    without = dataclasses.replace(plan, adam=False)
    assert estimate.step_messages(config, model, without, 2) == {
        "reduce_scatter": banks // 2,
        "all_gather": banks // 2,
    }
    assert not estimate.step_messages(config, model, plan, 1)


def test_report_of_record_089():
    report = explain(recipes.load("record_089"), world_size=8)
    stages = report["stages"]
    assert [(stage["first_step"], stage["last_step"]) for stage in stages] == [
        (0, 422),
        (423, 846),
        (847, 1269),
        (1270, 1284),
    ]
    assert report["total_tokens"] == 423 * 131_072 + 424 * 262_144 + 438 * 393_216
    assert report["total_flops"] == pytest.approx(
        sum(
            (stage["last_step"] - stage["first_step"] + 1)
            * stage["tokens_per_step"]
            * stage["flops_a_token"]
            for stage in stages
        )
    )
    assert stages[1]["windows"] == [384, 896] and stages[1]["lr"][0] == 1.52
    assert stages[0]["multi_token_weights"][0] == [1, 0.5, 0.25]
    assert stages[1]["prefix_weight"] == [0.25, pytest.approx(0.25 / 424)]
    kinds = [(row["first_step"], row["adam"], row["tied"]) for row in report["messages"]]
    assert (
        (849, True, False) in kinds and (848, False, False) in kinds and (0, False, True) in kinds
    )


def run_explain(folder, *words):
    return train(folder, "explain", *words, module="speedrun.cli")


def test_command(tmp_path):
    run = run_explain(tmp_path, "--recipe", "tiny", "--steps", "10", "--world-size", "2")
    assert run.code == 0, run.err
    for text in ("tiny: 10 steps, 2 GPUs, ", "bigram_embed", "MLP: up", "optimizer state", "0-3"):
        assert text in run.out, text
    run = run_explain(tmp_path, "--recipe", "tiny", "--json", "--set", "model.model_dim=256")
    assert run.code == 1 and "model.model_dim=256: must be num_heads * head_dim" in run.err
    assert "Traceback" not in run.err
    run = run_explain(tmp_path, "--recipe", "tiny", "--json", "--set", "precision=float32")
    report = json.loads(run.out)
    assert (report["dtype"], report["fp8"], report["padded_vocab_size"]) == ("float32", False, 272)
    assert list(tmp_path.iterdir()) == []
