"""Small models whose matrices have several blocks and whole groups, and checkpoints of them in every format."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from daedal.checkpoint.quantize import quantize
from daedal.checkpoint.save import save
from daedal.model.transformer import Transformer
from tests.tiny import tiny_model

_SIZES: dict[str, object] = {
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "num_nextn_predict_layers": 1,
}
_LATENT: dict[str, object] = {"intermediate_size": 128, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
_COMPRESSED: dict[str, object] = {"head_dim": 64, "qk_rope_head_dim": 16, "o_groups": 2, "o_lora_rank": 64}

FORMATS = (
    ("deepseek_v3", "fp8", None),
    ("deepseek_v32", "fp8", None),
    ("deepseek_v4", "bf16", "deepseek"),
    ("deepseek_v4", "bf16", "transformers"),
    ("deepseek_v4", "fp8", "deepseek"),
    ("deepseek_v4", "fp8", "transformers"),
    ("deepseek_v4", "fp4", "deepseek"),
    ("deepseek_v4", "fp4", "transformers"),
)


def quantizable_model(family: str, *, drafting: bool = True) -> Transformer:
    sizes = _SIZES | (_COMPRESSED if family == "deepseek_v4" else _LATENT)
    model = tiny_model(family, dtype=torch.bfloat16, drafting=drafting, **sizes)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.mul_(0.4)  # wider matrices of smaller numbers: logits stay of the size of the other tiny models'
    return model


def quantized(directory: Path, family: str, to: str, layout: str | None = None) -> Path:
    """A checkpoint with drafting modules, under `directory`, in a format."""
    save(quantizable_model(family), directory / "source")
    quantize(directory / "source", directory / to, to=to, layout=layout)
    return directory / to


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: object) -> None:
    """Rewrites the tensors of a checkpoint of one file, and fields of its config.json."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    published = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**published, **config}))
