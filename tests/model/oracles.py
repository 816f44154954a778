"""Small random V3, V3.2 and V4 models of transformers, and ours with their weights.

Sixteen index heads: a head's score is cut off at zero, so with few heads many entries score exactly zero, and
transformers breaks such ties by the length of the array.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty

TOLERANCE = 1e-4
VOCABULARY = 131

_SIZES: Mapping[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "index_n_heads": 16,
    "max_position_embeddings": 4096,
}
_V32: Mapping[str, object] = {
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 22,
    "kv_lora_rank": 26,
    "qk_rope_head_dim": 10,
    "qk_nope_head_dim": 14,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "index_head_dim": 24,
    "index_topk": 37,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 64.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
_V4: Mapping[str, object] = {
    "num_attention_heads": 6,
    "head_dim": 20,
    "q_lora_rank": 18,
    "qk_rope_head_dim": 8,
    "n_routed_experts": 8,
    "o_groups": 3,
    "o_lora_rank": 10,
    "index_head_dim": 16,
    "index_topk": 7,
    "sliding_window": 16,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.4,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
_RATIO = {"window": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}


def v32_pair(seed: int, **changes: object) -> tuple[torch.nn.Module, Transformer]:
    """The oracle and our model. `changes` are fields of its configuration."""
    return pair("DeepseekV32", seed, {**_SIZES, **_V32, **changes})


def v2_pair(seed: int, **changes: object) -> tuple[torch.nn.Module, Transformer]:
    """The same without an indexer, and with V2's router."""
    published = {name: value for name, value in {**_SIZES, **_V32}.items() if not name.startswith("index_")}
    return pair("DeepseekV2", seed, {**published, "topk_method": "group_limited_greedy", **changes})


def v3_pair(seed: int, **changes: object) -> tuple[torch.nn.Module, Transformer]:
    """The same without an indexer."""
    published = {name: value for name, value in {**_SIZES, **_V32}.items() if not name.startswith("index_")}
    return pair("DeepseekV3", seed, {**published, **changes})


def v4_pair(seed: int, layers: str, hashed: int = 0, **changes: object) -> tuple[torch.nn.Module, Transformer]:
    """The oracle and our model. layers: its kinds, as in "window csa hca"; the first `hashed` route by token id."""
    kinds = [_RATIO[kind] for kind in layers.split()]
    mlp = ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed)
    named = {"num_hidden_layers": len(kinds), "layer_types": kinds, "mlp_layer_types": mlp}
    return pair("DeepseekV4", seed, {**_SIZES, **_V4, **named, **changes})


def pair(family: str, seed: int, published: Mapping[str, object]) -> tuple[torch.nn.Module, Transformer]:
    """A model of transformers, random by `seed`, and ours with the same weights."""
    config = getattr(transformers, f"{family}Config")(**published)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    oracle = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    randomise(oracle, seed, config.n_routed_experts)
    model = empty(ModelConfig.from_published(config.to_dict()))
    model.load_state_dict(our_names(oracle), strict=True)
    return oracle, model


def our_names(oracle: torch.nn.Module) -> dict[str, Tensor]:
    """The oracle's tensors; those without numbers, of which ours has no parameter, left out."""
    tensors = oracle.state_dict()
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if tensor.numel()}


@torch.no_grad()
def randomise(oracle: torch.nn.Module, seed: int, num_experts: int) -> None:
    """Lively numbers everywhere: norms, biases, sinks and scales vary too, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in oracle.state_dict().items():
        if name.endswith("tid2eid"):
            tensor.random_(0, num_experts, generator=generator)
        elif name.endswith("norm.weight") or name.endswith("scale"):
            tensor.normal_(1.0, 0.15, generator=generator)
        elif name.endswith("sinks"):
            tensor.normal_(0.0, 1.0, generator=generator)
        else:
            tensor.normal_(0.0, 0.15, generator=generator)


def random_ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1000 + seed))


@dataclass(frozen=True, eq=False)
class Proven:
    """Our model, some ids, and the logits of transformers, which it was seen to equal."""

    model: Transformer
    ids: list[int]
    wanted_TV: Tensor

    @classmethod
    def of(cls, pair: tuple[torch.nn.Module, Transformer], length: int) -> "Proven":
        ids_1T = random_ids(length, 1, length)
        with torch.no_grad():
            wanted_TV = pair[0](ids_1T, use_cache=False).logits[0]
        proven = cls(pair[1], ids_1T[0].tolist(), wanted_TV)
        assert wanted_TV.std() > 0.3
        assert proven.errors().max() <= TOLERANCE
        return proven

    @torch.no_grad()
    def errors(self, model: Transformer | None = None) -> Tensor:
        """The largest error of each token's logits, of this model or of another."""
        logits_TV = (model or self.model).logits(torch.tensor([self.ids]))[0]
        return (logits_TV - self.wanted_TV).abs().amax(-1)

    def is_wrong(self) -> bool:
        """Whether a planted mistake shows: not by rounding, and not by a hair."""
        error = float(self.errors().max())
        assert error <= TOLERANCE or error > 30 * TOLERANCE, error
        return error > TOLERANCE
