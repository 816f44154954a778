"""`daedal cost`: what a model costs by count, beside the same model with ordinary attention. Loads no torch.

With --json the table is followed by one flat JSON object per model, one a line, in the order of the arguments; so the
last line is always one flat object. What is counted, and how, is the business of `daedal.cost`.
"""

import dataclasses
import json
from pathlib import Path
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


def command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Presets, names, or directories with a config.json.")
    ],
    context: Annotated[int, typer.Option(help="Tokens of one sequence.")] = 4096,
    json_lines: Annotated[bool, typer.Option("--json", help="End with one flat JSON object per model.")] = False,
) -> None:
    """Count parameters, cache bytes and FLOPs of models, without loading them."""
    reports = [count.report(read_config(model), model=model, context=context) for model in models]
    Console().print(_table(reports, context))
    if json_lines:
        for report in reports:
            print(json.dumps(dataclasses.asdict(report)))


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
    rows = [
        ("parameters", [in_parameters(report.total_params) for report in reports]),
        ("active per token", [_active(report) for report in reports]),
        ("compute per decoded token", [in_flops(report.decode_flops_per_token) for report in reports]),
        ("KV bytes per token", [f"{report.kv_bytes_per_token:,}" for report in reports]),
        ("  with MHA", [f"{report.mha_kv_bytes_per_token:,}" for report in reports]),
        ("  with GQA-8", [f"{report.gqa8_kv_bytes_per_token:,}" for report in reports]),
        ("KV bytes at context", [in_bytes(report.kv_bytes_at_context) for report in reports]),
        ("  with MHA", [in_bytes(report.mha_kv_bytes_at_context) for report in reports]),
        ("  with GQA-8", [in_bytes(report.gqa8_kv_bytes_at_context) for report in reports]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _active(report: CostReport) -> str:
    return f"{in_parameters(report.active_params)} ({report.active_params / report.total_params:.1%})"
