"""Models so small that their arithmetic costs nothing: what a step of them takes is the engine's own overhead.

Random numbers, packed where the CPU has kernels for that, as a server would hold them. Knows nothing of what is timed.
"""

import torch

from daedal import shapes
from daedal.config import ModelConfig
from daedal.model.packing import assign
from daedal.model.transformer import Transformer, empty
from daedal.ops.packed import Packed
from daedal.packed import FORMATS, PANEL, kept, packed_bytes, padded_columns, stays_plain

FORMAT = "int8"
_SCALE_BYTE = 0x3C


def dense(layers: int, *, hidden: int = 64, heads: int = 2, dim: int = 32, context: int = 8192) -> ModelConfig:
    """Keys and values for each head of `dim` numbers."""
    return ModelConfig.from_published(
        {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": hidden,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": dim,
            "max_position_embeddings": context,
            "torch_dtype": "bfloat16",
        }
    )


def latent(layers: int, *, active: int = 2, context: int = 8192) -> ModelConfig:
    """Latent attention and 16 experts in each layer, `active` of them for each token."""
    return ModelConfig.from_published(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "n_shared_experts": 1,
            "n_routed_experts": 16,
            "num_experts_per_tok": active,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "q_lora_rank": None,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "max_position_embeddings": context,
            "torch_dtype": "bfloat16",
        }
    )


def build(config: ModelConfig, *, packed: bool, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A model of this configuration with random weights. packed: in int8, computing in bfloat16 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    model = empty(config, dtype=torch.bfloat16 if packed else dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05 + (tensor.dim() == 1))
    if packed:
        for slot in shapes.parameters(config):
            for one in () if stays_plain(slot, config, FORMAT) else kept(slot, config, FORMAT):
                assign(model, one.name, _random(one.format, one.shape, generator))
    return model.to(device)


def _random(form: str, shape: tuple[int, ...], generator: torch.Generator) -> Packed:
    """Random codes; all scales the same."""
    data = torch.full((packed_bytes(form, shape),), _SCALE_BYTE, dtype=torch.uint8)
    panels = data.view(-1, packed_bytes(form, (PANEL, shape[-1])))
    codes = PANEL * padded_columns(form, shape[-1]) * FORMATS[form].bits // 8
    panels[:, :codes] = torch.randint(0, 256, (len(panels), codes), generator=generator, dtype=torch.uint8)
    return Packed(data, form, shape)
