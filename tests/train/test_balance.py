"""Loads, the bias update and the sequence-wise loss, against sums written out."""

import torch

from daedal.config import ModelConfig
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import Routed
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train.balance import balance, load_of, routers, sequence_loss, update_biases
from daedal.train.batches import Batch
from daedal.train.objective import Pretraining
from tests.tiny import tiny_published


def model_of(family: str, seed: int = 0) -> Transformer:
    config = ModelConfig.from_published(tiny_published(family, num_nextn_predict_layers=1))
    return initialise(empty(config, drafting=True), seed=seed)


def batch_of(*lengths: int, seed: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.of([torch.randint(320, (length + 1,), generator=generator).numpy() for length in lengths])


def routed(scoring: str) -> Routed:
    generator = torch.Generator().manual_seed(1)
    batch = RaggedBatch.of([[1] * 5, [2] * 3])
    logits_TE = torch.randn(8, 6, generator=generator, dtype=torch.float64).requires_grad_()
    ids_TA = torch.randint(6, (8, 2), generator=generator)
    return Routed(layer=1, batch=batch, logits_TE=logits_TE, ids_TA=ids_TA, scoring=scoring, hashed=False)


def test_the_sequence_loss_is_the_published_sum() -> None:
    for scoring, score in (("softmax", lambda x: x.softmax(-1)), ("sigmoid", torch.sigmoid)):
        seen = routed(scoring)
        scores_TE, wanted = score(seen.logits_TE.detach()), 0.0
        for begin, end in ((0, 5), (5, 8)):
            length = end - begin
            for expert in range(6):
                best = [set(row.topk(2).indices.tolist()) for row in scores_TE[begin:end]]
                f = 6 / (2 * length) * sum(expert in chosen for chosen in best)
                p = sum(float(row[expert] / row.sum()) for row in scores_TE[begin:end]) / length
                wanted += length * f * p
        loss = sequence_loss(seen)
        torch.testing.assert_close(loss.item(), wanted)
        assert torch.autograd.grad(loss, seen.logits_TE)[0].any()


def test_a_load_counts_every_choice() -> None:
    seen = routed("sigmoid")
    assert load_of(seen).tolist() == [int((seen.ids_TA == expert).sum()) for expert in range(6)]


def test_biases_move_by_the_speed_towards_the_mean() -> None:
    model = model_of("deepseek_v3")
    biased = {layer: router for layer, router in routers(model).items()}
    assert set(biased) == {1, 2, 3}, "two layers of experts and the drafting module"
    loads = {layer: torch.tensor([9, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0]) for layer in biased}
    update_biases(model, loads, speed=0.5)
    for router in biased.values():
        assert router.e_score_correction_bias is not None
        assert router.e_score_correction_bias.tolist() == [-0.5] + [0.0] * 9 + [0.5, 0.5]


def test_balance_names_the_busiest_and_the_idle() -> None:
    found = balance({0: torch.tensor([4, 2, 0, 2]), 1: torch.tensor([1, 1, 1, 1])})
    assert found is not None
    assert (found.max_violation, found.worst_violation, found.idle) == (0.5, 1.0, 1)
    assert balance({}) is None


def test_every_layer_that_chooses_is_counted_once_even_when_computed_twice() -> None:
    batch = batch_of(30, 17)
    for family in ("deepseek_v3", "deepseek_v4"):
        model = model_of(family)
        kept = Pretraining()(model, batch)
        model.recompute = True
        again = Pretraining()(model, batch)
        again.total.backward()
        assert set(kept.loads) == set(again.loads) == set(routers(model))
        num_active = model.config.num_experts_per_tok
        last = max(kept.loads)
        for layer, load_E in kept.loads.items():
            tokens = 47 if layer != last else 45  # a draft has no target behind a sequence's last token
            assert load_E.sum() == num_active * tokens
            assert load_E.tolist() == again.loads[layer].tolist()


def test_evaluation_counts_nothing() -> None:
    model = model_of("deepseek_v3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        model.logits(torch.arange(10).unsqueeze(0))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
