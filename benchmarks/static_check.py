"""What the compilers made of the kernels for Hopper (sm_90a); needs no GPU.

    python -m benchmarks.static_check [--all] [--json FILE] [--readme] [STEM ...]

Compiles the CUDA kernels, in the build folder that pip and the tests use too, where nvcc is, and
the Triton kernels; prints a row for each (columns: benchmarks/README.md). Without arguments: the
stems whose files differ from the last commit on main (branch origin/main, or main); files not
committed count as well. On main itself, or where git can't tell: all.

Exit code 1: a kernel spills, ptxas made wgmma serial or ignored setmaxnreg, a TMA instruction is
repeated for each thread of a warp, or one of REQUIRED is missing. cuobjdump: from PATH, the
toolkit, or the triton wheel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from benchmarks.report import ROOT, markdown_table, replace_between

README = Path(__file__).with_name("README.md")
TRITON_FOLDER = ROOT / "python" / "speedrun" / "triton_kernels"
ARCH = "sm_90a"

COUNTED = {
    "QGMMA": r"QGMMA\b",
    "HGMMA": r"HGMMA\b",
    "MMA": r"(HMMA|QMMA)\b",
    "UTMALDG": r"UTMALDG\b",
    "UTMASTG": r"UTMASTG\b",
    "UTMAREDG": r"UTMAREDG\b",
    "ld128": r"LDG\.\S*128",
    "ld": r"LDG\.(?!\S*128)",
    "st128": r"STG\.\S*128",
    "st": r"STG\.(?!\S*128)",
    "lds128": r"LDS\.\S*128",
    "lds": r"LDS(?!\S*128|M)",
    "sts128": r"STS\.\S*128",
    "sts": r"STS(?!\S*128|M)",
    "LDL/STL": r"(LDL|STL)\b",
    # The loop in which ptxas lets each thread of a warp issue an instruction that a warp issues.
    "by thread": r"BRA\.U\.ANY\b",
}
SHOWN = [kind for kind in COUNTED if not kind.startswith(("lds", "sts", "by thread"))]

# (stem, language, kernels by name, what each must have one of): without, it is on a slower path.
REQUIRED = (
    ("transpose", "cuda", "true, true", ("ld128", "st128")),
    ("transpose", "triton", "", ("ld128", "st128")),
    ("fp8_quantize", "cuda", "true>", ("ld128", "st128")),
    ("fp8_quantize", "triton", "", ("ld128", "st128")),
    ("fp8_matmul", "cuda", "", ("QGMMA", "UTMALDG", "UTMASTG UTMAREDG")),
    ("fp8_matmul", "triton", "", ("QGMMA",)),
    ("relu2_mlp", "cuda", "", ("HGMMA", "UTMALDG", "UTMASTG")),
    ("relu2_mlp", "triton", "", ("HGMMA QGMMA",)),
    ("sym_matmul", "cuda", "SymMatmul<", ("HGMMA", "UTMALDG", "UTMASTG")),
    ("normuon_step", "cuda", "second_kernel<.*, true, ", ("ld128",)),
    ("normuon_step", "cuda", "update_kernel<.*, true>", ("ld128", "st128")),
    ("normuon_step", "triton", "second", ("ld128",)),
    ("normuon_step", "triton", "update", ("ld128", "st128")),
    ("sym_matmul", "triton", "", ("HGMMA", "st128")),
    ("attention", "triton", "forward|dq|dkdv", ("HGMMA", "ld128", "st128")),
    ("attention_strip", "triton", "strip", ("HGMMA", "ld128", "st128")),
    ("softcap_ce", "cuda", "", ("ld128", "st128")),
    ("softcap_ce", "triton", "", ("ld128", "st128")),
    ("polar_express", "triton", "", ("ld128", "st128")),
    ("adam_step", "cuda", "", ("ld128", "st128")),
    ("adam_step", "triton", "", ("ld128", "st128")),
    ("polar_express", "cuda", "true>", ("ld128", "st128")),
    ("polar_chain", "cuda", "", ("HGMMA", "UTMALDG", "lds128", "st128")),
    ("head_logits", "cuda", "HeadProduct", ("QGMMA", "UTMALDG", "UTMASTG")),
    ("head_logits", "cuda", "terms|rows", ("ld128",)),
    ("head_logits", "triton", "^product", ("QGMMA",)),
    ("qk_norm_rope", "cuda", "true>", ("ld128", "st128")),
    ("qk_norm_rope", "triton", "", ("ld128", "st128")),
    ("attention_epilogue", "cuda", "true>", ("ld128", "st128")),
    ("attention_epilogue", "triton", "", ("ld128", "st128")),
    ("residual_mix", "triton", "", ("ld128", "st128")),
    ("dc_attention", "triton", "", ("HGMMA",)),
)

# What ptxas says when it gives up on what the kernel was written for.
RUIN = {
    "C7508": "setmaxnreg ignored",
    "C7510": "wgmma serialised",
    "C7511": "wgmma serialised for want of registers",
}


@dataclasses.dataclass
class Kernel:
    stem: str
    language: str  # "cuda" or "triton"
    arch: str
    name: str
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    tile: str = ""
    stages: int = 0
    instructions: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    ruin: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        found = [f"{code}: {RUIN[code]}" for code in self.ruin]
        if self.spill_bytes or self.counts["LDL/STL"]:
            found.append(f"spills {self.spill_bytes} bytes, {self.counts['LDL/STL']} LDL/STL")
        if self.counts["by thread"]:
            found.append("TMA instructions that each thread of a warp issues: let one do it")
        for stem, language, pattern, kinds in REQUIRED:
            if (stem, language) == (self.stem, self.language) and re.search(pattern, self.name):
                missing = [k for k in kinds if not any(self.counts[one] for one in k.split())]
                found += [f"has no {' or '.join(kind.split())}" for kind in missing]
        return found

    def cells(self) -> tuple[str, ...]:
        figures = (self.registers, self.shared_bytes, self.spill_bytes)
        return (
            self.stem,
            self.language,
            self.name,
            *map(str, figures),
            self.tile or "-",
            str(self.stages or "-"),
            str(self.instructions),
            *(str(self.counts[kind] or "-") for kind in SHOWN),
        )


HEADER = ("stem", "in", "kernel", "regs", "smem", "spill", "tile", "stages", "instr", *SHOWN)


@functools.cache
def load_script(path: Path) -> ModuleType:
    """setup.py or pyext/source_hashes.py, which are in no package."""
    spec = importlib.util.spec_from_file_location(f"speedrun_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_cuobjdump() -> str | None:
    places = [None, "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next(filter(None, (shutil.which("cuobjdump", path=place) for place in places)), None)


# ---- Which stems -----------------------------------------------------------------------------


def stems_by_language() -> dict[str, list[str]]:
    triton = [p.stem for p in TRITON_FOLDER.glob("*.py") if not p.stem.startswith("_")]
    cuda = [p.stem for p in (ROOT / "pyext" / "ops").glob("*.cpp")]
    return {"cuda": sorted(cuda), "triton": sorted(triton)}


def changed_files(root: Path = ROOT) -> list[str] | None:
    """Since the last commit on main, with those not committed; None where that can't be told,
    as on main itself: its last commits may have come together."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        for branch in ("refs/remotes/origin/main", "refs/heads/main"):
            found = git("for-each-ref", "--format=%(objectname)", branch)
            if found and found != head:
                base = git("merge-base", found, head)
                break
        else:
            return None
        changed = git("diff", "--name-only", base)
        return (changed + "\n" + git("ls-files", "--others", "--exclude-standard")).split()
    except (OSError, subprocess.CalledProcessError):
        return None


def stems_of(files: list[str] | None, stems: list[str]) -> list[str]:
    """Stems that a change of these files touches; all, where it is a file that all share."""
    stem_of = load_script(ROOT / "pyext" / "source_hashes.py").stem_of
    found = set()
    for name in files if files is not None else ["CMakeLists.txt"]:
        path = Path(name)
        folder, shared = path.parent.as_posix(), path.name.startswith("_")
        if folder in ("csrc/kernels", "pyext/ops"):
            found.add(stem_of(path.stem, stems))
        elif folder.endswith("triton_kernels") and not shared:
            found.add(path.stem)
        elif folder in ("csrc/common", "python/speedrun/triton_kernels") or name in (
            "CMakeLists.txt",
            "pyext/torch_utils.h",
            "benchmarks/static_check.py",
            "benchmarks/triton_compile.py",
        ):
            return stems
    return sorted(found & set(stems))


# ---- CUDA ------------------------------------------------------------------------------------


def kernel_objects(folder: Path) -> dict[str, str]:
    """Path of each csrc/kernels/*.cu in the checkout -> its object in the build folder."""
    objects = {}
    for command in json.loads((folder / "compile_commands.json").read_text()):
        source = os.path.relpath(command["file"], ROOT)
        if source.startswith("csrc/kernels/"):
            objects[source] = os.path.relpath(Path(folder, command["output"]), folder)
    return objects


def build(*targets: str, cuda: bool = True) -> Path:
    """Builds targets (none: all, with the tests) in the folder that pip uses; returns it.

    `cuda`: the kernels too where nvcc is.
    """
    setup = load_script(ROOT / "setup.py")
    compiler = setup.find_compiler()
    if problem := setup.missing_tool(compiler):
        raise RuntimeError(problem)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            cuda = cuda and bool(setup.find_nvcc())
            return setup.run_cmake(compiler, cuda, *targets, SPEEDRUN_TESTS="ON")
    except SystemExit as problem:
        raise RuntimeError(f"{output.getvalue()[-4000:]}\n{problem}") from None


def compiler_output(folder: Path) -> dict[str, str]:
    """Object -> what its compiler printed when it was last built."""
    output: dict[str, str] = {}
    current = None
    for line in (folder / "build.log").read_text().splitlines():
        if match := re.match(r"\[\d+/\d+\] (?:Building \w+ object (\S+))?", line):
            current = match[1]
            if current:
                output[current] = ""
        elif current:
            output[current] += line + "\n"
    return output


def check_cuda(stems: list[str], cuobjdump: str) -> list[Kernel]:
    folder = build("build.ninja")  # configures only
    stem_of = load_script(ROOT / "pyext" / "source_hashes.py").stem_of
    names = stems_by_language()["cuda"]
    objects = {
        name: stem
        for source, name in kernel_objects(folder).items()
        if (stem := stem_of(Path(source).stem, names)) in stems
    }
    if objects:
        build(*objects)
    output = compiler_output(folder)
    kernels = []
    for name, stem in objects.items():
        if name not in output:
            raise RuntimeError(f"{folder}/build.log doesn't have {name}: delete the folder")
        found = read_kernels(folder / name, cuobjdump, ARCH)
        read_log(found, output[name])
        readable = demangled([mangled for _, mangled in found])
        for (_, mangled), kernel in found.items():
            kernel.stem = stem
            describe(kernel, readable[mangled])
        kernels += found.values()
    return sorted(kernels, key=lambda kernel: (kernel.stem, kernel.name))


def read_kernels(
    file: Path, cuobjdump: str, arch: str | None = None
) -> dict[tuple[str, str], Kernel]:
    """(architecture, mangled name) -> Kernel, of an object, library or cubin; `arch`: only that."""

    def dump(option: str) -> list[str]:
        command = [cuobjdump, option, *(["-arch", arch] if arch else []), str(file)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        return run.stdout.splitlines()

    kernels: dict[tuple[str, str], Kernel] = {}
    now, name = arch or "", ""  # a cubin doesn't name its architecture
    for line in dump("-res-usage"):
        if match := re.match(r"arch = (\w+)", line):
            now = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            kernels[now, name] = Kernel("", "cuda", now, name, registers, shared, stack)
    for line in dump("-sass"):
        if match := re.match(r"\s*code for (\w+)", line):
            now = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)", line):
            kernel = kernels[now, name]
            kernel.instructions += 1
            for kind, pattern in COUNTED.items():
                kernel.counts[kind] += bool(re.match(pattern, match[1] + "."))
    return kernels


def read_log(kernels: dict[tuple[str, str], Kernel], text: str) -> None:
    """Adds the spills and warnings that ptxas printed for an object's kernels."""
    now = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            now = kernels.get((match[2], match[1]))
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if now:
                now.spill_bytes += int(match[1]) + int(match[2])
        for code in RUIN:
            if code in line:  # it names its kernel, and comes in no fixed place
                for (_, name), kernel in kernels.items():
                    if name in line or (kernel is now and "function" not in line):
                        kernel.ruin.append(code)


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled name -> C++ name."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    command = ["c++filt"]
    run = subprocess.run(command, input="\n".join(names), capture_output=True, text=True)
    return dict(zip(names, run.stdout.splitlines(), strict=True))


def describe(kernel: Kernel, name: str) -> None:
    """A short name; of a GEMM also tile, stages and shared memory, which csrc puts into its name:
    stem_kernel<Name, tile rows, tile columns, stages, bytes>."""
    short = re.sub(r"^void |\w+::|\(anonymous namespace\)::|\(\w+\)(?=\d)", "", name)
    kernel.name = re.sub(r"\(.*\)$", "", short)
    if match := re.search(r"<(\w+(?:<.*>)?), (\d+), (\d+), (\d+), (\d+)>$", kernel.name):
        kernel.name, kernel.tile = match[1], f"{match[2]}x{match[3]}"
        kernel.stages, kernel.shared_bytes = int(match[4]), int(match[5])


# ---- Triton ----------------------------------------------------------------------------------


def check_triton(stems: list[str], cuobjdump: str) -> list[Kernel]:
    """RuntimeError where a stem doesn't compile."""
    kernels = []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for stem in stems:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.triton_compile", stem, folder]
            run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{stem}: Triton: {run.stderr.strip()[-2000:]}")
            for variant in json.loads(Path(folder, "variants.json").read_text()):
                (kernel,) = read_kernels(Path(folder, variant["file"]), cuobjdump, ARCH).values()
                kernel.stem, kernel.language, kernel.name = stem, "triton", variant["name"]
                kernel.shared_bytes, kernel.stages = variant["shared_bytes"], variant["num_stages"]
                kernels.append(kernel)
    return kernels


# ---- The program -----------------------------------------------------------------------------


def table(kernels: list[Kernel]) -> str:
    lines = [HEADER, *(kernel.cells() for kernel in kernels)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main() -> int:
    by_language = stems_by_language()
    known = sorted({*by_language["cuda"], *by_language["triton"]})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM", help=f"of {', '.join(known)}")
    parser.add_argument("--all", action="store_true", help="all stems, changed or not")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    if unknown := set(args.stems) - set(known):
        parser.error(f"no kernels of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("no cuobjdump: install the CUDA toolkit or triton", file=sys.stderr)
        return 2
    stems = args.stems or (known if args.all else stems_of(changed_files(), known))
    print(f"checking: {', '.join(stems) or 'nothing, no kernel has changed (--all checks all)'}")
    start = time.monotonic()
    checks = {"cuda": check_cuda, "triton": check_triton}
    needs = {
        "cuda": load_script(ROOT / "setup.py").find_nvcc() and importlib.util.find_spec("torch"),
        "triton": importlib.util.find_spec("triton"),
    }
    kernels, problems = [], []
    for language, check in checks.items():
        chosen = [stem for stem in stems if stem in by_language[language]]
        if chosen and not needs[language]:
            print(f"left out: {language}, whose compiler is not on this machine")
        elif chosen:
            try:
                kernels += check(chosen, cuobjdump)
            except RuntimeError as problem:
                problems.append(str(problem))
    print(table(kernels))
    for kernel in kernels:
        where = f"{kernel.stem} {kernel.language} {kernel.name}"
        problems += [f"{where}: {problem}" for problem in kernel.problems()]
    for problem in problems:
        print(f"FAILED {problem}")
    seconds = time.monotonic() - start
    print(f"{len(kernels)} kernels, {len(problems)} problems, {seconds:.0f} s")
    if args.json:
        rows = [{**dataclasses.asdict(k), "problems": k.problems()} for k in kernels]
        args.json.write_text(json.dumps(rows, indent=1))
    if args.readme:
        content = markdown_table(HEADER, [kernel.cells() for kernel in kernels])
        README.write_text(replace_between(README.read_text(), "static_check", content))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
