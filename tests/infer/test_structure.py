"""Masks in the sampler: what they forbid is never chosen, and drafts change nothing but the number of passes."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from daedal.checkpoint.load import load
from daedal.errors import RequestError
from daedal.infer.engine import Engine
from daedal.infer.request import Request, SamplingParams
from daedal.infer.speculative import Speculation
from daedal.text.structure.shape import Shape
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer
from tests.tiny import tiny_checkpoint, tiny_model

END = 1


@dataclass
class _Steps:
    """After each token others are allowed: `token + 1` to `token + 9`; the end after `length` tokens."""

    length: int

    def begin(self, *, vocab_size: int, end_ids: frozenset[int]) -> "_Mask":
        assert end_ids == {END}
        return _Mask(vocab_size, self.length)


@dataclass
class _Mask:
    vocab_size: int
    length: int
    taken: list[int] = field(default_factory=list)
    failed: bool = False

    def allowed(self) -> np.ndarray:
        allowed_V = np.zeros(self.vocab_size, dtype=np.bool_)
        if len(self.taken) == self.length:
            allowed_V[END] = True
        else:
            allowed_V[range_after(self.taken[-1] if self.taken else 7)] = True
        return allowed_V

    def accept(self, token: int) -> None:
        assert self.allowed()[token]
        self.taken.append(token)


def range_after(token: int) -> list[int]:
    return [2 + (token + step) % 300 for step in range(1, 10)]


def answers(engine: Engine, params: SamplingParams, *, structured: bool = True) -> list[list[int]]:
    """Five requests side by side: every second one has a structure."""
    got: dict[str, list[int]] = {}
    for index in range(5):
        structure = _Steps(20) if structured and index % 2 == 0 else None
        engine.add(Request(id=str(index), prompt=(7, 8, 9, 7, 8, index + 9), params=params, structure=structure))
        got[str(index)] = []
    while engine.has_work:
        for output in engine.step():
            got[output.request_id] += output.ids
    return list(got.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_is_allowed_is_chosen(temperature: float) -> None:
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, logit_bias={5: 100.0}, top_k=40)
    engine = Engine(tiny_model("llama"), max_batch=5)
    got = answers(engine, params)
    for ids in got[::2]:
        assert len(ids) == 21
        assert ids[-1] == END
        before = 7
        for token in ids[:-1]:
            assert token in range_after(before)
            before = token
    assert got[1::2] == answers(engine, params, structured=False)[1::2], "neighbours are not touched"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("family", "method"), [("llama", "lookup"), ("llama", "model"), ("deepseek_v4", "mtp")])
def test_drafts_obey_or_are_rejected(family: str, method: str, temperature: float) -> None:
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, logit_bias=dict.fromkeys((20, 21), 20.0))
    model = tiny_model(family, drafting=method == "mtp")
    plain = answers(Engine(model, max_batch=5), params)
    draft_model = tiny_model("llama", seed=1) if method == "model" else None
    drafting = Engine(
        model,
        max_batch=5,
        speculate=Speculation(method=method, draft_tokens=1 if method == "mtp" else 4, draft_model=draft_model),
    )
    assert answers(drafting, params) == plain
    assert drafting.stats().num_drafted_total > 0


def test_a_grammar_gives_the_same_answer_with_drafts(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    directory = tiny_checkpoint(tmp_path)
    tokenizer, model = Tokenizer.load(directory), load(directory)
    schema = {"type": "array", "items": {"enum": ["ab", "abab"]}, "minItems": 6, "maxItems": 6}
    structure = Structures(tokenizer).make(Shape(json=schema))
    spaces = tokenizer.encode(" \n\t\r", add_special_tokens=False)
    params = SamplingParams(max_tokens=200, seed=5, logit_bias=dict.fromkeys(spaces, -30.0))

    def answer(engine: Engine) -> str:
        engine.add(Request(id="a", prompt=(70, 71, 70, 71), params=params, structure=structure))
        text = ""
        while engine.has_work:
            text += "".join(output.text or "" for output in engine.step())
        return text

    plain = answer(Engine(model, tokenizer=tokenizer))
    assert len(json.loads(plain)) == 6
    drafting = Engine(model, tokenizer=tokenizer, speculate=Speculation(method="lookup", draft_tokens=4))
    assert answer(drafting) == plain
    assert drafting.stats().num_accepted_total > 0


def test_a_structure_needs_an_end() -> None:
    structure = _Steps(3)
    with pytest.raises(RequestError, match="ignore_eos"):
        Request(id="a", prompt=(5,), params=SamplingParams(ignore_eos=True), structure=structure)
    engine = Engine(tiny_model("llama", eos_token_id=None))
    with pytest.raises(RequestError, match="no end-of-sequence id"):
        engine.add(Request(id="a", prompt=(5,), params=SamplingParams(), structure=structure))
    assert not engine.has_work


def test_a_preempted_request_keeps_its_place_in_the_structure() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3)
    model = tiny_model("llama")
    roomy = answers(Engine(model, max_batch=5), params)
    row = Engine(model, max_batch=1, max_context=64).stats()
    tight = Engine(model, max_batch=5, max_context=64, page_size=4, cache_bytes=row.kv_bytes_total)
    assert answers(tight, params) == roomy
    assert tight.stats().num_preemptions > 0
