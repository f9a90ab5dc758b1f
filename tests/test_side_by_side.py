"""Our training program beside a stand-in for modded-nanogpt's, in turns, on a CPU."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import bench_step, loss_parity, peer_program, side_by_side
from benchmarks.peer_weights import PeerWeightsError, our_weights
from benchmarks.side_by_side import Comparison, ShortSchedule
from numerics import assert_same_bits
from speedrun import recipes
from speedrun.config import ConfigError
from speedrun.data import BYTES, find_shards
from speedrun.model import GPT
from speedrun.ops import _attention_backends as attention_backends
from speedrun.overrides import apply_overrides
from speedrun.passes import forward_backward
from speedrun.record_logs import LoggedRun, Validation
from speedrun.reference._blocks import block_mask
from speedrun.reference.attention import attention as reference
from speedrun.runlog import RunError
from speedrun.schedule import Schedule
from speedrun.shards import write_splits
from speedrun.sources import shards_of, to_micro_batches, training_loader
from train_helpers import normal

STAND_IN = Path(__file__).parent / "peer_stand_in"


def record_words(**changes):
    """Values for --set that make record_089 small, in steps like the stand-in's."""
    sizes = dict(model_dim=96, head_dim=16, mlp_hidden=192, bigram_rows=256, bigram_dim=96)
    sizes |= dict(sign_rows=64, vocab_multiple=16) | changes
    words = [f"model.{name}={value}" for name, value in sizes.items()]
    for stage in (*(f"stages.{i}" for i in range(3)), "extension"):
        numbers = dict(tokens_per_step=1024, max_seq_len=64, window_short=16, window_long=32)
        words += [f"schedule.{stage}.{name}={value}" for name, value in numbers.items()]
    words += ["schedule.final_windows=16,48", "data.val_tokens_per_part=256", "precision=float32"]
    return [*words, "micro_batch_parts=8"]


def record(**changes):
    return apply_overrides(recipes.load("record_089"), record_words(**changes))


def write_letters(folder):
    random = np.random.default_rng(0)
    documents = [random.integers(97, 123, 60).astype(np.uint16) for _ in range(100)]
    pairs = ((split, document) for split in ("train", "val") for document in documents)
    write_splits(folder, "letters", pairs, BYTES)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(the JSON, the folder of both outputs) of one round of two steps a stage."""
    folder = tmp_path_factory.mktemp("side_by_side")
    write_letters(folder / "letters")
    args = ["--recipe=record_089", f"--peer={STAND_IN}", f"--data={folder / 'letters'}"]
    args += ["--rounds=1", "--steps-a-round=2", "--device=cpu", f"--out={folder / 'out'}"]
    args += [f"--set={word}" for word in record_words(layers="short+paired,long")]
    assert bench_step.main([*args, f"--json={folder / 'step.json'}"]) == 0
    return json.loads((folder / "step.json").read_text()), folder / "out"


def test_both_programs_are_timed(dry_run):
    found = dry_run[0]["comparison"]
    assert found["stages"] == ["1", "2", "3", "extension"]
    for name in ("ours_ms", "peer_ms"):
        assert [len(samples) for samples in found[name]] == [1] * 4
        assert all(ms > 0 for samples in found[name] for ms in samples)
    assert all(seconds > 0 for seconds in found["start_s"].values())  # nan: it took no turn
    assert found["peak_mib"] == {"ours": None, "peer": 7}


def test_changes_of_the_peer_are_listed(dry_run):
    changes = dry_run[0]["comparison"]["changes"]
    fields = [line for line in changes if line.startswith("Hyperparameters.")]
    assert fields == [
        "Hyperparameters.num_scheduled_iterations = 12 instead of 1270",
        "Hyperparameters.num_extension_iterations = 4 instead of 15",
        "Hyperparameters.val_loss_every = 2 instead of 250",
        "Hyperparameters.val_tokens = 2048 instead of 10485760",
    ]
    assert any(line.startswith("attention: sdpa, by speedrun, instead of") for line in changes)
    assert any("waits for its turn" in line for line in changes)


def test_both_programs_train_on_one_shard(dry_run):
    """Of whole documents, the source's in order, again and again, enough for the schedule."""
    folder = dry_run[1] / "tokens" / "data" / "fineweb10B"
    first, ahead = find_shards(folder, "train")
    tokens = np.fromfile(first, "<u2", offset=1024)
    source = np.fromfile(ahead, "<u2", offset=1024)
    assert ahead.name == "fineweb_train_999999.bin" and len(tokens) > 16 * 1024 > len(source)
    np.testing.assert_array_equal(tokens, np.resize(source, len(tokens)))
    assert tokens[-61] == BYTES.bos_id
    header = json.loads((dry_run[1] / "ours" / "run" / "metrics.jsonl").open().readline())
    assert header["train_data"][0] == str(first) and header["config"]["data"]["repeat"] is False


def test_turns_alternate():
    order = []

    def program(name, num_turns):
        turns = iter([True] * num_turns + [False])

        def wait():
            order.append(f"{name} waits")
            return next(turns)

        send = lambda _: order.append(f"{name} goes on")  # noqa: E731
        return SimpleNamespace(wait_for_turn=wait, turns=SimpleNamespace(send=send))

    peer = program("peer", 2)
    assert (
        side_by_side.take_turns(program("ours", 2), lambda: order.append("start") or peer) is peer
    )
    assert order[:3] == ["ours waits", "start", "peer waits"]
    assert order[3:] == [f"{name} {what}" for name in ("ours", "peer") for what in GOES] * 2


GOES = ("goes on", "waits")


def test_rounds_without_a_stages_first():
    schedule = ShortSchedule((6, 4), val_interval=2)
    times = {0: 0.0, 2: 9.0, 4: 10.0, 6: 12.0, 8: 20.0, 10: 21.0}
    run = LoggedRun("log", tuple(Validation(step, 1.0, s) for step, s in times.items()))
    assert side_by_side.rounds_ms(run, schedule) == [[500.0, 1000.0], [500.0]]
    less = dataclasses.replace(run, validations=run.validations[:-1])
    with pytest.raises(RunError, match="no time of a validation at step 10"):
        side_by_side.rounds_ms(less, schedule)


def test_a_comparison_pairs_rounds():
    found = Comparison(("1",), [[30.0, 10.0, 40.0]], [[60.0, 40.0, 50.0]], {}, {}, [])
    assert found.ratios(0) == [0.5, 0.25, 0.8]
    times = ("30.00 (10.00 to 40.00)", "50.00 (40.00 to 60.00)")
    assert found.cells() == [("1", *times, "0.500", "0.250 to 0.800")]


@pytest.mark.parametrize("interval", [4, 16])
def test_both_schedules_are_one(interval):
    """Our Schedule from our words does what the peer's rules give for its fields."""
    steps = ShortSchedule((48, 16, 32, 16), interval)
    config = apply_overrides(record(), steps.our_words(record()))
    schedule = config.schedule
    fields, durations = steps.peer_fields(config), steps.peer_durations
    assert (schedule.num_steps, schedule.extension_steps) == (
        fields["num_scheduled_iterations"],
        fields["num_extension_iterations"],
    )
    ends = [round(sum(durations[: i + 1]) * schedule.num_steps) for i in range(3)]
    found = Schedule(schedule)
    assert found.ends == [*ends, 112] and found.split_step == ends[1] | 1
    validated = [plan.step for plan in found if plan.validate]
    assert validated == list(range(0, 113, fields["val_loss_every"]))


def test_what_is_no_peer_says_so(tmp_path, capsys):
    args = ["--recipe=record_089", f"--data={tmp_path}", f"--peer={tmp_path}"]
    assert bench_step.main(args) == 1
    assert "there is no train_gpt.py; name a folder" in capsys.readouterr().err
    args = ["--recipe=tiny", f"--data={tmp_path}", f"--peer={STAND_IN}"]
    assert bench_step.main(args) == 1
    assert "recipe tiny has 2 stages and no extension" in capsys.readouterr().err


def test_a_program_that_fails_is_quoted(tmp_path):
    with side_by_side.started("peer", tmp_path / "peer", ["no_such_module"]) as program:
        with pytest.raises(RunError, match=r"(?s)peer: exit code 1; .*No module named no_such_mod"):
            program.wait_for_turn()


def wait_until(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(condition)


def test_sigterm_ends_what_was_started(tmp_path):
    """With its children."""
    child = "__import__('os').system('echo $$ > child; exec sleep 60')"
    before, pid = signal.getsignal(signal.SIGTERM), tmp_path / "peer" / "child"
    with pytest.raises(SystemExit):
        arguments = ["timeit", "-n1", "-r1", child]
        with side_by_side.started("peer", tmp_path / "peer", arguments) as program:
            wait_until(lambda: pid.exists() and pid.read_text())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    assert program.process.poll() == -signal.SIGKILL
    command = Path("/proc", pid.read_text().strip(), "cmdline")
    wait_until(lambda: not command.exists() or not command.read_bytes())  # gone, or to be reaped
    assert signal.getsignal(signal.SIGTERM) is before


def test_fields_of_another_version_are_refused(monkeypatch):
    monkeypatch.setattr(dataclasses, "dataclass", dataclasses.dataclass)
    changes = []
    peer_program.set_fields({"num_steps": 3}, (0.25, 0.75), changes)

    @dataclasses.dataclass(slots=True)
    class Hyperparameters:
        num_steps: int = 1270

    @dataclasses.dataclass(slots=True)
    class TrainingStage:
        size: int
        duration: float = None

    assert Hyperparameters().num_steps == 3
    stages = [TrainingStage(size=1, duration=1 / 2) for _ in range(2)] + [TrainingStage(size=1)]
    assert [stage.duration for stage in stages] == [0.25, 0.75, None]
    assert "Hyperparameters.num_steps = 3 instead of 1270" in changes
    with pytest.raises(SystemExit, match="Hyperparameters has no num_steps"):

        @dataclasses.dataclass
        class Hyperparameters:
            iterations: int = 1


def test_losses_are_of_training_steps():
    losses, model = peer_program.Losses(micro_batches=2), nn.Linear(1, 1)
    losses.see(model, (), torch.full((5,), 100.0))  # of the warm-up
    losses.forget()
    for value, size in [(1.0, 3), (3.0, 1), (2.0, 4), (2.0, 4)]:
        losses.see(model.train(), (), torch.full((size,), value))
        losses.see(model.eval(), (), torch.full((size,), 50.0))
    assert losses.by_step() == [1.5, 2.0]


def test_attention_of_the_peer():
    """As it is called there: documents padded with the number of tokens, a window on the left."""
    module = peer_program.attention_module(attention_backends.load("sdpa"))
    starts = torch.tensor([0, 17, 40, 48, 48], dtype=torch.int32)
    inputs = [normal(48, 2, 16, seed=i).bfloat16().requires_grad_() for i in range(3)]
    options = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=32, max_seqlen_k=32)
    options |= dict(causal=True, softmax_scale=0.1, window_size=(9, 0))
    dout = normal(48, 2, 16, seed=3)
    found = module.flash_attn_varlen_func(*inputs, **options)
    grads = torch.autograd.grad(found, inputs, dout.bfloat16())
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, block_mask(starts, 48, 9, torch.float64), 0.1)
    expected_grads = torch.autograd.grad(expected, exact, dout)
    for one, other in zip((found, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.02)


# ---- Parity of losses ------------------------------------------------------------------------


def test_differences_by_stage():
    """Of two seeds, in a stage of two steps and one of four."""
    losses = {
        ("peer", 0): [5.0, 4.0, 3.0, 3.0, 3.0, 3.0],
        ("ours", 0): [5.5, 3.75, 3.0, 3.0, 3.0, 4.0],
        ("peer", 1): [6.0, 4.0, 3.0, 3.0, 3.0, 3.0],
        ("ours", 1): [6.0, 4.25, 3.0, 3.0, 3.0, 3.0],
    }
    schedule = ShortSchedule((2, 4), 2)
    first, last = loss_parity.differences(losses, schedule)
    assert (first.stage, first.signed, first.absolute, first.largest) == ("1", 0.125, 0.25, 0.5)
    assert first.between_seeds == {"peer": 0.5, "ours": 0.5}
    assert (last.stage, last.signed, last.largest) == ("extension", 0.125, 1.0)
    assert last.between_seeds == {"peer": 0.0, "ours": 0.25}
    alone = {run: values for run, values in losses.items() if run[1] == 0}
    assert loss_parity.differences(alone, schedule)[0].cells()[-2:] == ("-", "-")
    with pytest.raises(RunError, match="ours, seed 1: 5 training losses in its log, not 6"):
        loss_parity.differences(losses | {("ours", 1): [1.0] * 5}, schedule)


def test_settings_of_other_runs_are_refused(tmp_path):
    loss_parity.same_settings(tmp_path / "out", {"steps": [2], "set": []})
    loss_parity.same_settings(tmp_path / "out", {"steps": [2], "set": []})
    with pytest.raises(ConfigError, match="holds runs of other steps; name another folder"):
        loss_parity.same_settings(tmp_path / "out", {"steps": [4], "set": []})


@pytest.mark.slow
def test_parity_with_the_stand_in(tmp_path, capsys):
    """Ours starts from the peer's weights, of each seed; what is there isn't run again."""
    write_letters(tmp_path / "letters")
    out = tmp_path / "out"
    args = [f"--peer={STAND_IN}", f"--data={tmp_path / 'letters'}", f"--out={out}", "--device=cpu"]
    args += ["--steps=4,2,2,2", "--seeds=2", f"--json={tmp_path / 'parity.json'}"]
    args += [f"--set={word}" for word in record_words()]
    assert loss_parity.main(args) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["1", "2", "3", "extension"]
    assert {len(losses) for losses in found["losses"].values()} == {10}
    assert found["losses"]["peer, seed 0"] != found["losses"]["peer, seed 1"]
    assert (out / "loss_parity.png").stat().st_size > 10_000
    weights = [torch.load(out / f"seed_{i}_weights.pt", weights_only=True) for i in range(2)]
    assert not torch.equal(weights[0]["qk_bank"], weights[1]["qk_bank"])
    # Our first loss is that of a model with these weights.
    config = apply_overrides(record(), ShortSchedule((4, 2, 2, 2), 2).our_words(record()))
    model = GPT(dataclasses.replace(config.model, vocab_size=257))
    model.load_state_dict(our_weights(weights[0], model.state_dict()))
    expected = found["losses"]["ours, seed 0"][0]
    folder = out / "tokens" / "data" / "fineweb10B"
    assert first_loss(model, config, folder) == pytest.approx(expected, rel=1e-5)
    capsys.readouterr()
    assert loss_parity.main(args) == 0
    assert "seed 0, in" not in capsys.readouterr().out


def first_loss(model, config, folder):
    """Mean training loss of step 0."""
    schedule = Schedule(config.schedule)
    plan, data = schedule.plan(0), shards_of(folder, config)
    with training_loader(config, data, schedule, 0, 1) as loader:
        batches = to_micro_batches(loader.next_step(), config, torch.device("cpu"))
    return forward_backward(model, None, batches, plan).item() / plan.tokens_per_step


# ---- Weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    """(the peer's, made of ours as RECIPE and the program say; ours)."""
    config = dataclasses.replace(record().model, vocab_size=257)
    model = GPT(config)
    ours = {
        name: normal(*t.shape, seed=i).float()
        for i, (name, t) in enumerate(model.state_dict().items())
    }
    ours["lambda_smear"], ours["lambda_skip"] = torch.tensor(0.25), torch.tensor(-2.0)

    def stacked(names, rows):
        padded = [
            torch.cat([ours[n], torch.full((rows - len(ours[n]), *ours[n].shape[1:]), 9.0)])
            for n in names
        ]
        return torch.stack(padded)

    gates, mudd = ("gate_pre", "gate_post"), ("mudd_layer", "mudd_out")
    lambdas = torch.stack([ours["lambda_qkv"], ours["lambda_o"]], 1).flatten()
    theirs = {
        "embed.weight": ours["embed"],
        "lm_head.weight": ours["lm_head"],
        "bigram_embed.weight": ours["bigram_embed"],
        "bigram_sign_table": ours["sign_table"],
        "value_embeds": ours["value_embeds"].flatten(0, 1),
        "smear_gate.weight": ours["w_smear"][None],
        "qk_bank": torch.cat([ours["qk_bank"], torch.zeros(4, *ours["qk_bank"].shape[1:])]),
        "vo_bank": torch.cat([ours["vo_bank"], torch.zeros(4, *ours["vo_bank"].shape[1:])]),
        "mlp_bank": torch.cat([ours["mlp_bank"], torch.ones(2, 192, 96)]).view(12, 2, 192, 96),
        "ve_gate_bank": torch.cat([ours["ve_gate"], torch.ones(1, 6, 12)]),
        "resid_lambdas": torch.stack([ours["r_attn"], ours["r_mlp"]], 1),
        "post_lambdas": torch.stack([ours["p_attn"], ours["p_mlp"]], 1),
        "scalars": torch.cat([lambdas, torch.tensor([0.25, -2.0, 1.0, 1.0])]),
        "_mudd_gate_scale": ours["gate_s"],
        "mudd_gate_w1": torch.stack([ours[f"{net}_W1"] for net in gates]),
        "mudd_gate_w2": stacked([f"{net}_W2" for net in gates], 41),
        "mudd_gate_b2": stacked([f"{net}_c" for net in gates], 41),
        "mudd_w1": torch.stack([ours[f"{net}_W1"] for net in mudd]),
        "mudd_w2": stacked([f"{net}_W2" for net in mudd], 14),
        "mudd_b2": stacked([f"{net}_c" for net in mudd], 14),
    }
    return theirs, ours


def test_weights_of_the_peer(weights):
    theirs, ours = weights
    found = our_weights(theirs, ours)
    assert set(found) == set(ours)
    for name, tensor in found.items():
        assert_same_bits(tensor, ours[name])


def test_weights_of_another_model_are_refused(weights):
    theirs, ours = weights
    with pytest.raises(PeerWeightsError, match="has no vo_bank: it isn't that of record 89"):
        our_weights({k: v for k, v in theirs.items() if k != "vo_bank"}, ours)
    with pytest.raises(
        PeerWeightsError, match=r"embed is \(272, 96\) in ours, the peer's \(5, 9\)"
    ):
        our_weights(theirs | {"embed.weight": torch.ones(5, 9)}, ours)
    with pytest.raises(PeerWeightsError, match="only one of both models has extra"):
        our_weights(theirs, ours | {"extra": torch.ones(1)})
