"""The build: CMake's targets, what the CUDA compiler says, what _C needs, and bare machines.

The build folder is that of pip and of benchmarks/static_check.py, and is kept: only the first run
compiles everything. That takes minutes with the kernels, so tests of these are slow ones; .ci/run
runs them in full.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the checkout, it is not installed

from benchmarks import static_check  # noqa: E402

setup = static_check.load_script(ROOT / "setup.py")
NVCC = setup.find_nvcc()
WITH_KERNELS = pytest.param(
    True,
    marks=[
        pytest.mark.skipif(not NVCC, reason="needs nvcc, which is not on this machine"),
        pytest.mark.slow,
        pytest.mark.timeout(3600),
    ],
    id="kernels",
)
with_kernels = pytest.mark.parametrize("build", [WITH_KERNELS], indirect=True)


@pytest.fixture(scope="session", params=[pytest.param(False, id="host"), WITH_KERNELS])
def build(request) -> Path:
    """Folder with every target built."""
    missing = setup.missing_tool(setup.find_compiler())
    if missing:
        pytest.skip(f"can't build: {missing}")
    return static_check.build(cuda=request.param)


def compiler_output(folder: Path) -> dict[str, str | None]:
    """Object -> what its compiler printed when it was last built, of all objects there are."""
    commands = json.loads((folder / "compile_commands.json").read_text())
    wanted = {os.path.relpath(Path(folder, command["output"]), folder) for command in commands}
    output = static_check.compiler_output(folder)
    return {name: output.get(name) for name in wanted}


def test_compiles_without_warnings(build):
    for name, text in compiler_output(build).items():
        assert text is not None, f"{name} is not in build.log: delete {build}"
        assert not re.search("warning", text, re.IGNORECASE), f"{name}:\n{text}"


@with_kernels
def test_kernels_do_not_spill(build):
    archs = {"kernels.dir": {"sm_80", "sm_89", "sm_90a"}, "hopper_kernels.dir": {"sm_90a"}}
    found = 0
    for name, text in compiler_output(build).items():
        target = name.split("/")[1]
        if target in archs:
            compiled = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", text)
            spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
            assert {arch for _, arch in compiled} == archs[target], name
            assert len(spills) >= len(compiled) and set(spills) == {("0", "0")}, name
            found += len(compiled)
    assert found


@with_kernels
def test_sass_moves_16_bytes_at_a_time(build):
    cuobjdump = static_check.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    objects = static_check.kernel_objects(build)
    found = static_check.read_kernels(build / objects["csrc/kernels/transpose.cu"], cuobjdump)
    names = static_check.demangled([name for _, name in found])
    for (_, name), kernel in found.items():
        static_check.describe(kernel, names[name])
    assert {k.arch for k in found.values()} == {"sm_80", "sm_89", "sm_90a"}
    aligned = [k for k in found.values() if ", true, true, " in k.name]
    assert len(aligned) == 3 * 6  # three architectures; three sizes moved, three types added
    for kernel in aligned:
        counts = kernel.counts
        assert counts["ld128"] and counts["st128"] and counts["lds128"] and counts["sts128"]
        narrow = {kind: counts[kind] for kind in ("ld", "st", "lds", "sts", "LDL/STL")}
        assert not any(narrow.values()), (kernel.name, narrow)


LOAD_C = """
import importlib.util, sys, torch
def load_library():
    spec = importlib.util.spec_from_file_location("speedrun._C", sys.argv[1])
    sys.modules["speedrun._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
def has_kernel():
    return torch._C._dispatch_has_kernel_for_dispatch_key("speedrun::transpose_out", "CUDA")
"""


@with_kernels
@pytest.mark.parametrize("library_first", [True, False])
def test_c_imports_and_registers(build, library_first):
    """Under whichever torch is here, the CPU's included, before or after the schema."""
    steps = ["load_library()", "from speedrun import ops"]
    steps = steps if library_first else steps[::-1]
    checks = [
        "assert has_kernel() and not torch.cuda.is_initialized()",
        "assert torch.equal(ops.transpose(torch.ones(2, 3)), torch.ones(3, 2))",
    ]
    code = "\n".join([LOAD_C, *steps, *checks])
    command = [sys.executable, "-c", code, build / "_C.abi3.so"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@with_kernels
def test_c_knows_what_it_was_built_from(build):
    code = LOAD_C + "load_library()\nprint(sys.modules['speedrun._C'].source_hashes)"
    command = [sys.executable, "-c", code, build / "_C.abi3.so"]
    run = subprocess.run(command, capture_output=True, text=True)
    hashes = static_check.load_script(ROOT / "pyext" / "source_hashes.py").source_hashes()
    assert json.loads(run.stdout) == hashes and "transpose" in hashes, run.stderr


@with_kernels
def test_c_needs_only_stable_symbols(build):
    for tool in ("nm", "readelf"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool} of binutils")
    library = build / "_C.abi3.so"
    command = ["nm", "-D", "--undefined-only", library]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    strong = [line.split()[-1] for line in lines if line.split()[-2] == "U"]
    weak = [line.split()[-1] for line in lines if line.split()[-2] in "wv"]
    stable = re.compile(
        r"(aoti_torch|torch)_\w+$|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_|"
        r"PyModule_(Create2|AddStringConstant)$|_Py_Dealloc$"
    )
    assert [name for name in strong if not stable.match(name)] == []
    assert "aoti_torch_get_current_cuda_stream" in weak
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = set(re.findall(r"Shared library: \[([^\]]+)\]", dynamic))
    # libtorch.so brings libtorch_cuda.so where torch has it: without it the weak symbol stays null.
    assert "libtorch.so" in needed
    system = {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libm.so.6",
        "libdl.so.2",
        "librt.so.1",
    }
    loader = {name for name in needed if name.startswith("ld-linux")} | {"libpthread.so.0"}
    assert needed <= {"libtorch.so", "libtorch_cpu.so"} | system | loader
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_cpp_tests_pass(build):
    cmake = setup.find_tool("cmake", "CMAKE_BIN_DIR")
    ctest = shutil.which("ctest", path=Path(cmake).parent) or shutil.which("ctest")
    command = [ctest, "--test-dir", build, "--output-on-failure", "--no-tests=error"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "int_math_test" in run.stdout and "data_test" in run.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the build needs."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "pyext", "python"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def install(checkout: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    if not importlib.util.find_spec("setuptools") or not importlib.util.find_spec("pip"):
        pytest.skip("needs pip and setuptools in this environment")
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", target, checkout]
    environment = {**os.environ, "SPEEDRUN_CUDA": "0", **environment}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_no_compiler_gives_one_warning_and_an_install(checkout, tmp_path):
    target = tmp_path / "installed"
    run = install(checkout, target, CC="/nowhere/cc", CXX="/nowhere/c++", PATH="")
    assert run.returncode == 0, run.stdout[-2000:]
    warnings = [line for line in run.stdout.splitlines() if "warning: built without" in line]
    assert len(warnings) == 1 and "no C++ compiler: tried /nowhere/c++" in warnings[0]
    assert not list(target.rglob("*.so"))
    code = "import speedrun; print(speedrun.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.startswith(str(target)), run.stderr


def test_an_error_of_ours_fails_the_build(checkout, tmp_path):
    if setup.missing_tool(setup.find_compiler()):
        pytest.skip("needs a compiler")
    source = checkout / "csrc" / "data" / "shard.cpp"
    source.write_text("#error broken on purpose\n" + source.read_text())
    run = install(checkout, tmp_path / "installed", MAX_JOBS="1")
    assert run.returncode != 0
    assert "broken on purpose" in run.stdout and "the build failed" in run.stdout


def test_setup_can_be_nested(tmp_path):
    """.ci/run sets up, then calls test.sh, which does too: neither may wait for the other."""
    script = f"""
        set -euo pipefail
        source {ROOT / ".ci/setup.sh"}
        install_into_venv() {{ echo "installed $1"; }}
        setup_venv $1
        if [ $1 = outer ]; then bash "$0" inner; fi
    """
    (tmp_path / "nested.sh").write_text(script)
    command = ["bash", "nested.sh", "outer"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert run.stdout.split() == ["installed", "outer", "installed", "inner"], run.stderr


def test_missing_tools_are_named(monkeypatch, tmp_path):
    compiler = setup.find_compiler()
    monkeypatch.setattr(setup, "find_tool", lambda name, attribute: None)
    assert setup.missing_tool(compiler) == "not installed: cmake, ninja"
    monkeypatch.undo()
    if compiler is None:
        pytest.skip("the rest needs a compiler")
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda key: str(tmp_path))
    assert re.search(r"can.*build a Python module: .*Python\.h", setup.missing_tool(compiler))


def test_when_cuda_kernels_are_built(monkeypatch):
    def wanted(choice, nvcc, gpu):
        monkeypatch.setenv("SPEEDRUN_CUDA", choice)
        monkeypatch.setattr(setup, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(setup, "gpu_is_visible", lambda: gpu)
        return bool(setup.cuda_is_wanted())

    assert wanted("auto", "/usr/bin/nvcc", True)
    assert not wanted("auto", "/usr/bin/nvcc", False)
    assert not wanted("auto", None, True)
    assert wanted("1", "/usr/bin/nvcc", False)
    assert not wanted("0", "/usr/bin/nvcc", True)
    with pytest.raises(SystemExit, match="nvcc was not found"):
        wanted("1", None, True)
    with pytest.raises(SystemExit, match="allowed are auto, 0 and 1"):
        wanted("yes", None, False)


def test_cuda_needs_torch_at_build_time_only_if_kernels_are_built():
    """An isolated build installs what this hook names."""
    code = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    for choice in ["0", "1"] if NVCC else ["0"]:
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "SPEEDRUN_CUDA": choice},
            capture_output=True,
            text=True,
        )
        assert run.stdout.splitlines()[-1] == str(setup.CUDA_REQUIRES if choice == "1" else [])


def test_number_of_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.num_jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= setup.num_jobs() <= (os.cpu_count() or 1)
    monkeypatch.setattr(setup, "KIB_PER_JOB", 1 << 60)  # no memory for even one
    assert setup.num_jobs() == 1


def test_weak_symbols_resolve_through_a_library_that_is_only_named(tmp_path):
    """Why _C names libtorch.so: ours then finds libtorch_cuda.so's functions, built without it."""
    compiler = setup.find_compiler()
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a compiler on Linux")

    def library(name, code, *flags):
        source, folder = tmp_path / f"{name}.cpp", tmp_path / os.path.dirname(name)
        folder.mkdir(exist_ok=True)
        source.write_text(code)
        flags = [f"-Wl,-soname,{os.path.basename(name)}.so", "-Wl,--no-as-needed", *flags]
        command = [*compiler, "-shared", "-fPIC", source, "-o", tmp_path / f"{name}.so", *flags]
        subprocess.run(command, check=True, cwd=tmp_path)

    library("libcuda_part", 'extern "C" int stream() { return 42; }')
    library("libwhole", "", "-L.", "-lcuda_part", f"-Wl,-rpath,{tmp_path}")
    library("cpu/libwhole", "")  # what it is built against
    weak = 'extern "C" int stream() __attribute__((weak));'
    library(
        "ours", weak + 'extern "C" int run() { return stream ? stream() : -1; }', "-Lcpu", "-lwhole"
    )
    code = """
        import ctypes
        ctypes.CDLL("./libwhole.so", mode=0)  # local, as Python loads torch
        print(ctypes.CDLL("./ours.so", mode=0).run())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "42", run.stderr
