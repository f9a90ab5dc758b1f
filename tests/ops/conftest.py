"""The backends that every operator is tested on."""

import pytest
import torch

from speedrun import ops
from speedrun.ops._dispatch import library_problem


@pytest.fixture(autouse=True)
def raw_operators(request):
    """opcheck calls operators past the dispatch that loads what serves them on a GPU."""
    if "opcheck" in request.node.name and torch.cuda.is_available() and library_problem():
        pytest.skip(f"operators on CUDA tensors: {library_problem()}")


@pytest.fixture(params=["torch", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """Its name, while it serves all operators. A file may have its own, for other hardware."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cuda" and library_problem():
        pytest.skip(library_problem())
    with ops.use_backend(request.param):
        yield request.param
