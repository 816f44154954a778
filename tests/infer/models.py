"""Small random models of every cache kind, with weights large enough that near-ties of logits are rare."""

import torch

from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty, initialise

VOCAB = 97
# Experts on native kernels are a multiple of 16 wide.
WIDE_EXPERTS = {"moe_intermediate_size": 32}
CONTEXT = 64

DENSE = {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
LATENT = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    **EXPERTS,
}
INDEXED = {**LATENT, "model_type": "deepseek_v32", "index_n_heads": 8, "index_head_dim": 8, "index_topk": 9}
# Groups, window and choices are small: short texts cross many of their borders.
COMPRESSED = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 4,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "num_hash_layers": 1,
    "head_dim": 8,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 12,
    "o_groups": 2,
    "o_lora_rank": 6,
    "sliding_window": 6,
    "index_n_heads": 8,
    "index_head_dim": 8,
    "index_topk": 3,
    "hc_mult": 2,
    "num_nextn_predict_layers": 1,
    **EXPERTS,
}
KINDS = {"dense": DENSE, "latent": LATENT, "indexed": INDEXED, "compressed": COMPRESSED}


def tiny(kind: str, *, seed: int = 0, drafting: bool = False, **changes: object) -> Transformer:
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
    return initialise(empty(ModelConfig.from_published(published), drafting=drafting), seed=seed)


@torch.no_grad()
def tame(model: Transformer, share: float = 0.05) -> Transformer:
    """The same model with layers that say little, so that its last token nearly decides the next; and with a drafting
    module that goes by the last token too, if not by it alone. So its drafts are often right, and often wrong.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "o_b_proj.weight", "down_proj", "down_proj.weight")):
            weight.mul_(0.4 if name.startswith("mtp.") else share)
        elif name.endswith((".e_proj.weight", ".eh_proj.weight")):
            hidden = weight.shape[0]
            weight[:, :hidden] = torch.eye(hidden)
            weight[:, hidden:].mul_(0.3)
        elif name.endswith(".h_proj.weight"):
            weight.mul_(0.3)
    return model


@torch.no_grad()
def near(model: Transformer, *, noise: float = 0.03) -> Transformer:
    """A model that often agrees with `model`."""
    other = empty(model.config)
    generator = torch.Generator().manual_seed(5)
    kept = model.state_dict()
    for name, tensor in other.state_dict().items():
        tensor.copy_(kept[name])
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * noise * tensor.std(correction=0))
    return other


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
