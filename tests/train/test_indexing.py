"""The indexers' lesson against a plain float64 account of it, and that they learn from it."""

import math

import pytest
import torch

from daedal.config import ModelConfig
from daedal.model.forward_pass import Attended, Indexed
from daedal.model.transformer import Transformer, empty, initialise
from daedal.ops.rows import FlatRows
from daedal.train.batches import Batch
from daedal.train.indexing import lesson
from daedal.train.objective import Pretraining, Watch
from tests.tiny import tiny_published


def model_of(family: str, **changes: object) -> Transformer:
    config = ModelConfig.from_published(tiny_published(family, **changes))
    return initialise(empty(config), seed=1)


def batch_of(*lengths: int, seed: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.of([torch.randint(320, (length + 1,), generator=generator).numpy() for length in lengths])


class Keeper(Watch):
    """A watch that keeps what it is shown."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage=stage, index_topk=11, balances=False)
        self.kept: list[tuple[Indexed, Attended]] = []

    def indexed(self, seen: Indexed, attended: Attended, *, again: bool) -> None:
        self.kept.append((seen, attended))


def plain_lesson(seen: Indexed, attended: Attended) -> float:
    """Query by query, head by head: the divergence of the indexer's distribution from attention's."""
    total, start = 0.0, 0
    for sequence, count in enumerate(attended.batch.counts):
        keys, entries = seen.keys.sequence(sequence).double(), attended.entries.sequence(sequence).double()
        window = attended.window.sequence(sequence).double() if attended.window is not None else None
        for place in range(count):
            token = start + place
            visible = set(range((place + 1) // seen.rate))
            if attended.chosen_TA is not None:
                visible &= set(attended.chosen_TA[token].tolist())
            names = sorted(visible)
            if not names:
                continue
            target = torch.zeros(len(names), dtype=torch.float64)
            for head in range(attended.q_THK.shape[1]):
                query = attended.q_THK[token, head].double()
                logits = [float(query @ entries[name]) * attended.scale for name in names]
                others = [] if attended.sinks_H is None else [float(attended.sinks_H[head])]
                if window is not None:
                    nearest = range(max(0, place - attended.span + 1), place + 1)
                    others += [float(query @ window[row]) * attended.scale for row in nearest]
                whole = sum(math.exp(logit) for logit in logits + others)
                target += torch.tensor([math.exp(logit) / whole for logit in logits], dtype=torch.float64)
            target /= target.sum()
            weights = seen.weights_TI[token].double()
            guess = torch.stack([(weights * (seen.q_TIK[token].double() @ keys[name]).relu()).sum() for name in names])
            total += float((target * (target.log() - guess.log_softmax(0))).sum())
        start += count
    return total


@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_the_lesson_is_the_divergence_from_what_all_heads_attend_to(family: str, stage: str) -> None:
    model, watch = model_of(family), Keeper(stage)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(4.0)  # attention that is not all but uniform
        model.states(batch_of(61, 30).inputs, observer=watch)
        assert watch.kept
        for seen, attended in watch.kept:
            assert (attended.chosen_TA is None) == (stage == "warm-up")
            found = lesson(seen, attended, count=11)
            wanted = plain_lesson(seen, attended)
            assert wanted > 1e-3
            torch.testing.assert_close(float(found.loss), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_every_indexer_gets_a_gradient_and_nothing_else_does_in_the_warm_up(family: str) -> None:
    model = model_of(family)
    loss = Pretraining(stage="warm-up")(model, batch_of(61, 30))
    loss.total.backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == ("indexer" in name), name


def test_in_the_sparse_stage_everything_gets_a_gradient_and_the_next_token_gives_indexers_none() -> None:
    model = model_of("deepseek_v4")
    batch = batch_of(140, 30)
    without = Pretraining(indexer_weight=0.0, balance_weight=0.0)(model, batch)
    without.total.backward()
    assert all(not parameter.grad.any() for name, parameter in model.named_parameters() if "indexer" in name)
    model.zero_grad()
    Pretraining()(model, batch).total.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert silent == []


def test_recall_counts_how_much_of_the_best_is_guessed_by_those_who_must_choose() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(12).inputs
    rows_SK = torch.rand(12, 6, generator=generator)  # positive, so that no two scores are cut off to the same zero
    queries_THK = torch.rand(12, 2, 6, generator=generator) * 3

    def of(weight: float) -> tuple[float, float]:
        seen = Indexed(
            layer=0,
            q_TIK=queries_THK,
            weights_TI=torch.full((12, 2), weight),
            keys=FlatRows(rows_SK, (0, 12)),
            rate=1,
        )
        attended = Attended(
            layer=0,
            batch=batch,
            q_THK=queries_THK,
            entries=FlatRows(rows_SK, (0, 12)),
            chosen_TA=None,
            window=None,
            sinks_H=None,
            scale=1.0,
            rate=1,
            span=0,
        )
        found = lesson(seen, attended, count=3)
        assert found.queries == 9, "the first three read all that they see"
        scores_TS = weight * torch.einsum("tik,sk->ts", queries_THK, rows_SK)
        shares_TS = torch.einsum("thk,sk->ths", queries_THK, rows_SK)
        held, recall = 0.0, 0.0
        for token in range(3, 12):
            wanted = shares_TS[token, :, : token + 1].softmax(-1).sum(0)
            guessed, best = (set(row[: token + 1].topk(3).indices.tolist()) for row in (scores_TS[token], wanted))
            recall += len(guessed & best) / 3
            held += float(wanted[list(guessed)].sum() / wanted[list(best)].sum())
        torch.testing.assert_close(float(found.recall), recall)
        torch.testing.assert_close(float(found.held), held)
        return recall / 9, held / 9

    like, unlike = of(1.0), of(-1.0)
    assert unlike[0] < like[0]
    assert unlike[1] < like[1]
    assert min(like) > 0.7


def test_shares_are_told_only_where_attention_reads_everything() -> None:
    model = model_of("deepseek_v32")
    batch = batch_of(30, 5)
    told = Pretraining(stage="warm-up")(model, batch).parts
    assert 0 < float(told["recall"]) < batch.num_targets
    assert 0 < float(told["held"]) < batch.num_targets
    short = Pretraining(stage="warm-up")(model, batch_of(5, 3)).parts
    assert float(short["recall"]) == 8, "nothing to choose, nothing missed; the names are the same on every process"
    assert not {"recall", "held"} & Pretraining()(model, batch).parts.keys()
