"""What a model's replies to problems come to: how many are right, how long they are, and what they cost.

Of one model, and beside another problem by problem. Costs are those of the engine as it ran: shares of batches whose
other replies were of the same task. Knows no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from daedal.eval.estimates import Estimate, estimate, share
from daedal.eval.records import ReplyRecord


@dataclass(frozen=True, kw_only=True)
class RepliesSummary:
    """Of one task. unanswered: replies in which nothing counts as an answer; cut: that were not over at their bound.
    The rest are means of a reply; joules: None where nobody counted them.
    """

    problems: int
    accuracy: Estimate
    unanswered: int
    cut: int
    prompt_tokens: float
    tokens: float
    flops: float
    kv_byte_seconds: float
    device_seconds: float
    joules: float | None
    energy_source: str | None


@dataclass(frozen=True, kw_only=True)
class RepliesDifference:
    """accuracy: this model's less the baseline's. gained, lost: problems that only this, or only that one, solved."""

    accuracy: Estimate
    gained: int
    lost: int


def summarise_replies(rows: Sequence[ReplyRecord]) -> RepliesSummary:
    """Of one task; at least one reply."""
    count = len(rows)
    sources = {row.energy_source for row in rows}
    joules = [row.joules for row in rows if row.joules is not None]
    return RepliesSummary(
        problems=count,
        accuracy=share(sum(row.right for row in rows), count),
        unanswered=sum(row.found is None for row in rows),
        cut=sum(row.finish_reason == "length" for row in rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows) / count,
        tokens=sum(row.tokens for row in rows) / count,
        flops=sum(row.flops for row in rows) / count,
        kv_byte_seconds=sum(row.kv_byte_seconds for row in rows) / count,
        device_seconds=sum(row.device_seconds for row in rows) / count,
        joules=sum(joules) / count if len(joules) == count else None,
        energy_source="; ".join(sorted(source for source in sources if source)) or None,
    )


def compare_replies(rows: Sequence[ReplyRecord], others: Sequence[ReplyRecord]) -> RepliesDifference:
    """Both of the same problems."""
    assert [row.key for row in rows] == [other.key for other in others]
    gains = [float(row.right) - float(other.right) for row, other in zip(rows, others, strict=True)]
    return RepliesDifference(
        accuracy=estimate(gains), gained=sum(gain > 0 for gain in gains), lost=sum(gain < 0 for gain in gains)
    )
