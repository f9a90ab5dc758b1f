"""`speedrun plan`: counts by hand, the measurements that its figures stand for, refusals."""

import argparse
import dataclasses
import json
import math
from collections import Counter

import pytest
import torch

from speedrun import estimate, hardware, recipes, roofline, traffic
from speedrun.commands import plan
from speedrun.config import (
    AttentionConfig,
    BaselineConfig,
    ConfigError,
    HeadConfig,
    LayerSpec,
    Windows,
)
from speedrun.estimate import Gemm, Precision, Work
from speedrun.optim import placements
from speedrun.plan_check import train_times, with_total_steps
from speedrun.record_logs import LogError
from speedrun.roofline import PARTS, Cluster
from speedrun.schedule import Schedule
from speedrun.sources import with_vocabulary
from train_helpers import small_config

BF16, RECIPE = Precision(torch.bfloat16, False), Precision(torch.bfloat16, True)
PEAKS = hardware.gpu_peaks("NVIDIA H100 80GB HBM3")
FIGURES = roofline.figures(PEAKS, 400.0, {})


def changed(figures, name, value):
    return figures | {name: dataclasses.replace(figures[name], value=value)}


def report_of(*words):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.make_report(parser.parse_args(words))


@pytest.fixture(scope="module", autouse=True)
def no_records(tmp_path_factory):
    """What the checkout's records hold changes with each measurement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "RECORDS", tmp_path_factory.mktemp("records"))
        yield


@pytest.fixture(scope="module")
def record():
    return report_of("--recipe", "record_089")


# What a figure was taken from must come out again: public measurements, all on H100 SXM.


def test_attention_takes_as_long_as_flash_attention_3():
    """4 causal sequences of 1,024 tokens, 48 heads of 128: 141.63 and 709.66 µs."""
    model = BaselineConfig(1, 48 * 128, 128, 1, vocab_size=1)
    windows = Windows(short=1024, long=1024)
    (work,) = estimate.attention_work(model, windows, 1024, BF16, roofline.tile_keys).values()
    forward, backward = roofline.attention_seconds(work, FIGURES)
    assert 4096 * forward == pytest.approx(141.63e-6, rel=0.02)
    assert 4096 * backward == pytest.approx(709.66e-6, rel=0.02)


@pytest.mark.parametrize(("size", "tflops"), [(1024, 564), (8192, 808)])
def test_products_are_as_fast_as_public_ones(size, tflops):
    """bf16, all sums of `size` terms, every SM busy."""
    gemm, cluster = Gemm("x", 1, size, size, 2, 2, 2), Cluster(1, 8, num_sms=64)
    seconds = roofline.product_seconds(gemm, size, BF16, cluster, FIGURES)
    assert 3 * 2 * size**3 / seconds == pytest.approx(tflops * 1e12, rel=0.06)


def test_bytes_move_as_fast_as_in_a_public_transpose():
    """49,152 × 50,304 bytes, read and written, in 1.768 ms."""
    assert FIGURES["memory"].value == pytest.approx(2 * 49152 * 50304 / 1.768e-3, rel=0.01)


def test_record_update_takes_what_traces_of_it_show(record):
    """1.1 ms a step on 8 GPUs."""
    assert record["stages"][0]["parts_seconds"]["matrix update"] == pytest.approx(1.1e-3, rel=0.05)


# Counts.


@pytest.mark.parametrize("length", [1, 100, 128, 129, 896, 1000])
@pytest.mark.parametrize("window", [0, 1, 127, 128, 129, 300, 5000])
def test_tile_keys_against_a_mask(length, window):
    """Tiles with at least one visible key, for documents in whole tiles."""
    size = 128 * math.ceil(length / 128)
    t, s = torch.arange(size)[:, None], torch.arange(size)
    visible = (s <= t) & (s >= t - window)
    tiles = visible.view(size // 128, 128, size // 128, 128).any(3).any(1)
    assert roofline.tile_keys(length, window) == 128 * tiles.sum().item() / len(tiles)


def test_tile_fill():
    assert roofline.tile_fill(128 * 12, 128 * 11, 132) == 1
    assert roofline.tile_fill(128 * 133, 1, 132) == 133 / 264  # a second wave of one tile
    assert roofline.tile_fill(1, 129, 132) == 2 / 132


def test_product_by_hand():
    """256 tokens, 2 products of 100 inputs and 300 outputs, FP8 only in the forward pass."""
    gemm, cluster = Gemm("x", 2, 100, 300, 1, 2, 2), Cluster(1, 8, num_sms=6)
    fast = changed(FIGURES, "memory", math.inf)
    fp8, bf16 = FIGURES["fp8"].value, FIGURES["bf16"].value
    flops = 2 * 256 * 2 * 100 * 300
    forward = flops / fp8 * 550 / 100  # 2 × 3 tiles on 6 SMs
    dx = flops / bf16 * 750 / 300 * 3  # 2 × 1 tiles
    dw = flops / bf16 * 706 / 256
    seconds = roofline.product_seconds(gemm, 256, RECIPE, cluster, fast)
    assert seconds == pytest.approx(forward + dx + dw)
    slow = changed(FIGURES, "memory", 1.0)
    x, y, w = 256 * 100, 256 * 300, 100 * 300
    moved = 2 * ((x + w) + 2 * y + 2 * (y + w + x) + 2 * (x + y + w))
    assert roofline.product_seconds(gemm, 256, RECIPE, cluster, slow) == pytest.approx(moved)


def record_places(world_size, **optim):
    config = with_vocabulary(recipes.load("record_089"))
    config = dataclasses.replace(config.optim, **optim)
    model = estimate.meta_model(with_vocabulary(recipes.load("record_089")).model, RECIPE)
    return config, {p.name: p for p in placements(model.named_parameters(), config, world_size)}


@pytest.mark.parametrize(("world_size", "own"), [(1, 22), (8, 3), (64, 1)])
def test_orthogonalisation_by_hand(world_size, own):
    config, places = record_places(world_size)
    n, m = 768, 3072
    flops = roofline.matrix_flops(places["mlp_bank"], config, world_size)
    # X Xᵀ and A² by one triangle, B X whole: n²m + n³ + 2n²m a step.
    assert flops == own * 5 * (n * n * m + n**3 + 2 * n * n * m)
    config, places = record_places(world_size, matrix_rule="muon")
    assert roofline.matrix_flops(places["mlp_bank"], config, world_size) == (
        own * config.muon.ns_steps * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)
    )


def test_gram_form_costs_less_for_long_sides_only():
    config, places = record_places(8)
    gram = dataclasses.replace(
        config, normuon=dataclasses.replace(config.normuon, polar_form="gram")
    )
    bank, square = places["mlp_bank"], places["vo_bank"]
    assert roofline.matrix_flops(bank, gram, 8) < 0.8 * roofline.matrix_flops(bank, config, 8)
    assert roofline.matrix_flops(square, gram, 8) == roofline.matrix_flops(square, config, 8)


def test_adam_bytes_by_hand():
    """A weight and its gradient in bf16, the weight written, two fp32 moments read and written."""
    _, places = record_places(8)
    assert roofline.vector_bytes(places["lm_head"], 8) == 768 * 50304 / 8 * (3 * 2 + 2 * 2 * 4)
    assert roofline.vector_bytes(places["gate_pre_W1"], 8) == 64 * 768 * 22  # on every GPU


def test_messages_by_hand():
    by = {name: FIGURES[name] for name in ("link", "network", "collective", "hop")}
    for name, value in (("link", 100.0), ("network", 10.0), ("collective", 3.0), ("hop", 0.5)):
        by = changed(by, name, value)
    sent = Counter(all_gather=600, all_to_all=50)
    of = roofline.message_seconds
    assert of(sent, 2, Cluster(8, 8, 1), by) == (6.5, 6.0)
    # On 3 machines the ring has 8 × 10 to the next one, and all_to_all a GPU's 10.
    assert of(sent, 2, Cluster(24, 8, 1), by) == (7.5 + 5.0, 2 * (3.0 + 2 * 0.5))
    assert of(Counter(), 2, Cluster(1, 8, 1), by) == (0, 0)


def test_passes_of_the_baseline_by_hand():
    """Two layers of D = 32, F = 128, in bf16."""
    found = traffic.between_products(BaselineConfig(2, 32, 16, 128, vocab_size=64), BF16)
    D, F = 32 * 2, 128 * 2
    moved = {group: (work.forward_bytes, work.backward_bytes) for group, work in found.items()}
    assert moved == {
        "embedding": (3 * D, 5 * D),  # read; itself and its norm. Two gradients and x; x, factor's
        "queries, keys, values": (2 * 6 * D, 2 * 8 * D),
        "residual streams": (4 * 4 * D, 4 * 7 * D),
        "relu²": (2 * 2 * F, 2 * 3 * F),
    }


@pytest.mark.parametrize(
    ("change", "forward", "backward"),
    [
        ({"xsa": True}, 3, 5),
        ({"gated": True}, 2, 3),
        ({"value_embed": True}, 1, 2),
        ({"dc": True}, 6, 14),
    ],
)
def test_passes_of_what_a_layer_has(change, forward, backward):
    model = small_config().model

    def moved(*layers):
        groups = traffic.between_products(dataclasses.replace(model, layers=layers), BF16).values()
        return [sum(g.forward_bytes for g in groups), sum(g.backward_bytes for g in groups)]

    plain, more = moved(LayerSpec()), moved(LayerSpec(**change))
    D = model.model_dim * 2
    assert [b - a for a, b in zip(plain, more, strict=True)] == [forward * D, backward * D]


ALL_FP8 = {name: "fp8" for name in traffic.MLP_PRODUCTS}


@pytest.mark.parametrize(
    ("kinds", "forward", "backward"),
    [
        # Read for the maximum and to be converted, written; relu² in FP8 from its product.
        ({"up": "fp8", "down": "fp8"}, 2 * 2 * 768 + 768 + 3072, 0),
        # Everything in two layouts; the gradient that comes in is read in bf16.
        (ALL_FP8, 2 * 2 * 768 + 2 * (768 + 3072), 2 * (3072 + 768) + 2 * 768),
    ],
)
def test_fp8_copies_by_hand(kinds, forward, backward):
    model = with_vocabulary(recipes.load("record_089")).model
    bf16 = dict.fromkeys(traffic.MLP_PRODUCTS, "bf16")
    mlp = dataclasses.replace(model.mlp, x_scale="current", **(bf16 | kinds))
    model = dataclasses.replace(model, mlp=mlp)
    found = traffic.between_products(model, RECIPE)["FP8 copies"]
    assert (found.forward_bytes, found.backward_bytes) == (11 * forward, 11 * backward)
    assert traffic.between_products(model, BF16)["FP8 copies"] == Work()


@pytest.mark.parametrize(
    ("changes", "roles", "forward", "backward"),
    [
        ({"qkv": "fp8"}, {}, 2 + 1, 0),  # read in bf16, written
        ({"qkv": "fp8", "x_scale": "current"}, {}, 2 * 2 + 1, 0),
        ({"out": "fp8"}, {}, 2 + 1, 0),
        ({"out": "fp8"}, {"xsa": True}, 1, 0),
        ({"dx": "fp8"}, {}, 0, 0),
        # Gradients of output, queries, keys and values: read twice in bf16, written.
        ({"qkv": "fp8", "out": "fp8", "dx": "fp8"}, {}, 2 * (2 + 1), 4 * (2 * 2 + 1)),
    ],
)
def test_fp8_copies_of_projections_by_hand(changes, roles, forward, backward):
    bf16 = dict.fromkeys(traffic.MLP_PRODUCTS, "bf16")
    model = small_config().model
    mlp = dataclasses.replace(model.mlp, **bf16)
    model = dataclasses.replace(
        model, layers=(LayerSpec(**roles),), mlp=mlp, attention=AttentionConfig(**changes)
    )
    found = traffic.between_products(model, RECIPE)["FP8 copies"]
    D = model.model_dim
    assert (found.forward_bytes, found.backward_bytes) == (D * forward, D * backward)


def test_collectives_of_a_record_step_by_hand():
    """Two for three banks, embed, head, value_embeds; four for the bigram table's rows; a sum of
    small parameters for each of two types."""
    config = with_vocabulary(recipes.load("record_089"))
    model = estimate.meta_model(config.model, RECIPE)
    by = changed(FIGURES, "link", math.inf)
    for step, collectives in ((848, 6), (849, 18)):  # Adam has none in the first
        plan = Schedule(config.schedule).plan(step)
        parts = roofline.step_seconds(config, model, RECIPE, plan, Cluster(8, 8, 132), by)
        assert parts["messages, exposed"] == pytest.approx(collectives * by["collective"].value)


def test_loss_and_gradient_bytes_by_hand():
    config = small_config()
    V = config.model.padded_vocab_size
    assert traffic.loss_bytes(config.model, RECIPE) == V * (2 + 1 + 1)
    assert traffic.loss_bytes(config.model, BF16) == V * 3 * 4
    fused = dataclasses.replace(config.model, head=HeadConfig(form="fused"))
    assert traffic.loss_bytes(fused, RECIPE) == 2 * 4 * V / 128  # a sum of 128 logits
    assert traffic.loss_bytes(fused, BF16) == V * 3 * 4
    model = estimate.meta_model(config.model, BF16)
    tables = sum(p.nbytes for n, p in model.named_parameters() if n in estimate.TABLES)
    matrices = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("_bank"))
    head = model.lm_head.nbytes
    for micro_batches, written, added in [(1, 2, 1), (4, 8, 7)]:  # in two steps, to Adam's update
        total = 2 * 3 * (micro_batches - 1) * matrices + 3 * added * head
        total += (written + 3 * added) * tables
        assert traffic.gradient_bytes(model, config, micro_batches) == total / 2


# A step.


@pytest.fixture(scope="module")
def fp8_attention():
    """Recipe record_089 with every kind of product."""
    config = with_vocabulary(recipes.load("record_089"))
    attention = AttentionConfig(qkv="fp8", out="fp8")
    mlp = dataclasses.replace(config.model.mlp, down="bf16")
    model = dataclasses.replace(config.model, attention=attention, mlp=mlp)
    return dataclasses.replace(config, model=model)


def test_each_part_rests_on_the_figures_named_beside_it(fp8_attention):
    """A thousand times slower, a figure changes the parts that name it and no others."""
    step = Schedule(fp8_attention.schedule).plan(501)
    dependent = {name: set() for name in FIGURES}
    for precision in (BF16, RECIPE):
        model = estimate.meta_model(fp8_attention.model, precision)
        for num_gpus in (1, 16):
            cluster = Cluster(num_gpus, 8, 132)

            def parts(by, model=model, precision=precision, cluster=cluster):
                return roofline.step_seconds(fp8_attention, model, precision, step, cluster, by)

            before = parts(FIGURES)
            for name, figure in FIGURES.items():
                slower = figure.value / 1000 if figure.unit.endswith("/s") else 1000 * figure.value
                after = parts(changed(FIGURES, name, slower))
                dependent[name] |= {part for part in PARTS if after[part] != before[part]}
    for name, found in dependent.items():
        named = {part for part, (_, names) in PARTS.items() if name in names}
        hidden = {"waiting for the host"}  # beside everything
        if name in ("memory", "matrix update"):
            hidden.add("messages, exposed")  # beside the update
        assert found - hidden == named - hidden, name
    assert dependent["host"] == {"waiting for the host"}


def test_stages_add_up(record):
    assert [stage["last_step"] + 1 for stage in record["stages"]] == [423, 847, 1270, 1285]
    for stage in record["stages"]:
        num_steps = stage["last_step"] + 1 - stage["first_step"]
        assert math.fsum(stage["parts_seconds"].values()) == pytest.approx(stage["step_seconds"])
        assert stage["seconds"] == pytest.approx(num_steps * stage["step_seconds"])
        steps = range(stage["first_step"], stage["last_step"] + 1)
        odd = sum(step % 2 for step in steps) / num_steps
        without, with_adam = stage["step_seconds_without_adam"], stage["step_seconds_with_adam"]
        assert stage["step_seconds"] == pytest.approx((1 - odd) * without + odd * with_adam)
        assert with_adam > without
    assert record["total_seconds"] == pytest.approx(sum(s["seconds"] for s in record["stages"]))
    assert record["total_steps"] == 1285


def test_more_gpus_share_the_work_until_messages_take_longest(record):
    rows = {row["gpus"]: row for row in record["scaling"]}
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert rows[1]["seconds"] / 8 < rows[8]["seconds"] < rows[1]["seconds"] / 7
    assert (rows[8]["bound_by"], rows[512]["bound_by"]) == ("compute", "communication")
    assert rows[512]["seconds"] > rows[128]["seconds"]
    assert rows[512]["gpu_hours"] == pytest.approx(512 * rows[512]["seconds"] / 3600)
    assert record["warnings"] == []


def test_small_models_are_bound_by_launches():
    report = report_of("--recipe", "tiny", "--gpus", "1")
    assert {stage["bound_by"] for stage in report["stages"]} == {"latency"}
    assert report["stages"][0]["parts_seconds"]["messages, exposed"] == 0


def test_most_worth():
    def rows(*seconds):
        return [{"gpus": 2**i, "seconds": s} for i, s in enumerate(seconds)]

    assert plan.most_worth(rows(100, 60, 50, 20)) == 2
    assert plan.most_worth(rows(100, 80)) == 1
    assert plan.most_worth(rows(100, 75, 50)) == 4


def test_gpus_that_cut_documents_short_are_told():
    report = report_of("--recipe", "record_089", "--gpus", "256")
    first = report["warnings"][0]
    assert "256 GPUs have 512 tokens each" in first and "max_seq_len=896" in first
    assert "at most 146 GPUs" in first
    assert "--set schedule.stages.0.tokens_per_step=229376" in first
    enough = [w.partition("--set ")[2] for w in report["warnings"]]
    words = [word for value in enough for word in ("--set", value)]
    assert report_of("--recipe", "record_089", "--gpus", "256", *words)["warnings"] == []


# What is shown.


def test_every_figure_has_its_source_and_every_part_its_figures(record):
    text = plan.as_text(record)
    for i, (name, figure) in enumerate(record["figures"].items(), start=1):
        assert f"[{i}] {name}: " in text
        assert figure["source"].startswith(("assumed", "counted"))
    for part in PARTS:
        (line,) = (line for line in text.splitlines() if line.startswith(f"{part}  "))
        assert line.endswith("]") and "[]" not in line
    assert "Up to 64 GPUs" in text


def test_json_has_no_nan_where_a_gpu_has_no_fp8(capsys):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    words = ["--recipe", "record_089", "--gpu", "a100", "--json"]
    assert plan.run(parser.parse_args(words)) == 0

    def refuse(word):
        raise AssertionError(word)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["gpu"] == "NVIDIA A100-SXM4-80GB" and "fp8" not in report["figures"]
    assert "[1, 2, 3]" in plan.as_text(report)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("H100-PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H200 NVL", "NVIDIA H200 NVL"),
        ("4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_gpus_by_some_of_their_words(text, name):
    assert plan.gpu_named(text) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "cpu"], "'cpu'.*(?s:.)*NVIDIA H100 80GB HBM3(?s:.)*speedrun train"),
        (["--gpu", ""], "no rates are known"),
        (["--gpu", "H10"], "no rates are known"),
        (["--gpu", "h100 l4"], "no rates are known"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--gpus", "7"], "7 ranks: .*use 1, 2, 4, 8"),
        (["--network-gbit", "0"], "--network-gbit 0.0"),
        (["--network-gbit", "nan"], "--network-gbit nan"),
        (["--set", "precision=float32"], "precision=float32.*use bf16"),
        (["--gpu", "a100", "--set", "precision=recipe"], "has no FP8; use auto or bf16"),
        (["--records", "/nowhere"], "--records /nowhere: there is no such folder"),
        (["--check", "/nowhere.txt"], "--check /nowhere.txt: No such file"),
    ],
)
def test_refusals(words, message):
    with pytest.raises((ConfigError, LogError), match=message):
        report_of("--recipe", "tiny", *words)


# Figures measured on the GPU.


def write_record(folder, name, gpu, **steps):
    (folder / name).write_text(json.dumps({"gpu": gpu, "steps": steps}))


def test_measured_roofs_replace_assumptions(tmp_path):
    gpu = "NVIDIA H100 80GB HBM3"
    roofs = [{"copy": 2e12, "bf16": 7e14, "fp8": None}, {"copy": 9e12}, {"copy": 3e12}]
    benches = {f"bench {i}": {"roofs": found} for i, found in enumerate(roofs)}
    write_record(tmp_path, "h100.json", gpu, build={"verdict": "pass"}, **benches)
    write_record(tmp_path, "other.json", "NVIDIA H200", bench={"roofs": {"fp8": 1.0}})
    figures = report_of("--recipe", "record_089", "--records", str(tmp_path))["figures"]
    assert (figures["memory"]["value"], figures["bf16"]["value"]) == (3e12, 7e14)
    assert figures["bf16"]["source"] == "measured on this GPU: roof bf16"
    assert figures["fp8"]["source"].startswith("assumed")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"gpu": "NVIDIA H100 80GB HBM3"}'])
def test_other_files_among_the_records_are_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json: not a record of hardware_check"):
        report_of("--records", str(tmp_path))


# The check against a log.

GPU_ROW = (
    "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:8D:00.0 Off |                    0 |\n"
)


def log_of(times_ms, total, final_ms=None):
    lines = [
        "import torch\nstep:9/9 train_time:1ms\n",
        "=" * 100 + "\nRunning Python 3.12\n",
        2 * GPU_ROW,
        f"step:0/{total} val_loss:10.8 train_time:0ms step_avg:0.03ms\n",
    ]
    lines += [f"step:{n}/{total} train_time:{t}ms step_avg:1ms\n" for n, t in times_ms.items()]
    if final_ms is not None:
        lines.append(f"step:{total}/{total} val_loss:3.3 train_time:{final_ms}ms step_avg:1ms\n")
    return "".join(lines)


def test_check_by_stage_and_by_update(tmp_path):
    """24 + 15 steps: 10 ms, 20 ms from the second stage on, and 5 more where Adam has an update."""
    times, now = {}, 0
    for step in range(39):
        now += (10 if step < 8 else 20) + 5 * (step % 2)
        times[step + 1] = now
    path = tmp_path / "log.txt"
    path.write_text(log_of(times, 39, final_ms=now + 60))
    found = report_of("--recipe", "record_089", "--check", str(path))
    check = found["check"]
    assert check["log_gpus"] == ("NVIDIA H100 80GB HBM3",) * 2
    observed = [(r["first_step"], r["adam"], r["observed_seconds"]) for r in check["rows"]]
    last = (8 * 20 + 7 * 25) / 15  # steps 24 to 38
    means = [(0, 10, 12.5, 15), (8, 20, 22.5, 25), (16, 20, 22.5, 25), (24, 20, last, 25)]
    expected = []
    for start, without, mean, with_adam in means:
        rows = ((None, mean), (False, without), (True, with_adam))
        expected += [(start, adam, pytest.approx(1e-3 * ms)) for adam, ms in rows]
    assert observed == expected
    planned = [row["planned_seconds"] for row in check["rows"] if row["adam"] is None]
    assert planned == [stage["step_seconds"] for stage in found["stages"]]
    assert check["run"]["observed_seconds"] == pytest.approx(1e-3 * (now + 60))
    assert check["run"]["planned_seconds"] == found["total_seconds"]
    for row in [*check["rows"], check["run"]]:
        assert row["off"] == row["planned_seconds"] / row["observed_seconds"] - 1
    text = plan.as_text(found)
    assert "of 39 steps on 2 × NVIDIA H100 80GB HBM3:" in text
    (line,) = (line for line in text.splitlines() if line.startswith("run, s"))
    assert line.endswith(f"{check['run']['off']:+.1%}")


def test_check_with_stage_ends_only_and_in_a_folder(tmp_path):
    (tmp_path / "log.txt").write_text(log_of({8: 100, 16: 260, 24: 500, 39: 900}, 39))
    check = report_of("--recipe", "record_089", "--check", str(tmp_path))["check"]
    assert [row["adam"] for row in check["rows"]] == [None] * 4
    assert [row["observed_seconds"] for row in check["rows"]] == pytest.approx(
        [0.0125, 0.02, 0.03, 0.4 / 15]
    )
    assert check["run"]["observed_seconds"] == 0.9


@pytest.mark.parametrize(
    ("times", "total", "message"),
    [
        ({8: 100, 24: 500, 39: 900}, 39, "no training line of step 16"),
        ({1: 100, 2: 50}, 39, "train_time falls at step 2"),
        ({}, 39, "log_interval=1"),
        ({1: 10, 5: 100}, 5, "5 steps are too few for record_089"),
    ],
)
def test_logs_that_cannot_be_checked(tmp_path, times, total, message):
    path = tmp_path / "log.txt"
    path.write_text(log_of(times, total))
    with pytest.raises((ConfigError, LogError), match=message):
        report_of("--recipe", "record_089", "--check", str(path))


def test_check_takes_the_logs_steps(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(log_of({8: 100, 39: 900}, 39))
    with pytest.raises(ConfigError, match="--steps: leave it out"):
        report_of("--recipe", "record_089", "--steps", "39", "--check", str(path))
    schedule = with_total_steps(recipes.load("record_089"), 1390).schedule
    assert (schedule.num_steps, schedule.extension_steps) == (1375, 15)


def test_public_log_of_record_089(shared_data):
    """Its schedule had 1,375 + 15 steps; the plan is not fitted to it."""
    (path,) = (shared_data / "record_logs").glob("*FP8DownProjection*.txt")
    times = train_times(path)
    assert (times.total_steps, times.at_end) == (1390, pytest.approx(79.5, abs=0.1))
    check = report_of("--recipe", "record_089", "--check", str(path))["check"]
    observed = [row["observed_seconds"] for row in check["rows"] if row["adam"] is None]
    assert observed == pytest.approx([31.5e-3, 56.7e-3, 82.4e-3, 83.1e-3], rel=2e-3)
    assert abs(check["run"]["off"]) < 0.1
    assert all(abs(row["off"]) < 0.15 for row in check["rows"])
