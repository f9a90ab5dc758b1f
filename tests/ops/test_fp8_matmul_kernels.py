"""Which kernels serve `fp8_matmul`, and that Triton's compile; results: test_fp8_matmul.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speedrun import ops

front_door = sys.modules["speedrun.ops.fp8_matmul"]  # its name in `ops` is the function's
E4M3, E5M2, BF16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fp8_ones(shape, dtype):
    return torch.ones(shape, device=DEVICE).to(dtype)


def test_what_the_cuda_kernels_serve(monkeypatch):
    """`cuda` is offered a call exactly where a row of the kernels' table and TMA allow it."""
    offered = []

    def choose(op, device, cuda_kernel="", triton=False):
        offered.append(cuda_kernel)
        return "torch"

    monkeypatch.setattr(front_door, "choose", choose)

    def kernel_for(op, *args, **options):
        op(*args, **options)
        return offered.pop()

    a, b = fp8_ones((4, 32), E4M3), fp8_ones((16, 32), E4M3)
    grad, one, c = (
        fp8_ones((4, 32), E5M2),
        torch.ones((), device=DEVICE),
        torch.zeros(4, 16, device=DEVICE),
    )
    s = (one, one)
    rows = torch.ones(4, device=DEVICE)
    matmul, out = ops.fp8_matmul, "fp8_matmul_out"
    assert kernel_for(matmul, a, b, *s) == kernel_for(matmul, grad, b, *s) == out
    assert kernel_for(matmul, a, b, *s, row_scale=rows) == out
    assert kernel_for(matmul, a[None], b[None], *s) == out
    assert kernel_for(matmul, a, b, *s, out_dtype=E4M3, out_scale=one) == out
    assert kernel_for(matmul, grad, b, *s, out_dtype=FP32) == out
    assert kernel_for(ops.fp8_matmul_add_, c, grad, b, *s) == out
    for name, args, options in (
        ("two gradients", (grad, grad), {}),
        ("fp32 of weights", (a, b), {"out_dtype": FP32}),
        ("fp32 with row scales", (grad, b), {"out_dtype": FP32, "row_scale": rows}),
        ("fp32 in a batch", (grad[None], b[None]), {"out_dtype": FP32}),
        ("e5m2 results", (a, b), {"out_dtype": E5M2, "out_scale": one}),
        ("K of 24", (a[:, :24].contiguous(), b[:, :24].contiguous()), {}),
        ("a start off by 8", (a[:, 8:24], b[:, 8:24]), {}),
        ("rows of 30 bytes", (a, b[:15]), {}),
        ("one row repeated", (a[:1].expand(4, -1), b), {}),
        ("no K", (a[:, :0], b[:, :0]), {}),
    ):
        assert kernel_for(matmul, *args, *s, **options) == "", name
    wide = fp8_ones((16, 32), E4M3)  # what is stored transposed has rows of M
    relu2, fused = ops.fp8_matmul_relu2, {"post_scale": one}
    assert kernel_for(relu2, wide, b, *s, **fused) == "fp8_matmul_relu2_out"
    assert kernel_for(relu2, wide, b, *s, **fused, fast_accum=False) == ""
    assert kernel_for(relu2, a, b, *s, **fused) == "fp8_matmul_relu2_out"
    assert kernel_for(relu2, a, b, *s, **fused, transposed=True) == ""
    drelu2, wide = ops.fp8_matmul_drelu2, fp8_ones((16, 32), E5M2)
    post = torch.ones(16, 16, device=DEVICE)
    in_fp8 = {"post_scale": one, "out_scale": one}
    assert kernel_for(drelu2, wide, b, *s, post.bfloat16()) == "fp8_matmul_drelu2_out"
    assert kernel_for(drelu2, wide, b, *s, post.to(E4M3), **in_fp8) == "fp8_matmul_drelu2_out"
    assert kernel_for(drelu2, wide, b, *s, post.bfloat16(), out_scale=one) == ""
    assert kernel_for(drelu2, wide, b, *s, post.to(E4M3), post_scale=one) == ""


@pytest.mark.parametrize("num_tokens", [16384, 32768, 49152])
def test_every_product_of_the_record_has_a_cuda_kernel(monkeypatch, num_tokens):
    """Those of the head (logits, dX, dW) and of the MLP, all in FP8, at the record's sizes."""
    served = []

    def choose(op, device, cuda_kernel="", triton=False):
        served.append(cuda_kernel)
        return "torch"

    def empty(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def t(x):
        return x.mT.contiguous()

    monkeypatch.setattr(front_door, "choose", choose)
    x, w = (empty(*shape).requires_grad_() for shape in ((num_tokens, 768), (768, 50304)))
    targets, weights = empty(num_tokens, 3, dtype=torch.int64), empty(3, dtype=FP32)
    loss = ops.head_loss(x, w, targets, weights, 23.0, 5.0, 7.5, fp8=ops.quantize_head(w))
    loss.sum().backward()
    assert served == ["fp8_matmul_out"] * 3 and w.grad.shape == w.shape
    served.clear()

    up, down = (empty(3072, 768).requires_grad_() for _ in range(2))
    up_f8, down_f8 = (empty(3072, 768, dtype=E4M3) for _ in range(2))
    one = empty(dtype=FP32)
    gemms = ops.Gemms(*["fp8"] * 7)
    layer = ops.Fp8Layer(gemms, up_f8, t(up_f8), one, down_f8, t(down_f8), one, one)
    ops.relu2_mlp(x, up, down, layer).sum().backward()
    forward = ["fp8_matmul_relu2_out", "fp8_matmul_out"]
    assert served == [*forward, "fp8_matmul_drelu2_out", *["fp8_matmul_out"] * 3]


def test_the_table_of_cuda_kernels_is_the_one_that_is_compiled():
    source = (ROOT / "csrc" / "kernels" / "fp8_matmul_tiles.h").read_text()
    types = {"Float8E4M3": E4M3, "Float8E5M2": E5M2, "BFloat16": BF16, "Float32": FP32}
    row = r"^ +\{k(\w+), k(\w+), k(\w+), k(\w+), (true|false), \d+"
    compiled = {}
    for epilogue, *names, fast in re.findall(row, source, re.MULTILINE):
        kernels = compiled.setdefault(epilogue.removesuffix("Transposed").lower(), {})
        key = tuple(types[name] for name in names)
        kernels[key] = kernels.get(key, True) and fast == "true"
    assert compiled == front_door._CUDA_KERNELS


def test_triton_cuts_long_sums_where_there_are_few_tiles():
    pytest.importorskip("triton")
    from speedrun.triton_kernels.fp8_matmul import choose_split

    assert choose_split(6 * 393, 384, 132) == 1  # the head's weights: 18 full waves
    assert choose_split(1, 8, 132) == 1  # K too short to be cut
    assert choose_split(1, 0, 132) == 1
    for tiles, tiles_k in ((144, 128), (144, 384), (18, 384)):  # 3072 x 768; 768 x 384
        split = choose_split(tiles, tiles_k, 132)
        waves = -(-tiles * split // 132)
        assert 1 < split <= 8 and tiles_k // split >= 16
        assert tiles * split / (waves * 132) > 0.8


COMPILE = r"""
import re
from benchmarks import triton_compile
from speedrun.triton_kernels.fp8_matmul import static_variants
names = []
for capability, limit in ((90, 227), (89, 99)):
    triton_compile.HOPPER = ("cuda", capability, 32)
    for name, *variant in static_variants((capability // 10, capability % 10)):
        where = name, capability
        kernel = triton_compile.compile_variant(*variant)
        ptx, hopper = kernel.asm["ptx"], capability == 90
        assert len(kernel.asm["cubin"]) > 1000, where
        assert kernel.metadata.shared <= limit << 10, where
        mma = r"wgmma\.mma_async\S+\.e[45]m[23]\.e4m3" if hopper else r"mma\.sync\S+\.e4m3\.f32"
        assert re.search(mma, ptx), where
        if hopper and "unaligned" not in name:
            assert "cp.async.bulk.tensor" in ptx, where
        if hopper and variant[1]["out_ptr"].startswith("*fp8"):
            assert "cvt.rn.satfinite" in ptx, where  # the kernel itself does not clamp
        if hopper and name in ("store e4m3", "store e4m3 fast"):  # precise sums are added up
            assert (len(re.findall(r"add(?:\.rn)?\.f32", ptx)) >= 64) == ("fast" not in name), where
        names.append(where)
print("compiled", len(names))
"""


def test_triton_compiles_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "compiled 26" in run.stdout, run.stderr[-2000:]
