"""The tables of `daedal eval`: tasks and texts, of one model or beside another. Knows summaries alone."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from daedal.cli.units import in_flops

if TYPE_CHECKING:
    from daedal.eval.estimates import Estimate
    from daedal.eval.summary import Calibration, Comparison, Summary, TextSummary

ABSENT = "-"


def tables(summary: "Summary", baseline: "Summary | None", difference: "Comparison | None") -> "Iterator[Table]":
    """difference: of the summary from the baseline's; both or neither."""
    if summary.tasks:
        yield _tasks(summary, difference)
    if summary.replies:
        yield _replies(summary, difference)
    if summary.texts:
        yield _texts(summary, baseline, difference)


def _tasks(summary: "Summary", difference: "Comparison | None") -> Table:
    title = "accuracy in per cent, with 95 % intervals; acc_norm: by character"
    headings = ["items", "acc", "acc_norm"]
    headings += ["less the baseline", "gained, lost"] if difference else []
    table = _table(title, "task", [*headings, "ECE", "Brier", "NLL"])
    for task, one in summary.tasks.items():
        cells = [f"{one.items:,}", _interval(one.accuracy["none"]), _interval(one.accuracy["chars"])]
        if difference is not None:
            beside = difference.tasks[task]
            cells += [_interval(beside.accuracy["none"], "+"), f"+{beside.gained} -{beside.lost}"]
        table.add_row(task, *cells, *_calibration(one.calibration))
    if len(summary.tasks) > 1 and summary.accuracy is not None:
        mean = ["", _interval(summary.accuracy["none"]), _interval(summary.accuracy["chars"])]
        if difference is not None and difference.accuracy is not None:
            mean.append(_interval(difference.accuracy["none"], "+"))
        table.add_section()
        table.add_row("mean", *mean)
    return table


def _replies(summary: "Summary", difference: "Comparison | None") -> Table:
    title = "replies that are right in per cent, with 95 % intervals; tokens and costs of a reply"
    headings = ["problems", "right", "no answer", "cut off", "read", "written", "compute", "device", "energy"]
    headings += ["less the baseline", "gained, lost"] if difference else []
    table = _table(title, "task", headings)
    for task, one in summary.replies.items():
        joules = ABSENT if one.joules is None else f"{one.joules:.3g} J"
        cells = [f"{one.problems:,}", _interval(one.accuracy), f"{one.unanswered:,}", f"{one.cut:,}"]
        cells += [f"{one.prompt_tokens:,.0f}", f"{one.tokens:,.1f}", in_flops(one.flops)]
        cells += [f"{one.device_seconds:.3g} s", joules]
        if difference is not None:
            beside = difference.replies[task]
            cells += [_interval(beside.accuracy, "+"), f"+{beside.gained} -{beside.lost}"]
        table.add_row(task, *cells)
    return table


def _texts(summary: "Summary", baseline: "Summary | None", difference: "Comparison | None") -> Table:
    compared = difference is not None and bool(difference.texts)
    headings = ["context", "tokens", "bits per byte", "perplexity"]
    headings += ["the baseline's bits", "ratio of perplexities"] if compared else []
    table = _table("", "text", headings)
    others = {(one.kind, one.context): one for one in (baseline.texts if baseline else ())}
    ratios = {(one.kind, one.context): one.ratio for one in (difference.texts if difference else ())}
    for one in summary.texts:
        cells = [f"{one.context:,}", f"{one.tokens:,}", _bits(one), f"{one.perplexity:.3f}"]
        if compared:
            place = (one.kind, one.context)
            cells += [f"{others[place].bits_per_byte:.4f}", f"{ratios[place]:.4f}"]
        table.add_row(one.kind, *cells)
    if difference is not None and compared:
        table.add_section()
        for context, log_ratio in difference.log_ratio.items():
            table.add_row("mean", f"{context:,}", "", "", "", "", f"{math.exp(log_ratio):.4f}")
    return table


def _table(title: str, first: str, headings: Sequence[str]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _interval(found: "Estimate", sign: str = "") -> str:
    """0.3125 from 0.25 to 0.375 -> "31.2 (25.0 to 37.5)"."""
    form = f"{sign}.1f"
    return f"{100 * found.value:{form}} ({100 * found.low:{form}} to {100 * found.high:{form}})"


def _bits(found: "TextSummary") -> str:
    """1.2321 (1.2054 to 1.2601)"""
    interval = found.interval
    bounds = "" if interval is None else f" ({interval.low:.4f} to {interval.high:.4f})"
    return f"{found.bits_per_byte:.4f}{bounds}"


def _calibration(found: "Calibration | None") -> list[str]:
    return [ABSENT] * 3 if found is None else [f"{found.ece:.3f}", f"{found.brier:.3f}", f"{found.nll:.3f}"]
