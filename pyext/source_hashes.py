"""Writes the header from which speedrun._C knows what its kernels were built from.

    python source_hashes.py HEADER

For each operator (pyext/ops/<stem>.cpp) one sha256 over its kernel, header and binding and all of
csrc/common. A verdict of benchmarks/hardware_check.py counts only for the sources that were tried.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def source_hashes(root: Path = ROOT) -> dict[str, str]:
    """Stem -> sha256, of the checkout at `root`."""
    stems = sorted(path.stem for path in (root / "pyext" / "ops").glob("*.cpp"))
    return {stem: _hash(root, sources(stem, stems, root)) for stem in stems}


def sources(stem: str, stems: list[str], root: Path = ROOT) -> list[Path]:
    """Files whose change makes the stem's kernel another one."""
    kernels = [p for p in sorted((root / "csrc" / "kernels").iterdir()) if p.is_file()]
    found = [path for path in kernels if stem_of(path.stem, stems) == stem]
    found += [root / "pyext" / "ops" / f"{stem}.cpp", root / "pyext" / "torch_utils.h"]
    for path in found:  # it grows: headers of other stems that these include
        names = re.findall(r'^\s*#\s*include\s*"(kernels/[^"]+)"', path.read_text(), re.MULTILINE)
        found += [root / "csrc" / name for name in names if root / "csrc" / name not in found]
    return sorted({*found, *(p for p in (root / "csrc" / "common").iterdir() if p.is_file())})


def stem_of(name: str, stems: list[str]) -> str:
    """The longest stem that `name` is or begins with: fp8_matmul of fp8_matmul_relu2."""
    return max((s for s in stems if name == s or name.startswith(f"{s}_")), key=len, default="")


def _hash(root: Path, paths: list[Path]) -> str:
    state = hashlib.sha256()
    for path in paths:
        state.update(f"{path.relative_to(root).as_posix()}\0".encode())
        state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


if __name__ == "__main__":
    table = json.dumps(source_hashes())
    Path(sys.argv[1]).write_text(f'constexpr char kSourceHashes[] = R"({table})";\n')
