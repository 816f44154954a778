"""GGUF files of a DeepSeek-V2/V3 checkpoint, so that llama.cpp runs the very same weights as the other sides.

Written for the loader of llama.cpp's architecture "deepseek2", as the package llama-cpp-python 0.3.36 carries it: the
key-value expansion split per head with the key half transposed (the absorbed form), experts stacked, norms and routers
in float32, the rest bfloat16. The vocabulary is left out: sides exchange token ids. Narrower files are made from the
bfloat16 one by llama.cpp's own quantiser. Knows nothing of measuring.
"""

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}
_MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_FTYPES = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
# Where the CPU has AMX, this llama.cpp keeps the two halves of the key-value expansion in its AMX order when their type
# is Q4_0, Q4_1 or Q8_0, finds that it cannot multiply them there, and aborts. The nearest type that it leaves alone:
_EXPANSION = {"Q4_0": "Q5_0", "Q4_1": "Q5_1", "Q8_0": "BF16"}


def write_bf16(directory: Path, target: Path) -> None:
    """The checkpoint in `directory` (deepseek_v2 or deepseek_v3, plain tensors) as one bfloat16 GGUF file."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "deepseek2", use_temp_file=False)
    _write_metadata(writer, config)
    for name, tensor in _tensors(directory, config):
        if tensor.dim() == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        else:
            stored = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, kind: str) -> None:
    """Another GGUF file of `source`'s tensors, made by llama.cpp: F32, BF16, Q8_0, Q4_0 or Q4_1, its own mixture."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FTYPES[kind]
    params.allow_requantize = True
    if kind in _EXPANSION:
        params.tt_overrides = _overrides(_EXPANSION[kind])
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama.cpp could not write {source.name} as {kind}: see its message above")


def _overrides(kind: str) -> Any:
    import llama_cpp

    pattern = llama_cpp.llama_model_tensor_override(rb"attn_(k|v)_b\.weight", gguf.GGMLQuantizationType[kind])
    return (llama_cpp.llama_model_tensor_override * 2)(pattern, llama_cpp.llama_model_tensor_override())


def active_bytes(path: Path, *, batch: int) -> float:
    """Bytes of the file's weights that one decode step of `batch` tokens reads: not the embedding, few experts.

    With random routing `batch` tokens name E (1 - (1 - A / E) ** batch) of E experts together.
    """
    reader = gguf.GGUFReader(path)
    fields = {key.rpartition(".")[2]: field for key, field in reader.fields.items()}
    part = 1.0
    if "expert_count" in fields:
        experts, chosen = (fields[key].contents() for key in ("expert_count", "expert_used_count"))
        part = 1 - (1 - chosen / experts) ** batch
    names = {tensor.name for tensor in reader.tensors}
    total = 0.0
    for tensor in reader.tensors:
        if tensor.name != "token_embd.weight" or "output.weight" not in names:
            total += tensor.n_bytes * (part if "_exps." in tensor.name else 1.0)
    return total


def _write_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(rope)
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    functions = {"sigmoid": gguf.ExpertGatingFuncType.SIGMOID, "softmax": gguf.ExpertGatingFuncType.SOFTMAX}
    writer.add_expert_gating_func(functions[config["scoring_func"]])
    if max(config.get("n_group") or 1, config.get("topk_group") or 1) > 1:
        raise SystemExit("n_group is above 1: groups of experts are not written, use a model without them")
    if config.get("rope_scaling"):
        raise SystemExit("rope_scaling is set: scaled rotary angles are not written, use a model without them")


def _tensors(directory: Path, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under llama.cpp's name, in the order of the layers."""
    read: dict[str, Callable[[], Tensor]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        shard = safe_open(path, "pt")
        read |= {name: lambda shard=shard, name=name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    for name, written in _TOP.items():
        if name in read:
            yield written, read[name]()
    for layer in range(config["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for name, written in _LAYER.items():
            if prefix + name in read:
                yield block + written, read[prefix + name]()
        yield from _expansion(read[prefix + "self_attn.kv_b_proj.weight"](), block, config)
        for name, short in _MLP.items():
            if prefix + f"mlp.{name}.weight" in read:
                yield f"{block}ffn_{short}.weight", read[prefix + f"mlp.{name}.weight"]()
                continue
            experts = range(config["n_routed_experts"])
            stack = torch.stack([read[f"{prefix}mlp.experts.{expert}.{name}.weight"]() for expert in experts])
            yield f"{block}ffn_{short}_exps.weight", stack
            yield f"{block}ffn_{short}_shexp.weight", read[f"{prefix}mlp.shared_experts.{name}.weight"]()


def _expansion(weight: Tensor, block: str, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """kv_b_proj [H (N + V), L] as keys [H, L, N] and values [H, V, L]."""
    heads = weight.unflatten(0, (config["num_attention_heads"], -1))
    keys, values = heads.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
    yield f"{block}attn_k_b.weight", keys.transpose(1, 2)
    yield f"{block}attn_v_b.weight", values
