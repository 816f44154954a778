"""`daedal serve`: an OpenAI-compatible server and a chat page for one model. Prints its address once it is warm.

Takes the port before it loads anything, so that a port in use is said at once. Requests are the business of `serve/`.
"""

from typing import Annotated

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
    open_model,
    say,
)
from daedal.cli.units import in_bytes
from daedal.cli.weights import WeightsOption

PrefillOption = Annotated[
    float,
    typer.Option(
        help="Milliseconds that a step may read prompts while answers wait for their next token. How many tokens "
        "that is, the engine learns; with --deterministic it has no effect."
    ),
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
    from daedal.serve.server import bind, run
    from daedal.serve.service import Service

    with bind(host, port) as sock:
        opened = open_model(
            model,
            device=device,
            dtype=dtype,
            weights=weights,
            limits=limits,
            chat_format=chat_format,
            drafting=drafting,
        )
        if opened.without_chat is not None:
            say(f"no chat, completions only: {opened.without_chat}")
        engine = opened.engine
        cache = in_bytes(engine.stats().kv_bytes_total)
        say(f"up to {engine.max_context} tokens a request, {max_batch} requests at once, {cache} of KV cache")
        service = Service(
            engine=engine,
            tokenizer=opened.tokenizer,
            chat_format=opened.chat_format,
            model_name=name or opened.name,
            aliases=frozenset({model}),
            total_params=opened.total_params,
            active_params=opened.active_params,
        )
        run(service, sock)
