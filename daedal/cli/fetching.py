"""Work that takes a while, such as fetching a model, while a bar on stderr says how far it is. Knows no work itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

Found = TypeVar("Found")


class FetchDisplay:
    """A progress function for `checkpoint`: sentences become lines, counted work becomes bars."""

    def __init__(self, bars: Progress):
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, message: str, done: int = 0, total: int = 0, /) -> None:
        if total <= 0:
            self._bars.console.print(message, markup=False, highlight=False)
            return
        if not self._tasks:
            self._bars.start()
        if message not in self._tasks:
            self._tasks[message] = self._bars.add_task(message, total=total)
        self._bars.update(self._tasks[message], completed=done, total=total)


def resolve_shown(name: str) -> Path:
    """The checkpoint directory that `name` means, fetched on first use."""
    from daedal.checkpoint.sources import resolve

    return shown(lambda display: resolve(name, progress=display))


def pull_shown(name: str) -> Path:
    """`name` from the cache, fetched if it is not there."""
    from daedal.checkpoint.sources import pull

    return shown(lambda display: pull(name, progress=display))


def shown(fetch: Callable[[FetchDisplay], Found]) -> Found:
    """Runs `fetch` with a display."""
    with displayed() as display:
        return fetch(display)


@contextmanager
def displayed(*, quiet: bool = False) -> Iterator[FetchDisplay]:
    """A display, which is taken away again whatever happens. quiet: it shows nothing."""
    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True, quiet=quiet)
    bars = Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console)
    try:
        yield FetchDisplay(bars)
    finally:
        if bars.tasks:
            bars.stop()
