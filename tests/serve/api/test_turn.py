"""One choice's message, whatever pieces its answer comes in."""

import itertools

import pytest

from daedal.infer.request import Output
from daedal.serve.api.turn import Turn
from daedal.text.encodings.answers import Delta, gather
from daedal.text.encodings.formats import FORMATS

OPENING = "<\uff5cAssistant\uff5c><think>"  # what a prompt ends with
TOKENS = ("I ", "think", " so.", "", "</think>", "", "Yes", ", ", "I", " do.", "")


def outputs(cuts: tuple[int, ...]) -> list[Output]:
    """The answer, cut before these tokens."""
    made = []
    for start, end in itertools.pairwise((0, *cuts, len(TOKENS))):
        texts = TOKENS[start:end]
        lengths = [len(text) for text in texts]
        made.append(Output(request_id="a", ids=list(range(start, end)), text="".join(texts), lengths=lengths))
    made[-1].finish_reason = "stop"
    return made


@pytest.mark.parametrize("cuts", [(), (5,), (2, 4, 7), tuple(range(1, len(TOKENS)))], ids=str)
def test_reasoning_tokens_do_not_depend_on_what_comes_together(cuts: tuple[int, ...]) -> None:
    turn = Turn(FORMATS["deepseek-v4"].parser(OPENING))
    deltas = [delta for output in outputs(cuts) for delta in turn.take(output)]
    answer = gather(deltas)
    assert (answer.reasoning, answer.content) == ("I think so.", "Yes, I do.")
    assert turn.reasoning_tokens == 3


def test_what_comes_together_is_one_piece_of_each_kind() -> None:
    turn = Turn(FORMATS["deepseek-v4"].parser(OPENING))
    (output,) = outputs(())
    assert turn.take(output) == [Delta(reasoning="I think so."), Delta(content="Yes, I do.")]
