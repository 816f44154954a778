"""Dense feed-forward parts as experts: exact splits, what a choice costs, routers, groups and compensation."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from daedal.checkpoint.save import save
from daedal.convert.compensation import compensated
from daedal.convert.exactness import EXACT, furthest_logit
from daedal.convert.expert_layers import exact_layers, routed_layers, with_experts
from daedal.convert.expert_statistics import EVEN_SHARE, FIRST_SHARE, output_metrics, token_weights
from daedal.convert.experts import DenseMLP, ExpertSettings, exact_mlp, routed_mlp
from daedal.convert.layer_sample import LayerSample
from daedal.convert.neuron_groups import balanced
from daedal.convert.router import fit_router
from daedal.errors import ConfigError
from daedal.model.transformer import Transformer
from tests.tiny import tiny_model

HALF = ExpertSettings(experts=9, shared=3, active=3)
LATER = ExpertSettings(experts=9, shared=3, active=3, dense_layers=1)


def dense_v3() -> Transformer:
    return tiny_model("deepseek_v3", first_k_dense_replace=3)


def windows(count: int, length: int) -> list[Tensor]:
    return list(torch.randint(0, 320, (count, length)))


def test_all_experts_active_are_the_dense_model() -> None:
    model = dense_v3()
    settings = ExpertSettings(experts=12, shared=2, active=10, dense_layers=1)
    split = with_experts(model, settings, exact_layers(model, settings))
    ids_BT = torch.randint(0, 320, (2, 40))
    with torch.no_grad():
        assert split.config.moe_intermediate_size == 6
        assert split.config.to_published()["first_k_dense_replace"] == 1
        torch.testing.assert_close(split.logits(ids_BT), model.logits(ids_BT), atol=2e-5, rtol=2e-5)


def test_one_function_is_told_from_two_in_float64() -> None:
    model, texts = dense_v3(), windows(2, 24)
    settings = ExpertSettings(experts=12, shared=2, active=10)
    split = with_experts(model, settings, exact_layers(model, settings))
    told: list[int] = []
    assert furthest_logit(model, split, texts, told.append) < 1e-10
    assert told == [24, 24]
    with torch.no_grad():
        split.layers[1].mlp.experts.down_proj[3] += 0.01
        wanted = max(
            float((split.double().logits(ids_T[None]) - model.double().logits(ids_T[None])).abs().max())
            for ids_T in texts
        )
    assert furthest_logit(model, split, texts) == pytest.approx(wanted, rel=1e-6)
    assert wanted > EXACT


def test_transformers_reads_routed_experts_and_answers_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, texts = dense_v3(), windows(8, 48)
    made = with_experts(model, LATER, routed_layers(model, texts, output_metrics(model, texts[:2]), LATER))
    save(made, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    ids_BT = torch.randint(0, 320, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(made.logits(ids_BT), stock(ids_BT).logits, atol=5e-5, rtol=5e-5)
        assert (made.logits(ids_BT) - model.logits(ids_BT)).abs().max() > 1e-3  # fewer experts are another function


def test_a_router_s_gates_are_those_of_the_stock_layer() -> None:
    x_TD = torch.randn(500, 12) + 2.0 * one_hot(torch.tensor(3), 12)
    energy_TE = (x_TD[:, :6] + torch.arange(6) - 2.0).square()
    router = fit_router(x_TD, energy_TE, torch.rand(500), active=2)
    scores_TE = (x_TD @ router.weight_ED.T).sigmoid()
    chosen_TA = (scores_TE + router.bias_E).topk(2, -1).indices
    on_TE = torch.zeros(500, 6).scatter(-1, chosen_TA, 1.0)
    gates_TE = 2 * scores_TE * on_TE / (scores_TE * on_TE).sum(-1, keepdim=True)
    torch.testing.assert_close(router.gates(x_TD), gates_TE)
    # Small logits: what is on is nearly 1. And the choice is better than always that of most energy.
    assert float((gates_TE[on_TE > 0] - 1).abs().max()) < 0.5
    always_TE = torch.zeros(500, 6).index_fill(1, energy_TE.mean(0).topk(2).indices, 1.0)
    kept, constant = ((on * energy_TE).sum() for on in (on_TE, always_TE))
    assert kept > constant


def test_groups_of_given_sizes_cost_least() -> None:
    for seed in range(20):
        cost_FE = torch.rand(7, 3, generator=torch.Generator().manual_seed(seed)) ** 4
        capacity = [2, 2, 3]
        found = balanced(cost_FE, capacity)
        assert found.bincount(minlength=3).tolist() == capacity
        deals = {tuple(deal) for deal in permutations([0, 0, 1, 1, 2, 2, 2])}
        least = min(float(cost_FE.gather(1, torch.tensor(deal).unsqueeze(-1)).sum()) for deal in deals)
        assert float(cost_FE.gather(1, found.unsqueeze(-1)).sum()) <= 1.1 * least
    tied = balanced(torch.zeros(12, 4), [3, 3, 3, 3])
    assert tied.bincount(minlength=4).tolist() == [3, 3, 3, 3]


def planted(tokens: int) -> tuple[DenseMLP, LayerSample]:
    """Four kinds of token, each with eight neurons that it alone needs; eight more are needed by all. Shuffled."""
    kinds_T = torch.arange(tokens) % 4
    x_TD = 0.3 * torch.randn(tokens, 24)
    x_TD[:, :4] = 6.0 * torch.eye(4)[kinds_T] - 3.0
    x_TD[:, 4] = 3.0
    gate_FD = torch.zeros(40, 24)
    for kind in range(4):
        gate_FD[8 * kind : 8 * kind + 8, kind] = 2.0
    gate_FD[32:, 4] = 2.0
    up_FD, shuffled = 0.03 * torch.randn(40, 24), torch.randperm(40)
    up_FD[:, 4] = 1.0
    dense = DenseMLP(gate_FD=gate_FD[shuffled], up_FD=up_FD, down_DF=normalize(torch.randn(24, 40), dim=0))
    target_TD = dense.hidden(x_TD) @ dense.down_DF.T
    held_T = torch.arange(tokens) % 7 == 0
    weights_T = torch.full((tokens,), 1 / tokens)
    return dense, LayerSample(
        x_TD=x_TD, target_TD=target_TD, weights_T=weights_T, metric_DD=torch.eye(24), held_T=held_T
    )


def test_planted_experts_are_found() -> None:
    dense, sample = planted(2000)
    settings = ExpertSettings(experts=5, shared=1, active=1)
    made, report = routed_mlp(dense, sample, settings)
    assert report.router > 0.99
    assert report.compensated >= report.router
    error_TD = made(sample.x_TD) - sample.target_TD
    assert float(error_TD.square().sum() / sample.target_TD.square().sum()) < 0.01
    # The oracle has no better groups than the router, so it cannot be far ahead.
    assert report.oracle - report.router < 0.01


def test_a_last_matrix_makes_up_for_lost_inputs_but_never_harms() -> None:
    hidden_TF, down_DF = torch.randn(600, 8), torch.randn(6, 8)
    hidden_TF[:, 7] = hidden_TF[:, 0] + 0.1 * torch.randn(600)
    target_TD = hidden_TF @ down_DF.T
    lost_TF = hidden_TF.clone()
    lost_TF[:, 7] = 0
    found = compensated(lost_TF, down_DF, sampled(target_TD, torch.arange(600) % 5 == 0))
    torch.testing.assert_close(found.down_DF[:, 0], down_DF[:, 0] + down_DF[:, 7], atol=0.1, rtol=0)
    assert found.error < 0.02
    # Of seven noisy tokens nothing can be learned: the old matrix stays where it is better on the others.
    few_TD = (target_TD + 3 * torch.randn_like(target_TD))[:14]
    sample = sampled(few_TD, torch.arange(14) % 2 == 0)
    untouched = sample.of(sample.held_T).error(target_TD[:14][sample.held_T])
    assert compensated(hidden_TF[:14], down_DF, sample).error <= untouched * (1 + 1e-6)


def sampled(target_TD: Tensor, held_T: Tensor) -> LayerSample:
    tokens = len(target_TD)
    return LayerSample(
        x_TD=torch.zeros(tokens, 1),
        target_TD=target_TD,
        weights_T=torch.full((tokens,), 1 / tokens),
        metric_DD=torch.eye(target_TD.shape[1]),
        held_T=held_T,
    )


def test_metrics_know_what_the_head_reads() -> None:
    model, texts = tiny_model("llama"), windows(2, 32)
    with torch.no_grad():
        model.norm.weight[5] = 0.0
    metrics = output_metrics(model, texts)
    assert len(metrics) == 3
    for metric_DD in metrics:
        torch.testing.assert_close(metric_DD, metric_DD.T)
        assert float(metric_DD.diagonal().mean()) == pytest.approx(1.0, abs=1e-5)
        assert float(torch.linalg.eigvalsh(metric_DD).min()) > 0.9 * EVEN_SHARE
    # After the last layer the gradient of a direction that the norm's gain hides is its share in the residual's length.
    assert float(metrics[-1][5, 5]) < 0.5
    torch.testing.assert_close(output_metrics(model, texts)[0], metrics[0])


def test_tokens_count_relative_to_their_residual() -> None:
    residual_TD = torch.randn(10, 6)
    residual_TD[0] *= 1000
    first_T = torch.arange(10) == 0
    weights_T = token_weights(residual_TD, first_T)
    assert float(weights_T.sum()) == pytest.approx(1.0)
    assert float(weights_T[0]) == pytest.approx(FIRST_SHARE)
    relative_T = weights_T[1:] * residual_TD[1:].square().mean(-1)
    torch.testing.assert_close(relative_T, relative_T[:1].expand(9))


def test_a_layer_makes_up_for_errors_from_before_it() -> None:
    teacher, model, texts = dense_v3(), dense_v3(), windows(16, 64)
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight += 0.05 * torch.randn_like(model.layers[0].self_attn.o_proj.weight)
    metrics, ids_BT = output_metrics(teacher, texts[:2]), torch.stack(texts)

    def away(made: Transformer) -> float:
        return float((made.logits(ids_BT).softmax(-1) - teacher.logits(ids_BT).softmax(-1)).abs().sum(-1).mean())

    with torch.no_grad():
        alone = with_experts(model, HALF, routed_layers(model, texts, metrics, HALF))
        led = with_experts(model, HALF, routed_layers(model, texts, metrics, HALF, teacher=teacher))
        assert away(led) < away(alone)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (lambda: ExpertSettings(experts=16, shared=0, active=8), "at least 1 must be"),
        (lambda: ExpertSettings(experts=16, shared=4, active=13), "1 to 12 can be"),
        (lambda: ExpertSettings.of_share(16, 0.7), "must be whole"),
        (lambda: ExpertSettings(dense_layers=3).config_fields(72, 3), "at least one must become experts"),
        (lambda: ExpertSettings(experts=7, shared=1, active=6).width(72), "choose a number that divides them"),
        (lambda: list(exact_layers(tiny_model("deepseek_v3", first_k_dense_replace=0), HALF)), "experts already"),
        (lambda: with_experts(tiny_model("llama"), HALF, []), "latent attention"),
        (lambda: list(routed_layers(tiny_model("llama"), windows(1, 8), [], HALF)), "give more text"),
        (lambda: exact_mlp(planted(8)[0], ExpertSettings(experts=5, shared=1, active=2)), "needs them all"),
    ],
)
def test_what_cannot_be_done_is_said(wanted: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted()  # type: ignore[operator]
