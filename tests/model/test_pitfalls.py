"""What others got wrong in V2 to V4, each as a test of its own: rotation and attention.

A model that equals transformers stands ready; each test plants one mistake and sees that the logits tell. So none of
these can creep in unseen, and each line says what the mistake was. Experts, streams and serving have their own files.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.errors import ConfigError
from daedal.model import attention_compressed
from daedal.model.attention_sparse import TokenIndexer
from daedal.model.forward_pass import ForwardPass, Groups
from daedal.model.rotary import angles
from daedal.model.transformer import Transformer, empty
from daedal.ops import reference_sparse
from daedal.ops.rows import Rows
from daedal.rope import RopeParameters
from tests.model.oracles import Proven, v2_pair, v3_pair, v4_pair, v32_pair

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def v4() -> Proven:
    return Proven.of(v4_pair(4, "window csa hca csa", hashed=1), length=300)


@pytest.fixture(scope="module")
def v32() -> Proven:
    return Proven.of(v32_pair(4, num_hidden_layers=2), length=150)


def test_v32s_indexer_turns_halves_and_not_pairs(v32: Proven, monkeypatch: Patch) -> None:
    """Interleaved by mistake in the first published engine: retrieval falls off beyond 16K tokens."""

    def in_pairs(self: TokenIndexer, x_THK: Tensor, step: ForwardPass) -> Tensor:
        rotated, plain = x_THK.split((self.rope, self.dim - self.rope), -1)
        return torch.cat((ops.rotary(rotated, *step.turn(), interleaved=True), plain), -1)

    monkeypatch.setattr(TokenIndexer, "_rotate", in_pairs)
    assert v32.is_wrong()


def test_v32s_indexer_turns_the_first_numbers_and_not_the_last(v32: Proven, monkeypatch: Patch) -> None:
    """V4 turns the last, everywhere; V3.2's main heads too."""

    def the_last(self: TokenIndexer, x_THK: Tensor, step: ForwardPass) -> Tensor:
        plain, rotated = x_THK.split((self.dim - self.rope, self.rope), -1)
        return torch.cat((plain, ops.rotary(rotated, *step.turn(), interleaved=False)), -1)

    monkeypatch.setattr(TokenIndexer, "_rotate", the_last)
    assert v32.is_wrong()


@pytest.mark.parametrize("make", [v2_pair, v3_pair, v32_pair])
@pytest.mark.parametrize("name", ["length_scale", "rotation_scale"])
def test_yarn_scales_the_softmax_by_m_squared_up_to_v32(
    make: Callable[[int], tuple[torch.nn.Module, Transformer]], name: str, monkeypatch: Patch
) -> None:
    """m² left out of the softmax, or put into cosine and sine: exact at the first token, then adrift with length."""
    proven = Proven.of(make(0), length=60)
    right = RopeParameters.length_scale(proven.model.config.rope_parameters)
    assert right > 1.5
    monkeypatch.setattr(RopeParameters, name, lambda rope: 1.0 if name == "length_scale" else right**0.5)
    planted = empty(proven.model.config)
    planted.load_state_dict(proven.model.state_dict())
    error_T = proven.errors(planted)
    assert error_T[0] < 1e-4
    assert error_T[30:].max() > 1e-2


def test_yarn_scales_nothing_in_v4(v4: Proven, monkeypatch: Patch) -> None:
    """Its YaRN bends frequencies only: no m² in the softmax."""
    assert v4.model.config.compress_rope_parameters is not None
    m = 1 + 0.1 * torch.tensor(v4.model.config.compress_rope_parameters.factor).log().item()
    real = ops.sparse_attention
    monkeypatch.setattr(
        ops, "sparse_attention", lambda *args, scale, **kwargs: real(*args, scale=scale * m * m, **kwargs)
    )
    assert v4.is_wrong()


def test_yarn_leaves_v4s_magnitudes_at_one(v4: Proven, monkeypatch: Patch) -> None:
    """1 + 0.1 ln(factor) on cosine and sine is what YaRN does elsewhere."""
    monkeypatch.setattr(RopeParameters, "rotation_scale", lambda rope: 1.277 if rope.rope_type == "yarn" else 1.0)
    assert v4.is_wrong()


def test_layers_with_a_window_only_have_no_yarn(v4: Proven, monkeypatch: Patch) -> None:
    """Left on it turns the window by a few degrees. No configuration can ask for it."""
    config = v4.model.config
    assert config.compress_rope_parameters is not None
    stretched = replace(config.compress_rope_parameters, rope_theta=config.rope_parameters.rope_theta)
    with pytest.raises(ConfigError, match="plain rotation"):
        config.replace(rope_parameters=stretched)
    real = ForwardPass._angles

    def left_on(step: ForwardPass, positions_T: Tensor, compressed: bool) -> tuple[Tensor, Tensor]:
        return real(step, positions_T, True) if compressed else angles(stretched, config.rope_dim, positions_T)

    monkeypatch.setattr(ForwardPass, "_angles", left_on)
    assert v4.is_wrong()


@pytest.mark.parametrize("theta", [10000.0, 40000.0])
def test_layers_with_entries_have_a_base_of_their_own(v4: Proven, theta: float, monkeypatch: Patch) -> None:
    """One base for all collapses after some two hundred tokens; 40000 is a default that no release uses."""
    config = v4.model.config
    assert config.compress_rope_parameters is not None
    assert (config.rope_parameters.rope_theta, config.compress_rope_parameters.rope_theta) == (1e4, 1.6e5)
    other = replace(config.compress_rope_parameters, rope_theta=theta)
    monkeypatch.setattr(v4.model, "config", config.replace(compress_rope_parameters=other))
    assert v4.is_wrong()


def test_queries_and_window_rows_turn_as_the_entries_beside_them(v4: Proven, monkeypatch: Patch) -> None:
    """The base of layers with entries holds for all that these layers read, not for the entries alone."""
    real = ForwardPass.turn
    monkeypatch.setattr(ForwardPass, "turn", lambda step, *, compressed=False: real(step, compressed=False))
    assert v4.is_wrong()


def test_v4_turns_pairs_and_not_halves(v4: Proven, monkeypatch: Patch) -> None:
    """The first port turned halves: cosine similarity 0.87 instead of 0.999."""

    def halves(x_THK: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        plain = x_THK.shape[-1] - 2 * cos_TC.shape[-1]
        tail = ops.rotary(x_THK[..., plain:], cos_TC, sin_TC, interleaved=False)
        return torch.cat((x_THK[..., :plain], tail), -1)

    monkeypatch.setattr(attention_compressed, "rotate_tail", halves)
    assert v4.is_wrong()


def test_v4_turns_the_last_numbers_of_a_head(v4: Proven, monkeypatch: Patch) -> None:
    """V3.2's indexer turns the first, V4 nothing but the last."""

    def first(x_THK: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        size = 2 * cos_TC.shape[-1]
        return torch.cat((ops.rotary(x_THK[..., :size], cos_TC, sin_TC, interleaved=True), x_THK[..., size:]), -1)

    monkeypatch.setattr(attention_compressed, "rotate_tail", first)
    assert v4.is_wrong()


def test_what_attention_brings_back_is_turned_back(v4: Proven, monkeypatch: Patch) -> None:
    """Rows are values too, so the output still carries their positions."""
    real = attention_compressed.rotate_tail

    def never_back(x_THK: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        # The slowest pair turns by less than half a circle, so its sine tells forwards from backwards.
        return x_THK if sin_TC[-1, -1] < 0 else real(x_THK, cos_TC, sin_TC)

    monkeypatch.setattr(attention_compressed, "rotate_tail", never_back)
    assert v4.is_wrong()


@pytest.mark.parametrize("planted", ["entry's number", "last token"])
def test_an_entry_turns_to_the_first_token_of_its_group(v4: Proven, planted: str, monkeypatch: Patch) -> None:
    """Not to its number in the pool, nor to the token that completes it."""
    real = ForwardPass._find_groups

    def elsewhere(step: ForwardPass, rate: int) -> Groups:
        groups = real(step, rate)
        rope, dim = step._config.compress_rope_parameters, step._config.rope_dim
        assert rope is not None
        numbers_N = torch.arange(groups.is_first_N.shape[0])
        places_N = numbers_N if planted == "entry's number" else numbers_N * rate + rate - 1
        return replace(groups, turn=angles(rope, dim, places_N))

    monkeypatch.setattr(ForwardPass, "_find_groups", elsewhere)
    assert v4.is_wrong()


@pytest.mark.parametrize("layers", ["window", "hca"])
def test_rows_and_entries_are_normed_before_they_turn(layers: str, monkeypatch: Patch) -> None:
    """The norm has weights, so the other order is another model."""
    proven = Proven.of(v4_pair(5, layers), length=270)
    attention = proven.model.layers[0].self_attn
    owner = attention if layers == "window" else attention.compressor
    norm, real = owner.kv_norm, attention_compressed.rotate_tail

    def then_norm(x_THK: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        turned = real(x_THK, cos_TC, sin_TC)
        is_planted = x_THK.shape[1] == 1 and (x_THK.shape[0] == 2) == (layers == "hca")
        return norm(turned) if is_planted else turned

    monkeypatch.setattr(attention_compressed, "rotate_tail", then_norm)
    monkeypatch.setattr(owner, "kv_norm", torch.nn.Identity())
    assert proven.is_wrong()


def test_queries_of_v4_are_normed_head_by_head(v4: Proven, monkeypatch: Patch) -> None:
    """Without weights, after their projection; easily overlooked, as the checkpoint has nothing of it."""
    real = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x, weight, eps: x if x.dim() == 3 else real(x, weight, eps))
    assert v4.is_wrong()


@pytest.mark.parametrize("planted", ["scaled", "left out", "zero"])
def test_a_sink_is_a_logit_that_is_not_scaled_and_has_no_value(v4: Proven, planted: str, monkeypatch: Patch) -> None:
    """It joins the softmax as it is and takes its share away."""
    real = ops.sparse_attention
    other = {"scaled": lambda sinks, scale: sinks * scale, "left out": lambda *_: None, "zero": lambda s, _: s * 0}

    def wrong(*args: Any, scale: float, **kwargs: Any) -> Tensor:
        return real(*args[:-1], other[planted](args[-1], scale), scale=scale, **kwargs)

    monkeypatch.setattr(ops, "sparse_attention", wrong)
    assert v4.is_wrong()


@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_counts_the_token_itself(v4: Proven, change: int, monkeypatch: Patch) -> None:
    """128 rows are the token and the 127 before it."""
    real = ops.sparse_attention
    monkeypatch.setattr(
        ops, "sparse_attention", lambda *args, span, **kwargs: real(*args, span=span + change, **kwargs)
    )
    assert v4.is_wrong()


def test_heads_are_grouped_side_by_side_for_the_output(v4: Proven, monkeypatch: Patch) -> None:
    """Group g projects heads g H/G to (g + 1) H/G - 1, not every G-th."""
    real, heads, dim = ops.grouped_linear, v4.model.config.num_attention_heads, v4.model.config.head_dim

    def every_other(x_TGC: Tensor, weight_GFC: Tensor) -> Tensor:
        groups = x_TGC.shape[1]
        return real(x_TGC.reshape(-1, heads // groups, groups, dim).transpose(1, 2).flatten(2), weight_GFC)

    monkeypatch.setattr(ops, "grouped_linear", every_other)
    assert v4.is_wrong()


@pytest.mark.parametrize(
    "planted",
    [
        lambda past, count, rate: torch.full((count,), (past + count) // rate),
        lambda past, count, rate: torch.arange(past, past + count) // rate,
        lambda past, count, rate: (torch.arange(past, past + count) + 1) // rate - 1,
    ],
    ids=["by the sequence", "not to the closing token", "complete groups before its own"],
)
def test_an_entry_is_seen_from_the_token_that_completes_it(
    v4: Proven, planted: Callable[[int, int, int], Tensor], monkeypatch: Patch
) -> None:
    """By each token's position: by the sequence, drafts and prompts would see what comes after them."""
    with ops.using("reference"):
        assert not v4.is_wrong()
        monkeypatch.setattr(
            reference_sparse, "visible", lambda past, count, rate, _: planted(past, count, rate).clamp(min=0)
        )
        assert v4.is_wrong()


@pytest.mark.parametrize("family", ["v4", "v32"])
def test_what_is_to_come_is_hidden_before_the_best_are_chosen(
    family: str, request: pytest.FixtureRequest, monkeypatch: Patch
) -> None:
    """Hidden afterwards, the future takes places from what may be read."""
    proven: Proven = request.getfixturevalue(family)

    def choose_all(
        q: Tensor,
        weights: Tensor,
        starts: tuple[int, ...],
        pasts: tuple[int, ...],
        keys: Rows,
        *,
        count: int,
        rate: int,
    ) -> Tensor:
        scores_TS = torch.einsum("tis,ti->ts", torch.einsum("tik,sk->tis", q, keys.sequence(0)).relu(), weights)
        best_TA = scores_TS.topk(count).indices.sort(-1).values
        seen_T1 = ((torch.arange(q.shape[0]) + 1) // rate)[:, None]
        return torch.where(best_TA < seen_T1, best_TA, -1)

    monkeypatch.setattr(ops, "choose_entries", choose_all)
    assert proven.is_wrong()


def test_the_first_half_of_a_projection_is_for_the_next_group(v4: Proven, monkeypatch: Patch) -> None:
    """An entry pools its predecessor's group through the first half and its own through the second."""
    planted = empty(v4.model.config)
    weights = v4.model.state_dict()
    names = ("compressor.kv_proj.weight", "compressor.gate_proj.weight")
    for name, tensor in weights.items():
        if name.startswith("layers.1.") and name.endswith(names):
            weights[name] = tensor.roll(tensor.shape[0] // 2, 0)
        elif name == "layers.1.self_attn.compressor.position_bias":
            weights[name] = tensor.roll(tensor.shape[1] // 2, 1)
    planted.load_state_dict(weights)
    assert v4.errors(planted).max() > 1e-2
