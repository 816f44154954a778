"""Turns a GGUF file of the Llama family into a checkpoint in the published layout.

Weights are dequantised exactly to float32; the rows of q and k, which GGUF keeps in interleaved rotary order, go back
to halves. Tokenizer and chat template come out of the file's own metadata. Reads the format with the `gguf` library;
knows nothing of where the file came from.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from daedal.checkpoint.gguf_header import read_gguf
from daedal.errors import CheckpointError

Metadata = Mapping[str, object]
Report = Callable[[int, int], None]

_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def import_gguf(path: Path, directory: Path, *, report: Report = lambda done, total: None) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files of the GGUF `path` into `directory`.

    report: called with tensors done and in all. CheckpointError for another architecture, tokenizer or a damaged file.
    """
    metadata, found = read_gguf(path)
    tied = all(tensor.name != "output.weight" for tensor in found)
    config = published_config(metadata, tied=tied)
    tokenizer = build_tokenizer(metadata)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _token_ids(metadata))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(metadata))
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, NDArray[numpy.float32]] = {}
    for done, tensor in enumerate(found, start=1):
        name, kind = published_name(tensor.name)
        num_heads = heads.get(kind)
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32, copy=False)
            tensors[name] = rotary_halves(weight, num_heads) if isinstance(num_heads, int) else weight
        # What numpy and gguf raise of a shape that its data or its heads do not fit, and of a type gguf cannot read.
        except (ValueError, ZeroDivisionError, NotImplementedError) as error:
            told = f"shape {tensor.shape.tolist()} and type {tensor.tensor_type.name}"
            raise CheckpointError(
                f"tensor {tensor.name!r} of {path} has {told}, which cannot be read ({error}): fetch the file again"
            ) from error
        report(done, len(found))
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        # The library hides the system's error number in its text; a full disk must be known as such.
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), str(error)) from error
    # The library writes for its owner alone; the cache may be shared.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)


def published_name(name: str) -> tuple[str, str]:
    """A GGUF tensor's published name, and its kind within the layer ("attn_q", …; "" for the others)."""
    if name == "output.weight":
        return "lm_head.weight", ""
    if name in _TOP:
        return _TOP[name], ""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER:
        raise CheckpointError(f"tensor {name!r} of the GGUF file is not one of a Llama model: use the original weights")
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}", match[2]


def rotary_halves(weight: NDArray[numpy.float32], num_heads: int) -> NDArray[numpy.float32]:
    """Rows [heads × K, D] (or [heads × K]) from interleaved pairs, GGUF's order, to two halves, the published order."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return numpy.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def published_config(metadata: Metadata, *, tied: bool) -> dict[str, object]:
    """The config.json of the model that `metadata` describes. tied: the output head is the embedding."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"the GGUF file holds a {architecture!r} model, only 'llama' is read: use safetensors")
    if "llama.rope.scaling.type" in metadata or "llama.expert_count" in metadata:
        raise CheckpointError("the GGUF file has scaled rope or experts, which are not read: use its safetensors")
    num_heads = _integer(metadata, "llama.attention.head_count")
    hidden = _integer(metadata, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_strings(metadata, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": _integer(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": _integer(metadata, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _integer(metadata, "llama.attention.head_count_kv", num_heads),
        "head_dim": _integer(metadata, "llama.attention.key_length", hidden // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": _integer(metadata, "llama.context_length"),
        "initializer_range": 0.02,
        "rms_norm_eps": _number(metadata, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(metadata, "llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "use_cache": True,
        **_token_ids(metadata),
        # Llama files are published in bfloat16; the tensors here keep what dequantising made them, which is more.
        "dtype": "bfloat16",
    }


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The byte-level BPE tokenizer in the metadata, its text cut first as `tokenizer.ggml.pre` says."""
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(cut, str) or cut not in ("smollm", "gpt-2"):
        raise CheckpointError(
            f"the GGUF file has a {kind!r} tokenizer cut as {cut!r}, only 'gpt2' cut as 'smollm' or 'gpt-2' is read: "
            "use the original tokenizer.json"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    merges = [_pair(merge) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError("tokenizer.ggml.token_type does not give one type per token: fetch the GGUF file again")
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes]) if cut == "smollm" else by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(special)
    plain = zip(tokens, types, strict=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in plain if kind == _USER_DEFINED])
    return tokenizer


def _tokenizer_config(metadata: Metadata) -> dict[str, object]:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _integer(metadata, "llama.context_length"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if f"tokenizer.ggml.{theirs}_token_id" in metadata:
            config[f"{ours}_token"] = tokens[_integer(metadata, f"tokenizer.ggml.{theirs}_token_id")]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _token_ids(metadata: Metadata) -> dict[str, object]:
    names = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    return {f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names}


def _integer(metadata: Metadata, key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int):
        raise CheckpointError(f"{key} of the GGUF file is {value!r}: an integer is needed, fetch the file again")
    return value


def _number(metadata: Metadata, key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, float):
        raise CheckpointError(f"{key} of the GGUF file is {value!r}: a number is needed, fetch the file again")
    return float(str(numpy.float32(value)))  # the shortest decimal of the 32-bit value: 1e-05, not 9.99…e-06


def _strings(metadata: Metadata, key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise CheckpointError(f"{key} of the GGUF file is not a list of strings: fetch the file again")
    return value


def _pair(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise CheckpointError(f"merge {merge!r} of the GGUF file is not a pair: fetch the file again")
    return left, right


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
