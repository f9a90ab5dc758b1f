"""Runs modded-nanogpt's training program as it is, for benchmarks beside ours.

    python -m benchmarks.peer_program [--turn DESCRIPTOR] SETTINGS.json      (of side_by_side.py)

train_gpt.py is executed unchanged, as the one process of a run on one device: 8 micro-batches a
step. What differs from the record's run is done around it, and listed in the file `changes`:

* the defaults of its class Hyperparameters and the durations of its TrainingStages;
* attention by what serves `speedrun.ops.attention` here, where FlashAttention 3 of the package
  `kernels`, which it downloads, can't be had;
* GPT-2's vocabulary from the folder of the tokens, where it would download that too;
* a seed, since it sets none;
* between two rounds of a benchmark it waits for its turn, in a validation, when its clock stands;
* for loss_parity: its start weights are saved, and its training losses added up.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speedrun.data import read_format
from speedrun.ops import _attention_backends as attention_backends
from speedrun.ops._attention_choice import first_right
from speedrun.tokenizer import load_tokenizer

FLASH_ATTENTION_3 = "kernels-community/flash-attn3"
HEAD_DIMS = (128, 128)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Paths are those of files or folders; None: not asked for.

    tokens: has data/fineweb10B with shards and gpt2.tiktoken. changes: where they are listed.
    weights, losses: where the start weights go, and a list of each training step's mean loss.
    """

    program: str
    tokens: str
    changes: str
    hyperparameters: dict[str, Any]
    durations: tuple[float, ...]
    seed: int = 0
    weights: str | None = None
    losses: str | None = None


class Turn:
    """Waits until it is this program's turn on the device, as a connection says; None: always."""

    def __init__(self, descriptor: int | None) -> None:
        self.connection = None if descriptor is None else Connection(descriptor)

    def wait(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if self.connection is not None:
            self.connection.send(None)
            self.connection.recv()


def set_fields(
    changed: Mapping[str, Any], durations: tuple[float, ...], changes: list[str]
) -> None:
    """Makes `dataclasses.dataclass` give the program's two classes of settings other values."""
    original, to_come = dataclasses.dataclass, iter(durations)

    def dataclass(cls: type | None = None, /, **options: Any) -> Any:
        if cls is None:
            return lambda cls: dataclass(cls, **options)
        if cls.__name__ == "Hyperparameters":
            for name, value in changed.items():
                if name not in cls.__annotations__:
                    raise SystemExit(
                        f"the peer's Hyperparameters has no {name}: it is another version than "
                        "benchmarks/peer_program.py knows"
                    )
                changes.append(f"Hyperparameters.{name} = {value} instead of {getattr(cls, name)}")
                setattr(cls, name, value)
        made = original(cls, **options)
        if cls.__name__ == "TrainingStage":
            construct = made.__init__

            def __init__(self: Any, *args: Any, **fields: Any) -> None:
                if fields.get("duration") is not None:
                    fields["duration"] = next(to_come)
                construct(self, *args, **fields)

            made.__init__ = __init__
        return made

    changes.append(f"TrainingStage.duration = {', '.join(f'{d:.4g}' for d in durations)} of them")
    dataclasses.dataclass = dataclass


def attention_module(backend: attention_backends.Backend) -> SimpleNamespace:
    """What the program takes of FlashAttention 3: flash_attn_varlen_func, of our `backend`.

    An operator that torch.compile leaves as it is, as it does FlashAttention 3.
    """
    numbers = "Tensor cu_seqlens, int window, int max_seqlen, float scale"
    schemas = {
        "attention": f"(Tensor q, Tensor k, Tensor v, {numbers}) -> (Tensor, Tensor)",
        "attention_bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{numbers}) -> (Tensor, Tensor, Tensor)",
    }

    def batch(q: Tensor, cu_seqlens: Tensor, window: int, max_seqlen: int):
        extra = backend.prepare(cu_seqlens, q.shape[0], window)
        return attention_backends.Batch(cu_seqlens, window, max_seqlen, extra)

    def forward(q, k, v, cu_seqlens, window, max_seqlen, scale):
        out, lse = backend.forward(q, k, v, batch(q, cu_seqlens, window, max_seqlen), scale)
        return out.contiguous(), lse.contiguous()

    def backward(dout, q, k, v, out, lse, cu_seqlens, window, max_seqlen, scale):
        documents = batch(q, cu_seqlens, window, max_seqlen)
        grads = backend.backward(dout, q, k, v, out, lse, documents, scale)
        return tuple(grad.contiguous() for grad in grads)

    def fake_forward(q, k, v, *others):
        return v.new_empty(v.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)

    def fake_backward(dout, q, k, v, *others):
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def save(ctx, inputs, output):
        q, k, v, cu_seqlens, *ctx.numbers = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens)

    def gradient(ctx, dout, dlse):
        inputs = (dout.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        return *torch.ops.peer.attention_bwd(*inputs), None, None, None, None

    library = torch.library.Library("peer", "DEF")
    for name, function, fake in (
        ("attention", forward, fake_forward),
        ("attention_bwd", backward, fake_backward),
    ):
        library.define(name + schemas[name], tags=(torch.Tag.needs_exact_strides,))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"peer::{name}", fake, lib=library)
    torch.library.register_autograd("peer::attention", gradient, setup_context=save, lib=library)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        softmax_scale: float,
        window_size: tuple[int, int],
    ) -> Tensor:
        """q, k, v (T, H, D) -> (T, H, D). Only what the program asks for: causal, with a window."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        numbers = (window_size[0], max_seqlen_q, softmax_scale)
        return torch.ops.peer.attention(q, k, v, cu_seqlens_q, *numbers)[0]

    return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, library=library)


def new_module(name: str) -> ModuleType:
    """An empty one that is imported under this name from now on."""
    sys.modules[name] = module = module_from_spec(ModuleSpec(name, loader=None))
    return module


def provide_attention(device: torch.device, changes: list[str]) -> None:
    """A package `kernels` with our attention, where FlashAttention 3 can't be had from the real."""
    try:
        importlib.import_module("kernels").get_kernel(FLASH_ATTENTION_3, version=1)
        return
    except Exception as problem:  # not installed, no network, no build for this torch, …
        why = f"{type(problem).__name__}: {problem}".splitlines()[0]
    name = first_right(device, HEAD_DIMS) if device.type == "cuda" else "sdpa"
    if name == "torch":
        raise SystemExit("no attention but the reference serves here; the peer can't run")
    backend = attention_backends.load(name)
    kernels = new_module("kernels")
    kernels.get_kernel = lambda repository, version: SimpleNamespace(
        flash_attn_interface=attention_module(backend)
    )
    changes.append(f"attention: {name}, by speedrun, instead of FlashAttention 3 ({why})")


def provide_vocabulary(folder: Path, changes: list[str]) -> None:
    """A package `tiktoken` with the vocabulary of the tokens in `folder`. DataError without it."""
    tokenizer = load_tokenizer(read_format(folder).tokenizer, folder=folder)
    words = range(tokenizer.format.vocab_size)
    ranks = {tokenizer.token_bytes(i): i for i in words if i != tokenizer.format.bos_id}
    tiktoken = new_module("tiktoken")
    tiktoken.get_encoding = lambda name: SimpleNamespace(_mergeable_ranks=ranks)
    changes.append("tiktoken: the vocabulary is read from the folder of the tokens")


class Losses:
    """Mean training loss of each step, from the losses that the model returns."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.sums: list[Tensor] = []
        self.num_tokens: list[int] = []

    def see(self, model: nn.Module, inputs: tuple, losses: Tensor) -> None:
        if model.training:
            self.sums.append(losses.detach().sum(dtype=torch.float64))
            self.num_tokens.append(losses.numel())

    def forget(self) -> None:
        self.sums.clear()
        self.num_tokens.clear()

    def by_step(self) -> list[float]:
        sums = [loss.item() for loss in self.sums]
        each = self.micro_batches
        return [
            sum(sums[i : i + each]) / sum(self.num_tokens[i : i + each])
            for i in range(0, len(sums), each)
        ]


def watch_model(settings: Settings, losses: Losses, changes: list[str]) -> None:
    """Makes `torch.compile` save the weights of the model that it is given, and hook its losses."""
    original: Callable = torch.compile

    def compile(model: Any = None, *args: Any, **options: Any) -> Any:
        compiled = original(model, *args, **options)
        if isinstance(model, nn.Module):
            if settings.weights is not None:
                torch.save({k: v.cpu() for k, v in model.state_dict().items()}, settings.weights)
            if settings.losses is not None:
                compiled.register_forward_hook(losses.see)
        return compiled

    torch.compile = compile
    if settings.losses is not None:
        changes.append("a hook adds up the losses that the model returns: one small kernel a part")


def take_turns(descriptor: int | None, losses: Losses, changes: list[str]) -> None:
    """Makes `torch.distributed.reduce`, which the program calls in a validation, wait for a turn.

    The first validation is in front of the first step: losses before it were of the warm-up.
    """
    original, turn, called = dist.reduce, Turn(descriptor), []

    def reduce(*args: Any, **options: Any) -> Any:
        work = original(*args, **options)
        if not called:
            losses.forget()
        called.append(True)
        turn.wait()
        return work

    dist.reduce = reduce
    if descriptor is not None:
        changes.append("it waits for its turn in its validations, while its clock stands")


def run(settings: Settings, turn: int | None) -> None:
    program, changes = Path(settings.program), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["DATA_PATH"] = settings.tokens
    changes.append("one process on one device: 8 micro-batches a step, as the program does it then")
    provide_attention(device, changes)
    provide_vocabulary(Path(settings.tokens, "data", "fineweb10B"), changes)
    losses = Losses(micro_batches=8)
    watch_model(settings, losses, changes)
    take_turns(turn, losses, changes)
    set_fields(settings.hyperparameters, settings.durations, changes)
    torch.manual_seed(settings.seed)
    changes.append(f"torch.manual_seed({settings.seed})")
    sys.argv, sys.path[0] = [str(program)], str(program.parent)
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        Path(settings.changes).write_text(json.dumps(changes, indent=1) + "\n")
    if settings.losses is not None:
        Path(settings.losses).write_text(json.dumps(losses.by_step()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turn", type=int, metavar="DESCRIPTOR")
    parser.add_argument("settings", type=Path, metavar="SETTINGS.json")
    args = parser.parse_args()
    values = json.loads(args.settings.read_text())
    run(Settings(**values | {"durations": tuple(values["durations"])}), args.turn)


if __name__ == "__main__":
    main()
