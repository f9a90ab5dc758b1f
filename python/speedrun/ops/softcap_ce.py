"""Front door of `softcap_ce`: softcapped cross-entropy. Backend: the reference."""

from speedrun.reference.softcap_ce import (
    NO_TARGET,
    softcap,
    softcap_ce,
)

__all__ = ["NO_TARGET", "softcap", "softcap_ce"]
