"""Fuzzes the parsers for some minutes: `python -m tests.fuzz --minutes 5`; the targets are those of `tests.hostile`.

Each target gets its share of the time, in rounds of other seeds. A defect is shrunk and shown with its seed, and the
exit status is 1. An example that takes more than ten seconds counts as a defect: it may never end.
"""

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from daedal.errors import DaedalError
from tests.checkpoint import hostile_files
from tests.hostile import Target
from tests.serve.api import hostile_events
from tests.text import hostile_answers

LONGEST = 10.0  # seconds of one example
ROUND = 500  # examples with one seed


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers of files, answers and events.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    wishes = parser.parse_args()
    logging.disable()
    known = (*hostile_files.TARGETS, *hostile_answers.TARGETS, *hostile_events.TARGETS)
    targets = [target for target in known if wishes.only in target.name]
    found = [run(target, 60 * wishes.minutes / len(targets), wishes.seed) for target in targets]
    return 1 if any(found) else 0


def run(target: Target, seconds: float, first: int) -> bool:
    """Whether a defect was found in that time."""
    counts = {"examples": 0, "refused": 0}
    ends, round = time.monotonic() + seconds, first
    with tempfile.TemporaryDirectory() as name:

        def once(example: Any) -> None:
            directory = Path(name) / "example"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            counts["examples"] += 1
            with limited(LONGEST):
                try:
                    target.check(example, directory)
                except DaedalError:
                    counts["refused"] += 1

        while time.monotonic() < ends:
            quiet = settings(max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            try:
                seed(round)(quiet(given(target.examples)(once)))()
            except Exception as error:
                print(f"{target.name}: seed {round}: {type(error).__name__}: {error}", flush=True)
                print("\n".join(getattr(error, "__notes__", [])), flush=True)
                return True
            round += 1
    print(f"{target.name}: {counts['examples']:,} examples, {counts['refused']:,} refused", flush=True)
    return False


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError where the block takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"an example took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
