"""Which of several engines takes a request: the one that has read its beginning, unless it has too much to do already.

What an engine has read is not asked but remembered, by what was sent to it: names of beginnings, block by block. An
engine may have dropped one since, which costs time and nothing else. Load is bounded: no engine gets more than a
factor times its even share of what is under way (Mirrokni, Thorup, Zadimoghaddam, Consistent hashing with bounded
loads, 2018), so a beginning that everybody has spreads over the engines as the crowd grows. Knows token ids and counts.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

BLOCK = 32  # tokens that are remembered together
KEPT = 2**16  # blocks: two million tokens, 10 MB
BOUND = 1.5


class Router:
    """For `count` engines. most: requests that one takes at once; None for any number. block: of how many tokens."""

    def __init__(self, count: int, *, most: int | None = None, block: int = BLOCK, kept: int = KEPT):
        self._most, self._block, self._kept = most, block, kept
        self._readers: OrderedDict[int, int] = OrderedDict()  # name of a beginning: who has read it, a bit for each
        self._chosen = [0] * count
        self._turn = 0

    def choose(
        self, prompt: Sequence[int], loads: Sequence[int], *, salt: str = "", among: Collection[int], count: int = 1
    ) -> int:
        """The engine, of those `among`, for `count` requests that begin with `prompt`.

        loads: requests under way, engine by engine. salt: only beginnings of the same salt are alike.
        """
        even = BOUND * (sum(loads[engine] for engine in among) + count) / len(among)
        most = math.ceil(even) if self._most is None else min(math.ceil(even), self._most)
        free = [engine for engine in among if loads[engine] + count <= most]
        names = list(self._names(prompt, salt))
        read = self._read(names)
        if free:
            best = min(free, key=lambda engine: (-read[engine], loads[engine], self._chosen[engine]))
        else:
            best = min(among, key=lambda engine: (loads[engine], -read[engine], self._chosen[engine]))
        self._remember(names, best)
        self._turn += 1
        self._chosen[best] = self._turn
        return best

    def forget(self, engine: int) -> None:
        """It has read nothing any more."""
        for name in self._readers:
            self._readers[name] &= ~(1 << engine)

    def _names(self, prompt: Sequence[int], salt: str) -> Iterator[int]:
        """Of each whole block with all before it."""
        name = hash(salt)
        for start in range(0, len(prompt) - self._block + 1, self._block):
            name = hash((name, tuple(prompt[start : start + self._block])))
            yield name

    def _read(self, names: Sequence[int]) -> list[int]:
        """Blocks of this prompt that each engine has read."""
        read = [0] * len(self._chosen)
        for place, name in enumerate(names, 1):
            readers = self._readers.get(name, 0)
            if not readers:
                break
            for engine in range(len(read)):
                if readers >> engine & 1:
                    read[engine] = place
        return read

    def _remember(self, names: Sequence[int], engine: int) -> None:
        for name in reversed(names):  # so that ends are forgotten first: without its start a beginning is not found
            self._readers[name] = self._readers.get(name, 0) | 1 << engine
            self._readers.move_to_end(name)
        while len(self._readers) > self._kept:
            self._readers.popitem(last=False)
