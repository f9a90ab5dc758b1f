"""Front door of `residual_mix`: weighted sums of residual streams. Backend: the reference."""

from speedrun.reference.residual_mix import residual_mix

__all__ = ["residual_mix"]
