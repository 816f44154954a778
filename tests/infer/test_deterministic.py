"""A deterministic engine: the numbers of a request are its own, bit for bit, whatever runs beside it."""

from pathlib import Path

import pytest
import torch

import daedal
from daedal.errors import ConfigError
from daedal.infer.cache import page_nbytes
from daedal.model.transformer import Transformer, empty, initialise
from tests.native import needs_kernels
from tests.private_cache import private_cache
from tests.tiny import tiny_checkpoint


@pytest.fixture(params=["deepseek_v3", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setenv("DAEDAL_CACHE", str(private_cache(tmp_path / "cache")))
    return daedal.load(tiny_checkpoint(tmp_path / "tiny", request.param), weights="int8")


def _prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = (37, 5, 70, 12, 1, 26)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _numbers(engine: daedal.Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    params = daedal.SamplingParams(max_tokens=9, temperature=0.0, logprobs=0, ignore_eos=True)
    outputs = engine.generate(prompts, params)
    return [(output.ids, [entry.logprob for entry in output.logprobs or ()]) for output in outputs]


@needs_kernels
def test_alone_in_a_crowd_and_with_more_threads(model: Transformer) -> None:
    prompts = _prompts(model.config.vocab_size)
    sizes = {"max_step_tokens": 24, "max_batch": 4, "max_context": 100, "deterministic": True}
    crowded = _numbers(daedal.Engine(model, **sizes), prompts)
    alone = [_numbers(daedal.Engine(model, **sizes), [prompt])[0] for prompt in prompts]
    assert crowded == alone
    torch.set_num_threads(2)
    assert _numbers(daedal.Engine(model, **sizes), prompts[::-1])[::-1] == alone


@needs_kernels
def test_a_small_cache_makes_requests_wait_and_changes_nothing(model: Transformer) -> None:
    prompts = _prompts(model.config.vocab_size)
    sizes = {"max_step_tokens": 24, "max_batch": 4, "max_context": 100, "deterministic": True}
    small = daedal.Engine(model, cache_bytes=2 * 80 * _row_bytes(model), **sizes)
    assert _numbers(small, prompts) == _numbers(daedal.Engine(model, **sizes), prompts)
    assert small.stats().num_preemptions == 0


def _row_bytes(model: Transformer) -> int:
    return page_nbytes(model.config, 1, model.dtype)


@needs_kernels
def test_what_cannot_be_deterministic_is_refused(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="more tokens in a step than requests"):
        daedal.Engine(model, max_step_tokens=4, max_batch=4, deterministic=True)
    with pytest.raises(ConfigError, match="leave out one"):
        daedal.Engine(model, speculate=daedal.Speculation(method="lookup"), deterministic=True)
    plain = initialise(empty(model.config, dtype=torch.bfloat16), seed=1)
    with pytest.raises(ConfigError, match="not packed"):
        daedal.Engine(plain, deterministic=True)
