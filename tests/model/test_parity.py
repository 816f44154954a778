"""Logits against transformers, the oracle: float32, random weights, odd sizes, several seeds, every family."""

import pytest
import torch
import transformers

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty

TOLERANCE = 1e-4

_SIZES = {
    "vocab_size": 131,
    "hidden_size": 40,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 26,
    "qk_rope_head_dim": 10,
    "qk_nope_head_dim": 14,
    "v_head_dim": 12,
    "moe_intermediate_size": 20,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_GROUPS = {"n_group": 3, "topk_group": 2}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama-one-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 14, "attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": ("Llama", {"num_key_value_heads": 4, "rope_parameters": _LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "smollm2": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-yarn": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": _YARN}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 18}),
    "v2-lite": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "n_shared_experts": 2}),
    "v2-lite-yarn": (
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": None, "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "v2": (
        "DeepseekV2",
        {
            **_LATENT,
            **_GROUPS,
            "q_lora_rank": 22,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "v3": (
        "DeepseekV3",
        {**_LATENT, **_GROUPS, "q_lora_rank": 22, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "v3-mscales-differ": (
        "DeepseekV3",
        {**_LATENT, **_GROUPS, "q_lora_rank": 22, "rope_parameters": {**_YARN, "mscale": 0.8, "mscale_all_dim": 0.5}},
    ),
    "v3-plain": (
        "DeepseekV3",
        {
            **_LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 3,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_interleave": False,
            "attention_bias": True,
        },
    ),
}


def _randomise(oracle: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in oracle.state_dict().items():
            norm = tensor.dim() == 1 and name.endswith("norm.weight")
            tensor.normal_(1.0 if norm else 0.0, 0.12, generator=generator)


def make_pair(case: str, seed: int) -> tuple[torch.nn.Module, Transformer]:
    """The oracle, and our model with the oracle's weights."""
    family, settings = CASES[case]
    published = {**_SIZES, **settings}
    config = getattr(transformers, f"{family}Config")(**published)
    config._attn_implementation = "eager"
    oracle = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    _randomise(oracle, seed)
    model = empty(ModelConfig.from_published(config.to_dict()))
    weights = {name.removeprefix("model."): tensor for name, tensor in oracle.state_dict().items()}
    model.load_state_dict(weights, strict=True)
    return oracle, model


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_oracle(case: str, seed: int) -> None:
    oracle, model = make_pair(case, seed)
    ids_BT = torch.randint(0, 131, (3, 67), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        wanted = oracle(ids_BT).logits
        assert wanted.std() > 0.05, "the oracle's logits are flat, so equality would prove nothing"
        got = model.logits(ids_BT)
        assert (got - wanted).abs().max() <= TOLERANCE
        with ops.using("reference"):
            assert (model.logits(ids_BT) - wanted).abs().max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("case", ["smollm2", "qwen3", "v2", "v3"])
def test_gradients_equal_the_oracle(case: str) -> None:
    oracle, model = make_pair(case, 3)
    model.train()
    ids_BT = torch.randint(0, 131, (2, 19))
    targets = torch.randint(0, 131, (38,))
    torch.nn.functional.cross_entropy(oracle(ids_BT).logits.flatten(0, 1), targets).backward()
    torch.nn.functional.cross_entropy(model.logits(ids_BT).flatten(0, 1), targets).backward()
    theirs = {name.removeprefix("model."): tensor.grad for name, tensor in oracle.named_parameters()}
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.grad, theirs[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
