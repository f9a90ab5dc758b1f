"""The laws of DESIGN section 2, read from the sources' includes and imports."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from speedrun.ops._dispatch import FORMS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "speedrun"
MAX_LINES = 600

# Law 4. What may read the environment or speak to other ranks, by file under python/speedrun.
ENVIRONMENT_READERS = {"train.py", "cli.py", "comms.py", "runlog.py", "ops/_dispatch.py"}
DISTRIBUTED_USERS = {"train.py", "cli.py", "comms.py", "runlog.py"}
# The ranks' key-value store, and torchrun's error files: what is left when collectives hang.
DISTRIBUTED_USERS |= {"peers.py", "failures.py"}
# PyTorch's checkpoints, and how a rank's rows are described to them.
CHECKPOINT_WRITERS = {"checkpoint.py", "autosave.py"}
CHECKPOINT_PARTS = tuple(
    f"torch.distributed.{name}" for name in ("checkpoint", "tensor", "device_mesh", "ProcessGroup")
)

# Who may import whom inside the package (first folder or module name); absent: anything.
MAY_IMPORT = {
    "reference": {"reference"},
    "triton_kernels": set(),
    "ops": {"ops", "reference", "triton_kernels", "_C"},
    "config": set(),
    "config_check": {"config", "ops"},  # ops: a limit of theirs
    "overrides": {"config"},
    "world_size": {"config"},
    "schedule": {"config"},
    "recipes": {"config", "recipes"},
    "model": {"ops", "config", "batch", "layer", "gates", "fp8_state"},
    "baseline_model": {"ops", "config", "batch"},
    "layer": {"ops", "config", "gates", "fp8_state"},
    "batch": {"ops"},
    "gates": {"config"},
    "fp8_state": {"ops", "config"},
    # schedule: StepPlan, a type
    "optim": {"ops", "config", "comms", "normuon", "update_rules", "schedule", "step_graph"},
    "normuon": {"ops", "update_rules"},
    "step_graph": {"schedule", "update_rules"},
    "update_rules": {"ops", "config", "schedule"},
}
TOP = {"train", "cli", "commands"}  # only these import these


def python_files():
    return {str(p.relative_to(PACKAGE)): p.read_text() for p in sorted(PACKAGE.rglob("*.py"))}


def imports(source):
    """Modules that Python source imports anywhere, as dotted names; `a.b` for `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def attribute_chains(source):
    """Dotted names used in Python source, such as os.environ and torch.distributed.barrier."""
    return {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}


def uses(source, module):
    names = imports(source) | attribute_chains(source)
    return any(name == module or name.startswith(module + ".") for name in names)


def forbidden_includes(source):
    """Law 1, for files under csrc/."""
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source, re.MULTILINE)
    return [name for name in included if re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", name)]


def included_folders(source):
    return set(re.findall(r'^\s*#\s*include\s*"(\w+)/', source, re.MULTILINE))


def launches(source):
    """Law 2, for files under pyext/."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    return "<<<" in code


def import_problems(path, source):
    """Laws 3 and 4 and the diagram, for one file under python/speedrun."""
    room = Path(path).parts[0].removesuffix(".py")
    own = f"{room}.{Path(path).stem}"
    problems = []
    for name in imports(source):
        parts = name.split(".")
        if parts[0] != "speedrun" or len(parts) == 1:
            continue
        other = parts[1]
        if room in MAY_IMPORT and other not in MAY_IMPORT[room] | {room}:
            problems.append(f"{path} imports {name}")
        if room in ("reference", "triton_kernels") and other == room:
            shared = len(parts) > 2 and parts[2].startswith("_")  # such as reference/_fp8.py
            own_file = f"{name}.".startswith(f"speedrun.{own}.") or Path(path).stem == "__init__"
            form = room == "triton_kernels" and FORMS.get(Path(path).stem) == parts[2]
            if not (own_file or shared or form):
                problems.append(f"{path} imports another {room} file, {name}")
        if other in TOP and room not in TOP:
            problems.append(f"{path} imports {name}, which is above it")
        if other in ("tests", "benchmarks", "records"):
            problems.append(f"{path} imports {name}")
    for name in ("tests", "benchmarks", "records"):
        if uses(source, name):
            problems.append(f"{path} imports {name}")
    if uses(source, "os.environ") or uses(source, "os.getenv"):
        if path not in ENVIRONMENT_READERS and room != "commands":
            problems.append(f"{path} reads the environment")
    distributed = {n for n in imports(source) if f"{n}.".startswith("torch.distributed.")}
    distributed |= {n for n in attribute_chains(source) if n.startswith("torch.distributed.")}
    if path in CHECKPOINT_WRITERS:
        distributed = {n for n in distributed if not n.startswith(CHECKPOINT_PARTS)}
    if distributed and path not in DISTRIBUTED_USERS:
        problems.append(f"{path} uses {', '.join(sorted(distributed))}")
    return problems


def source_files(*folders):
    suffixes = {".py", ".h", ".cuh", ".cu", ".cpp"}
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    return sorted(p for p in found if "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", source_files("csrc"), ids=lambda p: str(p.relative_to(ROOT)))
def test_csrc_knows_no_torch_and_no_python(path):
    assert forbidden_includes(path.read_text()) == []
    room = path.relative_to(ROOT / "csrc").parts[0]
    below = {"common": {"common"}, "kernels": {"common", "kernels"}, "data": {"common", "data"}}
    everything = {"common", "kernels", "data", "tests"}
    assert included_folders(path.read_text()) <= below.get(room, everything)


@pytest.mark.parametrize("path", source_files("pyext"), ids=lambda p: str(p.relative_to(ROOT)))
def test_bindings_launch_nothing(path):
    assert not launches(path.read_text())
    allowed = {"data"} if path.name == "host_module.cpp" else {"common", "kernels", "torch"}
    assert included_folders(path.read_text()) <= allowed


def test_imports_go_downwards():
    problems = [problem for item in python_files().items() for problem in import_problems(*item)]
    assert problems == []


def test_nothing_imports_records():
    for path in source_files("python", "tests", "benchmarks"):
        assert not any(name.split(".")[0] == "records" for name in imports(path.read_text())), path


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/adam_step.py", "from speedrun.ops import transpose"),
        ("reference/adam_step.py", "from speedrun.reference.transpose import transpose"),
        ("triton_kernels/transpose.py", "def f():\n    from speedrun.ops import transpose"),
        ("triton_kernels/transpose.py", "import speedrun.reference.transpose"),
        ("triton_kernels/transpose.py", "from speedrun.reference._fp8 import to_fp8"),
        ("triton_kernels/attention.py", "from speedrun.triton_kernels.attention_strip import x"),
        ("reference/_fp8.py", "from speedrun.reference.transpose import transpose"),
        ("triton_kernels/transpose.py", "from speedrun.model import GPT"),
        ("ops/transpose.py", "import speedrun.model"),
        ("ops/transpose.py", "from speedrun import train"),
        ("model.py", "import speedrun.optim"),
        ("model.py", "from speedrun.reference.attention import attention"),
        ("config.py", "from speedrun.model import GPT"),
        ("schedule.py", "from speedrun import optim"),
        ("data.py", "from speedrun.cli import main"),
        ("model.py", "import os\nrank = os.environ['RANK']"),
        ("model.py", "from os import environ"),
        ("ops/transpose.py", "import os\nos.getenv('X')"),
        ("optim.py", "import torch.distributed as dist"),
        ("optim.py", "import torch\ntorch.distributed.barrier()"),
        ("model.py", "from torch import distributed"),
        ("checkpoint.py", "import torch.distributed as dist"),
        ("model.py", "from benchmarks import bench"),
        ("model.py", "import records.log"),
    ],
)
def test_violations_are_found(path, source):
    assert import_problems(path, source) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train.py", "import os\nos.environ['RANK']\nimport torch.distributed as dist"),
        ("ops/_dispatch.py", "import os\nos.environ.get('SPEEDRUN_BACKEND')"),
        ("reference/fp8_matmul.py", "from speedrun.reference._fp8 import to_fp8"),
        ("ops/transpose.py", "from speedrun.triton_kernels.transpose import transpose"),
        ("triton_kernels/attention_strip.py", "from speedrun.triton_kernels.attention import x"),
        ("checkpoint.py", "import torch.distributed.checkpoint as dcp"),
        (
            "optim.py",
            "from speedrun.comms import Comms\nfrom speedrun.ops.adam_step import adam_step",
        ),
        ("commands/train.py", "from speedrun import train"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert import_problems(path, source) == []


def test_violations_in_cpp_are_found():
    for name in (
        "<torch/csrc/stable/tensor.h>",
        "<Python.h>",
        '"pybind11/pybind11.h"',
        "<ATen/ATen.h>",
    ):
        assert forbidden_includes(f"#pragma once\n  # include {name}\n")
    assert not forbidden_includes("#include <cuda_runtime.h>\n// #include torch/x.h is forbidden")
    assert launches("kernel<<<grid, block>>>(p);") and not launches("// no <<<>>> here\n/* <<< */")
    assert included_folders('#include "kernels/transpose.h"\n#include <vector>') == {"kernels"}


@pytest.mark.parametrize(
    "path",
    source_files("python", "csrc", "pyext", "benchmarks", "tests"),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_build_files_stay_small():
    for name in ("setup.py", "CMakeLists.txt"):
        assert len((ROOT / name).read_text().splitlines()) <= 150, name


IMPORT = """
import sys, time
import torch
modules = set(sys.modules)
start = time.process_time()
import {module}
elapsed = time.process_time() - start
import torch.distributed as dist
assert not dist.is_initialized() and not torch.cuda.is_initialized()
started = [name for name in ("triton", "torch._inductor", "torch._dynamo", "matplotlib", "tiktoken")
           if name in sys.modules and name not in modules]
assert not started, f"imported {{started}}"
import threading
assert threading.active_count() == 1
print(elapsed)
"""


@pytest.mark.parametrize("module", ["speedrun", "speedrun.ops"])
def test_importing_starts_nothing_and_is_quick(module):
    command = [sys.executable, "-c", IMPORT.format(module=module)]
    runs = [subprocess.run(command, capture_output=True, text=True) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    # CPU time, and the best of three: another program on the machine must not fail this.
    assert min(float(run.stdout) for run in runs) < 0.3


def test_importing_needs_no_network(tmp_path):
    code = "import socket\nsocket.socket.connect = None\nimport speedrun, speedrun.ops"
    environment = {**os.environ, "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.iterdir()) == []
