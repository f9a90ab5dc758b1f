"""Front door of `normuon_step`: momentum before and the weight update after the orthogonalisation. Backend: the reference."""

from speedrun.reference.normuon_step import (
    join_bits,
    momentum_step,
    split_bits,
    variance_rescale,
    weight_update,
)

__all__ = ["join_bits", "momentum_step", "split_bits", "variance_rescale", "weight_update"]
