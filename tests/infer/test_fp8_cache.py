"""The cache in eight bits: as many bytes as promised, the same numbers however tokens are fed, answers near those of
the plain cache, and every way of running an engine."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import daedal
from daedal import ops
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.infer.cache import PagedCache, page_nbytes, state_nbytes
from daedal.infer.engine import Engine
from daedal.infer.speculative import Speculation
from daedal.model.transformer import Transformer
from daedal.ops.packed_rows import PackedRows
from tests.infer.engines import fitting, poisoned
from tests.infer.models import prompts, tame, tiny
from tests.infer.test_cache import deepseek_v3, deepseek_v4_flash
from tests.infer.test_recorded import _equal
from tests.model.feeding import Feeder, in_chunks
from tests.native import needs_kernels
from tests.tiny import tiny_model

LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")


def _model_a() -> ModelConfig:
    """The small V3 of benchmarks/peers.py, as the cache sees it: 12 layers of 256 + 32 numbers."""
    return ModelConfig.from_published(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "max_position_embeddings": 16384,
            "q_lora_rank": 384,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "first_k_dense_replace": 12,
        }
    )


def test_bytes_per_token_as_allocated() -> None:
    for config, row, layers in ((_model_a(), 324, 12), (deepseek_v3(), 648, 61)):
        packed, plain = (
            PagedCache(config, num_pages=3, page_size=16, dtype=torch.bfloat16, kv_dtype=kv_dtype).nbytes
            for kv_dtype in ("fp8", "auto")
        )
        assert packed == row * layers * 3 * 16
        assert packed == 3 * page_nbytes(config, 16, torch.bfloat16, kv_dtype="fp8")
        assert packed <= 0.58 * plain


def test_v4_packs_its_entries_and_nothing_else() -> None:
    config = deepseek_v4_flash()
    cache = PagedCache(
        config, num_pages=2, page_size=128, dtype=torch.bfloat16, num_states=1, device="meta", kv_dtype="fp8"
    )
    page = page_nbytes(config, 128, torch.bfloat16, kv_dtype="fp8")
    assert page == 21 * 32 * (584 + 2 * 128) + 20 * 584
    assert cache.nbytes == 2 * page + state_nbytes(config, torch.bfloat16)
    packed = {name for pools in cache.pools.values() for name, pool in pools.items() if pool.dtype == torch.uint8}
    assert packed == {"entry"}


def _sequences(model: Transformer) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = (150, 1, 37) if model.config.is_compressed else (40, 1, 23)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", LATENT)
def test_chunks_and_single_tokens_equal_one_pass(family: str) -> None:
    """Each alone as beside the others. In float64, so that hardly a code falls on the other side by rounding alone."""
    model = tiny_model(family, dtype=torch.float64)
    sequences = _sequences(model)
    lengths = [len(sequence) for sequence in sequences]
    whole = Feeder(model, lengths, kv_dtype="fp8").feed(dict(enumerate(sequences)))
    feeder = Feeder(model, lengths, kv_dtype="fp8")
    pieces = in_chunks(feeder, sequences, [[7, 1, 1, 90, 30] + [1] * 150, [1], [1] * 37])
    for index, sequence in enumerate(sequences):
        (alone,) = Feeder(model, [len(sequence)], kv_dtype="fp8").feed({0: sequence}).values()
        torch.testing.assert_close(pieces[index], whole[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone, whole[index], rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("family", LATENT)
def test_kernels_give_what_the_reference_gives(family: str) -> None:
    model = tiny_model(family)
    (ids, *_) = _sequences(model)
    found: list[Tensor] = []
    for backend in (None, "reference"):
        feeder = Feeder(model, [len(ids)], kv_dtype="fp8")
        chunks = [[9, *[1] * len(ids)]]
        if backend is None:
            found += in_chunks(feeder, [ids], chunks)
        else:
            with ops.using(backend):
                found += in_chunks(feeder, [ids], chunks)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


@pytest.mark.parametrize("family", LATENT)
def test_answers_are_near_those_of_the_plain_cache(family: str) -> None:
    """Lively random weights exaggerate: real models' rows are tamer."""
    model = tiny_model(family)
    (ids, *_) = _sequences(model)
    plain, packed = (
        Feeder(model, [len(ids)], kv_dtype=kv_dtype).feed({0: ids})[0].log_softmax(-1) for kv_dtype in ("auto", "fp8")
    )
    assert not torch.equal(plain, packed)
    divergence = (plain.exp() * (plain - packed)).sum(-1)
    assert float(divergence.mean()) < 0.02
    assert float((plain.argmax(-1) == packed.argmax(-1)).float().mean()) > 0.8


@needs_kernels
@pytest.mark.parametrize("family", LATENT)
def test_replayed_steps_equal_those_run_op_by_op(family: str, packed: Callable[[str], Transformer]) -> None:
    model = packed(family)

    def make() -> Engine:
        return poisoned(Engine(model, page_size=fitting(model, 4), max_batch=3, kv_cache_dtype="fp8", stride_ms=None))

    recording, _ = _equal(make, [(0, 5, 33), (4, 1, 20), (11, 123, 9), (40, 3, 6)])
    assert recording.replayed > 30


@needs_kernels
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_deterministic_answers_do_not_depend_on_the_batch(family: str, packed: Callable[[str], Transformer]) -> None:
    model = packed(family)
    given = [[(7 * index + 3 * place) % 290 + 3 for place in range(length)] for index, length in enumerate((37, 5, 70))]
    params = daedal.SamplingParams(max_tokens=9, temperature=0.0, logprobs=0, ignore_eos=True)

    def numbers(some: list[list[int]]) -> list[list[float]]:
        engine = Engine(
            model, max_step_tokens=24, max_batch=3, max_context=256, deterministic=True, kv_cache_dtype="fp8"
        )
        outputs = engine.generate(some, params)
        return [[entry.logprob for entry in output.logprobs or ()] for output in outputs]

    assert numbers(given) == [numbers([prompt])[0] for prompt in given]


@pytest.mark.parametrize("kind", ["latent", "indexed", "compressed"])
@pytest.mark.parametrize("method", ["mtp", "lookup", "model"])
def test_drafting_changes_no_answer(kind: str, method: str) -> None:
    """Drafts are withdrawn from packed pages; a draft model without latent attention keeps its rows plain."""
    model = tame(tiny(kind, drafting=method == "mtp"))
    draft_model = tiny("dense") if method == "model" else None
    speculate = Speculation(method=method, draft_tokens=3, draft_model=draft_model)
    params = daedal.SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    given = prompts(9, 3, 20)
    engines = [
        poisoned(Engine(model, max_batch=2, kv_cache_dtype="fp8", speculate=drafter)) for drafter in (None, speculate)
    ]
    plain, drafted = ([output.ids for output in engine.generate(given, params)] for engine in engines)
    assert drafted == plain
    stats, plan = engines[1].stats(), engines[1]._plan
    assert stats.num_drafted_total > 0
    assert plan.nbytes == stats.kv_bytes_total == sum(cache.nbytes for cache in engines[1]._runner._caches)


def test_what_has_no_latent_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^kv_cache_dtype fp8 packs .* latent attention, and llama .*: use auto$"):
        Engine(tiny("dense"), kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int8': it may be auto or fp8"):
        Engine(tiny("latent"), kv_cache_dtype="int8")


def test_rows_are_taken_from_scattered_pages() -> None:
    """Some rows, all rows, and rows side by side give the same numbers."""
    cache = PagedCache(tiny("latent").config, num_pages=7, page_size=4, dtype=torch.float32, kv_dtype="fp8")
    rows_TL = torch.randn(18, 14)
    rows = cache.view([(5, 1, 4), (2, 0)], [0, 0], [11, 7]).extend(0, latent=rows_TL)["latent"]
    wanted = PackedRows(10, 4, torch.float32)
    back = wanted.unpack(wanted.pack(rows_TL))
    assert torch.equal(rows.sequence(0), back[:11])
    assert torch.equal(rows.select([1]).flatten().rows, back[11:])
    assert torch.equal(rows.take(0, torch.tensor([[9, 0], [3, 3]])), back[torch.tensor([[9, 0], [3, 3]])])
    padded, hidden_BS = rows.padded()
    assert torch.equal(padded[~hidden_BS], back)
