"""The cache holds what `shapes.cache` lists, to the byte, and gives back what was stored and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daedal import shapes
from daedal.config import ModelConfig
from daedal.infer.cache import REWIND, PagedCache, page_multiple, page_nbytes, state_nbytes
from tests.infer.models import tiny


def deepseek_v3() -> ModelConfig:
    """V3's attention, without the experts, which the cache never sees."""
    return ModelConfig.from_published(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 163840,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 61,
        }
    )


def deepseek_v4_flash() -> ModelConfig:
    """V4-Flash as the cache sees it: 2 layers with a window only, 21 sparse, 20 heavily compressed, one MTP module."""
    return ModelConfig.from_published(
        {
            "model_type": "deepseek_v4",
            "vocab_size": 129280,
            "hidden_size": 4096,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 43,
            "num_attention_heads": 64,
            "n_routed_experts": 256,
            "num_experts_per_tok": 6,
            "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
            "num_nextn_predict_layers": 1,
        }
    )


def test_v3_keeps_576_numbers_per_token_and_layer() -> None:
    config = deepseek_v3()
    cache = PagedCache(config, num_pages=3, page_size=16, dtype=torch.bfloat16)
    assert cache.nbytes == 576 * 61 * 2 * 3 * 16
    assert cache.nbytes == sum(slot.nbytes for slot in shapes.cache(config)) * 3 * 16
    assert cache.nbytes == 3 * page_nbytes(config, 16, torch.bfloat16)
    assert (page_multiple(config), state_nbytes(config, torch.bfloat16)) == (1, 0)
    assert {layer: list(pools) for layer, pools in cache.pools.items()} == {layer: ["latent"] for layer in range(61)}


@pytest.mark.parametrize("drafting", [False, True])
def test_v4_keeps_entries_on_pages_of_128_tokens_and_the_rest_in_rings(drafting: bool) -> None:
    config = deepseek_v4_flash()
    cache = PagedCache(
        config, num_pages=2, page_size=256, dtype=torch.bfloat16, num_states=3, drafting=drafting, device="meta"
    )
    assert page_multiple(config) == 128
    # Of 128 tokens 32 sparse entries with an index key each, and one heavily compressed entry: 6880 bytes a token.
    page = page_nbytes(config, 256, torch.bfloat16, drafting=drafting)
    assert page == 2 * 2 * (21 * 32 * (512 + 128) + 20 * 512) == 6880 * 256
    # Windows in bfloat16; of open groups values and gates in float32: 8 tokens where groups overlap, else 128.
    windows = (43 + drafting) * (128 + REWIND) * 512 * 2
    sparse = 21 * (8 + REWIND) * 2 * (2 * 512 + 2 * 128) * 4
    heavy = 20 * (128 + REWIND) * 2 * 512 * 4
    state = state_nbytes(config, torch.bfloat16, drafting=drafting)
    assert state == windows + sparse + heavy
    assert cache.nbytes == 2 * page + 3 * state
    assert sorted(cache.pools) == list(range(43 + drafting))


def test_rows_come_back_from_scattered_pages_and_nothing_else_is_touched() -> None:
    config = tiny("dense").config
    cache = PagedCache(config, num_pages=5, page_size=2, dtype=torch.float32)
    for pools in cache.pools.values():
        for pool in pools.values():
            pool.fill_(torch.nan)
    generator = torch.Generator().manual_seed(3)
    key_TGK, value_TGK = torch.randn(2, 6, 2, 8, generator=generator)
    tables = [(4, 1), (2,)]
    first = cache.view(tables, [0, 0], [2, 1])
    second = cache.view(tables, [2, 1], [2, 1])
    for layer in (0, 1):
        assert first.extend(layer, key=key_TGK[:3] + layer, value=value_TGK[:3])["key"].lengths == (2, 1)
        rows = second.extend(layer, key=key_TGK[3:] + layer, value=value_TGK[3:])
        assert torch.equal(rows["key"].sequence(0), key_TGK[[0, 1, 3, 4]] + layer)
        assert torch.equal(rows["value"].sequence(1), value_TGK[[2, 5]])
        assert rows["key"].lengths == (4, 2)
    for pools in cache.pools.values():
        assert all(pool[[0, 3]].isnan().all() and not pool[[1, 2, 4]].isnan().any() for pool in pools.values())


COMPRESSED = tiny("compressed").config  # its layer 1 has a window of 6 and entries of 4 tokens
moves = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, REWIND), st.integers(0, 2)), min_size=1, max_size=14
)


@settings(max_examples=40, deadline=None)
@given(moves=moves)
def test_rings_and_entries_follow_positions_through_every_rewind(moves: list[tuple[int, int, int, int]]) -> None:
    """Sequences feed chunks or drafts, side by side, and withdraw some of the latter; each row says when it was fed."""
    layer = 1
    slots = {slot.name: slot for slot in shapes.cache(COMPRESSED) if slot.layer == layer}
    rate, pages = slots["entry"].rate, 60
    cache = PagedCache(COMPRESSED, num_pages=3 * pages, page_size=8, dtype=torch.float32, num_states=4)
    for pool in cache.pools[layer].values():
        pool.fill_(torch.nan)
    tables = [tuple(range(index, 3 * pages, 3)) for index in range(3)]
    told: list[list[float]] = [[], [], []]
    clock = 0.0
    for index, count, withdrawn, others in moves:
        fed = {index: count} | {other: 1 for other in range(others) if other != index}
        names = sorted(fed)
        pasts, counts = [len(told[name]) for name in names], [fed[name] for name in names]
        view = cache.view([tables[name] for name in names], pasts, counts, [(name + 2) % 4 for name in names])
        for name in names:
            told[name] += [clock := clock + 1 for _ in range(fed[name])]
        new_T = [told[name][-fed[name] :] for name in names]
        rows = torch.tensor([time for times in new_T for time in times])
        window = view.recent(layer, "window", _wide(rows, slots["window"].shape).contiguous())
        groups = view.groups(layer, "compressor", "entry")
        assert groups.states == view.places.states
        entries = groups.entries
        for place, (name, past) in enumerate(zip(names, pasts, strict=True)):
            first = max(past - slots["window"].ring + 1, 0)
            assert _times(window.sequence(place)) == told[name][first:]
            for end in range((past // rate + 1) * rate, len(told[name]) + 1, rate):
                page, row = divmod(end // rate - 1, entries.pages.page_size)
                entries.pool[entries.pages.tables[place][page], row] = told[name][end - 1]
            assert _times(entries.sequence(place)) == told[name][rate - 1 :: rate]
        # Of what was fed last up to REWIND tokens are withdrawn, but never all.
        if count <= REWIND + 1:
            del told[index][len(told[index]) - min(withdrawn, count - 1) :]


def _wide(values_T: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return values_T.float().view(-1, *[1] * len(shape)).expand(-1, *shape)


def _times(rows: torch.Tensor) -> list[float]:
    assert bool((rows == rows.flatten(1)[:, :1].view(-1, *[1] * (rows.dim() - 1))).all())
    return rows.flatten(1)[:, 0].tolist()


def test_a_layer_that_stores_other_slots_is_refused() -> None:
    view = PagedCache(tiny("latent").config, num_pages=1, page_size=2, dtype=torch.float32).view([(0,)], [0], [1])
    with pytest.raises(
        ValueError, match=r"a row for each token as 'key': the cache keeps latent \(a row for each token\)"
    ):
        view.extend(0, key=torch.zeros(1, 14))
    with pytest.raises(ValueError, match="the last rows as 'latent'"):
        view.recent(0, "latent", torch.zeros(0, 14))
