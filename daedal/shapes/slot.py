"""One line of the lists that the keystone gives: a parameter, or what a token leaves in the cache. Knows no model."""

import math
from dataclasses import dataclass
from types import MappingProxyType

DTYPE_BITS = MappingProxyType(
    {
        "float64": 64,
        "int64": 64,
        "float32": 32,
        "bfloat16": 16,
        "float16": 16,
        "float8_e4m3fn": 8,
        "float4_e2m1fn_x2": 4,
    }
)

EIGHT_BIT_GROUP = 64  # numbers of a row in eight bits that share a scale

ROLES = (
    "embedding",
    "head",
    "norm",
    "attention",
    "indexer",
    "compressor",
    "hyper_connection",
    "dense_mlp",
    "router",
    "router_bias",
    "hash_table",
    "routed_expert",
    "shared_expert",
    "draft",
    "cache",
    "state",
)


@dataclass(frozen=True)
class Slot:
    """One parameter, or one row of the cache.

    dtype: as shipped by the publisher. layer: None for what belongs to no layer. Routed experts are stacked: their
    first axis is the expert. wide: kept in float32, whatever the model's dtype.

    Of the cache only: rate, the tokens of one row. ring: 0 for rows that stay; n for those of which only the last n are
    ever read. packed: bytes of a row as the publisher's engine stores it, where that is no plain dtype. exact: of a row
    that may be kept in eight bits, how many of its last numbers may not; None for rows that never are. Role "cache" is
    what attention reads, "state" what closes the next compressed entry.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    dtype: str
    layer: int | None = None
    wide: bool = False
    rate: int = 1
    ring: int = 0
    packed: int | None = None
    exact: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """As shipped; scales of quantised weights not included."""
        return self.numel * DTYPE_BITS[self.dtype] // 8 if self.packed is None else self.packed


def eight_bit_row(width: int, exact: int) -> int:
    """Bytes of a cached row: `width` numbers in FP8, a scale byte for each group of them, `exact` numbers in bfloat16,
    and a byte of padding where the sum is odd.
    """
    used = 2 * exact + width + -(-width // EIGHT_BIT_GROUP)
    return used + used % 2
