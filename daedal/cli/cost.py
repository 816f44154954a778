"""`daedal cost`: what a model costs by count, and what it would do on hardware that one need not have. Loads no torch.

With --json the last line is one object: the counts of the first model at the first context, flat; where there is more
than one, all of them under `counts`; with --hardware the predictions under `predictions`. What is counted and
predicted, and how, is the business of `daedal.cost`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from daedal.cli import cost_arguments, cost_predictions
from daedal.cli.console import table_console
from daedal.cli.cost_predictions import Predictions, Wanted
from daedal.cli.fetching import resolve_shown
from daedal.cli.units import in_bytes, in_flops, in_parameters
from daedal.config import ModelConfig
from daedal.cost import count, presets
from daedal.cost.count import CostReport
from daedal.cost.plan import NOT_MODELLED
from daedal.cost.prices import Prices
from daedal.errors import ConfigError

_ABSENT = "-"
_ATTENTION = ("attention", "indexer", "compressor")
_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "full": "attention",
        "latent": "attention, latent",
        "window": "attention, window",
        "sparse": "attention, sparse",
        "heavy": "attention, heavy",
    }
)


def command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Presets, names, or directories with a config.json.")
    ],
    context: Annotated[str, typer.Option(help="Tokens of one sequence, one or more: 4096, or 4k,128k,1m.")] = "4096",
    hardware: Annotated[
        str | None, typer.Option(help="Predict for these: h200,8xb200,this. Without it, counts only.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences decoded together, one or more: 1,16,64.")] = "1",
    weights: Annotated[
        str, typer.Option(help="Format of weights: shipped, or bf16, int8, int4, fp8, fp4 as `serve` packs them.")
    ] = "shipped",
    kv_cache_dtype: Annotated[
        str,
        typer.Option("--kv-cache-dtype", help="Format of the cache: auto (as published), bf16, fp8 or 6bit."),
    ] = "auto",
    skew: Annotated[float, typer.Option(help="How uneven the loads of experts are; 0 is even.")] = 0.0,
    acceptance: Annotated[
        float | None, typer.Option(help="Draft with the model's own modules; the share of drafts that is accepted.")
    ] = None,
    experts_in: Annotated[
        str, typer.Option(help="Where experts go that do not fit: memory (nowhere), host or disk.")
    ] = "memory",
    prices: Annotated[Path | None, typer.Option(help="Your own prices, a TOML file, over the known ones.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")] = False,
) -> None:
    """Count parameters, bytes and FLOPs of models, and predict speed and cost on hardware, without loading them."""
    lengths = cost_arguments.contexts(context)
    wanted = None
    if hardware is not None:
        wanted = Wanted(
            devices=cost_arguments.hardware(hardware),
            contexts=lengths,
            batches=cost_arguments.batches(batch),
            weights=weights,
            kv_cache_dtype=kv_cache_dtype,
            skew=skew,
            acceptance=acceptance,
            experts_in=experts_in,
        )
    else:
        given = (batch, weights, kv_cache_dtype, skew, acceptance, experts_in, prices)
        _refuse_without_hardware(given)
    configs = {model: read_config(model) for model in models}
    reports = _counted(configs, lengths)
    table = None if wanted is None else cost_predictions.read_prices(prices)
    predicted = [
        cost_predictions.predictions(model, config, wanted, table)
        for model, config in configs.items()
        if wanted is not None and table is not None
    ]
    _show(reports, lengths, predicted, wanted, table)
    if json_lines:
        print(json.dumps(_object(reports, predicted, wanted, table)))


def _counted(configs: Mapping[str, ModelConfig], lengths: list[int]) -> list[CostReport]:
    """Every model at the first length, then at the next."""
    first = [count.report(config, model=model, context=lengths[0]) for model, config in configs.items()]
    return first + [count.moved(report, configs[report.model], length) for length in lengths[1:] for report in first]


def _refuse_without_hardware(given: tuple[object, ...]) -> None:
    names = ("--batch", "--weights", "--kv-cache-dtype", "--skew", "--acceptance", "--experts-in", "--prices")
    plain = ("1", "shipped", "auto", 0.0, None, "memory", None)
    for name, value, default in zip(names, given, plain, strict=True):
        if value != default:
            raise ConfigError(f"{name} is {value}: it changes predictions only, give --hardware too")


def _show(
    reports: list[CostReport],
    lengths: list[int],
    predicted: list[Predictions],
    wanted: Wanted | None,
    table: Prices | None,
) -> None:
    console = table_console()
    first = [report for report in reports if report.context == lengths[0]]
    console.print(_table(first, lengths[0]))
    if len(lengths) > 1:
        console.print(_along(reports, lengths))
    if wanted is None or table is None:
        return
    cost_predictions.show(console, predicted, wanted)
    for line in _bought(first, table):
        console.print(line)


def _object(
    reports: list[CostReport], predicted: list[Predictions], wanted: Wanted | None, table: Prices | None
) -> dict[str, object]:
    result: dict[str, object] = dict(reports[0].flat())
    if len(reports) > 1:
        result["counts"] = [report.flat() for report in reports]
    if wanted is not None and table is not None:
        result["predictions"] = [item for one in predicted for item in cost_predictions.as_objects(one, wanted)]
        result["not_modelled"] = list(NOT_MODELLED)
        result["prices_version"] = table.version
        models = {report.model for report in reports}
        result["api_prices"] = [
            {**asdict(row), "share_of_week": table.share_of_week(row)} for row in table.api if row.model in models
        ]
    return result


def _bought(reports: list[CostReport], table: Prices) -> Iterator[str]:
    """What the same tokens cost as a service, where that is known."""
    for report in reports:
        for row in table.api:
            if row.model == report.model:
                yield (
                    f"{row.model} bought as a service, {row.label} ({table.share_of_week(row):.0%} of the week): "
                    f"$ {row.output:g} per million out, {row.input_miss:g} in, {row.input_hit:g} in that was read "
                    f"before ({row.date})"
                )


def _along(reports: list[CostReport], lengths: list[int]) -> Table:
    """Cache and compute of each model at each context."""
    table = Table(title="along the context", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("context", justify="right")
    for report in reports[: len(reports) // len(lengths)]:
        table.add_column(f"{report.model}: KV bytes", justify="right")
        table.add_column("compute per token", justify="right")
    for length in lengths:
        cells = []
        for report in reports:
            if report.context == length:
                cells += [in_bytes(report.kv_bytes_at_context), in_flops(report.decode_flops_per_token)]
        table.add_row(f"{length:,}", *cells)
    return table


def read_config(model: str) -> ModelConfig:
    """The configuration of a directory, a preset or a known name, in this order."""
    if Path(model).is_dir():
        return ModelConfig.read(model)
    preset = presets.read(model)
    if preset is not None:
        return preset
    return ModelConfig.read(resolve_shown(model))


def _table(reports: list[CostReport], context: int) -> Table:
    table = Table(title=f"counted at a context of {context:,} tokens", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for report in reports:
        table.add_column(report.model, justify="right")
    for row in zip(*(_rows(report) for report in reports), strict=True):
        names, cells = zip(*row, strict=True)
        if any(cell != _ABSENT for cell in cells):
            table.add_row(names[0], *cells)
    return table


def _rows(report: CostReport) -> Iterator[tuple[str, str]]:
    """(name, cell) from top to bottom: the same names for every model."""
    total, decoded = report.total_params, report.decode_flops_per_token
    attention = sum(report.params_by_role[role] for role in _ATTENTION)
    experts = report.params_by_role["routed_expert"]
    yield "parameters", in_parameters(total)
    yield "  routed experts", _share(experts, total)
    yield "  attention", _share(attention, total)
    yield "  everything else", _share(total - attention - experts, total)
    yield "active per token", f"{in_parameters(report.active_params)} ({_share(report.active_params, total)})"
    yield "drafting modules", _drafting(report.drafting_params, in_parameters)
    yield "weights as shipped", in_bytes(report.weight_bytes)
    yield "  in bf16", in_bytes(report.weight_bytes_bf16)
    yield "published tensors", f"{report.checkpoint_tensors:,}"
    yield "  with drafting", _drafting(report.checkpoint_tensors_with_drafting, "{:,}".format)
    yield "compute per token", in_flops(decoded)
    yield "  matrices", _share(report.decode_flops_linear, decoded)
    for kind, flops in report.decode_flops_attention_by_kind.items():
        yield f"  {_KINDS[kind]}", _share(flops, decoded)
    yield "  indexer", _share(report.decode_flops_indexer, decoded)
    yield "KV bytes per token", _number(report.kv_bytes_per_token)
    yield "  in bf16", _number(report.kv_bytes_per_token_bf16)
    yield "  with MHA", _number(report.mha_kv_bytes_per_token)
    yield "  with GQA-8", _number(report.gqa8_kv_bytes_per_token)
    yield "KV bytes at context", in_bytes(report.kv_bytes_at_context)
    yield "  in bf16", in_bytes(report.kv_bytes_at_context_bf16)
    yield "  with MHA", in_bytes(report.mha_kv_bytes_at_context)
    yield "  with GQA-8", in_bytes(report.gqa8_kv_bytes_at_context)
    yield "state beside them", in_bytes(report.state_bytes) if report.state_bytes else _ABSENT


def _drafting(value: int | None, show: Callable[[int], str]) -> str:
    if value is None:
        return "not counted"
    return show(value) if value else _ABSENT


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part else _ABSENT


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
