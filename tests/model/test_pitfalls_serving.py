"""What others got wrong in V4, each as a test of its own: steps, lengths, drafting modules, and what is quantised.

As in `test_pitfalls.py`, a model that equals transformers stands ready.
"""

import pytest
import torch

from daedal import shapes
from daedal.infer.cache import PagedCache
from tests.model.feeding import Feeder
from tests.model.oracles import Proven, v4_pair
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


@pytest.fixture(scope="module")
def v4() -> Proven:
    return Proven.of(v4_pair(4, "window csa hca csa", hashed=1), length=300)


@pytest.mark.parametrize(
    "slot", ["window", "entry", "index_key", "compressor", "index_compressor"], ids=lambda slot: f"loses {slot}"
)
def test_nothing_that_a_later_step_needs_is_lost_between_steps(v4: Proven, slot: str) -> None:
    """Index keys that stay with their chunk leave only the last within reach; without the rows of open groups and of
    the group before, decoding pools half an entry.
    """
    for loses in (False, True):
        feeder = Feeder(v4.model, [300])
        done, worst = 0, 0.0
        for count in (201, 1, 1, 3, 40, 1, 5):
            if loses and done:
                for pools in feeder.cache.pools.values():
                    if slot in pools:
                        pools[slot].zero_()
            (logits_TV,) = feeder.feed({0: v4.ids[done : done + count]}).values()
            worst = max(worst, float((logits_TV - v4.wanted_TV[done : done + count]).abs().max()))
            done += count
        assert (worst > 1e-3) == loses


@pytest.mark.parametrize("remainder", [0, 1, 2, 3])
def test_prompts_of_any_length_are_continued_alike(v4: Proven, remainder: int) -> None:
    """Some engines fail in long retrieval where the prompt's length leaves 3 after division by 4."""
    prompt = 256 + remainder
    feeder = Feeder(v4.model, [300])
    got = [
        feeder.feed({0: v4.ids[:prompt]})[0][-1:],
        *(feeder.feed({0: v4.ids[at : at + 1]})[0] for at in range(prompt, 264)),
    ]
    torch.testing.assert_close(torch.cat(got), v4.wanted_TV[prompt - 1 : 264], rtol=0, atol=1e-4)


def test_shorter_neighbours_do_not_reach_into_each_others_groups(v4: Proven) -> None:
    """Groups end by each sequence's own length; by the longest's, padding gets in from the fourth token on."""
    lengths = (5, 300, 3, 131)
    got = Feeder(v4.model, lengths).feed({name: v4.ids[:length] for name, length in enumerate(lengths)})
    for name, length in enumerate(lengths):
        torch.testing.assert_close(got[name], v4.wanted_TV[:length], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_a_sequence_that_brings_nothing_disturbs_nobody(family: str) -> None:
    """Nor a batch without sequences, or without tokens."""
    model = tiny_model(family)
    assert model.logits(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 320)
    assert model.logits(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 320)
    ids = torch.randint(0, 320, (2, 150)).tolist()
    plain, disturbed = Feeder(model, [150, 150]), Feeder(model, [150, 150])
    for feeder in (plain, disturbed):
        feeder.feed({0: ids[0][:130], 1: ids[1][:9]})
    for silent, speaking in ((1, 0), (0, 1), (1, 0)):
        piece = ids[speaking][plain.pasts[speaking] :][:3]
        wanted = plain.feed({speaking: piece})[speaking]
        got = disturbed.feed({silent: [], speaking: piece})
        assert got[silent].shape == (0, 320)
        torch.testing.assert_close(got[speaking], wanted, rtol=0, atol=1e-5)


def test_a_drafting_module_has_no_entries_whatever_the_layers_are() -> None:
    """V4-Pro's second layer is heavily compressed; its module is not, nor has it a table of experts by token."""
    config = tiny_config("deepseek_v4", compress_ratios=[128, 128, 4, 128, 0], num_hash_layers=3)
    names = [slot.name for slot in shapes.drafting(config)]
    assert not any("compressor" in name or "tid2eid" in name for name in names)
    assert "mtp.0.mlp.gate.e_score_correction_bias" in names
    (slot,) = (slot for slot in shapes.cache(config, drafting=True) if slot.layer == config.num_hidden_layers)
    assert slot.name == "window"
    model = tiny_model("deepseek_v4", drafting=True, compress_ratios=[128, 128, 4, 128, 0])
    assert model.mtp[0].self_attn.compressor is None


def test_what_compresses_and_chooses_is_never_quantised_nor_rounded() -> None:
    """Compressors, the indexer's weights, router, norms, streams and head stay as they are beside FP8 and FP4."""
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    config = tiny_config("deepseek_v4", quantization_config=quantised, expert_dtype="fp4", torch_dtype="bfloat16")
    plain = ("compressor.kv_proj", "compressor.gate_proj", "position_bias", "weights_proj", "mlp.gate.", "norm", "_hc.")
    slots = shapes.parameters(config) + shapes.drafting(config)
    coded = [slot for slot in slots if slot.dtype.startswith("float8") or slot.dtype.startswith("float4")]
    assert {slot.role for slot in coded} == {"attention", "indexer", "routed_expert", "shared_expert", "draft"}
    assert not [
        slot.name for slot in coded if any(part in slot.name for part in (*plain, "embed_tokens", "lm_head", "hc_head"))
    ]
    wide = {slot.name for slot in slots if slot.wide}
    for part in (
        "compressor.kv_proj",
        "compressor.gate_proj",
        "position_bias",
        "weights_proj",
        "sinks",
        "_hc.",
        "hc_head",
    ):
        assert all(slot.name in wide for slot in slots if part in slot.name), part
    cache = PagedCache(config, num_pages=1, page_size=128, dtype=torch.bfloat16)
    kept = {(name, pool.dtype) for pools in cache.pools.values() for name, pool in pools.items()}
    assert {name for name, dtype in kept if dtype == torch.float32} == {"compressor", "index_compressor"}
