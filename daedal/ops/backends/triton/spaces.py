"""The declared spaces: for each kernel a short list of constants to try on a chip, the safest first.

The first point is what the interpreter runs, unless it assumes a chip that wants wider blocks. All are compiled ahead
of time by `tools/compile_kernels.py`, which says which fit the memory beside a chip's cores. Needs no Triton.
"""

from collections.abc import Mapping, Sequence

Space = Sequence[Mapping[str, int]]


def first_of(space: Space, narrowest: int) -> Mapping[str, int]:
    """The first point whose blocks have at least so many columns: for chips on which points are not tried."""
    return next(point for point in space if point.get("BN", narrowest) >= narrowest)


ROWS: Space = tuple({"num_warps": warps} for warps in (4, 8, 16))

MULTIPLY: Space = (
    {"BN": 64, "num_warps": 4, "num_stages": 2},
    {"BN": 64, "num_warps": 4, "num_stages": 4},
    {"BN": 128, "num_warps": 8, "num_stages": 3},
    {"BN": 256, "num_warps": 8, "num_stages": 3},
    {"BN": 32, "num_warps": 4, "num_stages": 2},
)

EXPERTS: Space = (
    {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 2},
    {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    {"BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    {"BN": 128, "BK": 32, "num_warps": 8, "num_stages": 2},
    {"BN": 32, "BK": 128, "num_warps": 4, "num_stages": 3},
)

# Of gradients of experts' weights: BK rows of an expert in a step.
WEIGHT_GRADIENT: Space = (
    {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 2},
    {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BN": 128, "BK": 16, "num_warps": 4, "num_stages": 3},
)

# A block of 16 keys of 576 numbers is what 64 KiB beside a core leave room for.
ATTENTION: Space = (
    {"BN": 16, "num_warps": 4, "num_stages": 1},
    {"BN": 32, "num_warps": 4, "num_stages": 1},
    {"BN": 32, "num_warps": 8, "num_stages": 2},
    {"BN": 64, "num_warps": 8, "num_stages": 1},
    {"BN": 64, "num_warps": 4, "num_stages": 2},
    {"BN": 128, "num_warps": 8, "num_stages": 2},
)

# Of keys for the gradient of a block of queries, of queries for that of a block of keys.
ATTENTION_GRADIENTS: Space = (
    {"STEP": 16, "num_warps": 4, "num_stages": 1},
    {"STEP": 32, "num_warps": 4, "num_stages": 1},
    {"STEP": 32, "num_warps": 8, "num_stages": 2},
    {"STEP": 64, "num_warps": 8, "num_stages": 1},
    {"STEP": 64, "num_warps": 4, "num_stages": 2},
)
