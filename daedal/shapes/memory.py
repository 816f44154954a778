"""What one layer keeps of the past: rows per token, rows per window of tokens, and rings of the last few.

Packed sizes are those of the published engines: FP8 or FP4 codes, their scales, the rotated part in bf16 (V3.2 and V4
cache layouts).
"""

from collections.abc import Iterator

from daedal.config import ModelConfig
from daedal.shapes.slot import Slot


def rows(config: ModelConfig, layer: int) -> Iterator[Slot]:
    """The cache slots of a layer.

    Latent attention stores one row per token: the normalised latent, then the rotated key part that all heads share
    (V2, section 2.1.2); V3.2 adds the indexer's key. Grouped-query attention stores keys and values of its own heads.
    V4 stores a window of rows, entries, and what the next entry is made of.
    Of these the latents and the entries may be kept in eight bits, but for their rotated part: they are what grows.
    Windows and open groups are small, and the indexer's keys decide what is read.
    """
    if config.is_compressed:
        yield from _compressed(config, layer)
    elif config.is_latent:
        yield from _latent(config, layer)
    else:
        heads = (config.num_key_value_heads, config.head_dim)
        for name in ("key", "value"):
            yield Slot(name, heads, "cache", config.dtype, layer)


def _latent(config: ModelConfig, layer: int) -> Iterator[Slot]:
    assert config.kv_lora_rank is not None
    latent, rotated = config.kv_lora_rank, config.rope_dim
    if not config.is_indexed:
        yield Slot("latent", (latent + rotated,), "cache", config.dtype, layer, exact=rotated)
        return
    assert config.index_head_dim is not None
    packed = latent + 4 * -(-latent // 128) + 2 * rotated
    yield Slot("latent", (latent + rotated,), "cache", config.dtype, layer, packed=packed, exact=rotated)
    yield Slot("index_key", (config.index_head_dim,), "cache", config.dtype, layer, packed=config.index_head_dim + 4)


def _compressed(config: ModelConfig, layer: int) -> Iterator[Slot]:
    assert config.sliding_window is not None
    dim, kind, rate = config.head_dim, config.attention_kind(layer), config.compress_rate(layer)
    packed = _packed_row(dim - config.rope_dim, config.rope_dim)
    yield Slot("window", (dim,), "cache", config.dtype, layer, ring=config.sliding_window, packed=packed)
    if kind == "sliding_attention":
        return
    assert rate is not None
    overlaps = kind == "compressed_sparse_attention"
    # An overlapping window pools its predecessor's rows too, so twice as many are kept, each twice as wide.
    width, kept = (2 * dim, 2 * rate) if overlaps else (dim, rate)
    yield Slot("entry", (dim,), "cache", config.dtype, layer, rate=rate, packed=packed, exact=config.rope_dim)
    yield Slot("compressor", (2, width), "state", "float32", layer, wide=True, ring=kept)
    if overlaps:
        assert config.index_head_dim is not None
        index = config.index_head_dim
        yield Slot("index_key", (index,), "cache", config.dtype, layer, rate=rate, packed=index // 2 + -(-index // 32))
        yield Slot("index_compressor", (2, 2 * index), "state", "float32", layer, wide=True, ring=kept)


def _packed_row(plain: int, rotated: int) -> int:
    """FP8 codes with a scale byte for each 64, then bf16, padded to 8 bytes."""
    return -(-(plain + -(-plain // 64) + 2 * rotated) // 8) * 8
