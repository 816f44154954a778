"""Small random models of both cache kinds, with weights large enough that near-ties of logits are rare."""

import torch

from daedal.config import ModelConfig
from daedal.infer.engine import Engine
from daedal.model.transformer import Transformer, empty, initialise

VOCAB = 97
CONTEXT = 64

DENSE = {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LATENT = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
KINDS = {"dense": DENSE, "latent": LATENT}


def tiny(kind: str, *, seed: int = 0, **changes: object) -> Transformer:
    published = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        **KINDS[kind],
        **changes,
    }
    return initialise(empty(ModelConfig.from_published(published)), seed=seed)


def poisoned(engine: Engine) -> Engine:
    """The same engine, its cache filled with NaN: whatever reads a row that was not written, shows it."""
    for pools in engine._cache.pools.values():
        for pool in pools.values():
            pool.fill_(torch.nan)
    return engine


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
