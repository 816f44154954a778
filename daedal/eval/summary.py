"""From records to what is reported: accuracy, calibration and bits per byte, of one model and beside another.

A choice's probability is its share of the likelihood of all choices of its item, by whole continuations: what the model
would bet if one of them had to be right. Comparisons go item by item and window by window. Knows no files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from daedal.eval.calibration import (
    Bin,
    brier_scores,
    expected_calibration_error,
    nats_spent,
    reliability,
    softmax,
)
from daedal.eval.estimates import Estimate, estimate, ratio
from daedal.eval.harness import Answers
from daedal.eval.records import NORMS, ItemRecord, Norm, WindowRecord
from daedal.eval.replied import RepliesDifference, RepliesSummary, compare_replies, summarise_replies


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """ece: expected calibration error, 15 bins; without an interval, as items drawn anew lie worse in bins. brier: 0 to
    2. nll: of the right choice, nats.
    """

    ece: float
    brier: float
    nll: float
    brier_interval: Estimate
    nll_interval: Estimate


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """accuracy: by log-probability, "none", and by it for each of the choice's "chars" or "bytes".

    gold_bits_per_byte: of the right continuations, over their bytes. calibration: None without choices.
    """

    items: int
    accuracy: Mapping[Norm, Estimate]
    gold_bits_per_byte: float
    calibration: Calibration | None


@dataclass(frozen=True, kw_only=True)
class TextSummary:
    """Of all windows of one kind and one context. interval: of the bits per byte, by windows; None of a single one."""

    kind: str
    context: int
    tokens: int
    num_bytes: int
    nats: float
    bits_per_byte: float
    interval: Estimate | None
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of one model. accuracy: the mean over tasks, each counting the same; None without tasks."""

    tasks: Mapping[str, TaskSummary]
    accuracy: Mapping[Norm, Estimate] | None
    texts: Sequence[TextSummary]
    replies: Mapping[str, RepliesSummary]


@dataclass(frozen=True, kw_only=True)
class TaskDifference:
    """accuracy: this model's less the baseline's. gained, lost: items that only this one, or only that one, has right,
    by log-probability.
    """

    accuracy: Mapping[Norm, Estimate]
    gained: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class TextDifference:
    """log_ratio: nats per token more than the baseline spends; ratio: of perplexities, its exponential."""

    kind: str
    context: int
    log_ratio: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model beside a baseline. accuracy: the mean difference over tasks. log_ratio: by context, the mean over kinds.

    texts: empty where the two cut text into different tokens, so that their perplexities do not compare.
    """

    tasks: Mapping[str, TaskDifference]
    accuracy: Mapping[Norm, Estimate] | None
    texts: Sequence[TextDifference]
    log_ratio: Mapping[int, float]
    replies: Mapping[str, RepliesDifference]


def summarise(answers: Answers) -> Summary:
    """What one model's answers come to."""
    hits = [_hits(rows) for rows in answers.tasks.values()]
    return Summary(
        tasks={task: _task(rows) for task, rows in answers.tasks.items()},
        accuracy={norm: estimate(*(one[norm] for one in hits)) for norm in NORMS} if hits else None,
        texts=[_text(rows) for rows in _by_text(answers.windows)],
        replies={task: summarise_replies(rows) for task, rows in answers.replies.items()},
    )


def compare(answers: Answers, baseline: Answers) -> Comparison:
    """Both have answered the same items; windows count where both have answered all the same."""
    gains = [_gains(answers.tasks[task], baseline.tasks[task]) for task in answers.tasks]
    texts = _text_differences(answers.windows, baseline.windows)
    contexts = sorted({one.context for one in texts})
    return Comparison(
        tasks={task: _difference(gain) for task, gain in zip(answers.tasks, gains, strict=True)},
        accuracy={norm: estimate(*(one[norm] for one in gains)) for norm in NORMS} if gains else None,
        texts=texts,
        log_ratio={
            context: float(np.mean([one.log_ratio for one in texts if one.context == context])) for context in contexts
        },
        replies={task: compare_replies(rows, baseline.replies[task]) for task, rows in answers.replies.items()},
    )


def reliability_bins(answers: Answers) -> list[Bin]:
    """Of all items with choices, over all tasks; empty where there is none."""
    rows = [row for task in answers.tasks.values() for row in task if len(row.logprobs) > 1]
    return reliability([softmax(row.logprobs) for row in rows], [row.gold for row in rows]) if rows else []


def _hits(rows: Sequence[ItemRecord]) -> dict[Norm, list[float]]:
    return {norm: [float(row.correct(norm)) for row in rows] for norm in NORMS}


def _gains(rows: Sequence[ItemRecord], others: Sequence[ItemRecord]) -> dict[Norm, list[float]]:
    """1 where only this model is right, -1 where only the other is."""
    assert [row.key for row in rows] == [other.key for other in others]
    return {
        norm: [float(row.correct(norm)) - float(other.correct(norm)) for row, other in zip(rows, others, strict=True)]
        for norm in NORMS
    }


def _task(rows: Sequence[ItemRecord]) -> TaskSummary:
    nats = -sum(row.logprobs[row.gold] for row in rows)
    chosen = [row for row in rows if len(row.logprobs) > 1]
    return TaskSummary(
        items=len(rows),
        accuracy={norm: estimate(hits) for norm, hits in _hits(rows).items()},
        gold_bits_per_byte=nats / math.log(2) / max(1, sum(row.num_bytes[row.gold] for row in rows)),
        calibration=_calibration(chosen) if chosen else None,
    )


def _calibration(rows: Sequence[ItemRecord]) -> Calibration:
    probabilities, gold = [softmax(row.logprobs) for row in rows], [row.gold for row in rows]
    brier, nll = estimate(brier_scores(probabilities, gold)), estimate(nats_spent(probabilities, gold))
    return Calibration(
        ece=expected_calibration_error(probabilities, gold),
        brier=brier.value,
        nll=nll.value,
        brier_interval=brier,
        nll_interval=nll,
    )


def _difference(gain: Mapping[Norm, Sequence[float]]) -> TaskDifference:
    return TaskDifference(
        accuracy={norm: estimate(values) for norm, values in gain.items()},
        gained=sum(value > 0 for value in gain["none"]),
        lost=sum(value < 0 for value in gain["none"]),
    )


def _by_text(windows: Sequence[WindowRecord]) -> list[list[WindowRecord]]:
    """Windows of one kind and context together, in the order in which these first appear."""
    order = {(row.kind, row.context): None for row in windows}
    places = {text: place for place, text in enumerate(order)}
    arranged = sorted(windows, key=lambda row: places[row.kind, row.context])
    return [list(rows) for _, rows in groupby(arranged, key=lambda row: (row.kind, row.context))]


def _text(rows: Sequence[WindowRecord]) -> TextSummary:
    nats, tokens, num_bytes = sum(r.nats for r in rows), sum(r.tokens for r in rows), sum(r.num_bytes for r in rows)
    return TextSummary(
        kind=rows[0].kind,
        context=rows[0].context,
        tokens=tokens,
        num_bytes=num_bytes,
        nats=nats,
        bits_per_byte=nats / math.log(2) / max(1, num_bytes),
        interval=ratio([row.nats / math.log(2) for row in rows], [row.num_bytes for row in rows]),
        perplexity=math.exp(nats / tokens),
    )


def _text_differences(windows: Sequence[WindowRecord], others: Sequence[WindowRecord]) -> list[TextDifference]:
    if {row.key for row in windows} != {row.key for row in others}:
        return []
    held = {row.key: row.nats for row in others}
    found = []
    for rows in _by_text(windows):
        more = sum(row.nats - held[row.key] for row in rows) / sum(row.tokens for row in rows)
        found.append(TextDifference(kind=rows[0].kind, context=rows[0].context, log_ratio=more, ratio=math.exp(more)))
    return found
