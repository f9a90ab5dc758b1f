"""Compiles a stem's Triton kernels for Hopper; needs no GPU.

    python -m benchmarks.triton_compile STEM FOLDER

A process of its own, because with TRITON_INTERPRET Triton has no compiler. Writes into FOLDER one
<number>.cubin a variant, and variants.json: [{name, file, shared_bytes, num_warps, num_stages}].
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

HOPPER = ("cuda", 90, 32)  # Triton compiles for sm_90a then


def compile_variant(kernel, signature: dict, constexprs: dict, options: dict):
    """What Triton makes of one entry of `static_variants()`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [param.name for param in kernel.params]
    if unknown := set(names) ^ (set(signature) | set(constexprs)):
        raise ValueError(f"{kernel.fn.__name__}: signature and constexprs disagree on {unknown}")
    types, aligned, constants = {}, {}, dict(constexprs)

    def plain_type(text: str | None, *path: int) -> str:
        if text is None:  # in a tuple: an argument that is None
            constants[path] = None
            return "constexpr"
        kind, _, multiple = text.partition(":")
        if multiple:
            aligned[path] = [["tt.divisibility", int(multiple)]]
        return kind

    for index, name in enumerate(names):
        given = signature.get(name, "constexpr")
        if isinstance(given, tuple):
            types[name] = tuple(plain_type(text, index, i) for i, text in enumerate(given))
        else:
            types[name] = plain_type(given, index)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget(*HOPPER), options=options)


def main() -> int:
    stem, folder = sys.argv[1], Path(sys.argv[2])
    module = importlib.import_module(f"speedrun.triton_kernels.{stem}")
    if not hasattr(module, "static_variants"):
        print(f"triton_kernels/{stem}.py has no static_variants()", file=sys.stderr)
        return 3
    found = []
    for name, kernel, signature, constexprs, options in module.static_variants():
        compiled = compile_variant(kernel, signature, constexprs, options)
        file = f"{len(found)}.cubin"
        (folder / file).write_bytes(compiled.asm["cubin"])
        metadata = compiled.metadata
        found.append(
            {
                "name": name,
                "file": file,
                "shared_bytes": metadata.shared,
                "num_warps": metadata.num_warps,
                "num_stages": metadata.num_stages,
            }
        )
    (folder / "variants.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
