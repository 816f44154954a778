"""The keystone: every parameter and every cache slot of a model, listed from its configuration alone.

The model on the meta device equals this list exactly, the checkpoint reader knows from it what is missing, the cache
allocates by it, and the cost model counts from it, so that none of them can drift from the others. Standard library
only: it serves models that no laptop could hold.
"""

from collections.abc import Iterator

from daedal.config import ModelConfig
from daedal.shapes.attention import attention
from daedal.shapes.feed_forward import feed_forward
from daedal.shapes.memory import rows
from daedal.shapes.slot import DTYPE_BITS, EIGHT_BIT_GROUP, ROLES, Slot, eight_bit_row

__all__ = ["DTYPE_BITS", "EIGHT_BIT_GROUP", "ROLES", "Slot", "cache", "drafting", "eight_bit_row", "parameters"]


def parameters(config: ModelConfig) -> list[Slot]:
    """Every parameter of the backbone, in the order of the forward pass. A tied head is not listed twice.

    Hash tables are listed too, although they are data: role "hash_table".
    """
    slots = [Slot("embed_tokens.weight", (config.vocab_size, config.hidden_size), "embedding", config.dtype)]
    for layer in range(config.num_hidden_layers):
        slots.extend(_layer(config, layer, f"layers.{layer}."))
    if config.is_compressed:
        slots.extend(_hyper_head(config, "hc_head.", None))
    slots.append(Slot("norm.weight", (config.hidden_size,), "norm", config.dtype))
    if not config.tie_word_embeddings:
        slots.append(Slot("lm_head.weight", (config.vocab_size, config.hidden_size), "head", config.dtype))
    return slots


def drafting(config: ModelConfig) -> list[Slot]:
    """The parameters of the model's own drafting (MTP) modules, `num_nextn_predict_layers` of them; their embedding and
    head are the backbone's (V3, section 2.2).
    """
    slots: list[Slot] = []
    for module in range(config.num_nextn_predict_layers):
        prefix, layer = f"mtp.{module}.", config.num_hidden_layers + module
        hidden = config.hidden_size
        for name in ("enorm", "hnorm"):
            slots.append(Slot(f"{prefix}{name}.weight", (hidden,), "norm", config.dtype, layer))
        if config.is_compressed:
            quantised = "float8_e4m3fn" if config.quantization_config is not None else config.dtype
            for name in ("e_proj", "h_proj"):
                slots.append(Slot(f"{prefix}{name}.weight", (hidden, hidden), "draft", quantised, layer))
        else:
            # Shipped in bf16 also beside FP8 weights.
            slots.append(Slot(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), "draft", config.dtype, layer))
        slots.extend(_layer(config, layer, prefix))
        if config.is_compressed:
            slots.extend(_hyper_head(config, f"{prefix}hc_head.", layer))
        slots.append(Slot(f"{prefix}norm.weight", (hidden,), "norm", config.dtype, layer))
    return slots


def cache(config: ModelConfig, *, drafting: bool = False) -> list[Slot]:
    """What the cache keeps, layer by layer; with `drafting` also for the drafting modules, as layers after the last."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if drafting else 0)
    return [slot for layer in range(layers) for slot in rows(config, layer)]


def _layer(config: ModelConfig, layer: int, prefix: str) -> Iterator[Slot]:
    norm = (config.hidden_size,)
    if config.is_compressed:
        yield from _hyper_connection(config, f"{prefix}attn_hc.", layer)
    yield Slot(f"{prefix}input_layernorm.weight", norm, "norm", config.dtype, layer)
    yield from attention(config, f"{prefix}self_attn.", layer)
    if config.is_compressed:
        yield from _hyper_connection(config, f"{prefix}ffn_hc.", layer)
    yield Slot(f"{prefix}post_attention_layernorm.weight", norm, "norm", config.dtype, layer)
    yield from feed_forward(config, f"{prefix}mlp.", layer)


def _hyper_connection(config: ModelConfig, prefix: str, layer: int) -> Iterator[Slot]:
    """Weights that mix residual streams (mHC; V4, section 2.2): M in, M out, M x M between."""
    assert config.hc_mult is not None
    streams = config.hc_mult
    mixes = streams * (2 + streams)
    for name, shape in (("fn", (mixes, streams * config.hidden_size)), ("base", (mixes,)), ("scale", (3,))):
        yield Slot(prefix + name, shape, "hyper_connection", "float32", layer, wide=True)


def _hyper_head(config: ModelConfig, prefix: str, layer: int | None) -> Iterator[Slot]:
    """Weights that collapse the streams at the end."""
    assert config.hc_mult is not None
    streams = config.hc_mult
    shapes = (("hc_fn", (streams, streams * config.hidden_size)), ("hc_base", (streams,)), ("hc_scale", (1,)))
    for name, shape in shapes:
        yield Slot(prefix + name, shape, "hyper_connection", "float32", layer, wide=True)
