"""Front door of `qk_norm_rope`: QK-norm and half rotary. Backend: the reference."""

from speedrun.reference.qk_norm_rope import (
    NORM_EPS,
    qk_norm_rope,
    rotary_frequencies,
    rotary_table,
)

__all__ = ["NORM_EPS", "qk_norm_rope", "rotary_frequencies", "rotary_table"]
