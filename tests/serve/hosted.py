"""The other process of tests: `python -m tests.serve.hosted DESCRIPTOR` makes the engine that its options describe.

A scripted one tells by a prompt's first id what to do, and goes on without end for who asks for many tokens; with
`real` it is the checkpoint's own.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from daedal.errors import CheckpointError
from daedal.infer.request import Request
from daedal.serve.workers.engine_host import Hosted, host
from daedal.serve.workers.process_worker import Patience, ProcessWorker
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedEngine

COMMAND = (sys.executable, "-P", "-m", "tests.serve.hosted")
ENDLESS, KILLS, RAISES = 3, 4, 5
MANY = 10**6


def started(directory: Path, *, patience: Patience | None = None, **options: object) -> ProcessWorker:
    """A worker whose engine is there."""
    worker = ProcessWorker(COMMAND, {"directory": str(directory), **options}, patience=patience)
    worker.open()
    return worker


def script(request: Request) -> Iterator[int]:
    """What a scripted engine says, and does."""
    first = request.prompt[0]
    if first == KILLS:
        os.kill(os.getpid(), signal.SIGKILL)
    if first == RAISES:
        raise ZeroDivisionError("a secret of the engine")
    endless = first == ENDLESS or request.params.max_tokens >= MANY
    yield from itertools.repeat(40) if endless else (10 + first, 20)


def _make(options: Mapping[str, Any]) -> Hosted:
    directory = Path(options["directory"])
    tokenizer = Tokenizer.load(directory)
    pause = threading.Event()
    if "fails" in options:
        raise CheckpointError(options["fails"])
    while Path(options.get("held_by", "")).is_file():
        pause.wait(0.005)
    if options.get("real"):
        from daedal.checkpoint.load import load
        from daedal.infer.engine import Engine

        engine: Any = Engine(load(directory), tokenizer=tokenizer, max_batch=4)
    else:
        engine = ScriptedEngine(
            tokenizer,
            script,
            before_step=lambda: pause.wait(0.002),
            max_live=options.get("max_live"),
            max_running=options.get("max_running"),
        )
    return Hosted(engine=engine, compiled=Structures(tokenizer).compiled, facts={"called": directory.name})


if __name__ == "__main__":
    host(int(sys.argv[1]), _make)
