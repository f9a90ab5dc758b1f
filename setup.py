"""Builds speedrun's two compiled modules with CMake and Ninja; the metadata is in pyproject.toml.

_host, the data loader, wherever a C++20 compiler and Python.h are (else one warning). _C, the CUDA
kernels, by SPEEDRUN_CUDA: 1 always, 0 never, auto (default) where nvcc is and a GPU is visible.
MAX_JOBS: parallel jobs. build/<python tag>[-cuda]/ is kept for the next build, with a build.log.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KIB_PER_JOB = 4 << 20  # for nvcc over CUTLASS headers
CUDA_REQUIRES = ["torch>=2.10", "nvidia-cutlass>=4.2"]  # for their headers


def find_tool(name, folder_attribute):
    """Path of cmake or ninja: the pip package's own program, or else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = ""
    return shutil.which(name, path=folder) or shutil.which(name)


def find_nvcc():
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    places = [os.environ.get("CUDACXX", ""), *(f"{home}/bin/nvcc" for home in homes), "nvcc"]
    return next(filter(None, map(shutil.which, [*places, "/usr/local/cuda/bin/nvcc"])), None)


def gpu_is_visible():
    smi = shutil.which("nvidia-smi")  # for WSL, which has no /dev/nvidia0
    listing = subprocess.run([smi, "-L"], capture_output=True).stdout if smi else b""
    return Path("/dev/nvidia0").exists() or b"GPU " in listing


def cuda_is_wanted():
    choice, nvcc = os.environ.get("SPEEDRUN_CUDA", "auto"), find_nvcc()
    if choice not in ("auto", "0", "1"):
        sys.exit(f"SPEEDRUN_CUDA={choice}: allowed are auto, 0 and 1")
    if choice == "1" and not nvcc:
        sys.exit("SPEEDRUN_CUDA=1, but nvcc was not found: install CUDA, or set CUDA_HOME")
    return choice == "1" or (choice == "auto" and nvcc and gpu_is_visible())


def find_compiler():
    """Command of the C++ compiler as a list, or None: $CXX, else the usual names on PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    commands = [shlex.split(name) for name in names]
    return next(([shutil.which(c[0]), *c[1:]] for c in commands if shutil.which(c[0])), None)


def missing_tool(compiler):
    """What this machine lacks to build anything here, in one line; empty if nothing."""
    tools = {"cmake": find_tool("cmake", "CMAKE_BIN_DIR"), "ninja": find_tool("ninja", "BIN_DIR")}
    tools["pybind11"] = importlib.util.find_spec("pybind11")
    if None in tools.values():
        return f"not installed: {', '.join(name for name in tools if tools[name] is None)}"
    if compiler is None:
        return f"no C++ compiler: tried {os.environ.get('CXX') or 'c++, g++, clang++'}"
    with tempfile.TemporaryDirectory() as folder:  # a probe, so that our own errors stay errors
        Path(folder, "probe.cpp").write_text("#include <Python.h>\n#include <span>\n")
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}"]
        command = [*compiler, *flags, f"{folder}/probe.cpp", "-o", f"{folder}/probe.so"]
        probe = subprocess.run(command, capture_output=True, text=True)
    reason = next((line for line in probe.stderr.splitlines() if "error" in line), "no message")
    return f"{compiler[0]} cannot build a Python module: {reason}" if probe.returncode else ""


def num_jobs():
    cores, asked = os.cpu_count() or 1, int(os.environ.get("MAX_JOBS") or 0)
    try:
        cores = len(os.sched_getaffinity(0))
        free_kib = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    except (AttributeError, OSError, IndexError):  # not Linux
        return asked or cores
    return asked or max(1, min(cores, int(free_kib) // KIB_PER_JOB))


def run_cmake(compiler, cuda, *targets, **more):
    """Configures and builds; returns the folder. Tests and static_check build here, too."""
    folder = ROOT / "build" / (sys.implementation.cache_tag + "-cuda" * cuda)
    cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CXX_COMPILER": ";".join(compiler),
        "CMAKE_CUDA_COMPILER": find_nvcc() if cuda else "",
        "SPEEDRUN_LAUNCHER": shutil.which("ccache") or "",
        "SPEEDRUN_PYTHON": sys.executable,
        "SPEEDRUN_CUDA": "ON" if cuda else "OFF",
        **more,
    }
    fixed, now = folder / "fixed.txt", f"{ROOT} {compiler} {options['CMAKE_CUDA_COMPILER']}"
    if not fixed.exists() or fixed.read_text() != now:  # what CMake can't change in a folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    fixed.write_text(now)
    configure = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", "--no-warn-unused-cli"]
    configure += [f"-D{key}={value}" for key, value in options.items()]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (folder / "build.log").open("a") as log:  # tests read ptxas's lines in it
        for command in (configure, [ninja, "-C", folder, "-j", str(num_jobs()), *targets]):
            run = subprocess.Popen(command, **pipe)
            for line in run.stdout:
                print(line, end="", flush=True)
                log.write(line)
            if run.wait():
                sys.exit("the build failed" + "; SPEEDRUN_CUDA=0 builds no kernels" * cuda)
    return folder


class CMakeBuild(build_ext):
    def build_extensions(self):
        problem = missing_tool(compiler := find_compiler())
        modules = ["torch", "cutlass_library"] * (len(self.extensions) > 1)
        absent = [name for name in modules if not importlib.util.find_spec(name)]
        lack = f"no {' and no '.join(absent)} here: pip install {shlex.join(CUDA_REQUIRES)}"
        if os.environ.get("SPEEDRUN_CUDA") == "1" and (problem or absent):
            sys.exit(f"SPEEDRUN_CUDA=1, but {problem or lack}")
        if problem:
            print(f"warning: built without the C++ data loader: {problem}", file=sys.stderr)
            self.extensions = []
        elif absent:
            print(f"warning: built without CUDA kernels: {lack}", file=sys.stderr)
            self.extensions.pop()
        for stale in Path(self.build_lib, "speedrun").glob("_[Ch]*.so"):
            stale.unlink()  # from a build with other choices: it would get into the wheel
        targets = [extension.name.removeprefix("speedrun.") for extension in self.extensions]
        built = run_cmake(compiler, "_C" in targets, *targets) if targets else None
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            self.mkpath(str(target.parent))
            shutil.copy2(built / target.name, target)


if __name__ == "__main__":
    cuda = bool(cuda_is_wanted())
    ext = [Extension("speedrun._host", [], optional=True)]
    ext += [Extension("speedrun._C", [], py_limited_api=True)] * cuda
    setup(ext_modules=ext, cmdclass={"build_ext": CMakeBuild}, setup_requires=CUDA_REQUIRES * cuda)
