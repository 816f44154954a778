"""Speculation changes how many passes an answer takes, and nothing else: whoever drafts, whatever becomes of it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daedal.errors import ConfigError
from daedal.infer.draft_lookup import continued
from daedal.infer.draft_mtp import MtpDrafter
from daedal.infer.engine import Engine, StepError
from daedal.infer.request import Output, Request, SamplingParams
from daedal.infer.scheduler import Step
from daedal.infer.speculative import Speculation
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer, empty
from tests.infer.engines import Digits, assert_idle, check_acceptance, paged, poisoned, same, speculation
from tests.infer.models import CONTEXT, KINDS, VOCAB, prompts, tame, tiny

# Kinds and drafters as they meet: in ample room, and where prompts are cut, drafts cut short, and requests preempted.
AMPLE = [
    *(("dense", method) for method in ("lookup", "model")),
    *(("latent", method) for method in ("lookup", "model", "mtp")),
    *(("compressed", method) for method in ("lookup", "mtp")),
]
SCARCE = [
    *(("dense", method) for method in ("lookup", "model")),
    *((kind, "mtp") for kind in ("latent", "indexed")),
    *(("compressed", method) for method in ("model", "mtp")),
]
VARIED = [
    SamplingParams(temperature=0.0, max_tokens=24),
    SamplingParams(seed=3, max_tokens=20, temperature=0.5),
    SamplingParams(seed=3, max_tokens=9, top_p=0.8, temperature=0.7, frequency_penalty=0.7, logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=17, repetition_penalty=1.2, logprobs=2, prompt_logprobs=1),
    SamplingParams(seed=4, max_tokens=23, top_k=5, temperature=0.6, logit_bias={3: 2.0}, stop_ids=(40, 41, 42)),
    SamplingParams(temperature=0.0, max_tokens=25, presence_penalty=0.4),
]
PROMPTS = prompts(5, 1, 17, 8, 30, 3)


class Oracle:
    """Drafts what will be answered, but for mistakes; `right`: how likely each draft is to be right."""

    def __init__(self, texts: Mapping[str, Sequence[int]], *, right: float, seed: int = 0):
        self._texts = texts
        self._right = right
        self._luck = random.Random(seed)

    def propose(self, step: Step) -> Mapping[str, Sequence[int]]:
        drafts = {}
        for chunk in step.chunks:
            wanted = self._texts[chunk.request_id][chunk.end : chunk.end + chunk.max_drafts]
            drafts[chunk.request_id] = [
                token if self._luck.random() < self._right else self._luck.randrange(VOCAB) for token in wanted
            ]
        return drafts

    def forget(self, request_id: str) -> None:
        pass


def with_oracle(engine: Engine, outputs: Sequence[Output], asked: Sequence[Sequence[int]], *, right: float) -> Engine:
    """`engine`, made to speculate, with drafts taken from the answers that are expected of it."""
    texts = {output.request_id: [*prompt, *output.ids] for prompt, output in zip(asked, outputs, strict=True)}
    engine._runner._drafter = Oracle(texts, right=right)
    return engine


@cache
def target(kind: str, method: str = "lookup") -> Transformer:
    """A model to draft for: one that another model can resemble, or one that its drafting module can guess."""
    return tiny(kind) if method == "model" else tame(tiny(kind, drafting=kind != "dense"))


@cache
def plainly(model: Transformer) -> list[Output]:
    """What it answers without speculation."""
    return poisoned(Engine(model)).generate(PROMPTS, VARIED)


@pytest.mark.parametrize(("kind", "method"), AMPLE)
def test_a_batch_answers_as_without(kind: str, method: str) -> None:
    model = target(kind, method)
    engine = poisoned(Engine(model, speculate=speculation(method, model)))
    outputs = engine.generate(PROMPTS, VARIED)
    same(outputs, plainly(model))
    stats = engine.stats()
    assert stats.generation_tokens_total == sum(len(output.ids) for output in outputs)
    assert stats.num_accepted_total > (0 if method == "lookup" else 0.05 * stats.num_drafted_total)
    check_acceptance(stats)
    assert_idle(engine)


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_right_and_wrong_drafts_of_any_length(kind: str, right: float) -> None:
    model = target(kind)
    engine = poisoned(Engine(model, speculate=speculation("lookup", model, 8)))
    with_oracle(engine, plainly(model), PROMPTS, right=right)
    num_steps = 0
    for index, (prompt, params) in enumerate(zip(PROMPTS, VARIED, strict=True)):
        engine.add(Request(id=str(index), prompt=tuple(prompt), params=params))
    outputs = {str(index): Output(request_id=str(index)) for index in range(len(PROMPTS))}
    while engine.has_work:
        num_steps += 1
        for output in engine.step():
            outputs[output.request_id].extend(output)
    same(list(outputs.values()), plainly(model))
    stats = engine.stats()
    if right == 1.0:
        assert stats.num_accepted_total == stats.num_drafted_total
        assert num_steps <= 5
    else:
        check_acceptance(stats)


def test_compressed_entries_that_rejected_drafts_closed_are_written_again() -> None:
    """V4 at its own rates, a window shorter than a draft, texts that cross many borders of each kind."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    model = tame(tiny("compressed", compress_rates=rates, sliding_window=5, max_position_embeddings=512), 0.3)
    asked = prompts(50, 122, 250, 340, seed=8)
    params = SamplingParams(temperature=0.0, max_tokens=80)
    expected = poisoned(Engine(model)).generate(asked, params)
    engine = poisoned(Engine(model, max_step_tokens=64, speculate=speculation("lookup", model, 8)))
    same(with_oracle(engine, expected, asked, right=0.7).generate(asked, params), expected)
    check_acceptance(engine.stats())


@pytest.mark.parametrize(
    ("ending", "reason", "length"),
    [
        ({"max_tokens": 6}, "length", 6),
        ({"max_tokens": 99, "ignore_eos": True}, "length", 13),
        ({"stop_ids": (12,)}, "stop", 6),
        ({"stop": ("><6",)}, "stop", 3),
        ({"stop": ("nowhere", "<65><27>")}, "stop", 4),
        ({}, "stop", 7),
    ],
    ids=["max_tokens", "context", "stop id", "stop string", "stop string over two tokens", "end of sequence"],
)
def test_whatever_ends_an_answer_ends_it_inside_a_draft(ending: dict[str, object], reason: str, length: int) -> None:
    """Eight tokens are drafted, all of them right as far as the answer goes; it is over before the last."""
    model, asked = target("dense"), [PROMPTS[0]]
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "logprobs": 1, **ending})
    free = SamplingParams(temperature=0.0, max_tokens=24)
    sizes = {"tokenizer": Digits(end=85), "max_context": 18}
    expected = Engine(model, **sizes).generate(asked, params)
    assert (expected[0].finish_reason, len(expected[0].ids)) == (reason, length)
    engine = Engine(model, **sizes, speculate=speculation("lookup", model, 8))
    with_oracle(engine, Engine(model).generate(asked, free), asked, right=1.0)
    same(engine.generate(asked, params), expected)
    # The first token was sampled with the prompt, all others were drafted.
    assert engine.stats().num_accepted_total >= length - 3
    assert engine.stats().num_drafts_total <= 2
    assert engine.stats().generation_tokens_total == length
    assert_idle(engine)


class Broken(Oracle):
    """Fails whenever a sequence is at one position."""

    def __init__(self, drafts: Sequence[int] | None, *, at: int):
        super().__init__({}, right=0.0)
        self._drafts = drafts
        self._at = at

    def propose(self, step: Step) -> Mapping[str, Sequence[int]]:
        found = [chunk.request_id for chunk in step.chunks if chunk.end == self._at and chunk.max_drafts]
        if found and self._drafts is None:
            raise RuntimeError("the drafter died")
        return {name: self._drafts or () for name in found}


@pytest.mark.parametrize(
    ("drafts", "message"),
    [(None, "the drafter died"), ([3, VOCAB], "id 97: the vocabulary has 97"), ([-1], "id -1"), ([1] * 5, "")],
    ids=str,
)
def test_a_broken_drafter_fails_its_step_aloud(drafts: list[int] | None, message: str) -> None:
    model = target("latent")
    engine = poisoned(Engine(model, max_batch=1, speculate=speculation("lookup", model)))
    engine._runner._drafter = Broken(drafts, at=12)
    for index, prompt in enumerate(PROMPTS[:4]):
        engine.add(Request(id=str(index), prompt=tuple(prompt), params=VARIED[0]))
    outputs = {str(index): Output(request_id=str(index)) for index in range(4)}
    dropped: dict[tuple[str, ...], str] = {}
    while engine.has_work:
        try:
            for output in engine.step():
                outputs[output.request_id].extend(output)
        except StepError as error:
            dropped[error.request_ids] = str(error)
    assert list(dropped) == [("0",), ("1",), ("3",)]
    assert all(message in sentence for sentence in dropped.values())
    free = Engine(model).generate(PROMPTS[:4], VARIED[0])
    for index, output in enumerate(free):
        found = outputs[str(index)].ids
        assert found == output.ids[: len(found)]
    assert outputs["2"].ids == free[2].ids
    assert_idle(engine)


@dataclass(kw_only=True)
class Note:
    """What a drafter was asked: to continue `text`. state: of a drafting module, after all that came before."""

    text: list[int]
    drafts: list[int]
    state: torch.Tensor | None


def noted(engine: Engine) -> list[Note]:
    """From now on, every draft that the engine's drafter makes."""
    drafter, sequences = engine._runner._drafter, engine._scheduler._sequences
    suggest, notes = drafter.propose, []

    def propose(step: Step) -> Mapping[str, Sequence[int]]:
        drafts = suggest(step)
        for chunk in step.chunks:
            if drafts.get(chunk.request_id):
                text = list(sequences[chunk.request_id].tokens)
                assert len(text) == chunk.end
                state = drafter._last[chunk.request_id].state if isinstance(drafter, MtpDrafter) else None
                notes.append(Note(text=text, drafts=list(drafts[chunk.request_id]), state=state))
        return drafts

    drafter.propose = propose
    return notes


def check_by_model(model: Transformer, note: Note) -> None:
    """`model` goes on in the same way without any cache."""
    ids = list(note.text)
    for _ in note.drafts:
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert note.drafts == ids[len(note.text) :]


def check_by_module(model: Transformer, note: Note) -> None:
    """The drafting module of `model` goes on in the same way without any cache."""
    states, following = model.states(RaggedBatch.of([note.text[:-1]])), note.text[1:]
    for place, token in enumerate(note.drafts):
        drafted = model.draft(0, RaggedBatch.of([following]), states)[-1:]
        if place == 0:
            torch.testing.assert_close(drafted[0], note.state, rtol=1e-4, atol=1e-4)
        assert token == int(model.head(model.finish_draft(0, drafted)).argmax())
        states = torch.cat((states, drafted))
        following.append(token)


@pytest.mark.parametrize(("kind", "method"), SCARCE)
def test_chunks_and_preemption_change_neither_answers_nor_drafts(kind: str, method: str) -> None:
    """Prompts come in pieces, drafts are cut short by pages and budget, requests give way; yet a drafting model or
    module misses nothing of the text, and keeps nothing that was rejected.
    """
    model = target(kind, method)
    speculate = speculation(method, model, 3)
    engine = paged(model, 72, max_batch=4, max_step_tokens=11, speculate=speculate)
    notes = noted(engine)
    same(engine.generate(PROMPTS, VARIED), plainly(model))
    assert engine.stats().num_preemptions > 0
    check_acceptance(engine.stats())
    assert_idle(engine)
    assert len(notes) > (5 if method == "lookup" else 40)
    for note in random.Random(0).sample(notes, 0 if method == "lookup" else 10):
        with torch.inference_mode():
            if method == "mtp":
                check_by_module(model, note)
            else:
                check_by_model(speculate.draft_model, note)


@settings(max_examples=10, deadline=None)
@given(
    moves=st.lists(st.tuples(st.sampled_from(["add", "step", "step", "cancel"]), st.integers(0, 5)), max_size=30),
    num_tokens=st.integers(56, 72),
    chunk=st.integers(1, 14),
)
def test_arrivals_and_cancels_disturb_nobody(moves: list[tuple[str, int]], num_tokens: int, chunk: int) -> None:
    model = target("latent")
    engine = paged(model, num_tokens, max_batch=3, max_step_tokens=chunk, speculate=speculation("mtp", model, 3))
    outputs: dict[str, Output] = {}
    for move, index in [*moves, ("end", 0)]:
        name = str(index)
        if move == "add" and name not in outputs:
            outputs[name] = Output(request_id=name)
            engine.add(Request(id=name, prompt=tuple(PROMPTS[index]), params=VARIED[index]))
        elif move == "cancel":
            engine.cancel(name)
        while engine.has_work and move in ("step", "end"):
            for output in engine.step():
                outputs[output.request_id].extend(output)
            if move == "step":
                break
    for name, output in outputs.items():
        whole = plainly(model)[int(name)]
        cancelled = output.finish_reason == "cancelled"
        assert output.ids == (whole.ids[: len(output.ids)] if cancelled else whole.ids)
        assert cancelled or output.finish_reason == whole.finish_reason
    assert_idle(engine)


def test_lookup_repeats_what_followed_the_longest_latest_match() -> None:
    def drafts(text: str, count: int) -> str:
        return continued(text, count)[len(text) :]

    assert drafts("abcdXabc", 3) == "dXa"
    assert drafts("abcdYabceZabc", 2) == "eZ"
    assert drafts("1abcd_bcd2_xabcd", 4) == "_bcd"
    assert drafts("xyxy", 5) == "xyxyx"
    assert drafts("aaa", 2) == "aa"
    assert drafts("abcab", 0) == ""
    assert [drafts(text, 3) for text in ("", "a", "ab", "abca", "abcdef")] == [""] * 5


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"method": "lookup", "draft_tokens": 9}, "draft_tokens is 9: it must be a whole number from 1 to 8"),
        ({"method": "lookup", "draft_tokens": 0}, "draft_tokens is 0"),
        ({"method": "lookup", "draft_tokens": True}, "draft_tokens is True"),
        ({"method": "prophecy"}, "'prophecy': it must be one of lookup, model, mtp"),
        ({"method": "model"}, "'model': give a draft_model"),
    ],
    ids=str,
)
def test_impossible_speculation_is_refused(given_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Speculation(**given_)


def test_a_drafter_that_does_not_fit_the_model_is_refused() -> None:
    dense = target("dense")
    cases = [
        (dense, Speculation(method="mtp"), "num_nextn_predict_layers is 0"),
        (tiny("latent"), Speculation(method="mtp"), "load it with mtp=True"),
        (dense, Speculation(method="model", draft_model=tiny("dense", vocab_size=98)), "has 98 tokens"),
        (
            dense,
            Speculation(method="model", draft_model=tiny("dense", max_position_embeddings=63)),
            "context is 63, the engine's 64",
        ),
    ]
    for model, speculate, message in cases:
        with pytest.raises(ConfigError, match=message):
            Engine(model, speculate=speculate)
    vast = empty(dense.config.replace(vocab_size=2_000_000), device="meta")
    with pytest.raises(ConfigError, match="2000000 tokens"):
        Speculation(method="lookup").check(vast, CONTEXT)
    assert Engine(dense).stats().num_accepted_at == ()
