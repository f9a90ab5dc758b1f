"""Front door of `qk_norm_rope`: QK-norm, rotary, key offset, layout. Backend: the reference."""

from speedrun.reference.qk_norm_rope import (
    NORM_EPS,
    key_offset,
    pair_heads,
    qk_norm_rope,
    rotary_frequencies,
    rotary_positions,
    rotary_table,
    unpair_heads,
    yarn,
)

__all__ = [
    "NORM_EPS",
    "key_offset",
    "pair_heads",
    "qk_norm_rope",
    "rotary_frequencies",
    "rotary_positions",
    "rotary_table",
    "unpair_heads",
    "yarn",
]
