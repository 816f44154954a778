"""Which part of each parameter a rank holds where several ranks hold one model: tensor and expert parallelism.

Heads are dealt out with their rows of the projections before attention and their columns of the one behind it; the
widths of gated MLPs likewise; routed experts whole; the head by tokens of the vocabulary. What all heads share is on
every rank: latents and their projections, V4's rows and compressors, indexers, routers, norms, the embedding. So each
block of a layer gives a partial result, and the sum over ranks is what one process computes (Megatron-LM, section 3).
"""

from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.shapes.slot import Slot

Place = tuple[slice, ...]

MOST_RANKS = 256

_BY_ROWS = frozenset({"q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "o_a_proj", "gate_proj", "up_proj"})
_BY_COLUMNS = frozenset({"o_proj", "o_b_proj", "down_proj"})
_CUT = frozenset({"attention", "dense_mlp", "shared_expert"})


def place(slot: Slot, rank: int, size: int) -> Place | None:
    """Where a rank's part of a slot lies in it: a slice for each of the first axes, () for all of it. None for what
    another rank adds: here it is zero.
    """
    if slot.role == "routed_expert":
        return (_part(slot.shape[0], rank, size),)
    if slot.role == "head":
        return (vocabulary(slot.shape[0], rank, size),)
    owner, _, leaf = slot.name.rpartition(".")
    module = owner.rpartition(".")[2]
    if slot.role not in _CUT or not (module in _BY_ROWS or module in _BY_COLUMNS or leaf == "sinks"):
        return ()
    if module in _BY_COLUMNS:
        if leaf == "bias":  # of a sum over ranks: added once
            return () if rank == 0 else None
        return (slice(None), _part(slot.shape[1], rank, size))
    return (_part(slot.shape[0], rank, size),)


def vocabulary(tokens: int, rank: int, size: int) -> slice:
    """A rank's tokens of the vocabulary: the last may have fewer."""
    most = -(-tokens // size)
    return slice(min(rank * most, tokens), min((rank + 1) * most, tokens))


def shape(slot: Slot, rank: int, size: int) -> tuple[int, ...]:
    """Of a rank's part."""
    cuts = place(slot, rank, size) or ()
    kept = tuple(len(range(*cut.indices(rows))) for cut, rows in zip(cuts, slot.shape, strict=False))
    return kept + slot.shape[len(kept) :]


def check(config: ModelConfig, size: int) -> None:
    """ConfigError where so many ranks cannot share a model."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_RANKS:
        raise ConfigError(f"{size!r} processes are to share the model: give a whole number from 1 to {MOST_RANKS}")
    dealt = {"num_attention_heads": config.num_attention_heads}
    kinds = {config.mlp_kind(layer) for layer in range(config.num_hidden_layers)}
    if config.is_compressed:
        assert config.o_groups is not None
        dealt["o_groups"] = config.o_groups
    elif not config.is_latent:
        dealt["num_key_value_heads"] = config.num_key_value_heads
    if "dense" in kinds:
        dealt["intermediate_size"] = config.intermediate_size
    if kinds - {"dense"}:
        dealt["n_routed_experts"] = config.n_routed_experts
        if config.n_shared_experts:
            assert config.moe_intermediate_size is not None
            dealt["moe_intermediate_size x n_shared_experts"] = config.n_shared_experts * config.moe_intermediate_size
    for name, count in dealt.items():
        if count % size:
            raise ConfigError(f"{name} is {count}, which {size} processes cannot share evenly: give a divisor of it")


def cached(config: ModelConfig, size: int) -> ModelConfig:
    """The configuration whose cache rows a rank keeps: of grouped-query attention its own heads; rows that all heads
    share are kept whole on every rank.
    """
    if config.is_latent or config.is_compressed or size == 1:
        return config
    heads, keys = config.num_attention_heads // size, config.num_key_value_heads // size
    return config.replace(num_attention_heads=heads, num_key_value_heads=keys)


def _part(rows: int, rank: int, size: int) -> slice:
    assert rows % size == 0, "a model that cannot be shared so was not refused"
    each = rows // size
    return slice(rank * each, (rank + 1) * each)
