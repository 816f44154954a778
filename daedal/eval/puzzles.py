"""Problems made by rule, as many as wanted, each with one right answer: nobody can have learnt them by heart.

`arithmetic`, `sorting` and `reversing` show four solved examples first; `copying` and `retrieval` ask for what stands
in a text of a given length, at a place drawn evenly. A problem depends on its task, its size, the seed and its number
alone, so more of them never change those before. Words are common ones, about a token each. Knows no models.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from types import MappingProxyType

from daedal.errors import DataError
from daedal.eval.problems import Problem, Rule

EXAMPLES = 4
_CUE, _CONTINUED = 8, 8  # words of a copied text that are shown again, and those that must follow
_WORDS_OF_A_FACT = 11  # tokens of a line of `retrieval`, its end included
_NOUN_LIST = """
apple arm bag ball bank bed bell bird boat book box bread bridge brush bus cake camp car card
cat chair city clock cloud coat coin corn cup desk dog door dress drum egg farm fish flag flower
fork fox game garden gate glass goat gold hat hill horse house island key king knife lake lamp
leaf letter milk moon mouse nest night ocean page park pen pig plane plant plate pond queen rain
ring river road rock roof room rope rose salt sea ship shoe shop snow song star stone street
sugar sun table tent tiger tower town train tree wall watch water wheel wind window wood
"""
_ADJECTIVE_LIST = """
big black blue brave bright brown clean clear cold cool dark deep dry early empty fast fine flat
fresh full good gray great green happy hard heavy high hot kind large late light little long
loud low new nice old orange pink poor proud pure quick quiet red rich round sad safe sharp
short slow small smooth soft strong sweet tall thick thin tiny warm weak wet white wide wild
wise yellow young
"""
_NOUNS, _ADJECTIVES = _NOUN_LIST.split(), _ADJECTIVE_LIST.split()


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One kind. make: (question, answer) of a size. shown: whether solved examples come first. size: usual one, with
    the bounds least and most; unit: what it counts. tokens: that an answer of a size may take.
    """

    make: Callable[[random.Random, int], tuple[str, str]]
    rule: Rule
    size: int
    least: int
    most: int
    unit: str
    tokens: Callable[[int], int]
    shown: bool = True
    stop: tuple[str, ...] = ("\n",)


def _arithmetic(draw: random.Random, digits: int) -> tuple[str, str]:
    one, other = draw.randrange(10**digits), draw.randrange(10**digits)
    sign = draw.choice("+-*")
    value = {"+": one + other, "-": one - other, "*": one * other}[sign]
    return f"What is {one} {sign} {other}?", str(value)


def _sorting(draw: random.Random, count: int) -> tuple[str, str]:
    numbers = draw.sample(range(100), count)
    return f"Sort from the smallest to the largest: {_row(numbers)}", _row(sorted(numbers))


def _reversing(draw: random.Random, count: int) -> tuple[str, str]:
    words = draw.sample(_NOUNS, count)
    return f"Write these words in reverse order: {_row(words)}", _row(words[::-1])


def _copying(draw: random.Random, length: int) -> tuple[str, str]:
    words = [draw.choice(_NOUNS) for _ in range(length - _CUE)]
    first = draw.randrange(len(words) - _CUE - _CONTINUED + 1)
    cue, answer = words[first:][:_CUE], words[first + _CUE :][:_CONTINUED]
    return f"{_row(words)}\n\n{_row(cue)}", _row(answer)


def _retrieval(draw: random.Random, length: int) -> tuple[str, str]:
    count = length // _WORDS_OF_A_FACT
    pairs = list(permutations(_ADJECTIVES, 2))
    places = draw.sample(range(len(pairs) * len(_NOUNS)), count)
    names = [" ".join((*pairs[place // len(_NOUNS)], _NOUNS[place % len(_NOUNS)])) for place in places]
    words = [draw.choice(_NOUNS) for _ in names]
    lines = [f"The word for the {name} is {word}." for name, word in zip(names, words, strict=True)]
    asked = draw.randrange(count)
    return "\n".join([*lines, f"The word for the {names[asked]} is"]), words[asked]


def _row(items: list[int] | list[str]) -> str:
    return " ".join(map(str, items))


PUZZLES: Mapping[str, Puzzle] = MappingProxyType(
    {
        "arithmetic": Puzzle(
            make=_arithmetic, rule="number", size=2, least=1, most=9, unit="digits", tokens=lambda size: 2 * size + 8
        ),
        "sorting": Puzzle(
            make=_sorting, rule="text", size=5, least=2, most=50, unit="numbers", tokens=lambda size: 4 * size + 8
        ),
        "reversing": Puzzle(
            make=_reversing, rule="text", size=5, least=2, most=50, unit="words", tokens=lambda size: 3 * size + 8
        ),
        "copying": Puzzle(
            make=_copying,
            rule="beginning",
            size=512,
            least=64,
            most=2**20,
            unit="words",
            tokens=lambda _: 4 * _CONTINUED,
            shown=False,
        ),
        "retrieval": Puzzle(
            make=_retrieval,
            rule="text",
            size=1024,
            least=64,
            most=2**20,
            unit="words",
            tokens=lambda _: 8,
            shown=False,
            stop=("\n", "."),
        ),
    }
)


def is_puzzle(name: str) -> bool:
    """Whether a task is one of `PUZZLES`, perhaps with a size: `sorting`, `sorting:8`."""
    return name.partition(":")[0] in PUZZLES


def puzzles(name: str, count: int, *, seed: int) -> list[Problem]:
    """The first `count` problems of a task. DataError for a size that it cannot have."""
    kind, sign, given = name.partition(":")
    puzzle = PUZZLES[kind]
    size = puzzle.size if not sign else int(given) if re.fullmatch(r"\d{1,9}", given) else -1
    if not puzzle.least <= size <= puzzle.most:
        bounds = f"{puzzle.least} to {puzzle.most} {puzzle.unit}"
        raise DataError(f"the task {name!r} has no size that it can have: give {kind}:N with {bounds}")
    return [_problem(f"{kind}:{size}", puzzle, size, place, seed) for place in range(count)]


def _problem(task: str, puzzle: Puzzle, size: int, place: int, seed: int) -> Problem:
    draw = random.Random(f"{task}, {seed}, {place}")
    question, answer = puzzle.make(draw, size)
    prompt = question
    if puzzle.shown:
        solved = [f"{asked}\nAnswer: {told}\n\n" for asked, told in (puzzle.make(draw, size) for _ in range(EXAMPLES))]
        prompt = f"{''.join(solved)}{question}\nAnswer:"
    return Problem(
        task=task,
        doc_id=place,
        prompt=prompt,
        answer=answer,
        rule=puzzle.rule,
        stop=puzzle.stop,
        max_tokens=puzzle.tokens(size),
    )
