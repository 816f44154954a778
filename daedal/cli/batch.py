"""`daedal batch`: requests from a file, answers to another, resumable. The lines are OpenAI's for its Batch API.

Knows nothing of how requests are answered: that is the server's application, here without a socket.
"""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from daedal.cli.drafting import Drafting, DraftTokensOption, SpeculateOption
from daedal.cli.opening import (
    DEFAULT_MODEL,
    CacheOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    KvCacheOption,
    Limits,
    Opened,
    open_model,
    say,
)
from daedal.cli.stopping import INTERRUPTED, stopping
from daedal.cli.weights import WeightsOption

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daedal.serve.batch import BatchLine


def command(
    requests: Annotated[Path, typer.Argument(metavar="IN", help="A file with one request a line.")],
    answers: Annotated[Path, typer.Argument(metavar="OUT", help="Where answers go; those that it has are kept.")],
    model: Annotated[str, typer.Option(help="A name that `daedal pull` knows, or a directory.")] = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    kv_cache_dtype: KvCacheOption = "auto",
    cache_gb: CacheOption = None,
    max_context: ContextOption = None,
    chat_format: FormatOption = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 16,
    speculate: SpeculateOption = None,
    draft_tokens: DraftTokensOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> int:
    """Answer a file of requests (OpenAI's batch lines); run it again to go on where it was."""
    limits = Limits(cache_gb=cache_gb, max_context=max_context, max_batch=max_batch, kv_cache_dtype=kv_cache_dtype)
    drafting = Drafting(speculate=speculate, draft_tokens=draft_tokens)
    from daedal.serve.batch import answered, read_lines

    num_lines = sum(1 for _ in read_lines(requests))
    done = answered(answers)
    num_waiting = sum(1 for line in read_lines(requests) if line.custom_id not in done)
    say(f"{num_lines} requests, {num_lines - num_waiting} of them answered before")
    failed = written = 0
    if num_waiting:
        opened = open_model(
            model,
            device=device,
            dtype=dtype,
            weights=weights,
            limits=limits,
            chat_format=chat_format,
            drafting=drafting,
        )
        waiting = (line for line in read_lines(requests) if line.custom_id not in done)
        written, failed = _answered(opened, model, waiting, num_waiting, answers, at_once=2 * max_batch)
    left = num_waiting - written
    say(f"{written} answered, {failed} of them refused or failed, {left} left")
    if as_json:
        numbers = {"requests": num_lines, "answered_before": num_lines - num_waiting, "answered": written}
        print(json.dumps({**numbers, "failed": failed, "left": left}), flush=True)
    return INTERRUPTED if left else 0


def _answered(
    opened: Opened, name: str, lines: "Iterator[BatchLine]", count: int, answers: Path, *, at_once: int
) -> tuple[int, int]:
    """Answers lines behind a bar until all are done or the user stops it: how many were, and how many of these failed.
    name: what the model was asked for by, which requests may use too."""
    from daedal.serve.batch import run_batch
    from daedal.serve.state.service import Service
    from daedal.serve.workers.thread_worker import ThreadWorker

    service = Service(
        worker=ThreadWorker(opened.engine),
        tokenizer=opened.tokenizer,
        chat_format=opened.chat_format,
        model_name=opened.name,
        aliases=frozenset({name}),
    )
    written = 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as bars,
        stopping() as stopped,
        answers.open("a", encoding="utf-8") as out,
    ):
        task = bars.add_task("", total=count)

        def told(status: int) -> None:
            nonlocal written
            written += 1
            bars.advance(task)

        failed = asyncio.run(run_batch(service, lines, out, at_once=at_once, told=told, stopped=stopped))
    return written, failed
