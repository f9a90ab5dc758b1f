"""What the compiler made of the kernels, from the built library; needs no GPU.

    python -m benchmarks.static_check [LIBRARY] [--arch sm_90a] [--json FILE]

One row per kernel and architecture: registers a thread, stack bytes a thread (spills), static
shared memory a block (with the 1 KB that sm_90 keeps), and how many of the instructions that decide
its speed its code holds: memory accesses of 16 bytes and of less, local memory, tensor cores, TMA.
LIBRARY: speedrun/_C.abi3.so if not named. cuobjdump: from PATH, the toolkit, or the triton wheel.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

COUNTED = {
    "ld128": r"LDG\.\S*128",
    "ld": r"LDG\.(?!\S*128)",
    "st128": r"STG\.\S*128",
    "st": r"STG\.(?!\S*128)",
    "lds128": r"LDS\.\S*128",
    "lds": r"LDS(?!\S*128|M)",
    "sts128": r"STS\.\S*128",
    "sts": r"STS(?!\S*128|M)",
    "local": r"(LDL|STL)\b",
    "mma": r"(HMMA|QMMA|HGMMA|QGMMA)\b",
    "tma": r"(UTMALDG|UTMASTG|UTMAREDG)\b",
}


@dataclasses.dataclass
class Kernel:
    arch: str
    name: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    instructions: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTED, 0))


def find_cuobjdump() -> str | None:
    places = [None, "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next(filter(None, (shutil.which("cuobjdump", path=place) for place in places)), None)


def find_library() -> Path | None:
    package = importlib.util.find_spec("speedrun")
    folders = [Path(p) for p in package.submodule_search_locations] if package else []
    found = [path for folder in folders for path in folder.glob("_C.abi3.so")]
    return found[0] if found else None


def readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> name without namespaces and parameters."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True
    ).stdout
    short = [re.sub(r"^void |\w+::|\(anonymous namespace\)::", "", n) for n in text.splitlines()]
    return dict(zip(names, (re.sub(r"\(.*\)$", "", name) for name in short), strict=True))


def read_kernels(library: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels of the library for all architectures that it has code (not only PTX) for."""

    def dump(option: str) -> list[str]:
        command = [cuobjdump, option, str(library)]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.splitlines()

    kernels: dict[tuple[str, str], Kernel] = {}
    arch = name = ""
    for line in dump("-res-usage"):
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            kernels[arch, name] = Kernel(arch, name, registers, stack, shared)
    for line in dump("-sass"):
        if match := re.match(r"\s*code for (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)", line):
            kernel = kernels[arch, name]
            kernel.instructions += 1
            for kind, pattern in COUNTED.items():
                kernel.counts[kind] += bool(re.match(pattern, match[1] + "."))
    names = readable(sorted({kernel.name for kernel in kernels.values()}))
    for kernel in kernels.values():
        kernel.name = names[kernel.name]
    return sorted(kernels.values(), key=lambda kernel: (kernel.name, kernel.arch))


def table(kernels: list[Kernel]) -> str:
    kinds = [kind for kind in COUNTED if any(kernel.counts[kind] for kernel in kernels)]
    rows = [["kernel", "arch", "regs", "stack", "smem", "instr", *kinds]]
    for k in kernels:
        figures = [k.registers, k.stack_bytes, k.shared_bytes, k.instructions]
        rows.append([k.name, k.arch, *map(str, figures + [k.counts[kind] for kind in kinds])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )
    return "\n".join("  ".join(cells) for cells in aligned)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=find_library())
    parser.add_argument("--arch", help="only this architecture, such as sm_90a")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if args.library is None or not args.library.exists():
        print("no speedrun._C: build it with SPEEDRUN_CUDA=1, or name a file", file=sys.stderr)
        return 2
    if cuobjdump is None:
        print("no cuobjdump: install the CUDA toolkit or triton", file=sys.stderr)
        return 2
    kernels = read_kernels(args.library, cuobjdump)
    kernels = [kernel for kernel in kernels if args.arch in (None, kernel.arch)]
    print(table(kernels))
    spilling = [f"{k.name} ({k.arch})" for k in kernels if k.stack_bytes or k.counts["local"]]
    print(f"{len(kernels)} kernels, with spills: {', '.join(spilling) or 'none'}")
    if args.json:
        args.json.write_text(
            json.dumps([dataclasses.asdict(kernel) for kernel in kernels], indent=1)
        )
    return bool(spilling)


if __name__ == "__main__":
    sys.exit(main())
