"""Withdrawn tokens leave no trace: a sequence that says a smaller past goes on as if they had never been fed.

Rows that were written stay where they are, in pages and in rings, and are written again. That holds for up to `REWIND`
tokens; rings are not long enough for more, and nobody asks for more.
"""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from daedal.infer.cache import REWIND
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer
from tests.model.feeding import Feeder
from tests.tiny import tiny_model

TOLERANCE = 1e-4
# Around groups of 4 and 128, a window of 16, its ring of 24, the rings of open groups (16 and 136), 11 chosen rows.
BOUNDARIES = {"deepseek_v4": (4, 16, 24, 128, 136, 256), "deepseek_v32": (4, 11, 16), "deepseek_v3": (4,)}
RATES = {"compressed_sparse_attention": 6, "heavily_compressed_attention": 9}


def _pasts(family: str) -> list[int]:
    return sorted({boundary + offset for boundary in BOUNDARIES[family] for offset in (-3, -2, -1, 0, 1)})


def _ids(seed: int, count: int, length: int) -> list[list[int]]:
    return torch.randint(0, 320, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _logits(model: Transformer, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of each sequence, in one pass without a cache."""
    return list(model(RaggedBatch.of(sequences)).split([len(ids) for ids in sequences]))


def _withdraw(feeder: Feeder, pasts: Sequence[int]) -> None:
    feeder.pasts[:] = pasts


def _assert_equal(got: dict[int, Tensor], wanted: Sequence[Tensor], pasts: Sequence[int]) -> None:
    for name, logits_TV in got.items():
        right_TV = wanted[name][pasts[name] : pasts[name] + logits_TV.shape[0]]
        torch.testing.assert_close(logits_TV, right_TV, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", BOUNDARIES)
def test_at_every_alignment_any_number_of_wrong_tokens_is_forgotten(family: str) -> None:
    """At each length 1 to 8 wrong tokens, withdrawn, then 8 to 1 right ones, withdrawn too, over and over."""
    model, pasts = tiny_model(family), _pasts(family)
    sequences = _ids(1, len(pasts), pasts[-1] + REWIND)
    wrong = _ids(2, len(pasts), REWIND)
    wanted = _logits(model, sequences)
    feeder = Feeder(model, [past + REWIND for past in pasts])
    got = feeder.feed({name: ids[: pasts[name]] for name, ids in enumerate(sequences)})
    _assert_equal(got, wanted, [0] * len(pasts))
    for count in range(1, REWIND + 1):
        feeder.feed({name: ids[:count] for name, ids in enumerate(wrong)})
        _withdraw(feeder, pasts)
        ends = [past + REWIND + 1 - count for past in pasts]
        got = feeder.feed({name: ids[pasts[name] : ends[name]] for name, ids in enumerate(sequences)})
        _assert_equal(got, wanted, pasts)
        _withdraw(feeder, pasts)
    feeder.assert_nothing_else_was_touched()


@pytest.mark.parametrize(
    ("family", "changes", "starts"),
    [
        ("deepseek_v4", {}, (0, 1, 9, 101, 118, 125)),
        ("deepseek_v4", {}, (119,)),
        ("deepseek_v4", {"compress_rates": RATES, "sliding_window": 3, "index_topk": 2}, (0, 2, 5, 13)),
        ("deepseek_v32", {}, (0, 1, 3, 10)),
    ],
)
def test_drafts_that_are_partly_accepted_leave_the_answer_as_it_was(
    family: str, changes: dict[str, object], starts: tuple[int, ...]
) -> None:
    """A walk: some right tokens with wrong ones behind them, in one step or one by one; the wrong ones are withdrawn.
    The right ones' logits, and those of the wrong ones on their own past, are as if fed plainly. Some sit out a step.
    """
    model, dice = tiny_model(family, **changes), random.Random(5)
    ends = [start + 40 for start in starts]
    sequences = _ids(3, len(starts), max(ends))
    wanted = _logits(model, sequences)
    feeder = Feeder(model, [end + REWIND for end in ends])
    feeder.feed({name: ids[:start] for name, (ids, start) in enumerate(zip(sequences, starts, strict=True)) if start})
    while open_ones := [name for name, past in enumerate(feeder.pasts) if past < ends[name]]:
        live = [name for name in open_ones if dice.random() < 0.8] or open_ones
        pasts = list(feeder.pasts)
        accepted = {name: dice.randint(0, min(4, ends[name] - pasts[name])) for name in live}
        (wrong,) = _ids(dice.randrange(10**6), 1, dice.randint(1, REWIND))
        fed = {name: sequences[name][pasts[name] : pasts[name] + accepted[name]] + wrong for name in live}
        drafted = _feed(feeder, fed, one_by_one=dice.random() < 0.4)
        _assert_equal({name: drafted[name][: accepted[name]] for name in live}, wanted, pasts)
        name = live[-1]
        alone = _logits(model, [sequences[name][: pasts[name]] + fed[name]])
        _assert_equal({name: drafted[name]}, {name: alone[0]}, pasts)
        _withdraw(feeder, [past + accepted.get(name, 0) for name, past in enumerate(pasts)])
    feeder.assert_nothing_else_was_touched()


def _feed(feeder: Feeder, pieces: dict[int, list[int]], *, one_by_one: bool) -> dict[int, Tensor]:
    if not one_by_one:
        return feeder.feed(pieces)
    parts: dict[int, list[Tensor]] = {name: [] for name in pieces}
    for place in range(max(len(ids) for ids in pieces.values())):
        step = {name: ids[place : place + 1] for name, ids in pieces.items() if place < len(ids)}
        for name, logits_TV in feeder.feed(step).items():
            parts[name].append(logits_TV)
    return {name: torch.cat(part) for name, part in parts.items()}
