"""The names that DeepSeek gives the tensors of V4, and what transformers' writer makes of them.

Published files have no `model.` prefix and short names (`layers.0.attn.wq_a.weight`); drafting modules are `mtp.0.…`.
transformers reads them, and writes them back under a `model.` prefix with a few words changed; `as_published` undoes
that. Knows names only.
"""

import re
from types import MappingProxyType

_TOP = MappingProxyType({"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"})
# How a name within a layer (or a drafting module, which is a layer and a little more) begins: ours, theirs.
_BEGINNINGS = MappingProxyType(
    {
        "input_layernorm.": "attn_norm.",
        "post_attention_layernorm.": "ffn_norm.",
        "attn_hc.": "hc_attn_",
        "ffn_hc.": "hc_ffn_",
        "hc_head.hc_": "hc_head_",
        "self_attn.q_a_proj.": "attn.wq_a.",
        "self_attn.q_a_norm.": "attn.q_norm.",
        "self_attn.q_b_proj.": "attn.wq_b.",
        "self_attn.kv_proj.": "attn.wkv.",
        "self_attn.kv_norm.": "attn.kv_norm.",
        "self_attn.o_a_proj.": "attn.wo_a.",
        "self_attn.o_b_proj.": "attn.wo_b.",
        "self_attn.sinks": "attn.attn_sink",
        "self_attn.compressor.kv_proj.": "attn.compressor.wkv.",
        "self_attn.compressor.gate_proj.": "attn.compressor.wgate.",
        "self_attn.compressor.position_bias": "attn.compressor.ape",
        "self_attn.compressor.kv_norm.": "attn.compressor.norm.",
        "self_attn.compressor.indexer.kv_proj.": "attn.indexer.compressor.wkv.",
        "self_attn.compressor.indexer.gate_proj.": "attn.indexer.compressor.wgate.",
        "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
        "self_attn.compressor.indexer.kv_norm.": "attn.indexer.compressor.norm.",
        "self_attn.compressor.indexer.q_b_proj.": "attn.indexer.wq_b.",
        "self_attn.compressor.indexer.scorer.weights_proj.": "attn.indexer.weights_proj.",
        "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
        "mlp.gate.": "ffn.gate.",
    }
)
_EXPERT = re.compile(r"mlp\.(shared_experts|experts\.\d+)\.(gate|down|up)_proj\.")
_ROUTED = re.compile(r"(\.experts\.\d+)\.(gate|down|up)_proj\.")
_EXPERT_WORDS = MappingProxyType({"gate": "w1", "down": "w2", "up": "w3"})
_OWNER = re.compile(r"((?:layers|mtp)\.\d+\.)?(.*)")

# What transformers' writer changes besides the prefix: theirs, published.
_REWRITTEN = (
    (re.compile(r"^(model\.)?embed_tokens\."), "embed."),
    (re.compile(r"^(model\.)?lm_head\."), "head."),
    (re.compile(r"^model\."), ""),
    (re.compile(r"(^|\.)hc_head\.hc_"), r"\1hc_head_"),
    (re.compile(r"\.attn\.norm\."), ".attn.kv_norm."),
    (re.compile(r"\.weight_scale_inv$"), ".scale"),
)


def published_name(ours: str) -> str:
    """The published name of one of our parameters, experts already taken apart (`mlp.experts.3.up_proj.weight`)."""
    if ours in _TOP:
        return _TOP[ours]
    match = _OWNER.fullmatch(ours)
    assert match is not None
    owner, inner = match[1] or "", match[2]
    expert = _EXPERT.match(inner)
    if expert is not None:
        return f"{owner}ffn.{expert[1]}.{_EXPERT_WORDS[expert[2]]}.{inner[expert.end() :]}"
    for mine, theirs in _BEGINNINGS.items():
        if inner.startswith(mine):
            return owner + theirs + inner.removeprefix(mine)
    return ours


def with_published_experts(ours: str) -> str:
    """Our name with w1, w2 and w3 for the matrices of routed experts, all else as it is."""
    return _ROUTED.sub(lambda match: f"{match[1]}.{_EXPERT_WORDS[match[2]]}.", ours)


def scale_name(weight: str) -> str:
    """The published name of the scales of the published tensor `weight`."""
    return weight.removesuffix(".weight") + ".scale"


def as_published(name: str) -> str:
    """The published name of what transformers wrote as `name`. Published names stay as they are."""
    for pattern, replacement in _REWRITTEN:
        name = pattern.sub(replacement, name)
    return name
