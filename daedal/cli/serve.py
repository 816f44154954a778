"""`daedal serve`: an OpenAI-compatible server and a chat page for one model. Prints its address once it is warm.

Takes the port before it loads anything, so that a port in use is said at once. The engine runs in a process of its own
(`cli/engine`), so that this one never imports torch. Requests are the business of `serve/`.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daedal.cli.beginnings import Beginnings, DirectoryOption, PrefixOption, SizeOption
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
    leave_to_stay,
    say,
)
from daedal.cli.placement import Placement, RanksOption, RayOption, ReplicasOption
from daedal.cli.tariff import CostOption, HardwareOption, PriceOption, PricesOption, Rates
from daedal.cli.weights import WeightsOption
from daedal.errors import BackendError, RequestError, TemplateError

if TYPE_CHECKING:
    from daedal.serve.state.keys import Keys
    from daedal.serve.state.service import Service
    from daedal.serve.tracing import Tracing
    from daedal.serve.workers.child import Launch
    from daedal.serve.workers.process_worker import ProcessWorker
    from daedal.serve.workers.replicas import Replicas
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

KeysOption = Annotated[
    Path | None, typer.Option(help="A TOML file of keys and their limits; with it nobody is served without a key.")
]

TimeoutOption = Annotated[
    float, typer.Option(help="Seconds that a request may take, waiting included; its own `timeout` may be shorter.")
]
OtlpOption = Annotated[
    str | None,
    typer.Option(
        envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
        metavar="URL",
        help="A collector that takes OpenTelemetry's spans over HTTP: one for each request. Needs `daedal[otel]`.",
    ),
]
DrainOption = Annotated[
    float, typer.Option(help="Seconds that requests get to finish when the server is told to end; then they are cut.")
]
MOST_SECONDS = 10.0**6
STOP_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """request: that one may take. drain: that those under way get when the server is told to end."""

    request: float
    drain: float

    def __post_init__(self) -> None:
        bounds = (("--request-timeout", self.request, 1e-3), ("--drain-seconds", self.drain, 0.0))
        for name, value, least in bounds:
            if not least <= value <= MOST_SECONDS:
                raise RequestError(f"{name} is {value:g}: it must be from {least:g} to {MOST_SECONDS:.0f} seconds")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """To whom the model is served, and for how long."""

    host: str
    port: int
    name: str | None
    keys: Path | None
    shows_cost: bool
    seconds: Seconds
    otlp: str | None


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
    prefix_cache_dir: DirectoryOption = None,
    prefix_cache_gb: SizeOption = 4.0,
    chat_format: FormatOption = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests that may queue; more are refused with 429.")] = 256,
    deterministic: DeterministicOption = False,
    prefill_ms: PrefillOption = 100.0,
    tensor_parallel_size: RanksOption = 1,
    replicas: ReplicasOption = 1,
    ray: RayOption = False,
    speculate: SpeculateOption = None,
    draft_tokens: DraftTokensOption = None,
    cost: CostOption = False,
    hardware: HardwareOption = None,
    prices: PricesOption = None,
    price: PriceOption = None,
    keys: KeysOption = None,
    request_timeout: TimeoutOption = 3600.0,
    drain_seconds: DrainOption = 8.0,
    otlp_endpoint: OtlpOption = None,
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
            beginnings=Beginnings(shared=prefix_cache, directory=prefix_cache_dir, gb=prefix_cache_gb),
        ),
        drafting=Drafting(speculate=speculate, draft_tokens=draft_tokens),
        rates=Rates(hardware=hardware, prices=prices, price=price),
        log_format=log_format,
        placement=Placement(replicas=replicas, ranks=tensor_parallel_size, apart=ray),
    )
    seconds = Seconds(request=request_timeout, drain=drain_seconds)
    offer = Offer(host=host, port=port, name=name, keys=keys, shows_cost=cost, seconds=seconds, otlp=otlp_endpoint)
    return _serve(wish, offer)


def _serve(wish: Wish, offer: Offer) -> int:
    """Until it is told to end: 0, or 1 where engines end one after another."""
    from daedal.serve.listening import bind

    use(wish.log_format)
    known = None if offer.keys is None else _keys(offer.keys)
    tracing = None if offer.otlp is None else _tracing(offer.otlp)
    with bind(offer.host, offer.port) as sock, ExitStack() as ending:
        from daedal.serve.workers.child import EngineLost
        from daedal.serve.workers.worker import GenerationFailed, WorkerStopped

        if tracing is not None:
            ending.callback(tracing.close)
        try:
            # What takes long begins before the rest is imported.
            worker = _worker(wish)
            ending.callback(worker.stop, STOP_SECONDS)
            from daedal.serve.server import run

            service = _service(worker, wish, offer, known)
            if tracing is not None:
                service.followers, service.layers = (tracing.follow,), (tracing.layer,)
            leave_to_stay()
            run(service, sock, drain_seconds=offer.seconds.drain)
        except (EngineLost, GenerationFailed, WorkerStopped) as error:
            say(f"daedal: {error}")
            return 1
    return 0


def _worker(wish: Wish) -> "ProcessWorker | Replicas":
    """The engine, or all of them, started but not waited for."""
    from daedal.serve.workers.process_worker import ProcessWorker
    from daedal.serve.workers.replicas import Replicas

    placement = wish.placement
    if placement.replicas > 1 and wish.limits.beginnings.directory is not None:
        raise RequestError("--prefix-cache-dir is one engine's, and there are several: leave it or --replicas out")
    launch = _launch(wish)
    workers = [
        ProcessWorker(COMMAND, replace(wish, placement=replace(placement, replica=number)).options(), launch=launch)
        for number in range(placement.replicas)
    ]
    return workers[0] if len(workers) == 1 else Replicas(workers, most=wish.limits.max_requests)


def _launch(wish: Wish) -> "Launch":
    """How an engine's process is started: here, or where a Ray cluster has room."""
    from daedal.serve.workers.child import LocalChild

    if not wish.placement.apart:
        return LocalChild
    try:
        from daedal.serve.workers.ray_hosts import Cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise BackendError("--ray needs the package ray: pip install 'daedal[ray]', or leave it out") from None
    placement = wish.placement
    return Cluster(engines=placement.replicas, processes=placement.ranks, on_gpus=wish.device != "cpu").launch


def _service(worker: "ProcessWorker | Replicas", wish: Wish, offer: Offer, keys: "Keys | None") -> "Service":
    """What is served once the engine is there. A DaedalError says why it is not."""
    from pydantic import TypeAdapter

    from daedal.config import ModelConfig
    from daedal.serve.state.ancestry import beside_original
    from daedal.serve.state.service import Service
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
        max_requests=None if limits.max_requests is None else limits.max_requests * wish.placement.replicas,
        max_seconds=offer.seconds.request,
        tariff=wish.rates.tariff(on_cpu=facts.on_cpu, processes=wish.placement.ranks),
        shows_cost=offer.shows_cost,
        compared=beside_original(facts.path, called, ModelConfig.read(facts.path)),
    )


def _keys(path: Path) -> "Keys":
    from daedal.serve.state.keys import Keys

    return Keys.read(path)


def _tracing(endpoint: str) -> "Tracing":
    if not endpoint.startswith(("http://", "https://")):
        raise RequestError(f"--otlp-endpoint is {endpoint!r}: give the address of a collector, http://HOST:4318")
    try:
        from daedal.serve.tracing import Tracing
    except ImportError as error:
        raise RequestError(
            f"--otlp-endpoint is given and OpenTelemetry is not installed ({error.name}): pip install 'daedal[otel]'"
        ) from error
    return Tracing.to(endpoint)


def _chat_format(directory: Path, named: str | None) -> "ChatFormat | None":
    """None where the engine's process has said already that there is none."""
    from daedal.text.chat import load_format

    try:
        return load_format(directory, chat_format=named)
    except TemplateError:
        return None
