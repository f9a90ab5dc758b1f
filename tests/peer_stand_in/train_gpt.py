"""Stands in for modded-nanogpt's training program: its names, its log, a model that learns little.

The weights have the names and stacks of record 89's, at a width of 96; all but three are idle.
"""

import glob
import os
import sys
import time
import uuid
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton_kernels
from kernels import get_kernel
from torch import nn

PARTS = 8 // int(os.environ["WORLD_SIZE"])
flash_attention = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_interface
with open(os.path.join(os.path.dirname(sys.argv[0]), "triton_kernels.py")) as file:
    assert triton_kernels.NAME in file.read()
dist.init_process_group("gloo")


@dataclass(slots=True)
class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", ".")
    train_files: str = os.path.join(data_path, "data/fineweb10B/fineweb_train_*.bin")
    val_files: str = os.path.join(data_path, "data/fineweb10B/fineweb_val_*.bin")
    val_tokens: int = 10_485_760
    num_scheduled_iterations: int = 1270
    num_extension_iterations: int = 15
    val_loss_every: int = 250


@dataclass(slots=True)
class TrainingStage:
    batch_size: int
    duration: float = None


args = Hyperparameters()
stages = [TrainingStage(duration=1 / 3, batch_size=1024) for _ in range(3)]
stages.append(TrainingStage(batch_size=1024))
ends, reached = [], 0.0
for stage in stages[:-1]:
    reached += stage.duration
    ends.append(round(reached * args.num_scheduled_iterations))
assert ends[-1] == args.num_scheduled_iterations
ends.append(ends[-1] + args.num_extension_iterations)


class GPT(nn.Module):
    def __init__(self, V=272, D=96, H=6, F=192, L=11, rows=256):
        super().__init__()
        self.embed, self.bigram_embed = nn.Embedding(V, D), nn.Embedding(rows, D)
        self.lm_head, self.smear_gate = nn.Linear(V, D, bias=False), nn.Linear(12, 1, bias=False)
        shapes = {
            "qk_bank": (60, 2 * D // H, D),
            "vo_bank": (20, D, D),
            "mlp_bank": (12, 2, F, D),
            "value_embeds": (5 * V, D),
            "ve_gate_bank": (5, H, 12),
            "resid_lambdas": (L, 2),
            "post_lambdas": (L, 2),
            "scalars": (2 * L + 2,),
            "_mudd_gate_scale": (),
        }
        for name, outputs in {"mudd": 14, "mudd_gate": 41}.items():
            shapes |= {f"{name}_w1": (2, 64, D), f"{name}_w2": (2, outputs, 64)}
            shapes[f"{name}_b2"] = (2, outputs)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.05 * torch.randn(shape)))
        self.register_buffer("bigram_sign_table", torch.randn(64, D).sign())

    def forward(self, inputs, targets, cu_seqlens):
        x = self.embed(inputs).view(-1, 6, 16)
        y = flash_attention.flash_attn_varlen_func(
            *(x.bfloat16() for _ in range(3)),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=len(x),
            max_seqlen_k=len(x),
            causal=True,
            softmax_scale=0.1,
            window_size=(16, 0),
        )
        logits = (x + y).flatten(1) @ self.lm_head.weight
        return F.cross_entropy(logits, targets, reduction="none")


def parts(pattern, size):
    tokens = np.fromfile(sorted(glob.glob(pattern))[0], "<u2", offset=1024).astype(np.int64)
    for begin in range(0, len(tokens) - size, size):
        part = torch.from_numpy(tokens[begin : begin + size + 1])
        yield part[:-1], part[1:], torch.tensor([0, size], dtype=torch.int32)


os.makedirs("logs", exist_ok=True)
log = open(f"logs/{uuid.uuid4()}.txt", "a", buffering=1)
log.write(open(sys.argv[0]).read() + "=" * 100 + f"\nRunning Python {sys.version}\n")
model = torch.compile(GPT(), backend="eager")
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
loader = parts(args.train_files, 1024 // PARTS)
model(*next(loader)).mean().backward()  # the warm-up
optimizer.zero_grad()
model.load_state_dict(weights)

loader, total = parts(args.train_files, 1024 // PARTS), ends[-1]
start, elapsed_ms = time.perf_counter(), 0.0
len(tiktoken.get_encoding("gpt2")._mergeable_ranks)
for step in range(total + 1):
    if step == total or step % args.val_loss_every == 0:
        elapsed_ms += 1000 * (time.perf_counter() - start)
        model.eval()
        with torch.no_grad():
            val = parts(args.val_files, args.val_tokens // PARTS)
            val_loss = sum(model(*next(val)).mean() for _ in range(PARTS)) / PARTS
        dist.reduce(val_loss, 0)
        line = f"step:{step}/{total} val_loss:{val_loss:.4f} train_time:{elapsed_ms:.0f}ms"
        log.write(f"{line} step_avg:{elapsed_ms / max(step, 1):.2f}ms\n")
        model.train()
        start = time.perf_counter()
    if step == total:
        break
    for _ in range(PARTS):
        (model(*next(loader)).mean() / PARTS).backward()
    optimizer.step()
    optimizer.zero_grad()
    time_ms = elapsed_ms + 1000 * (time.perf_counter() - start)
    log.write(f"step:{step + 1}/{total} train_time:{time_ms:.0f}ms step_avg:0.00ms\n")
print("peak memory allocated: 7 MiB reserved: 8 MiB")
dist.destroy_process_group()
