"""Operators: one front door per file, with its schema, fake implementation and gradient."""

from speedrun.ops._dispatch import backends_used, use_backend
from speedrun.ops.transpose import transpose, transpose_add_

__all__ = ["backends_used", "transpose", "transpose_add_", "use_backend"]
