"""`daedal serve`: an OpenAI-compatible server and a chat page for one model. Prints its address once it is warm.

Takes the port before it loads anything, so that a port in use is said at once. The engine runs in a process of its own
(`cli/engine`), so that this one never imports torch. Requests are the business of `serve/`.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daedal.cli.drafting import Drafting, DraftTokensOption, SpeculateOption
from daedal.cli.engine import COMMAND, Facts, Wish
from daedal.cli.log_format import LogFormatOption, use
from daedal.cli.opening import (
    DEFAULT_MODEL,
    CacheOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    KvCacheOption,
    Limits,
    ModelArgument,
    say,
)
from daedal.cli.tariff import CostOption, HardwareOption, PriceOption, PricesOption, Rates
from daedal.cli.weights import WeightsOption
from daedal.errors import RequestError, TemplateError

if TYPE_CHECKING:
    from daedal.serve.keys import Keys
    from daedal.serve.process_worker import ProcessWorker
    from daedal.serve.service import Service
    from daedal.text.chat import ChatFormat

DeterministicOption = Annotated[
    bool, typer.Option("--deterministic", help="Same request, same numbers, whatever else runs; prompts read slower.")
]
PrefillOption = Annotated[
    float,
    typer.Option(
        help="Milliseconds that a step may read prompts while answers wait for their next token. How many tokens "
        "that is, the engine learns; with --deterministic it has no effect."
    ),
]

PrefixOption = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Requests that begin alike share what was read of their prompts; with keys, those of one key.",
    ),
]
KeysOption = Annotated[
    Path | None, typer.Option(help="A TOML file of keys and their limits; with it nobody is served without a key.")
]

TimeoutOption = Annotated[
    float, typer.Option(help="Seconds that a request may take, waiting included; its own `timeout` may be shorter.")
]
DrainOption = Annotated[
    float, typer.Option(help="Seconds that requests get to finish when the server is told to end; then they are cut.")
]
MOST_SECONDS = 10.0**6
STOP_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Offer:
    """To whom the model is served, and for how long; seconds in all."""

    host: str
    port: int
    name: str | None
    keys: Path | None
    shows_cost: bool
    request_timeout: float
    drain_seconds: float

    def __post_init__(self) -> None:
        bounds = (("--request-timeout", self.request_timeout, 1e-3), ("--drain-seconds", self.drain_seconds, 0.0))
        for name, value, least in bounds:
            if not least <= value <= MOST_SECONDS:
                raise RequestError(f"{name} is {value:g}: it must be from {least:g} to {MOST_SECONDS:.0f} seconds")


def command(
    model: ModelArgument = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its own name if not given.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    kv_cache_dtype: KvCacheOption = "auto",
    cache_gb: CacheOption = None,
    max_context: ContextOption = None,
    prefix_cache: PrefixOption = True,
    chat_format: FormatOption = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests that may queue; more are refused with 429.")] = 256,
    deterministic: DeterministicOption = False,
    prefill_ms: PrefillOption = 100.0,
    speculate: SpeculateOption = None,
    draft_tokens: DraftTokensOption = None,
    cost: CostOption = False,
    hardware: HardwareOption = None,
    prices: PricesOption = None,
    price: PriceOption = None,
    keys: KeysOption = None,
    request_timeout: TimeoutOption = 3600.0,
    drain_seconds: DrainOption = 8.0,
    log_format: LogFormatOption = "text",
) -> int:
    """Serve a model over HTTP, with a chat page at /."""
    wish = Wish(
        model=model,
        device=device,
        dtype=dtype,
        weights=weights,
        chat_format=chat_format,
        limits=Limits(
            cache_gb=cache_gb,
            max_context=max_context,
            max_batch=max_batch,
            max_waiting=max_waiting,
            deterministic=deterministic,
            prefill_ms=prefill_ms,
            kv_cache_dtype=kv_cache_dtype,
            prefix_caching=prefix_cache,
        ),
        drafting=Drafting(speculate=speculate, draft_tokens=draft_tokens),
        rates=Rates(hardware=hardware, prices=prices, price=price),
        log_format=log_format,
    )
    offer = Offer(
        host=host,
        port=port,
        name=name,
        keys=keys,
        shows_cost=cost,
        request_timeout=request_timeout,
        drain_seconds=drain_seconds,
    )
    use(log_format)
    return _serve(wish, offer)


def _serve(wish: Wish, offer: Offer) -> int:
    """Until it is told to end: 0, or 1 where engines end one after another."""
    from daedal.serve.listening import bind

    known = None if offer.keys is None else _keys(offer.keys)
    with bind(offer.host, offer.port) as sock, ExitStack() as ending:
        from daedal.serve.process_worker import EngineLost, ProcessWorker
        from daedal.serve.worker import GenerationFailed, WorkerStopped

        # What takes long begins before the rest is imported.
        worker = ProcessWorker(COMMAND, wish.options())
        ending.callback(worker.stop, STOP_SECONDS)
        from daedal.serve.server import run

        try:
            run(_service(worker, wish, offer, known), sock, drain_seconds=offer.drain_seconds)
        except (EngineLost, GenerationFailed, WorkerStopped) as error:
            say(f"daedal: {error}")
            return 1
    return 0


def _service(worker: "ProcessWorker", wish: Wish, offer: Offer, keys: "Keys | None") -> "Service":
    """What is served once the engine is there. A DaedalError says why it is not."""
    from pydantic import TypeAdapter

    from daedal.config import ModelConfig
    from daedal.serve.ancestry import beside_original
    from daedal.serve.service import Service
    from daedal.text.tokenizer import Tokenizer

    facts = TypeAdapter(Facts).validate_python(worker.open())
    called, limits = offer.name or facts.name, wish.limits
    return Service(
        worker=worker,
        tokenizer=Tokenizer.load(facts.path),
        chat_format=_chat_format(facts.path, wish.chat_format),
        model_name=called,
        aliases=frozenset({wish.model}),
        total_params=facts.total_params,
        active_params=facts.active_params,
        keys=keys,
        max_requests=None if limits.max_waiting is None else limits.max_batch + limits.max_waiting,
        max_seconds=offer.request_timeout,
        tariff=wish.rates.tariff(on_cpu=facts.on_cpu),
        shows_cost=offer.shows_cost,
        compared=beside_original(facts.path, called, ModelConfig.read(facts.path)),
    )


def _keys(path: Path) -> "Keys":
    from daedal.serve.keys import Keys

    return Keys.read(path)


def _chat_format(directory: Path, named: str | None) -> "ChatFormat | None":
    """None where the engine's process has said already that there is none."""
    from daedal.text.chat import load_format

    try:
        return load_format(directory, chat_format=named)
    except TemplateError:
        return None
