"""The benchmarks' arithmetic, checks and lines; what static_check reads; without a GPU."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the checkout, it is not installed

from benchmarks import bench, peers, report, run, static_check  # noqa: E402
from benchmarks.ops import bench_relu2_mlp  # noqa: E402
from cases import RELU2_MLP_SMALL  # noqa: E402
from speedrun.ops._dispatch import Unavailable  # noqa: E402
from speedrun.reference import relu2_mlp as reference  # noqa: E402
from speedrun.reference._fp8 import to_fp8  # noqa: E402

CPU = torch.device("cpu")


def run_module(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_median_and_quartiles():
    timing = bench.Timing((4.0, 1.0, 3.0, 2.0, 100.0))
    assert (timing.median_us, timing.iqr_us) == (3.0, 2.0)
    assert bench.Timing((5.0,)).iqr_us == 0


def test_interleaved_keeps_every_sample():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = bench.time_interleaved(functions, torch.device("cpu"), "cpu", repeats=4)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 4
    assert [len(t.samples_us) for t in timings.values()] == [4, 4]


def test_what_a_graph_cannot_capture_is_left_out(monkeypatch, capsys):
    def sampler(function, device, mode):
        if function is print:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: 1.0

    monkeypatch.setattr(bench, "_sampler", sampler)
    functions = {"waits": print, "fine": lambda: None}
    timings = bench.time_interleaved(functions, CPU, "cold/graph", repeats=2)
    assert list(timings) == ["fine"]
    assert "no cold/graph of waits: operation not permitted" in capsys.readouterr().err


def test_roofs_are_measured():
    found = bench.roofs(CPU)
    assert set(found) == {"copy", "bf16", "fp8"} and found["copy"] > 1e7


def test_a_row_has_rate_roof_and_ratios():
    timing = bench.Timing((500.0,))
    row = report.Row("s", "c", "cuda", "cold/graph", timing, 10**9, 0, 250.0, {"torch": 2.0})
    assert row.cells()[4:] == ("500.0", "2000.0 GB/s", "50 %", "0.0", "-", "2.00 torch")
    row = report.Row("s", "c", "cuda", "cold/graph", timing, 1, num_flops=10**12, peak_bytes=2.5e6)
    assert row.cells()[5:9] == ("2000.0 TFLOP/s", "-", "0.0", "2.5")
    assert json.loads(json.dumps(row.as_json()))["roof_us"] is None
    assert " | " in report.table([row])


def a_benchmark(call, check=lambda name, result: None, **fields):
    return run.Benchmark("op", "case", call, check, num_bytes=fields.pop("num_bytes", 8), **fields)


def test_the_roof_is_the_slower_of_bytes_and_products():
    roofs = {"copy": 1e9, "bf16": 1e12, "fp8": 2e12}
    products = {"bf16": 1e9, "fp8": 2e9}  # 1 ms each
    assert a_benchmark(None, num_bytes=10**6).roof_us(roofs) == pytest.approx(1000)
    assert a_benchmark(None, num_flops=products).roof_us(roofs) == pytest.approx(2000)
    more = a_benchmark(None, num_bytes=5 * 10**6, num_flops=products)
    assert more.roof_us(roofs) == pytest.approx(5000)
    assert math.isnan(more.roof_us({**roofs, "fp8": math.nan}))


def test_only_what_is_right_is_timed():
    values = torch.zeros(3)

    def check(name, result):
        assert torch.equal(result, torch.ones(3)), "not ones"

    def broken():
        raise ValueError("peer broke\nsecond line")

    def missing():
        raise peers.Missing("not installed")

    benchmark = a_benchmark(
        lambda: values.add_(1),
        check,
        reset=lambda: values.zero_(),
        peers={
            "right": lambda: lambda: torch.ones(3),
            "wrong": lambda: lambda: torch.zeros(3),
            "broken": broken,
            "missing": missing,
        },
    )
    functions, checks = run.functions_of(benchmark, ["torch"], CPU)
    assert list(functions) == ["torch", "right"]
    found = {check.name: (check.verdict, check.error) for check in checks}
    assert found["torch"] == found["right"] == ("pass", "")
    assert found["wrong"] == ("fail", "AssertionError: not ones")
    assert found["broken"] == ("fail", "ValueError: peer broke")
    assert found["missing"] == ("skip", "not installed")
    rows = run.measure(benchmark, functions, CPU, 2, {"copy": 1e9})
    assert [row.name for row in rows] == ["torch", "right"]
    assert rows[0].ratios["right"] == pytest.approx(1 / rows[1].ratios["torch"])


def test_rows_have_the_peak_of_what_asks_for_it():
    functions = {"torch": lambda: torch.empty(1 << 20, dtype=torch.uint8)}
    for asked in (False, True):
        (row,) = run.measure(a_benchmark(None, peak=asked), functions, CPU, 1, {"copy": 1e9})
        assert row.peak_bytes == (1 << 20 if asked else pytest.approx(math.nan, nan_ok=True))


def test_elements_never_written_are_seen():
    def check(name, result):
        assert not result.isnan().any(), "NaN"

    functions, checks = run.functions_of(a_benchmark(lambda: torch.empty(9), check), ["torch"], CPU)
    assert not functions and checks[0].error == "AssertionError: NaN"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_backend_that_cannot_serve_is_left_out():
    from speedrun import ops

    call = lambda: ops.transpose(torch.ones(2, 3))  # noqa: E731
    functions, checks = run.functions_of(a_benchmark(call), ["cuda", "torch"], CPU)
    assert list(functions) == ["torch"] and checks[0].verdict == "skip"
    with pytest.raises(Unavailable), ops.use_backend("cuda"):
        call()


def test_the_report_names_what_was_left_out_and_what_was_wrong(tmp_path):
    checks = [report.Check("op", f"case{i}", "quack", "skip", "not installed") for i in range(3)]
    checks += [report.Check("op", "case0", "cuda", "fail", "AssertionError: 3 elements differ")]
    result = report.Report({"gpu": "x"}, {"copy": 2e12, "fp8": math.nan}, checks)
    text = result.text()
    assert "left out: op quack: not installed (3 cases)" in text
    assert "WRONG, not timed: op case0 cuda: AssertionError: 3 elements differ" in text
    assert "roof copy: 2000.00 GB/s" in text
    result.write(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["roofs"] == {"copy": 2e12, "fp8": None} and len(content["checks"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_peers_that_are_not_there_say_so(tmp_path):
    for make, reason in (
        (lambda: peers.package("no_such_package"), "no_such_package is not installed"),
        (lambda: peers.modded_nanogpt("XXT"), "no folder named by --modded-nanogpt"),
        (lambda: peers.scaled_mm(*[torch.ones(2, 2)] * 4), "compute capability 8.9"),
    ):
        with pytest.raises(peers.Missing, match=reason):
            make()
    (tmp_path / "triton_kernels.py").write_text("def XXT():\n    return 5\n")
    assert peers._modded_nanogpt_module(tmp_path).XXT() == 5
    with pytest.raises(peers.Missing, match="there is no"):
        peers._modded_nanogpt_module(tmp_path / "none")
    peers.configure(enabled=False)
    try:
        with pytest.raises(peers.Missing, match="--no-peers"):
            peers.inductor(torch.neg, torch.ones(2))
    finally:
        peers.configure()


class RecordMlp(torch.autograd.Function):
    """Stands in for modded-nanogpt's MLP: its arguments, in plain PyTorch; without FP8, bf16."""

    @staticmethod
    def forward(ctx, x, up, down, up_f8=None, scale=1, x_f8=None, down_f8=None, *scales):
        product = x @ up.T if up_f8 is None else x_f8.float() @ up_f8.float().T * scale
        post = product.bfloat16().relu().square()
        ctx.save_for_backward(x, up, down, post)
        if up_f8 is None:
            return post @ down
        down_scale, post_scale, partial_amax = scales
        assert partial_amax.numel() == 132 and down_f8.stride(0) == 1  # as cuBLASLt wants it
        post_f8 = to_fp8(post, post_scale, torch.float8_e4m3fn)
        return (post_f8.float() @ down_f8.float() * (post_scale * down_scale)).bfloat16()

    @staticmethod
    def backward(ctx, grad):
        x, up, down, post = ctx.saved_tensors
        return *reference.relu2_mlp_backward(grad, x, up, down, post)[1:], *[None] * 7


def test_modded_nanogpt_s_mlp_gets_what_ours_gets(monkeypatch):
    """Its results are right by the law of the choice of GEMMs that it stands beside."""
    monkeypatch.setattr(peers, "modded_nanogpt", lambda name: RecordMlp)
    gpu = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = {}
    for choice in bench_relu2_mlp.CHOICES:
        benchmark = bench_relu2_mlp.make(RELU2_MLP_SMALL[0], choice, True, CPU)
        only = {name: benchmark.peers[name] for name in ["modded-nanogpt"]}
        _, (check,) = run.functions_of(dataclasses.replace(benchmark, peers=only), [], CPU)
        found[choice] = check.verdict, check.error
    assert found["record"] == found["bf16"] == ("pass", "")
    assert found["fp8"] == ("skip", "its backward pass is in bf16")


def test_unknown_gpus_have_no_peaks():
    from speedrun.hardware import GPU_PEAKS, gpu_peaks

    assert math.isnan(gpu_peaks("NVIDIA H100 80GB HBM4").bf16_flops_per_s)
    assert gpu_peaks("NVIDIA H200").memory_bytes_per_s == 4.8e12
    for name, peaks in GPU_PEAKS.items():
        assert name.startswith("NVIDIA ") and peaks.source and peaks.bf16_flops_per_s > 1e14
        ratio = peaks.fp8_flops_per_s / peaks.bf16_flops_per_s
        assert math.isnan(ratio) or abs(ratio - 2) < 0.03  # dense against dense


PTXAS = """
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'two' for 'sm_90a'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'one'
ptxas warning : setmaxnreg ignored to maintain minimum register requirement. (C7508)
ptxas info    : Compiling entry function 'two' for 'sm_80'
    8 bytes stack frame, 400 bytes spill stores, 0 bytes spill loads
"""  # noqa: E501


def test_what_ptxas_says_is_read():
    kernels = {
        ("sm_90a", name): static_check.Kernel("transpose", "cuda", "sm_90a", name)
        for name in ("one", "two")
    }
    static_check.read_log(kernels, PTXAS)
    one, two = kernels.values()
    assert (one.spill_bytes, one.ruin) == (0, ["C7510"])
    assert (two.spill_bytes, two.ruin) == (16, ["C7508"])
    assert one.problems() == ["C7510: wgmma serialised"]
    assert two.problems() == ["C7508: setmaxnreg ignored", "spills 16 bytes, 0 LDL/STL"]


def test_missing_instructions_are_found():
    kernel = static_check.Kernel("fp8_matmul", "cuda", "sm_90a", "StoreFast")
    kernel.counts |= {"QGMMA": 4, "UTMALDG": 2}
    assert kernel.problems() == ["has no UTMASTG or UTMAREDG"]
    kernel.counts["UTMAREDG"] = 1
    assert kernel.problems() == []
    kernel.counts["LDL/STL"] = 3
    assert kernel.problems() == ["spills 0 bytes, 3 LDL/STL"]


# As cuobjdump prints what ptxas makes of a TMA add that a whole warp issues: 32 of them.
REPEATED = """
Fatbin elf code:
arch = sm_90a
\tcode for sm_90a
\t\tFunction : add
        /*3a30*/               @P0 ELECT P3, URZ, PT ;                  /* 0x00000000003f082f */
        /*3a40*/                   UTMAREDG.2D.ADD [UR12], [UR6] ;      /* 0x0000000c060073b6 */
        /*3a50*/               @P3 PLOP3.LUT P0, PT, P3, PT, PT, 0x8, 0x0 ; /* 0x00000000000081c */
        /*3a70*/               @P0 BRA.U.ANY 0x3a30 ;                   /* 0xfffffffd00ec0947 */
"""
USAGE = " Function add:\n  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1024"


def test_tma_of_every_thread_is_found(tmp_path):
    cuobjdump = tmp_path / "cuobjdump"
    texts = f"case $1 in -sass) cat <<'EOF'\n{REPEATED}\nEOF\n;; *) echo '{USAGE}' ;; esac\n"
    cuobjdump.write_text("#!/bin/sh\n" + texts)
    cuobjdump.chmod(0o755)
    (kernel,) = static_check.read_kernels(tmp_path, str(cuobjdump), "sm_90a").values()
    assert kernel.counts["UTMAREDG"] == kernel.counts["by thread"] == 1
    assert kernel.problems() == [
        "TMA instructions that each thread of a warp issues: let one do it"
    ]


def test_names_of_gemms_are_taken_apart():
    kernel = static_check.Kernel("fp8_matmul", "cuda", "sm_90a", "mangled")
    static_check.describe(
        kernel,
        "void speedrun::fp8_matmul_kernel<speedrun::(anonymous namespace)::AddE5m2, 128, 192, 5, "
        "231424>(speedrun::(anonymous namespace)::AddE5m2::Kernel::Params)",
    )
    assert (kernel.name, kernel.tile, kernel.stages) == ("AddE5m2", "128x192", 5)
    assert kernel.shared_bytes == 231424
    static_check.describe(kernel, "void speedrun::quantize_kernel<float, (type_t)1, true>(A, long)")
    assert kernel.name == "quantize_kernel<float, 1, true>"
    static_check.describe(kernel, "void speedrun::transpose_kernel<int, true>(Params)")
    assert kernel.name == "transpose_kernel<int, true>"


@pytest.mark.parametrize(
    ("files", "stems"),
    [
        (["csrc/kernels/fp8_matmul_relu2.cu"], ["fp8_matmul"]),
        (["csrc/kernels/transpose.h", "README.md"], ["transpose"]),
        (["python/speedrun/triton_kernels/relu2_mlp.py"], ["relu2_mlp"]),
        (["pyext/ops/transpose.cpp"], ["transpose"]),
        (["tests/ops/test_transpose.py", "python/speedrun/ops/transpose.py"], []),
        (["csrc/common/sm90.cuh"], ["fp8_matmul", "relu2_mlp", "transpose"]),
        (["python/speedrun/triton_kernels/_fp8.py"], ["fp8_matmul", "relu2_mlp", "transpose"]),
        (["CMakeLists.txt"], ["fp8_matmul", "relu2_mlp", "transpose"]),
        (None, ["fp8_matmul", "relu2_mlp", "transpose"]),
        ([], []),
    ],
)
def test_which_stems_a_change_touches(files, stems):
    assert static_check.stems_of(files, ["fp8_matmul", "relu2_mlp", "transpose"]) == stems


def test_changes_are_since_the_last_commit_on_main(tmp_path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def commit(name):
        (tmp_path / name).write_text("x")
        git("add", name)
        git("commit", "-m", name)

    assert static_check.changed_files(tmp_path) is None
    git("init", "-b", "main")
    commit("first")
    commit("second")
    assert static_check.changed_files(tmp_path) is None  # on main: all may have changed
    (tmp_path / "new").write_text("x")
    git("checkout", "-b", "work")
    commit("third")
    commit("fourth")
    assert static_check.changed_files(tmp_path) == ["fourth", "third", "new"]
    git("update-ref", "refs/remotes/origin/main", "HEAD~1")
    assert static_check.changed_files(tmp_path) == ["fourth", "new"]


def test_tables_between_comments_are_replaced():
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nb"
    assert report.replace_between(text, "t", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no lines <!-- t -->"):
        report.replace_between("a", "t", "new")


def test_triton_kernels_compile_for_hopper():
    """All variants of all stems that have any, in the process that has no interpreter."""
    pytest.importorskip("triton")
    cuobjdump = static_check.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    kernels = static_check.check_triton(["transpose"], cuobjdump)
    assert len(kernels) == 6 and not any(kernel.problems() for kernel in kernels)
    assert all(kernel.registers and kernel.instructions for kernel in kernels)


def test_unknown_stems_are_refused():
    for command in (
        ["benchmarks.run", "--op", "transpoze"],
        ["benchmarks.static_check", "transpoze"],
    ):
        done = run_module(*command)
        assert done.returncode == 2 and "transpose" in done.stderr


@pytest.mark.slow
def test_a_run_on_this_machine(tmp_path):
    done = run_module(
        "benchmarks.run", "--op", "transpose", "--repeats", 2, "--json", tmp_path / "r.json"
    )
    assert done.returncode == 0, done.stderr
    assert "transpose  tied_head  torch" in done.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert all(len(row["timing"]["samples"]) == 2 for row in content["rows"])
