"""`daedal cost`: what a model costs by count, beside the same model with ordinary attention. Loads no torch.

With --json the table is followed by one flat JSON object per model, one a line, in the order of the arguments; so the
last line is always one flat object. What is counted, and how, is the business of `daedal.cost`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from daedal.cli.fetching import resolve_shown
from daedal.cli.units import in_bytes, in_flops, in_parameters
from daedal.config import ModelConfig
from daedal.cost import count, presets
from daedal.cost.count import CostReport

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
    context: Annotated[int, typer.Option(help="Tokens of one sequence.")] = 4096,
    json_lines: Annotated[bool, typer.Option("--json", help="End with one flat JSON object per model.")] = False,
) -> None:
    """Count parameters, bytes and FLOPs of models, without loading them."""
    reports = [count.report(read_config(model), model=model, context=context) for model in models]
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a file or a pipe takes the table whole
    console.print(_table(reports, context))
    if json_lines:
        for report in reports:
            print(json.dumps(report.flat()))


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
