"""`daedal batch`: requests from a file, answers to another, resumable. The lines are OpenAI's for its Batch API.

Knows nothing of how requests are answered: that is the server's application, here without a socket.
"""

import asyncio
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from daedal.cli.drafting import Drafting, DraftTokensOption, SpeculateOption
from daedal.cli.engine import Wish
from daedal.cli.opening import (
    DEFAULT_MODEL,
    CacheOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    KvCacheOption,
    Limits,
    say,
)
from daedal.cli.placement import Placement
from daedal.cli.stopping import INTERRUPTED, stopping
from daedal.cli.tariff import Rates
from daedal.cli.weights import WeightsOption
from daedal.errors import BackendError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from daedal.serve.batch import BatchLine
    from daedal.serve.state.service import Service

AT_ONCE = 2  # requests under way, times those that run together


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
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Engines run where a Ray cluster has room, over Ray Data; see docs/deploy.md."),
    ] = False,
    replicas: Annotated[int, typer.Option(help="With --ray: engines that answer side by side.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> int:
    """Answer a file of requests (OpenAI's batch lines); run it again to go on where it was."""
    limits = Limits(cache_gb=cache_gb, max_context=max_context, max_batch=max_batch, kv_cache_dtype=kv_cache_dtype)
    drafting = Drafting(speculate=speculate, draft_tokens=draft_tokens)
    placement = Placement(replicas=replicas, apart=ray)
    if replicas > 1 and not ray:
        raise RequestError(f"--replicas is {replicas}, which only --ray makes use of: give both, or neither")
    wish = Wish(
        model=model,
        device=device,
        dtype=dtype,
        weights=weights,
        chat_format=chat_format,
        limits=limits,
        drafting=drafting,
        rates=Rates(),
        placement=placement,
    )
    from daedal.serve.batch import answered, read_lines

    num_lines = sum(1 for _ in read_lines(requests))
    done = answered(answers)
    num_waiting = sum(1 for line in read_lines(requests) if line.custom_id not in done)
    say(f"{num_lines} requests, {num_lines - num_waiting} of them answered before")
    failed = written = 0
    if num_waiting:
        waiting = (line for line in read_lines(requests) if line.custom_id not in done)
        written, failed = (_answered_by_ray if ray else _answered)(wish, waiting, num_waiting, answers)
    left = num_waiting - written
    say(f"{written} answered, {failed} of them refused or failed, {left} left")
    if as_json:
        numbers = {"requests": num_lines, "answered_before": num_lines - num_waiting, "answered": written}
        print(json.dumps({**numbers, "failed": failed, "left": left}), flush=True)
    return INTERRUPTED if left else 0


def _service(options: "Mapping[str, Any]") -> "Service":
    """Of the model that is wished for, under the name that it is asked for by too. Ray calls it where an engine is."""
    from daedal.serve.state.service import Service
    from daedal.serve.workers.thread_worker import ThreadWorker

    wish = Wish.read(options)
    opened = wish.open()
    return Service(
        worker=ThreadWorker(opened.engine),
        tokenizer=opened.tokenizer,
        chat_format=opened.chat_format,
        model_name=opened.name,
        aliases=frozenset({wish.model}),
    )


@contextmanager
def _bar(count: int) -> "Iterator[Progress]":
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bars.add_task("", total=count)
        yield bars


def _answered(wish: Wish, lines: "Iterator[BatchLine]", count: int, answers: Path) -> tuple[int, int]:
    """Answers lines behind a bar until all are done or the user stops it: how many were, and how many failed."""
    from daedal.serve.batch import run_batch

    service = _service(wish.options())
    written = 0
    with _bar(count) as bars, stopping() as stopped, answers.open("a", encoding="utf-8") as out:

        def told(status: int) -> None:
            nonlocal written
            written += 1
            bars.advance(bars.task_ids[0])

        at_once = AT_ONCE * wish.limits.max_batch
        failed = asyncio.run(run_batch(service, lines, out, at_once=at_once, told=told, stopped=stopped))
    return written, failed


def _answered_by_ray(wish: Wish, lines: "Iterator[BatchLine]", count: int, answers: Path) -> tuple[int, int]:
    """The same by engines on a cluster; what runs there when the user stops it is lost."""
    try:
        from daedal.serve.ray_data import answered
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pandas", "pyarrow"):
            raise
        raise BackendError(
            f"--ray needs the package {error.name}: pip install 'daedal[ray]', or leave it out"
        ) from None
    written = failed = 0
    found = answered(
        lines,
        partial(_service, wish.options()),
        engines=wish.placement.replicas,
        at_once=AT_ONCE * wish.limits.max_batch,
        on_gpus=wish.device != "cpu",
    )
    with _bar(count) as bars, stopping() as stopped, answers.open("a", encoding="utf-8") as out:
        for answer in found:
            out.write(answer.line + "\n")
            out.flush()
            written, failed = written + 1, failed + (answer.status >= 400)
            bars.advance(bars.task_ids[0])
            if stopped():
                break
    return written, failed
