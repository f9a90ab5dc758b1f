"""Which backend serves an operator, what an override may do, and what is recorded."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from speedrun import ops
from speedrun.ops import _dispatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the checkout, it is not installed

from benchmarks.static_check import load_script  # noqa: E402

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def python(code, **environment):
    """Runs `code` in a fresh interpreter; returns the completed process."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True)


SOURCES = {"cuda": "cuda sources", "triton": "triton sources"}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A pretended H100 (9.0), a loaded library with the kernel, and no verdict."""
    state = {"library": "", "registered": True}

    def give(*rows):
        """rows: (backend, capability, verdict) and maybe gpu, speed, source_sha256."""
        table = {}
        for backend, capability, verdict, *rest in rows:
            name, speed, source = (*rest, *("NVIDIA H100", None, SOURCES[backend])[len(rest) :])
            row = {"gpu": name, "compute_capability": capability, "commit": "c"}
            row |= {"verdict": verdict, "speed": speed, "source_sha256": source}
            table.setdefault(backend, []).append(row)
        path = tmp_path / "verdicts.json"
        path.write_text(json.dumps({"verdicts": {"op": table}}))
        monkeypatch.setattr(_dispatch, "VERDICTS_PATH", path)
        forget()

    def forget():
        _dispatch._verdicts.cache_clear()
        _dispatch._decide_once.cache_clear()

    state["give"], state["forget"] = give, forget
    give()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(_dispatch, "library_problem", lambda: state["library"])
    monkeypatch.setattr(_dispatch, "source_sha256", lambda op, backend: SOURCES[backend])
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda name, key: state["registered"] and (name, key) == ("speedrun::op_out", "CUDA"),
    )
    yield state
    forget()


def choose(device=GPU, cuda_kernel="op_out", triton=True):
    return _dispatch.choose("op", device, cuda_kernel, triton)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kernels_need_a_verdict_of_this_capability(gpu, backend):
    assert choose() == "torch"
    gpu["give"]((backend, "8.0", "pass", "NVIDIA A100"))
    assert choose() == "torch"
    gpu["give"]((backend, "8.0", "fail", "NVIDIA A100"), (backend, "9.0", "pass"))
    assert choose() == backend
    gpu["give"]((backend, "9.0", "pass", "NVIDIA H200"))  # correct on another GPU of the kind
    assert choose() == backend
    gpu["give"]((backend, "9.0", "pass"), (backend, "9.0", "fail", "NVIDIA H200"))
    assert choose() == "torch"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_verdict_counts_for_its_sources_only(gpu, backend):
    gpu["give"]((backend, "9.0", "pass", "NVIDIA H100", 2.0, "older sources"))
    assert choose() == "torch"
    older_failed = (backend, "9.0", "fail", "NVIDIA H200", None, "older sources")
    gpu["give"]((backend, "9.0", "pass"), older_failed)
    assert choose() == backend


def test_speed_counts_for_a_gpu_name(gpu):
    cuda, triton = (
        ("cuda", "9.0", "pass", "NVIDIA H100"),
        ("triton", "9.0", "pass", "NVIDIA H100"),
    )
    gpu["give"]((*cuda, 1.2), (*triton, 1.5))
    assert choose() == "triton"
    gpu["give"]((*cuda, 1.5), (*triton, 1.2))
    assert choose() == "cuda"
    gpu["give"]((*cuda, 0.9))  # right, but slower than torch
    assert choose() == "torch"
    gpu["give"]((*cuda, 0.9), triton)
    assert choose() == "triton"
    gpu["give"](("cuda", "9.0", "pass", "NVIDIA H200", 0.9))  # another GPU's speed
    assert choose() == "cuda"
    gpu["give"](("triton", "9.0", "pass", "NVIDIA H100", 9.0), ("cuda", "9.0", "pass"))
    assert choose() == "cuda"  # not measured: ours first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"library": "speedrun._C is broken"}, r"speedrun\._C is broken"),
        ({"registered": False}, "no kernel op_out"),
    ],
)
def test_without_the_library_triton_serves(gpu, change, reason):
    gpu.update(change)
    gpu["give"](("cuda", "9.0", "pass"), ("triton", "9.0", "pass"))
    assert choose() == "triton"
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match=f"asks for .*'cuda'.*{reason}"):
        choose()


def test_shapes_without_a_kernel_go_to_the_next_backend(gpu):
    gpu["give"](("cuda", "9.0", "pass"), ("triton", "9.0", "pass"))
    assert choose() == "cuda"
    assert choose(cuda_kernel="") == "triton"
    assert choose(cuda_kernel="", triton=False) == "torch"
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no Triton version"):
        choose(triton=False)
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="no CUDA kernel"):
        choose(cuda_kernel="")


def test_a_choice_is_made_once(gpu, monkeypatch):
    gpu["give"](("cuda", "9.0", "pass"))
    assert choose() == "cuda"
    monkeypatch.setattr(_dispatch, "_problem", None)  # not looked at again
    assert choose() == "cuda"


def test_an_override_needs_no_verdict(gpu):
    with ops.use_backend("cuda"):
        assert choose() == "cuda"
    with ops.use_backend("triton"):
        assert choose() == "triton"
    assert choose() == "torch"


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


def test_triton_sources_are_the_stem_s_file_and_what_all_share(monkeypatch, tmp_path):
    monkeypatch.setattr(_dispatch, "TRITON_FOLDER", tmp_path)
    (tmp_path / "op.py").write_text("kernel")
    (tmp_path / "other.py").write_text("kernel")
    (tmp_path / "__init__.py").write_text("")
    first = _dispatch.source_sha256("op", "triton")
    for name, changes in (("other.py", False), ("__init__.py", False), ("_shared.py", True)):
        (tmp_path / name).write_text("changed")
        assert (_dispatch.source_sha256("op", "triton") != first) == changes, name
    before = _dispatch.source_sha256("op", "triton")
    (tmp_path / "op.py").write_text("kernel, changed")
    assert _dispatch.source_sha256("op", "triton") != before
    assert _dispatch.source_sha256("none", "triton") == ""
    monkeypatch.setattr(_dispatch, "FORMS", {"op": "other"})
    before = _dispatch.source_sha256("op", "triton")
    (tmp_path / "other.py").write_text("what op uses, changed")
    assert _dispatch.source_sha256("op", "triton") != before


def test_cuda_sources_are_those_of_the_library(monkeypatch):
    library = types.ModuleType("speedrun._C")
    monkeypatch.setitem(sys.modules, "speedrun._C", library)
    monkeypatch.setattr(_dispatch, "library_problem", lambda: "")
    assert _dispatch.source_sha256("op", "cuda") == ""  # a library from before there were any
    library.source_hashes = json.dumps({"op": "abc"})
    assert _dispatch.source_sha256("op", "cuda") == "abc"
    assert _dispatch.source_sha256("other", "cuda") == ""


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("csrc/kernels/transpose.cu", True),
        ("csrc/kernels/transpose.h", True),
        ("csrc/common/new.cuh", True),
        ("pyext/ops/transpose.cpp", True),
        ("pyext/torch_utils.h", True),
        ("csrc/kernels/other.cu", False),
        ("pyext/ops/other.cpp", False),
        ("csrc/kernels/transpose_extra.cu", True),
    ],
)
def test_a_changed_kernel_loses_its_verdict(gpu, tmp_path, monkeypatch, file, changed):
    """The sources that count, by changing them in a copy; and the default that follows."""
    hashes = load_script(ROOT / "pyext" / "source_hashes.py").source_hashes
    for folder in ("csrc", "pyext"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(
        _dispatch, "source_sha256", lambda op, backend: hashes(tmp_path)["transpose"]
    )
    gpu["give"](("cuda", "9.0", "pass", "NVIDIA H100", 2.0, hashes()["transpose"]))
    assert choose() == "cuda"
    path = tmp_path / file
    path.write_text((path.read_text() if path.exists() else "") + "// changed\n")
    gpu["forget"]()
    assert choose() == ("torch" if changed else "cuda")


def test_headers_of_other_kernels_count(tmp_path):
    script = load_script(ROOT / "pyext" / "source_hashes.py")
    for name, text in {
        "csrc/common/a.h": "",
        "csrc/kernels/one.cu": '#include "kernels/two.h"',
        "csrc/kernels/two.h": '#include "kernels/three.h"',
        "csrc/kernels/three.h": "",
        "csrc/kernels/one_more.cu": "",
        "pyext/torch_utils.h": "",
        **{f"pyext/ops/{stem}.cpp": "" for stem in ("one", "two", "one_more")},
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = script.sources("one", ["one", "two", "one_more"], tmp_path)
    names = ["a.h", "one.cu", "three.h", "two.h", "one.cpp", "torch_utils.h"]
    assert [path.name for path in found] == names


def test_verdicts_are_well_formed():
    table = json.loads(_dispatch.VERDICTS_PATH.read_text())["verdicts"]
    for op, backends in table.items():
        assert hasattr(ops, op), f"verdicts.json names an operator that isn't there: {op}"
        for rows in backends.values():
            assert all(row["verdict"] in ("pass", "fail") for row in rows)
            assert len({row["gpu"] for row in rows}) == len(rows)
        assert set(backends) <= {"cuda", "triton"}
