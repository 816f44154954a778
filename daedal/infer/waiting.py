"""Who of those that wait starts next: the more urgent first, owners in turns, nobody never.

A request's priority is a number, and lower ones go first, as vLLM has it. Within one number owners take turns and each
owner's requests go in order of arrival: start-time fair queueing (Goyal, Vin and Cheng, 1996), counted in requests. A
line of less urgent ones that was passed over `TURNS` times lets one go, which from then on is before everybody until it
is over: so nothing waits for ever. Knows names, numbers and owners; no tokens, no pages, no clock.
"""

import itertools
from bisect import insort
from dataclasses import dataclass, field

TURNS = 8


@dataclass(kw_only=True, eq=False)
class Place:
    """One request's place, while it waits and while it runs. tag: in its line; number: in order of arrival. favoured:
    its line had been passed over often enough. yielded: it has given way to a more urgent one, and need not again.
    """

    request_id: str
    priority: int
    tag: int
    number: int
    favoured: bool = False
    yielded: bool = False

    @property
    def rank(self) -> tuple[bool, int, int, int]:
        """Of two requests the one of lower rank is served first, and keeps its pages longer."""
        return (not self.favoured, self.priority, self.tag, self.number)

    def yields_to(self, other: "Place") -> bool:
        """Whether a running request gives its place to this one."""
        return self.priority > other.priority and not (self.favoured or self.yielded)


@dataclass(kw_only=True, eq=False)
class _Line:
    """All that wait with one priority. now: the tag of who started last. passed: times that others, more urgent, were
    started since one of these was.
    """

    places: list[Place] = field(default_factory=list)
    next_tags: dict[str, int] = field(default_factory=dict)
    now: int = 0
    passed: int = 0

    def leave(self, place: Place) -> None:
        self.places.remove(place)
        if not self.places:
            self.next_tags.clear()
            self.passed = 0


class Waiting:
    """The lines, by priority."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(len(line.places) for line in self._lines.values())

    def come(self, request_id: str, *, priority: int = 0, owner: str = "") -> Place:
        """A new request, which waits from now on."""
        line = self._lines.setdefault(priority, _Line())
        tag = max(line.now, line.next_tags.get(owner, 0))
        line.next_tags[owner] = tag + 1
        place = Place(request_id=request_id, priority=priority, tag=tag, number=next(self._numbers))
        self.come_back(place)
        return place

    def come_back(self, place: Place) -> None:
        """One that had started waits again, where it would be had it not."""
        insort(self._lines[place.priority].places, place, key=_rank)

    def leave(self, place: Place) -> None:
        """One that waits is no longer wanted."""
        self._lines[place.priority].leave(place)

    def first(self) -> Place | None:
        """Who is to start next."""
        firsts = [line.places[0] for line in self._lines.values() if line.places]
        return min(firsts, key=self._turn, default=None)

    def before(self, priority: int) -> list[str]:
        """Those that a newcomer of this priority would wait for."""
        lines = (line for urgency, line in self._lines.items() if urgency <= priority)
        return [place.request_id for line in lines for place in line.places]

    def start(self, place: Place) -> None:
        """One that waits starts."""
        line = self._lines[place.priority]
        place.favoured = place.favoured or line.passed >= TURNS
        line.leave(place)
        line.now, line.passed = max(line.now, place.tag), 0
        for priority, other in self._lines.items():
            if other.places and priority > place.priority:
                other.passed += 1

    def _turn(self, place: Place) -> tuple[bool, tuple[bool, int, int, int]]:
        due = place.favoured or self._lines[place.priority].passed >= TURNS
        return (not due, place.rank)


def _rank(place: Place) -> tuple[bool, int, int, int]:
    return place.rank
