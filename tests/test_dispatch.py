"""Which backend serves an operator, what an override may do, and what is recorded."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from speedrun import ops
from speedrun.ops import _dispatch

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def python(code, **environment):
    """Runs `code` in a fresh interpreter; returns the completed process."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A pretended GPU of capability 9.0, a loaded library with the kernel, and no verdict."""
    state = {"library": "", "registered": True, "verdicts": {}}

    def write_verdicts(capabilities):
        path = tmp_path / "verdicts.json"
        rows = [
            dict.fromkeys(("commit", "gpu", "date"), "") | {"capability": c} for c in capabilities
        ]
        path.write_text(json.dumps({"verdicts": {"op": rows}}))
        monkeypatch.setattr(_dispatch, "VERDICTS_PATH", path)
        _dispatch._passed.cache_clear()

    write_verdicts([])
    state["pass_on"] = write_verdicts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_dispatch, "library_problem", lambda: state["library"])
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda name, key: state["registered"] and (name, key) == ("speedrun::op_out", "CUDA"),
    )
    yield state
    _dispatch._passed.cache_clear()


def choose(device=GPU, cuda_kernel="op_out", triton=True):
    return _dispatch.choose("op", device, cuda_kernel, triton)


def test_cuda_kernels_need_a_verdict_of_this_capability(gpu):
    assert choose() == "triton"
    gpu["pass_on"](["8.0"])
    assert choose() == "triton"
    gpu["pass_on"](["8.0", "9.0"])
    assert choose() == "cuda"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"library": "speedrun._C is broken"}, r"speedrun\._C is broken"),
        ({"registered": False}, "no kernel op_out"),
    ],
)
def test_without_the_library_triton_serves(gpu, change, reason):
    gpu["pass_on"](["9.0"])
    gpu.update(change)
    assert choose() == "triton"
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match=f"asks for .*'cuda'.*{reason}"):
        choose()


def test_shapes_without_a_kernel_go_to_the_next_backend(gpu):
    gpu["pass_on"](["9.0"])
    assert choose(cuda_kernel="") == "triton"
    assert choose(cuda_kernel="", triton=False) == "torch"
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no Triton version"):
        choose(triton=False)
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="no CUDA kernel"):
        choose(cuda_kernel="")


def test_an_override_needs_no_verdict(gpu):
    with ops.use_backend("cuda"):
        assert choose() == "cuda"
    with ops.use_backend("torch"):
        assert choose() == "torch"
    assert choose() == "triton"


def test_cpu_tensors_use_the_reference():
    assert choose(CPU) == "torch"
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="tensors are on cpu"):
        choose(CPU)


def test_triton_serves_cpu_tensors_only_in_its_interpreter():
    pytest.importorskip("triton")
    code = """
        import torch
        from speedrun import ops
        with ops.use_backend("triton"):
            ops.transpose(torch.ones(2, 3))
        print(ops.backends_used())
    """
    run = python(code, TRITON_INTERPRET="1")
    assert run.stdout.strip() == "{'transpose': ('triton',)}", run.stderr
    assert "needs TRITON_INTERPRET=1" in python(code).stderr


def test_overrides_nest_and_can_name_operators():
    with ops.use_backend("triton", "another"):
        assert choose(CPU) == "torch"
        with ops.use_backend("triton", "op"), pytest.raises(RuntimeError):
            choose(torch.device("meta"))
        assert choose(CPU) == "torch"
    assert _dispatch._forced == {}


def test_unknown_backends_are_refused():
    allowed = "allowed are cuda, triton, torch"
    with pytest.raises(ValueError, match=allowed), ops.use_backend("opencl"):
        pass
    code = "import torch; from speedrun import ops; ops.transpose(torch.ones(2, 3))"
    run = python(code, SPEEDRUN_BACKEND="opencl")
    assert run.returncode and allowed in run.stderr


@pytest.mark.parametrize(
    ("value", "forced"),
    [
        ("", {}),
        ("torch", {"*": "torch"}),
        ("softcap_ce=torch, transpose=cuda", {"softcap_ce": "torch", "transpose": "cuda"}),
        ("triton,transpose=cuda", {"*": "triton", "transpose": "cuda"}),
    ],
)
def test_environment_variable(value, forced):
    assert _dispatch._parse(value) == forced
    code = "from speedrun.ops import _dispatch; print(_dispatch._forced)"
    assert python(code, SPEEDRUN_BACKEND=value).stdout.strip() == str(forced)


def test_records_what_ran(monkeypatch):
    monkeypatch.setattr(_dispatch, "_used", {})
    assert ops.backends_used() == {}
    ops.transpose(torch.ones(2, 3))
    assert ops.backends_used() == {"transpose": ("torch",)}


def test_compiled_code_follows_an_override(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_dispatch, "_used", {})
    torch._dynamo.reset()
    compiled = torch.compile(ops.transpose, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(2, 3, device=GPU if torch.cuda.is_available() else CPU))
    before = ops.backends_used()["transpose"]
    with ops.use_backend("triton"):
        compiled(torch.ones(2, 3, device=GPU if torch.cuda.is_available() else CPU))
    assert ops.backends_used()["transpose"] == tuple(sorted({*before, "triton"}))


def test_a_broken_library_warns_once_and_does_not_break(tmp_path):
    (tmp_path / "_C.py").write_text("raise ImportError('undefined symbol: no_such_thing')")
    code = f"""
        import speedrun, torch, warnings
        speedrun.__path__.insert(0, {str(tmp_path)!r})
        from speedrun import ops
        from speedrun.ops import _dispatch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(_dispatch.library_problem(), _dispatch.library_problem(), sep="|")
            print(ops.transpose(torch.ones(2, 3)).shape, [str(w.message) for w in caught])
    """
    lines = python(code).stdout.splitlines()
    problem = "speedrun._C can't be loaded: undefined symbol: no_such_thing"
    assert lines[0] == f"{problem}|{problem}"
    assert lines[1] == f'torch.Size([3, 2]) ["no CUDA kernels: {problem}"]'


def test_verdicts_are_well_formed():
    table = json.loads(_dispatch.VERDICTS_PATH.read_text())["verdicts"]
    for op, rows in table.items():
        assert hasattr(ops, op), f"verdicts.json names an operator that isn't there: {op}"
        for row in rows:
            assert set(row) == {"capability", "commit", "gpu", "date"}
            assert row["capability"].replace(".", "").isdigit()
        assert len({row["capability"] for row in rows}) == len(rows)
