"""Golden arrays of the public program, small configs and a way to run the training program."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedrun import cli, recipes
from speedrun._numpy_loader import bigram_rows, sign_rows
from speedrun.baseline_model import BaselineGPT
from speedrun.batch import MicroBatch
from speedrun.checkpoint import Trained
from speedrun.config import (
    AdamRow,
    BaselineConfig,
    Config,
    LayerSpec,
    ModelConfig,
    MuonRow,
    OptimConfig,
    ScheduleConfig,
    Stage,
)
from speedrun.schedule import Schedule

# Float64 results of a few hundred operations on numbers around 1: sums in another order differ by
# some hundred ulps at most; a wrong formula by many orders of magnitude more.
FLOAT64_NOISE = dict(rtol=1e-11, atol=1e-11)

# Six steps over two stages; Adam runs at 1, 3 and 5, and the head is on its own behind 3.
SPLIT_PLANS = Schedule(
    ScheduleConfig(
        num_steps=6,
        stages=(Stage(8, 8, 1, 1), Stage(8, 8, 1, 1, lr_factor=1.5)),
        untie_frac=0.5,
        momentum_warmup_steps=2,
        momentum_cooldown_steps=2,
    )
)


@functools.cache
def golden(shared_data: Path, name: str) -> dict[str, np.ndarray]:
    """Arrays of one file of golden_089 (see its README)."""
    with np.load(shared_data / "golden_089" / name) as file:
        return {key: file[key] for key in file.files}


def from_golden(array: np.ndarray) -> Tensor:
    """A tensor of its own; uint16 arrays are the bits of bf16 numbers."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def low_bits(array: np.ndarray) -> Tensor:
    """uint16 low halves of weights, as the int16 with the same bits."""
    return torch.from_numpy(array.view(np.int16).copy())


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def add_gradients(parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    """As backward does: into `.grad`, in the parameter's own type."""
    for name, gradient in gradients.items():
        parameter = parameters[name]
        gradient = gradient.view_as(parameter)
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad += gradient


def small_config(**changes: Any) -> Config:
    """A config of its own, so that no recipe's numbers are in the tests."""
    banks = ("qk_bank", "vo_bank", "mlp_bank")
    others = ("embed", "lm_head", "bigram_embed")
    values = dict(
        name="small",
        model=ModelConfig(
            layers=(LayerSpec(), LayerSpec(window="long")),
            model_dim=16,
            num_heads=2,
            head_dim=8,
            mlp_hidden=24,
            vocab_size=29,
            vocab_multiple=16,
            bigram_rows=31,
            bigram_dim=12,
            sign_rows=8,
        ),
        optim=OptimConfig(
            muon_table=tuple(MuonRow(name) for name in banks),
            adam_table=tuple(AdamRow(name, 0.9, 0.95) for name in others),
        ),
        schedule=ScheduleConfig(
            num_steps=30,
            stages=(Stage(512, 64, 8, 16), Stage(1024, 128, 16, 32)),
            extension_steps=3,
            extension=Stage(1024, 128, 24, 48, lr_factor=0.15),
            final_windows=(24, 64),
            val_interval=10,
            momentum_warmup_steps=6,
            momentum_cooldown_steps=3,
        ),
    )
    return Config(**(values | changes))


def make_batch(config: ModelConfig, num_parts: int, starts: list[int], seed: int = 0) -> MicroBatch:
    """Random tokens in documents that begin at `starts`, of which the last is the length T."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, config.vocab_size, (num_parts, starts[-1] + 1))
    return micro_batch(config, tokens, starts)


def micro_batch(config: ModelConfig, tokens: np.ndarray, starts: list[int]) -> MicroBatch:
    """`tokens` (P, T + 1): inputs and the targets behind them."""
    tokens = np.ascontiguousarray(tokens, np.int32)
    inputs, num_tokens = tokens[:, :-1], starts[-1]

    def rows(function: Callable, num_rows: int) -> Tensor | None:
        if not num_rows:
            return None
        return torch.from_numpy(np.stack([function(part, num_rows) for part in inputs]))

    offsets = num_tokens * np.arange(len(tokens))[:, None]
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(tokens[:, 1:]).long(),
        torch.from_numpy((np.array(starts) + offsets).ravel().astype(np.int32)),
        rows(bigram_rows, config.bigram_rows),
        rows(sign_rows, config.sign_rows),
    )


def tiny_sets(**changes: Any) -> list[str]:
    """`--set` words that make recipe `tiny` a model of a few thousand weights.

    Every number that the tests rely on is set, since the recipe's own are tuned for speed.
    """
    values = {
        "model.layers": "short,long",
        "model.model_dim": 32,
        "model.num_heads": 2,
        "model.head_dim": 16,
        "model.mlp_hidden": 64,
        "model.bigram_rows": 256,
        "model.bigram_dim": 16,
        "schedule.stage_ends": "",
        "schedule.num_steps": 20,
        "schedule.val_interval": 5,
        "optim.adam.lr": 0.02,
        "schedule.momentum_warmup_steps": 4,
        "schedule.momentum_cooldown_steps": 2,
        "data.val_tokens": 2048,
        "data.val_tokens_per_part": 256,
        "data.repeat": "true",
        "schedule.adam_interval": 2,
        "micro_batch_parts": 8,
        "log_interval": 2,
        "precision": "auto",
    }
    for i in range(len(recipes.load("tiny").schedule.stages)):
        values |= {
            f"schedule.stages.{i}.tokens_per_step": 1024,
            f"schedule.stages.{i}.max_seq_len": 64,
            f"schedule.stages.{i}.window_short": 16,
            f"schedule.stages.{i}.window_long": 32,
        }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


def train(folder: Path, *words: Any, ranks: int = 0, module: str = "speedrun.train") -> Run:
    """The training program in `folder`, by torchrun if `ranks`; ends within five minutes."""
    process = start_training(folder, *words, ranks=ranks, module=module)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Run(process.returncode, out, err)


def start_training(
    folder: Path, *words: Any, ranks: int = 0, module: str = "speedrun.train"
) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks else []), "-m", module, *map(str, words)]
    # Threads that wait for each other must not spin: other processes want the core.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def read_events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_losses(folder: Path) -> list[tuple[str, int, float]]:
    """(event, step, loss) of each training and validation event."""
    return [
        (event["event"], event["step"], event.get("train_loss", event.get("val_loss")))
        for event in read_events(folder)
        if event["event"] in ("training", "validation")
    ]


def write_text(path: Path) -> None:
    """A text of 60 made-up words, some of them frequent."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, random.integers(2, 8)).tolist()) for _ in range(60)]
    chosen = np.minimum(random.zipf(1.4, 6000) - 1, 59)
    path.write_bytes(b" ".join(words[i] for i in chosen))


def random_baseline(vocab_size: int) -> BaselineGPT:
    """Float64, two layers, with a head that isn't zero as at the start."""
    config = BaselineConfig(2, model_dim=16, head_dim=8, mlp_hidden=24, vocab_size=vocab_size)
    model = BaselineGPT(config, torch.float64)
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.normal_(generator=torch.Generator().manual_seed(0))
    return model


def verb_on(loaded: Trained, command: Any, monkeypatch: Any, capsys: Any) -> Callable:
    """Runs the verb of module `command` on CKPT, which is `loaded`.

    Gives exit code, stdout, stderr; load: instead of `load_for_inference`.
    """

    def run(*words: str, load: Callable = lambda path, device: loaded) -> tuple[int, str, str]:
        monkeypatch.setattr(command, "load_for_inference", load)
        verb = command.__name__.rpartition(".")[2]
        code = cli.main([verb, "CKPT", "--device", "cpu", *words])
        return code, *capsys.readouterr()

    return run
