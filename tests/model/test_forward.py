"""The forward pass in its parts: shapes from the keystone, chunks and decode against one pass, both forms of MLA."""

from collections.abc import Sequence

import pytest
import torch

from daedal import shapes
from daedal.errors import RequestError
from daedal.infer.cache import PagedCache
from daedal.model.attention_latent import Part
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer, empty, initialise
from daedal.ops.rows import FlatRows
from tests.tiny import FAMILIES, tiny_config, tiny_model

PAGE = {"deepseek_v4": 128}


# V4 has a head of its own, always: its configuration refuses a tied one (tests/test_config.py).
@pytest.mark.parametrize(
    ("family", "tied"),
    [(name, tied) for name in FAMILIES for tied in (False, True) if (name, tied) != ("deepseek_v4", True)],
)
def test_the_model_is_exactly_what_shapes_lists(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(config)
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        assert model.lm_head.weight is model.embed_tokens.weight
        del held["lm_head.weight"]
    assert {slot.name: slot.shape for slot in shapes.parameters(config)} == held


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_drafting_modules_are_exactly_what_shapes_lists(family: str) -> None:
    config = tiny_config(family, num_nextn_predict_layers=2)
    model = empty(config, device="meta", dtype=torch.bfloat16, drafting=True)
    slots = shapes.parameters(config) + shapes.drafting(config)
    held = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}

    def kept(slot: shapes.Slot) -> torch.dtype:
        return torch.int64 if slot.role == "hash_table" else torch.float32 if slot.wide else torch.bfloat16

    assert held == {slot.name: (slot.shape, kept(slot)) for slot in slots}


def _tables(lengths: Sequence[int], page: int) -> tuple[tuple[int, ...], ...]:
    """Pages for each sequence, in scattered order over one pool."""
    free = torch.randperm(64, generator=torch.Generator().manual_seed(5)).tolist()
    return tuple(tuple(free.pop() for _ in range(-(-length // page))) for length in lengths)


def _in_chunks(model: Transformer, sequences: list[list[int]], chunks: list[int]) -> list[torch.Tensor]:
    """Logits of each sequence, fed in chunks of its own size, all sequences side by side in each step."""
    page = PAGE.get(model.config.model_type, 4)
    cache = PagedCache(
        model.config, num_pages=64, page_size=page, dtype=model.dtype, device=model.device, num_states=len(sequences)
    )
    tables = _tables([len(ids) for ids in sequences], page)
    done = [0] * len(sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(past < len(ids) for past, ids in zip(done, sequences, strict=True)):
        live = [index for index, ids in enumerate(sequences) if done[index] < len(ids)]
        pieces = [sequences[index][done[index] : done[index] + chunks[index]] for index in live]
        pasts = [done[index] for index in live]
        batch = RaggedBatch.of(pieces, pasts)
        view = cache.view([tables[index] for index in live], pasts, [len(piece) for piece in pieces], live)
        logits_TV = model(batch, view)
        for place, index in enumerate(live):
            parts[index].append(logits_TV[batch.starts[place] : batch.starts[place + 1]])
            done[index] += len(pieces[place])
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_prefill_in_chunks_equals_one_pass(family: str, chunk: int) -> None:
    model = tiny_model(family)
    lengths = (290, 1, 133) if family == "deepseek_v4" else (41, 1, 18)
    sequences = [torch.randint(0, 320, (length,)).tolist() for length in lengths]
    with torch.no_grad():
        got = _in_chunks(model, sequences, [chunk] * 3)
        for logits_TV, ids in zip(got, sequences, strict=True):
            wanted = model.logits(torch.tensor([ids]))[0]
            assert (logits_TV - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_prefill_and_decode_share_a_step(family: str) -> None:
    """One sequence decodes token by token while others bring chunks: both forms of attention in one batch."""
    model = tiny_model(family)
    sequences = [torch.randint(0, 320, (40,)).tolist() for _ in range(3)]
    with torch.no_grad():
        got = _in_chunks(model, sequences, [1, 13, 40])
        for logits_TV, ids in zip(got, sequences, strict=True):
            assert (logits_TV - model.logits(torch.tensor([ids]))[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_absorbed_and_naive_latent_attention_agree(q_lora_rank: int | None) -> None:
    model = tiny_model("deepseek_v3", q_lora_rank=q_lora_rank).double()
    attention = model.layers[0].self_attn
    q_THN, q_THR = torch.randn(9, 6, 16).double(), torch.randn(9, 6, 8).double()
    rows = FlatRows(torch.randn(30, 32).double(), (0, 11, 30))
    part = Part(q_THN, q_THR, (0, 4, 9), (7, 14), rows, None)
    torch.testing.assert_close(attention.naive(part), attention.absorbed(part), rtol=1e-10, atol=1e-10)


def test_latent_attention_takes_the_cheaper_form() -> None:
    attention = tiny_model("deepseek_v3").layers[0].self_attn
    assert attention.absorbs(1, 1000), "decode attends on the latents"
    assert not attention.absorbs(1000, 1000), "a long prefill expands them"


def test_rows_choose_the_positions_and_hidden_stops_before_the_head() -> None:
    model = tiny_model("llama")
    batch = RaggedBatch.of([[5, 6, 7], [8, 9]])
    with torch.no_grad():
        everything = model(batch)
        chosen = model(batch, rows=torch.tensor([2, 4]))
        hidden_TD = model(batch, hidden=True)
    torch.testing.assert_close(chosen, everything[[2, 4]])
    assert hidden_TD.shape == (5, 48)
    torch.testing.assert_close(model.head(hidden_TD), everything)


@pytest.mark.parametrize(
    "ids", [torch.tensor([[0, 320]]), torch.tensor([[-1]]), torch.tensor([1, 2]), torch.ones(1, 2)]
)
def test_ids_that_are_no_ids_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(RequestError):
        tiny_model("llama").logits(ids)


def test_an_empty_batch_gives_empty_logits() -> None:
    assert tiny_model("llama").logits(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 320)


def test_initialise_repeats_with_its_seed() -> None:
    first, second = (initialise(tiny_model("deepseek_v3"), seed=4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert 0.015 < first["layers.1.mlp.experts.gate_up_proj"].std() < 0.025


def test_bfloat16_logits_are_not_rounded_to_bfloat16_and_follow_the_weights() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    batch = RaggedBatch.of([[5, 6, 7]])
    with torch.no_grad():
        logits_TV = model(batch)
        assert (logits_TV != logits_TV.bfloat16().float()).any()
        exact = model(batch, hidden=True).double() @ model.lm_head.weight.double().T
        torch.testing.assert_close(logits_TV.double(), exact, rtol=1e-5, atol=1e-5)
        model.lm_head.weight.mul_(2)
        torch.testing.assert_close(model(batch), 2 * logits_TV)
