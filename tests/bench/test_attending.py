"""What attention is measured by: its work is what the planner counts for a model of the same sizes."""

import pytest
import torch

from daedal.bench import attending
from daedal.bench.attending import Rows
from daedal.config import ModelConfig
from daedal.cost import work

SEQUENCES, HELD, TOKENS = 3, 64, 16
MADE = Rows(device=torch.device("cpu"), dtype=torch.bfloat16)
DENSE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}
LATENT = DENSE | {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": None,
    "first_k_dense_replace": 1,
}


def planned(published: dict[str, object]) -> tuple[work.Model, list[work.Part]]:
    published = {name: value for name, value in published.items() if name != "head_dim" or published is DENSE}
    model = work.model(ModelConfig.from_published(published), weights="bf16", kv_dtype="bf16")
    return model, [part for part in work.decode(model, batch=SEQUENCES, context=HELD) if part.cache_bytes]


@pytest.mark.parametrize(("published", "build"), [(DENSE, attending._full), (LATENT, attending._latent)])
def test_decoding_and_prompts_are_counted_as_the_planner_counts_them(published, build) -> None:  # type: ignore[no-untyped-def]
    model, parts = planned(published)
    call, nbytes, flops = build(MADE, SEQUENCES, 1, HELD)
    assert nbytes == sum(part.cache_bytes for part in parts)
    assert flops == sum(part.flops for part in parts)
    assert torch.isfinite(call()).all()
    call, _, flops = build(MADE, 1, TOKENS, HELD)
    expected = sum(
        2 * layers * reading.expanded * (reading.rows_up_to(HELD) - reading.rows_up_to(HELD - TOKENS))
        for reading, layers in model.readings.items()
    )
    assert flops == expected
    assert torch.isfinite(call()).all()


def test_windows_and_entries_are_read_by_every_query() -> None:
    call, nbytes, flops = attending._compressed(MADE, SEQUENCES, 1, 256)
    assert nbytes == SEQUENCES * (256 // 4 + 128) * 128 * 2
    assert flops == 4 * 16 * 128 * SEQUENCES * (256 // 4 + 128)
    assert torch.isfinite(call()).all()
    call, _, flops = attending._compressed(MADE, 1, TOKENS, 256)
    entries = sum((position + 1) // 4 for position in range(256 - TOKENS, 256))
    assert flops == pytest.approx(4 * 16 * 128 * (TOKENS * 128 + entries), rel=0.01)
    assert torch.isfinite(call()).all()
