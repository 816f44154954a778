"""A request as the scheduler follows it: its tokens, how many of them are in the cache, and where they lie there.

Knows no text, no model and no other requests.
"""

from dataclasses import dataclass

from daedal.infer.prefixes import Chain
from daedal.infer.waiting import Place


@dataclass(kw_only=True, eq=False)
class Track:
    """`tokens`: prompt and answer; the first `num_cached` of them have their rows on the pages of `table`, the last few
    of these in the rings `state`. num_prompt: of the tokens; most: that prompt and answer can have together. begun: it
    has just started behind a beginning, and its first chunk is to come.
    """

    id: str
    tokens: list[int]
    num_prompt: int
    most: int
    chain: Chain
    place: Place
    num_cached: int = 0
    table: tuple[int, ...] = ()
    state: int | None = None
    begun: bool = False

    @property
    def generates(self) -> bool:
        return self.most > self.num_prompt

    @property
    def num_remaining(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def answers(self) -> bool:
        """Whether all but the newest of its tokens are read."""
        return self.num_remaining == 1 and self.num_cached > 0
