"""Triton versions of the operators, for any NVIDIA GPU. Imported only when one of them is used.

Each file also has `static_variants()` for benchmarks/static_check.py: the kernels that training
launches, as tuples (name, kernel, signature, constexprs, options). signature: Triton's type of
each parameter that is no constexpr, ":16" behind it where it is a multiple of 16, such as
{"x_ptr": "*bf16:16", "rows": "i32:16", "scale": "fp32"}, or a tuple of types where the argument is
a tuple, with None for those of its entries that are None; options: {"num_warps": 8, ...}.
"""
