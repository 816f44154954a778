"""Small random models of every family, as configurations, as models and as whole checkpoint directories."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from daedal.checkpoint.save import save
from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty

FAMILIES = ("llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")

_TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families."
)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
_VOCABULARY = 320  # 256 bytes, three special tokens, a few merges; the rest of the rows have no token


def tiny_published(family: str, **changes: object) -> dict[str, object]:
    """A published config.json of odd sizes."""
    published: dict[str, object] = {
        "model_type": family,
        "vocab_size": _VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    if family.startswith("deepseek"):
        del published["head_dim"]
        published |= {
            "num_key_value_heads": 6,
            "q_lora_rank": 20,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "moe_intermediate_size": 20,
            "n_routed_experts": 12,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        }
    if family == "deepseek_v2":
        published |= {"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}
    if family == "deepseek_v32":
        published |= {"index_n_heads": 16, "index_head_dim": 20, "index_topk": 11}
    if family == "deepseek_v4":
        published |= _V4
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_group", "topk_group", "intermediate_size"):
            del published[name]
    return published | changes


# Every kind of attention and of feed-forward; entries, windows and choices small enough that short texts cross them.
_V4: dict[str, object] = {
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_hash_layers": 1,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "o_groups": 3,
    "o_lora_rank": 10,
    "sliding_window": 16,
    "index_n_heads": 16,
    "index_head_dim": 12,
    "index_topk": 7,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 1,
}


def tiny_config(family: str, **changes: object) -> ModelConfig:
    return ModelConfig.from_published(tiny_published(family, **changes))


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, drafting: bool = False, **changes: object
) -> Transformer:
    """A model with lively random weights: norms and biases vary too, so that a forgotten one is seen."""
    model = empty(tiny_config(family, **changes), dtype=dtype, drafting=drafting)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.random_(0, model.config.n_routed_experts, generator=generator)
            elif name.endswith(("bias", "base", "sinks")):
                tensor.normal_(0.0, 0.1, generator=generator)
            elif tensor.dim() == 1:
                tensor.normal_(1.0, 0.1, generator=generator)
            else:
                tensor.normal_(0.0, 0.15, generator=generator)
    return model


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with `<|start|>` (0, also BOS), `<|end|>` (1, EOS) and `<|pad|>` (2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def tiny_checkpoint(
    directory: Path, family: str = "llama", *, chat: bool = True, seed: int = 0, **changes: object
) -> Path:
    """A whole checkpoint: config, weights, tokenizer, and with `chat` a chat template."""
    save(tiny_model(family, seed=seed, **changes), directory)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    described: dict[str, object] = {"bos_token": "<|start|>", "eos_token": "<|end|>", "add_bos_token": False}
    if chat:
        described["chat_template"] = _TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    return directory
