"""Cases of polar_chain: what it is tested and timed at, each with its reason."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ChainCase:
    """Matrices (batch, n, n) that go through `steps` of the Gram form."""

    name: str
    batch: int
    n: int
    steps: int
    why: str


POLAR_CHAIN_SMALL = (
    ChainCase("square", 2, 128, 3, "one square of the kernel's a matrix: nothing is mirrored"),
    ChainCase("one_step", 3, 256, 1, "one product, of which Q is a copy"),
    ChainCase("two_steps", 1, 384, 2, "an odd number of squares a side"),
)
# The record's banks that take the Gram form, whole and one GPU's share of 8: 2 steps, then 3.
POLAR_CHAIN_FULL = tuple(
    ChainCase(f"{name}{part}_{steps}", batch // share, n, steps, why)
    for share, part in ((1, ""), (8, "_8"))
    for name, batch, n, why in (
        ("qk", 64, 256, "three squares a matrix: waiting counts"),
        ("mlp", 24, 768, "21 squares a matrix: L2 counts"),
    )
    for steps in (2, 3)
)
