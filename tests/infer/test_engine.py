"""The engine gives what the model alone would give, however requests are cut, mixed, preempted and cancelled."""

from functools import cache
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from daedal.errors import CapacityError, ConfigError, OverloadError, RequestError
from daedal.infer import memory
from daedal.infer.engine import Engine, StepError
from daedal.infer.request import Output, Request, SamplingParams
from daedal.model.transformer import Transformer
from daedal.text.tokenizer import Tokenizer
from tests.infer.engines import Digits, assert_idle, fitting, paged, poisoned, same
from tests.infer.models import CONTEXT, KINDS, VOCAB, prompts, tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
VARIED = [
    GREEDY,
    SamplingParams(seed=7, max_tokens=15),
    SamplingParams(seed=7, max_tokens=9, top_p=0.8, temperature=1.5, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, max_tokens=11, repetition_penalty=1.4, logprobs=2),
    SamplingParams(seed=8, max_tokens=13, top_k=5, logit_bias={3: 2.0}, stop_ids=(40, 41, 42)),
    SamplingParams(seed=9, max_tokens=4, prompt_logprobs=1),
]
PROMPTS = prompts(5, 1, 17, 8, 30, 3)


@pytest.fixture(params=KINDS, scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny(request.param)


@cache
def singly(model: Transformer) -> list[Output]:
    """Answers to each prompt in an engine of its own."""
    return [
        poisoned(Engine(model)).generate([prompt], params)[0] for prompt, params in zip(PROMPTS, VARIED, strict=True)
    ]


def test_decoding_equals_the_model_in_one_pass(model: Transformer) -> None:
    engine = poisoned(Engine(model, page_size=fitting(model, 4)))
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=5, prompt_logprobs=3)
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        assert len(output.ids) == 20
        whole = [*prompt, *output.ids]
        with torch.inference_mode():
            exact_TV = model.logits(torch.tensor([whole]))[0].log_softmax(-1)
        assert output.ids == exact_TV[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert output.prompt_logprobs is not None
        assert output.logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [*output.prompt_logprobs[1:], *output.logprobs]
        assert [entry.id for entry in entries if entry] == whole[1:]
        for row, entry in enumerate(entries):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(exact_TV[row, entry.id]), abs=1e-4)
            values, ids = exact_TV[row].topk(3 if row < len(prompt) - 1 else 5)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [logprob for _, logprob in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert_idle(engine)


def test_a_batch_equals_its_requests_one_by_one(model: Transformer) -> None:
    engine = poisoned(Engine(model))
    together = engine.generate(PROMPTS, VARIED)
    same(together, singly(model))
    assert [output.request_id for output in together] == [str(index) for index in range(len(PROMPTS))]
    assert len({tuple(output.ids) for output in together}) == len(PROMPTS)
    assert engine.stats().generation_tokens_total == sum(len(output.ids) for output in together)
    assert engine.stats().prompt_tokens_total == sum(map(len, PROMPTS))
    assert_idle(engine)


@pytest.mark.parametrize("chunk", [2, 7])
def test_chunks_change_nothing(model: Transformer, chunk: int) -> None:
    engine = poisoned(Engine(model, max_step_tokens=chunk, max_batch=3, page_size=fitting(model, 2)))
    same(engine.generate(PROMPTS, VARIED), singly(model))


def test_preemption_changes_nothing(model: Transformer) -> None:
    engine = paged(model, 48, max_step_tokens=16)
    outputs = engine.generate(PROMPTS, VARIED)
    assert engine.stats().num_preemptions > 0
    same(outputs, singly(model))
    assert engine.stats().generation_tokens_total == sum(len(output.ids) for output in outputs)
    assert engine.stats().prompt_tokens_total == sum(map(len, PROMPTS))
    assert_idle(engine)


def test_a_prompt_preempted_half_way_is_scored_once() -> None:
    model = tiny("dense")
    engine = paged(model, 36, max_step_tokens=4)
    params = [
        SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True),
        SamplingParams(max_tokens=0, prompt_logprobs=2),
    ]
    pair = prompts(4, 28, seed=4)
    outputs = engine.generate(pair, params)
    assert engine.stats().num_preemptions > 0
    same(outputs, [Engine(model).generate([prompt], one)[0] for prompt, one in zip(pair, params, strict=True)])
    assert len(outputs[1].prompt_logprobs or []) == 28


def test_a_prompt_can_be_scored_without_an_answer() -> None:
    output = Engine(tiny("dense")).generate([[5]], SamplingParams(max_tokens=0, prompt_logprobs=0, logprobs=1))[0]
    assert output == Output(request_id="0", logprobs=[], prompt_logprobs=[None], finish_reason="length")


def test_the_context_ends_an_answer() -> None:
    model = tiny("dense")
    params = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    for engine, length in (
        (Engine(model), CONTEXT),
        (Engine(model, max_context=20), 20),
        (paged(model, CONTEXT), CONTEXT),
    ):
        assert engine.max_context == length
        output = engine.generate([PROMPTS[2]], params)[0]
        assert (len(output.ids), output.finish_reason) == (length - 17, "length")


def test_end_ids_of_model_and_tokenizer_end_an_answer() -> None:
    model = tiny("dense", eos_token_id=[11, 12])
    for token, tokenizer in ((11, None), (12, None), (0, Digits())):
        engine = Engine(model, tokenizer=tokenizer)
        params = SamplingParams(temperature=0.0, max_tokens=3, logit_bias={token: 100.0})
        output = engine.generate([[1, 2]], params)[0]
        assert (output.ids, output.finish_reason) == ([token], "stop")
        assert output.text == (None if tokenizer is None else "")
        ignoring = SamplingParams(temperature=0.0, max_tokens=3, logit_bias={token: 100.0}, ignore_eos=True)
        assert engine.generate([[1, 2]], ignoring)[0].finish_reason == "length"


def test_stop_strings_cut_the_text_and_streaming_shows_it_once() -> None:
    engine = Engine(tiny("dense"), tokenizer=Digits())
    free = engine.generate([PROMPTS[0]], GREEDY)[0]
    assert free.text == "".join(f"<{token}>" for token in free.ids)
    stop = free.text[free.text.index("<", 9) - 2 :][:5]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=(stop, "never"))
    engine.add(Request(id="r", prompt=tuple(PROMPTS[0]), params=params))
    outputs = [output for _ in range(12) if engine.has_work for output in engine.step()]
    assert "".join(output.text or "" for output in outputs) == free.text[: free.text.index(stop)]
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["stop"]
    told = [token for output in outputs for token in output.ids]
    assert told == free.ids[: len(told)]
    assert stop in "".join(f"<{token}>" for token in told)
    assert stop not in "".join(f"<{token}>" for token in told[:-1])
    assert_idle(engine)


def test_text_is_what_the_tokenizer_makes_of_the_ids(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(["naïve café, 東京 and 🙂🙃"] * 3, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    engine = Engine(tiny("dense", vocab_size=300), tokenizer=tokenizer)
    params = [SamplingParams(seed=seed, max_tokens=40, ignore_eos=True) for seed in range(3)]
    for output in engine.generate([tokenizer.encode("東京 🙂")] * 3, params):
        assert output.text == tokenizer.decode(output.ids)


def test_cancelling_frees_at_once_and_others_go_on() -> None:
    model = tiny("latent")
    engine = poisoned(Engine(model, max_batch=2, max_step_tokens=8))
    for index, prompt in enumerate(PROMPTS[:4]):
        engine.add(Request(id=f"r{index}", prompt=tuple(prompt), params=GREEDY))
    outputs = {output.request_id: output for output in engine.step()}
    used = engine.stats().pages_used
    assert engine.cancel("r0")
    assert engine.stats().pages_used < used
    assert engine.cancel("r3")
    assert not engine.cancel("r3")
    assert not engine.cancel("unknown")
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, Output(request_id=output.request_id)).extend(output)
    assert (outputs["r0"].finish_reason, outputs["r3"].finish_reason) == ("cancelled", "cancelled")
    for index in (1, 2):
        assert outputs[f"r{index}"].ids == Engine(model).generate([PROMPTS[index]], GREEDY)[0].ids
    assert_idle(engine)


def test_a_failing_step_drops_its_requests_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("dense")
    engine = Engine(model, max_batch=1)
    for name in ("a", "b", "c"):
        engine.add(Request(id=name, prompt=tuple(PROMPTS[0]), params=GREEDY))
    engine.cancel("c")
    with monkeypatch.context() as patch:
        patch.setattr(model, "head", lambda hidden_TD: hidden_TD[:, :1] + torch.nan)
        with pytest.raises(StepError, match="NaN") as caught:
            engine.step()
    assert caught.value.request_ids == ("a",)
    assert isinstance(caught.value.__cause__, FloatingPointError)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.request_id for output in outputs if output.finish_reason] == ["c", "b"]
    ids = [token for output in outputs for token in output.ids]
    assert ids == Engine(model).generate([PROMPTS[0]], GREEDY)[0].ids
    assert_idle(engine)


def test_an_interrupted_generate_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("dense")
    engine = Engine(model)
    with monkeypatch.context() as patch:

        def interrupt(hidden_TD: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

        patch.setattr(model, "head", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, GREEDY)
    assert_idle(engine)
    assert engine.generate(PROMPTS[:1], GREEDY)[0].ids == Engine(model).generate(PROMPTS[:1], GREEDY)[0].ids


def request(prompt: list[int], **params: object) -> Request:
    return Request(id="r", prompt=tuple(prompt), params=SamplingParams(**params))


@pytest.mark.parametrize(
    ("refused", "param", "message"),
    [
        (request([VOCAB]), "prompt", "id 97, the vocabulary has 97"),
        (request([3, -1]), "prompt", "id -1"),
        (request([1] * CONTEXT), "prompt", "prompt has 64 tokens, the context is 64"),
        (request([1] * 500, max_tokens=0), "prompt", "500 tokens"),
        (request([1], stop_ids=[VOCAB]), "stop_ids", "id 97"),
        (request([1], logit_bias={-1: 1.0}), "logit_bias", "id -1"),
        (request([1], stop=["x"]), "stop", "no tokenizer"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(refused: Request, param: str, message: str) -> None:
    engine = Engine(tiny("dense"))
    with pytest.raises(RequestError, match=message) as caught:
        engine.add(refused)
    assert caught.value.param == param
    with pytest.raises(RequestError, match=message):
        engine.generate([[1, 2], refused.prompt], [GREEDY, refused.params])
    assert engine.stats().generation_tokens_total == 0
    assert_idle(engine)


def test_what_the_cache_could_never_hold_is_refused() -> None:
    engine = paged(tiny("dense"), 12)
    assert engine.max_context == 13
    for prompt, max_tokens, param in (([1] * 13, 0, "prompt"), ([1] * 5, 9, "max_tokens"), ([1] * 5, 99, "max_tokens")):
        with pytest.raises(CapacityError, match="room for 12") as caught:
            engine.add(request(prompt, max_tokens=max_tokens))
        assert caught.value.param == param
    outputs = engine.generate(
        [[1] * 12, [1] * 5, [1] * 12],
        [SamplingParams(max_tokens=tokens, ignore_eos=True) for tokens in (1, 8, 0)],
    )
    assert [len(output.ids) for output in outputs] == [1, 8, 0]
    assert [output.finish_reason for output in outputs] == ["length"] * 3


def test_the_queue_is_bounded_but_generate_feeds_it() -> None:
    engine = Engine(tiny("dense"), max_batch=1, max_waiting=1)
    engine.add(Request(id="a", prompt=(1,), params=GREEDY))
    with pytest.raises(RequestError, match="'a' belongs to a request under way"):
        engine.add(Request(id="a", prompt=(1,), params=GREEDY))
    engine.add(Request(id="b", prompt=(1,), params=GREEDY))
    with pytest.raises(OverloadError, match="try again later"):
        engine.add(Request(id="c", prompt=(1,), params=GREEDY))
    with pytest.raises(RequestError, match="under way"):
        engine.generate([[1]])
    engine.cancel("a")
    engine.cancel("b")
    assert [output.finish_reason for output in engine.step()] == ["cancelled", "cancelled"]
    assert len(engine.generate([[token] for token in range(5)], GREEDY)) == 5
    assert engine.generate([]) == []
    with pytest.raises(RequestError, match="1 entries for 2 prompts"):
        engine.generate([[1], [2]], [GREEDY])
    with pytest.raises(RequestError, match="prompt is of type int"):
        engine.generate([1, 2])
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.generate([[1], []])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cache_bytes": 100}, "cache_bytes is 100, one page of the cache takes 256 bytes"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_step_tokens": 0}, "max_step_tokens is 0"),
        ({"page_size": 0}, "page_size is 0"),
        ({"max_waiting": -1}, "max_waiting is -1"),
        ({"max_context": CONTEXT + 1}, "the model's is 64"),
        ({"max_context": 1}, "max_context is 1"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(tiny("dense"), **sizes)


def test_the_default_cache_holds_a_full_batch() -> None:
    model = tiny("latent")
    token_bytes = 2 * 14 * 4
    for max_batch in (3, 40):
        assert Engine(model, max_batch=max_batch).stats().kv_bytes_total == max_batch * CONTEXT * token_bytes
    assert Engine(model, max_batch=40).stats().pages_total == 40 * CONTEXT // 16
    small = Engine(model, cache_bytes=41 * token_bytes + 7).stats()
    assert (small.pages_total, small.kv_bytes_total) == (41, 41 * token_bytes)


def test_the_default_cache_leaves_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("latent")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000 * 2 * 14 * 4)
    engine = Engine(model, page_size=10)
    assert engine.stats().pages_total == 50
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with pytest.raises(ConfigError, match="half of the free memory is 50"):
        Engine(model)


@pytest.fixture(scope="module")
def alone() -> tuple[Transformer, list[Output]]:
    """The small dense model, and what it answers to each prompt alone."""
    model = tiny("dense")
    return model, singly(model)


@settings(max_examples=20, deadline=None)
@given(
    moves=st.lists(st.tuples(st.sampled_from(["add", "step", "cancel"]), st.integers(0, 5)), max_size=25),
    num_pages=st.integers(11, 16),
    chunk=st.integers(1, 12),
)
def test_arrivals_and_cancels_disturb_nobody(
    alone: tuple[Transformer, list[Output]], moves: list[tuple[str, int]], num_pages: int, chunk: int
) -> None:
    model, expected = alone
    engine = paged(model, 4 * num_pages, max_step_tokens=chunk, max_batch=3)
    outputs: dict[str, Output] = {}
    for move, index in moves:
        if move == "add" and f"{index}" not in outputs:
            outputs[f"{index}"] = Output(request_id=f"{index}")
            engine.add(Request(id=f"{index}", prompt=tuple(PROMPTS[index]), params=VARIED[index]))
        elif move == "cancel":
            engine.cancel(f"{index}")
        else:
            for output in engine.step():
                outputs[output.request_id].extend(output)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].extend(output)
    for name, output in outputs.items():
        whole = expected[int(name)]
        cancelled = output.finish_reason == "cancelled"
        assert output.ids == (whole.ids[: len(output.ids)] if cancelled else whole.ids)
        assert cancelled or output.finish_reason == whole.finish_reason
    assert_idle(engine)
