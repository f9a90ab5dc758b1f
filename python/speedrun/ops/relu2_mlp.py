"""Front door of `relu2_mlp`: the MLP with squared ReLU. Backend: the reference."""

from speedrun.reference.relu2_mlp import relu2_mlp

__all__ = ["relu2_mlp"]
