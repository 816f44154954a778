"""What others got wrong in V2 to V4, each as a test of its own: experts and residual streams.

As in `test_pitfalls.py`, a model that equals transformers stands ready, and each test plants one mistake.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from daedal import ops
from daedal.model import moe
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass
from daedal.model.transformer import empty
from tests.model.feeding import Feeder
from tests.model.oracles import Proven, v4_pair, v32_pair
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def v4() -> Proven:
    """With limits that many products exceed, an eps that shows where it is added, and few turns, so that rows and
    columns do not settle whatever their order.
    """
    changes = {"swiglu_limit": 0.3, "hc_eps": 0.03, "hc_sinkhorn_iters": 2}
    return Proven.of(v4_pair(6, "window csa", hashed=1, **changes), length=120)


@pytest.fixture(scope="module")
def v32() -> Proven:
    return Proven.of(v32_pair(7, num_hidden_layers=2), length=100)


@pytest.mark.parametrize("family", ["v4", "v32"])
def test_the_bias_steers_the_choice_and_weighs_nothing(
    family: str, request: pytest.FixtureRequest, monkeypatch: Patch
) -> None:
    """Weights are scores without it."""
    proven: Proven = request.getfixturevalue(family)
    real = ops.route

    def biased(logits_TE: Tensor, bias_E: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids_TA, weights_TA = real(logits_TE, bias_E, **kwargs)
        if bias_E is None:
            return ids_TA, weights_TA
        scores_TE = logits_TE.sigmoid() if kwargs["scoring"] == "sigmoid" else F.softplus(logits_TE).sqrt()
        weights_TA = (scores_TE + bias_E).gather(1, ids_TA)
        return ids_TA, weights_TA / weights_TA.sum(1, keepdim=True) * kwargs["scale"]

    monkeypatch.setattr(ops, "route", biased)
    assert proven.is_wrong()


def test_groups_that_are_passed_over_cannot_be_chosen_from() -> None:
    """V3 sets their scores to minus infinity. With 0 they would beat experts whose biased scores are below it."""
    logits, bias = torch.tensor([[2.0, 1.5, 1.0, -1.0, 0.9, 0.8]]), torch.full((6,), -2.0)
    settings = {"num_active": 3, "n_group": 3, "topk_group": 2, "normalise": True, "scale": 1.0}
    ids, _ = ops.route(logits, bias, scoring="sigmoid", method="noaux_tc", **settings)
    assert ids.tolist() == [[0, 1, 4]]
    steered = (logits.sigmoid() + bias)[0]
    assert steered.max() < 0
    zeroed = torch.where(torch.tensor([0, 0, 1, 1, 0, 0]).bool(), 0.0, steered)
    assert zeroed.topk(3).indices.tolist() != ids[0].tolist()


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_the_router_is_float32_in_a_bfloat16_model(family: str, monkeypatch: Patch) -> None:
    """In bfloat16 two experts whose logits differ by a thousandth tie, and the wrong one may be taken."""
    router = moe.Router(tiny_config(family), 1, hashed=False).bfloat16()
    with torch.no_grad():
        router.weight.zero_()
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias.zero_()
        router.weight[:, 0] = 1.0
        router.weight[7, 1] = 2**-10
        x_TD = torch.zeros(1, router.weight.shape[1], dtype=torch.bfloat16)
        x_TD[0, :2] = 1.0
        step = ForwardPass(tiny_config(family), RaggedBatch.of([[0]]), None)
        ids_TA, weights_TA = router(x_TD, step)
        assert ids_TA[0, 0] == 7
        assert weights_TA.dtype == torch.float32
        assert F.linear(x_TD, router.weight).unique().numel() == 1, "in bfloat16 all are equal"
        seen: list[torch.dtype] = []
        real = ops.route
        monkeypatch.setattr(
            ops, "route", lambda logits, *args, **kw: seen.append(logits.dtype) or real(logits, *args, **kw)
        )
        model = tiny_model(family, dtype=torch.bfloat16)
        model(RaggedBatch.of([[1, 2, 3]]))
    assert set(seen) == {torch.float32}
    biases = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert {tensor.dtype for tensor in biases} == {torch.float32}


def test_hash_layers_go_by_the_tokens_id_and_by_nothing_else(v4: Proven, monkeypatch: Patch) -> None:
    """Whoever hands on embeddings without ids, or ids in another order, breaks the first layers."""
    real = moe.Router.forward

    def elsewhere(self: moe.Router, x_TD: Tensor, step: ForwardPass) -> tuple[Tensor, Tensor]:
        batch = replace(step.batch, ids_T=step.batch.ids_T.roll(1))
        return real(self, x_TD, ForwardPass(self.config, batch, step.cache))

    monkeypatch.setattr(moe.Router, "forward", elsewhere)
    assert v4.is_wrong()


def test_two_tokens_of_one_embedding_differ_by_their_experts() -> None:
    model = tiny_model("deepseek_v4")
    table = model.layers[0].mlp.gate.tid2eid
    assert model.layers[1].mlp.gate.tid2eid is None
    with torch.no_grad():
        model.embed_tokens.weight[11] = model.embed_tokens.weight[10]
        table[10], table[11] = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 4])
        (got,) = Feeder(model, [4]).feed({0: [10, 11]}).values()
        table[11] = table[10]
        (same,) = Feeder(model, [4]).feed({0: [10, 11]}).values()
    assert (got[1] - same[1]).abs().max() > 1e-3
    torch.testing.assert_close(got[0], same[0])


def test_the_table_of_experts_travels_with_the_weights() -> None:
    """It is data that no seed brings back: a model without it must not load."""
    weights = tiny_model("deepseek_v4").state_dict()
    table = weights.pop("layers.0.mlp.gate.tid2eid")
    assert table.dtype == torch.int64
    with pytest.raises(RuntimeError, match="tid2eid"):
        empty(tiny_config("deepseek_v4")).load_state_dict(weights)


@pytest.mark.parametrize("part", ["shared_experts", "experts"])
def test_routed_and_shared_experts_are_both_cut_off(v4: Proven, part: str, monkeypatch: Patch) -> None:
    """Left out for either by three ports."""
    for layer in v4.model.layers:
        monkeypatch.setattr(getattr(layer.mlp, part), "limit", None)
    assert v4.is_wrong()


@pytest.mark.parametrize(
    "planted",
    [
        lambda gate, up, limit: (F.silu(gate) * up).clamp(-limit, limit),
        lambda gate, up, limit: F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit),
        lambda gate, up, limit: F.silu(gate.clamp(-limit, limit)) * up.clamp(-limit, limit),
        lambda gate, up, limit: F.silu(gate.clamp(max=limit)) * up.clamp(max=limit),
    ],
    ids=["after the product", "after the activation", "the gate below too", "the other above only"],
)
def test_products_are_cut_off_before_they_are_formed(
    v4: Proven, planted: Callable[[Tensor, Tensor, float], Tensor], monkeypatch: Patch
) -> None:
    """The gate above, before its activation; the other on both sides."""
    monkeypatch.setattr(ops, "swiglu", lambda gate, up, *, limit: planted(gate, up, limit))
    assert v4.is_wrong()


Mixing = tuple[Tensor, Tensor, Tensor]


def _rows_first(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, **settings: Any) -> Mixing:
    """As the paper writes it: exp, then rows and columns in turn."""
    x_TD, post_TM, _ = ops_collapse(streams, fn, base, scale, **settings)
    flat, num = streams.flatten(1), streams.shape[1]
    mixes = (flat * torch.rsqrt(flat.square().mean(1, keepdim=True) + settings["norm_eps"])) @ fn.T
    comb_TMM = (mixes[:, 2 * num :] * scale[2] + base[2 * num :]).unflatten(1, (num, num)).exp()
    for _ in range(settings["iterations"]):
        comb_TMM = comb_TMM / (comb_TMM.sum(2, keepdim=True) + settings["eps"])
        comb_TMM = comb_TMM / (comb_TMM.sum(1, keepdim=True) + settings["eps"])
    return x_TD, post_TM, comb_TMM


def _transposed(*args: Tensor, **settings: Any) -> Mixing:
    x_TD, post_TM, comb_TMM = ops_collapse(*args, **settings)
    return x_TD, post_TM, comb_TMM.transpose(1, 2)


def _post_with_eps(*args: Tensor, **settings: Any) -> Mixing:
    x_TD, post_TM, comb_TMM = ops_collapse(*args, **settings)
    return x_TD, post_TM + settings["eps"], comb_TMM


def _post_not_doubled(*args: Tensor, **settings: Any) -> Mixing:
    x_TD, post_TM, comb_TMM = ops_collapse(*args, **settings)
    return x_TD, post_TM / 2, comb_TMM


def _one_turn_more(*args: Tensor, iterations: int, **settings: Any) -> Mixing:
    """Ends on rows."""
    x_TD, post_TM, comb_TMM = ops_collapse(*args, iterations=iterations, **settings)
    return x_TD, post_TM, comb_TMM / (comb_TMM.sum(2, keepdim=True) + settings["eps"])


ops_collapse = ops.hyper_collapse


@pytest.mark.parametrize("planted", [_transposed, _post_with_eps, _post_not_doubled, _rows_first, _one_turn_more])
def test_streams_mix_by_columns_first_and_by_the_transposed_matrix(
    v4: Proven, planted: Callable[..., Mixing], monkeypatch: Patch
) -> None:
    """Stream k takes comb[j, k] of stream j; the block's output returns by 2 sigmoid, without eps; the matrix is made
    by a softmax over rows, then columns, then rows and columns in turn. The code says so, the paper less exactly.
    """
    monkeypatch.setattr(ops, "hyper_collapse", planted)
    assert v4.is_wrong()


def test_streams_are_mixed_in_float32_in_a_bfloat16_model(monkeypatch: Patch) -> None:
    """Twenty divisions in bfloat16 leave no doubly stochastic matrix."""
    sums: list[Tensor] = []

    def seen(*args: Tensor, **settings: Any) -> Mixing:
        result = ops_collapse(*args, **settings)
        assert {result[1].dtype, result[2].dtype} == {torch.float32}
        sums.append(result[2].sum(1))
        return result

    monkeypatch.setattr(ops, "hyper_collapse", seen)
    with torch.no_grad():
        tiny_model("deepseek_v4", dtype=torch.bfloat16)(RaggedBatch.of([list(range(40))]))
    torch.testing.assert_close(torch.cat(sums), torch.ones(8 * 40, 4), rtol=0, atol=1e-4)
