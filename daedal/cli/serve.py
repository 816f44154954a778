"""`daedal serve`: an OpenAI-compatible server and a chat page for one model. Prints its address once it is warm.

Takes the port before it loads anything, so that a port in use is said at once. Requests are the business of `serve/`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    ModelArgument,
    Opened,
    open_model,
    say,
)
from daedal.cli.tariff import CostOption, HardwareOption, PriceOption, PricesOption, Rates
from daedal.cli.units import in_bytes
from daedal.cli.weights import WeightsOption
from daedal.cost.spending import Tariff

if TYPE_CHECKING:
    from daedal.serve.keys import Keys
    from daedal.serve.service import Service

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
    chat_format: FormatOption = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests that may queue; more are refused with 429.")] = 256,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Same request, same numbers, whatever else runs; prompts read slower."),
    ] = False,
    prefill_ms: PrefillOption = 100.0,
    speculate: SpeculateOption = None,
    draft_tokens: DraftTokensOption = None,
    cost: CostOption = False,
    hardware: HardwareOption = None,
    prices: PricesOption = None,
    price: PriceOption = None,
    keys: KeysOption = None,
) -> None:
    """Serve a model over HTTP, with a chat page at /."""
    limits = Limits(
        cache_gb=cache_gb,
        max_context=max_context,
        max_batch=max_batch,
        max_waiting=max_waiting,
        deterministic=deterministic,
        prefill_ms=prefill_ms,
        kv_cache_dtype=kv_cache_dtype,
    )
    drafting = Drafting(speculate=speculate, draft_tokens=draft_tokens)
    rates = Rates(hardware=hardware, prices=prices, price=price)
    from daedal.checkpoint.load import resolve_device
    from daedal.serve.keys import Keys
    from daedal.serve.server import bind, run

    with bind(host, port) as sock:
        known = None if keys is None else Keys.read(keys)
        tariff = rates.tariff(resolve_device(device))
        opened = open_model(
            model,
            device=device,
            dtype=dtype,
            weights=weights,
            limits=limits,
            chat_format=chat_format,
            drafting=drafting,
            tariff=tariff,
        )
        _tell(opened, max_batch)
        run(_service(opened, name or opened.name, model, tariff, known, shows_cost=cost), sock)


def _tell(opened: Opened, max_batch: int) -> None:
    if opened.without_chat is not None:
        say(f"no chat, completions only: {opened.without_chat}")
    engine = opened.engine
    cache = in_bytes(engine.stats().kv_bytes_total)
    say(f"up to {engine.max_context} tokens a request, {max_batch} requests at once, {cache} of KV cache")


def _service(
    opened: Opened, name: str, alias: str, tariff: Tariff, keys: "Keys | None", *, shows_cost: bool
) -> "Service":
    from daedal.serve.ancestry import beside_original
    from daedal.serve.service import Service

    return Service(
        engine=opened.engine,
        tokenizer=opened.tokenizer,
        chat_format=opened.chat_format,
        model_name=name,
        aliases=frozenset({alias}),
        total_params=opened.total_params,
        active_params=opened.active_params,
        keys=keys,
        tariff=tariff,
        shows_cost=shows_cost,
        compared=beside_original(opened.directory, name, opened.model.config),
    )
