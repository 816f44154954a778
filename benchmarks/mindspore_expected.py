"""What MindSpore is held against: exports models and records Daedal's own logits and greedy ids beside each.

    python benchmarks/mindspore_expected.py /tmp/parity                                  # the three usual ones
    python benchmarks/mindspore_expected.py /tmp/parity --models small-v3 DIRECTORY

`small-v3` is made here: a random V3 with groups, shared experts and YaRN. The other half, `mindspore_parity.py`, reads
what this one writes, and runs where MindSpore is and torch need not be. Float32, on the CPU.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import daedal
from daedal.checkpoint.sources import resolve
from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty, initialise
from daedal.ports.export import export
from daedal.text.tokenizer import Tokenizer

SMALL = "small-v3"
USUAL = (SMALL, "smollm2-135m", "smollm2-135m-latent")
TEXTS = (
    "The sea was calm when the ship left the harbour, and nobody on board thought of storms. " * 4,
    "The capital of France is",
    "def fibonacci(n):",
)
NUM_TOKENS = 32
_SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.08,
    "max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "torch_dtype": "float32",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Export models and record what they say, for mindspore_parity.py.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--models", nargs="+", default=list(USUAL), metavar="NAME|DIRECTORY")
    wishes = parser.parse_args()
    for name in wishes.models:
        record(wishes.directory, name)


def record(directory: Path, name: str) -> Path:
    """Exports one model to a directory below `directory`, with expected.npz beside its weights."""
    source = _small(directory) if name == SMALL else resolve(name)
    target = directory / (SMALL if name == SMALL else Path(name).name)
    report = export(source, target, dtype="float32")
    model = daedal.load(source, device="cpu", dtype=torch.float32)
    found: dict[str, object] = {}
    for index, prompt in enumerate(_prompts(source, model)):
        found |= _said(model, prompt, index)
    np.savez(target / "expected.npz", **found)
    print(f"{target}: {report.tensors:,} tensors, {report.nbytes:,} bytes, {len(found) // 3} prompts", flush=True)
    return target


def _said(model: Transformer, prompt: Sequence[int], index: int) -> dict[str, object]:
    with torch.inference_mode():
        logits_BTV = model.logits(torch.tensor([list(prompt)]))
    params = daedal.SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    output = daedal.Engine(model, max_batch=1).generate([list(prompt)], params)[0]
    return {
        f"prompt-{index}": np.asarray(prompt),
        f"logits-{index}": logits_BTV[0].numpy(),
        f"greedy-{index}": np.asarray(output.ids),
    }


def _prompts(source: Path, model: Transformer) -> Iterator[list[int]]:
    if (source / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(source)
        yield from (tokenizer.encode(text) for text in TEXTS)
        return
    generator = torch.Generator().manual_seed(0)
    for length in (90, 5, 1):
        yield torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()


def _small(directory: Path) -> Path:
    source = directory / "made" / SMALL
    model = initialise(empty(ModelConfig.from_published(_SMALL)), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.1, generator=generator)
    daedal.save(model, source)
    return source


if __name__ == "__main__":
    main()
