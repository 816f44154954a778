"""Stop strings cut the same text however it comes in pieces, and what was shown is never taken back."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daedal.infer.request import FinishReason, SamplingParams
from daedal.infer.stopping import Ending, StopStrings

END = 0
LETTERS = st.text(alphabet="ab", max_size=14)


class Letters:
    """A tokenizer's detokenizer: id n is the n-th letter, ids from 100 on are the two halves of an é."""

    def __init__(self) -> None:
        self._half = False

    def push(self, token_id: int) -> str:
        if token_id == 100:
            self._half = True
            return ""
        if token_id == 101:
            self._half = False
            return "é"
        return "" if token_id == END else chr(ord("a") + token_id - 1)

    def finish(self) -> str:
        return "\N{REPLACEMENT CHARACTER}" if self._half else ""


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The first prefix that ends with a stop string, without the longest such."""
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


@given(
    text=LETTERS,
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3).map(tuple),
    borders=st.sets(st.integers(0, 14)),
)
def test_any_split_gives_the_same_text(text: str, stops: tuple[str, ...], borders: set[int]) -> None:
    expected, stopped = cut(text, stops)
    edges = [0, *sorted(border for border in borders if border < len(text)), len(text)]
    strings = StopStrings(stops)
    shown = ""
    for start, end in itertools.pairwise(edges):
        piece, found = strings.push(text[start:end])
        shown += piece
        assert expected.startswith(shown)
        assert found == (stopped and cut(text[:end], stops)[1])
        if found:
            break
        # No more is held back than the longest beginning of a stop string at the end.
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) for stop in stops)
    else:
        shown += strings.finish()
    assert shown == expected


def run(params: SamplingParams, ids: list[int], room: int = 99) -> tuple[str, int, FinishReason | None]:
    """Text, tokens taken, reason."""
    ending = Ending(params, end_ids={END}, room=room, detokenizer=Letters())
    text = ""
    for count, token in enumerate(ids, start=1):
        piece, reason = ending.push(token)
        text += piece or ""
        if reason:
            return text, count, reason
    return text + (ending.finish() or ""), len(ids), None


@pytest.mark.parametrize(
    ("changes", "ids", "expected"),
    [
        ({"max_tokens": 3}, [1, 2, 3, 4], ("abc", 3, "length")),
        ({"room": 2}, [1, 2, 3], ("ab", 2, "length")),
        ({}, [1, 2, END, 3], ("ab", 3, "stop")),
        ({"ignore_eos": True}, [1, END, 2], ("ab", 3, None)),
        ({"stop_ids": (3,), "ignore_eos": True}, [1, END, 3], ("a", 3, "stop")),
        ({"stop": ("cd",)}, [1, 3, 3, 4, 5], ("ac", 4, "stop")),
        ({"stop": ("cd",), "max_tokens": 2}, [1, 3], ("ac", 2, "length")),
        ({"stop": ("cd",), "max_tokens": 2}, [3, 4], ("", 2, "stop")),
        ({"stop": ("cd",)}, [1, 3, END], ("ac", 3, "stop")),
        ({"stop": ("cd",)}, [1, 3], ("ac", 2, None)),
        ({"max_tokens": 3}, [1, 100, 101], ("aé", 3, "length")),
        ({"max_tokens": 2}, [1, 100], ("a�", 2, "length")),
        ({"max_tokens": 2, "stop": ("a�",)}, [1, 100], ("", 2, "stop")),
        ({"stop": ("ac",)}, [1, 100, END], ("a�", 3, "stop")),
    ],
    ids=str,
)
def test_endings(changes: dict[str, object], ids: list[int], expected: tuple[str, int, str | None]) -> None:
    room = changes.get("room", 99)
    assert isinstance(room, int)
    params = SamplingParams(**{name: value for name, value in changes.items() if name != "room"})
    assert run(params, ids, room) == expected


def test_without_text_only_ids_and_lengths_end() -> None:
    ending = Ending(SamplingParams(max_tokens=2), end_ids=frozenset(), room=9, detokenizer=None)
    assert ending.push(END) == (None, None)
    assert ending.finish() is None
    assert ending.push(1) == (None, "length")
