"""Front door of `normuon_step`: what surrounds the orthogonalisation. Backend: the reference."""

from speedrun.reference.normuon_step import (
    join_bits,
    momentum_step,
    split_bits,
    variance_rescale,
    weight_update,
)

__all__ = ["join_bits", "momentum_step", "split_bits", "variance_rescale", "weight_update"]
