"""Replies to problems: what the engine writes alone, at what cost, on record at once, and none asked for twice."""

from pathlib import Path

import pytest

from daedal.cost.flops import Feeding
from daedal.errors import DataError
from daedal.eval.answering import replies
from daedal.eval.harness import Answers, Questions, answers, ask
from daedal.eval.problems import Problem
from daedal.eval.puzzles import puzzles
from daedal.eval.records import REPLIES, Records
from daedal.eval.summary import compare, summarise
from daedal.infer.engine import Engine
from daedal.infer.request import SamplingParams
from daedal.text.tokenizer import Tokenizer
from tests.tiny import tiny_checkpoint, tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def problems(count: int, answer: str = "x") -> list[Problem]:
    return [
        Problem(
            task="made",
            doc_id=place,
            prompt=f"It is a truth {'universally ' * (place % 4)}{place}",
            answer=answer,
            rule="text",
            stop=("é",),
            max_tokens=3 + place % 5,
        )
        for place in range(count)
    ]


def test_replies_are_what_the_engine_says_to_each_alone(tokenizer: Tokenizer) -> None:
    model = tiny_model("deepseek_v3")
    asked = problems(9)
    found = dict(replies(model, tokenizer, asked, together=4))
    assert sorted(found) == list(range(9))
    feeding = Feeding.of(model.config)
    for place, one in enumerate(asked):
        prompt = tokenizer.encode(one.prompt)
        params = SamplingParams(max_tokens=one.max_tokens, temperature=0.0, stop=one.stop)
        (alone,) = Engine(model, tokenizer=tokenizer, max_batch=1).generate([prompt], params)
        reply = found[place]
        assert (reply.text, reply.tokens, reply.finish_reason) == (alone.text, len(alone.ids), alone.finish_reason)
        assert reply.prompt_tokens == len(prompt)
        least = feeding.flops(0, len(prompt) + reply.tokens - 1, reply.tokens)
        assert least * (1 - 1e-9) <= reply.spent.flops
        assert reply.spent.joules is not None
        assert reply.energy_source


def test_a_stopped_run_asks_only_for_what_is_missing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_model("llama")
    questions = Questions(problems={"made": problems(12), "arithmetic:2": puzzles("arithmetic", 3, seed=0)})

    def stop(message: str, done: int = 0, total: int = 0) -> None:
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, tokenizer, questions, Records(tmp_path), progress=stop)
    kept = (tmp_path / REPLIES).read_text().splitlines()
    assert len(kept) == 5
    with pytest.raises(DataError, match="the results lack some items of made, arithmetic:2"):
        answers(questions, Records.open(tmp_path))
    told: list[tuple[str, int, int]] = []
    found = ask(model, tokenizer, questions, Records(tmp_path), progress=lambda *said: told.append(said))
    assert told[0] == ("made", 5, 12)
    assert told[-1] == ("arithmetic:2", 3, 3)
    assert (tmp_path / REPLIES).read_text().splitlines()[:5] == kept
    assert answers(questions, Records.open(tmp_path)) == found
    assert [row.doc_id for row in found.replies["made"]] == list(range(12))


def test_replies_add_up(tokenizer: Tokenizer) -> None:
    model = tiny_model("llama")
    first = ask(model, tokenizer, Questions(problems={"made": problems(8)}), Records())
    # Half of the problems are given the answer that the model writes.
    known = [
        Problem(**{field: getattr(one, field) for field in Problem.__slots__} | {"answer": row.found or ""})
        if row.doc_id % 2
        else one
        for one, row in zip(problems(8), first.replies["made"], strict=True)
    ]
    second = ask(model, tokenizer, Questions(problems={"made": known}), Records())
    summary = summarise(second).replies["made"]
    assert summary.accuracy.value == 0.5
    assert summary.accuracy.low < 0.3 < 0.7 < summary.accuracy.high
    rows = second.replies["made"]
    assert summary.flops == pytest.approx(sum(row.flops for row in rows) / 8)
    assert summary.tokens == sum(row.tokens for row in rows) / 8
    assert summary.cut == sum(row.finish_reason == "length" for row in rows)
    assert summary.joules is not None
    same = Answers(tasks={}, windows=[], replies={"made": rows})
    difference = compare(same, second).replies["made"]
    assert (difference.gained, difference.lost, difference.accuracy.value) == (0, 0, 0.0)


def test_a_problem_that_the_model_cannot_read_is_named(tokenizer: Tokenizer) -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    asked = puzzles("copying:200", 2, seed=0)
    with pytest.raises(DataError, match=r"copying:200, problem 0, has \d+ tokens, and the model reads 1 to 63"):
        next(replies(model, tokenizer, asked))
