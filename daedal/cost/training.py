"""The FLOPs of learning from one token: forwards once, backwards twice, by what a token meets.

6 for each parameter that a token is multiplied with, drafting modules and their turn at the head included, and for
attention what the mean token of a sequence reads, as training computes it (latent attention expanded, not absorbed; V4
and V3.2 in their sparse stage). What is computed twice to save memory counts once, as in PaLM's model FLOPs
utilisation (arXiv 2204.02311, appendix B). Knows no device and no time.
"""

from daedal import shapes
from daedal.config import ModelConfig
from daedal.cost.weights import active_params
from daedal.errors import ConfigError

_PASSES = 3  # one forwards, two backwards
_MULTIPLY_ADD = 2


def flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs per token of sequences of `context` tokens, with `config.num_nextn_predict_layers` drafting modules."""
    if context < 1:
        raise ConfigError(f"context is {context}: a sequence has at least 1 token, give a larger one")
    modules = config.num_nextn_predict_layers
    met = active_params(config, shapes.parameters(config)) + modules * config.vocab_size * config.hidden_size
    met += active_params(config, shapes.drafting(config)) if modules else 0
    layers = range(config.num_hidden_layers + modules)
    read = sum(_attention(config, layer, context) for layer in layers)
    return round(_PASSES * _MULTIPLY_ADD * (met + read))


def _attention(config: ModelConfig, layer: int, context: int) -> float:
    """Multiply-adds of scores and values of the mean token in one layer, the indexer's scores included."""
    heads = config.num_attention_heads
    if config.is_compressed:
        return _compressed(config, layer, context)
    if config.is_latent:
        assert config.v_head_dim is not None
        if config.is_indexed:
            assert config.kv_lora_rank is not None
            width = 2 * config.kv_lora_rank + config.rope_dim
            return heads * width * _mean(context, most=config.index_topk) + _indexing(config, context, 1)
        return heads * (config.head_dim + config.v_head_dim) * _mean(context)
    return heads * 2 * config.head_dim * _mean(context)


def _compressed(config: ModelConfig, layer: int, context: int) -> float:
    width = config.num_attention_heads * 2 * config.head_dim
    total = width * _mean(context, most=config.sliding_window)
    rate = config.compress_rate(layer)
    if rate is None:
        return total
    if config.attention_kind(layer) == "compressed_sparse_attention":
        return total + width * _mean(context, rate, config.index_topk) + _indexing(config, context, rate)
    return total + width * _mean(context, rate)


def _indexing(config: ModelConfig, context: int, rate: int) -> float:
    assert config.index_n_heads is not None
    assert config.index_head_dim is not None
    return config.index_n_heads * config.index_head_dim * _mean(context, rate)


def _mean(context: int, rate: int = 1, most: int | None = None) -> float:
    """Rows that the mean token of a sequence reads, where one stands for `rate` tokens and at most `most` are read."""
    limit = context if most is None else most
    return sum(min(length // rate, limit) for length in range(1, context + 1)) / context
