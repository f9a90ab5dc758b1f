"""The operators' library: schemas live in Python, so the package works with nothing compiled.

`import speedrun._C` adds CUDA implementations to the same names, before or after this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("speedrun", "FRAGMENT")

# A kernel reads and writes the strides that it was checked with, so the compiler may not choose
# others (PyTorch issue 137437).
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(
    schema: str, fake: Callable, *, cpu: Callable | None = None, python: Callable | None = None
) -> None:
    """Defines `speedrun::<schema>`.

    fake: shapes and types of the outputs, for tracing; cpu: implementation for CPU tensors, where
    CUDA's is in speedrun._C; python: one implementation for all devices.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    torch.library.register_fake(f"speedrun::{name}", fake, lib=LIBRARY)
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if python is not None:
        LIBRARY.impl(name, python, "CompositeExplicitAutograd")


def define_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gradient of `speedrun::<name>`; the arguments are torch.library.register_autograd's."""
    torch.library.register_autograd(
        f"speedrun::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
