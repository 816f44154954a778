"""Behind the stock norm: a latent with a constant channel passes it unharmed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from daedal.convert.attention_statistics import LayerStatistics
from daedal.convert.dense import DenseRows, kept_frequencies
from daedal.convert.latent import cut
from daedal.convert.norm import StockRows, constant, normed, unevenness
from daedal.convert.partly_rotated import PartlyRotatedAttention
from daedal.convert.rotation import concentrated
from daedal.convert.settings import Settings, stock_config
from daedal.model.attention_dense import DenseAttention
from daedal.model.attention_latent import LatentAttention
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass
from daedal.model.rotary import inverse_frequencies
from daedal.model.transformer import Transformer
from tests.tiny import tiny_model


def _stock(model: Transformer, settings: Settings, rows: StockRows, layer: int) -> LatentAttention:
    attention = LatentAttention(stock_config(model.config, settings), layer)
    attention.load_state_dict({name: tensor.float() for name, tensor in rows.slots("").items()})
    return attention


def _dense(model: Transformer, layer: int) -> DenseAttention:
    attention = model.layers[layer].self_attn
    assert isinstance(attention, DenseAttention)
    return attention


def _cut(model: Transformer, settings: Settings, known: LayerStatistics, layer: int) -> tuple[StockRows, nn.Module]:
    """A layer's stock rows, and the same cut before the norm."""
    config, dense = model.config, _dense(model, layer)
    every_C = inverse_frequencies(config.rope_parameters, config.head_dim)
    split = concentrated(DenseRows.read(dense), known, every_C, config.head_dim, settings.rope_dims)
    latent = cut(split, known, settings.latent - 1, settings.method)
    frequencies_C = kept_frequencies(config, settings.rope_dims)
    before = PartlyRotatedAttention(dense, split.through(*latent.expanded()), frequencies_C)
    return normed(split, latent, dense.o_proj.weight.detach().double(), known), before


def _known(x_TD: Tensor) -> LayerStatistics:
    x_TX = nn.functional.pad(x_TD.double(), (0, 1), value=1.0)
    moment_XX = x_TX.T @ x_TX / len(x_TX)
    alike_HKK = torch.eye(8, dtype=torch.float64).expand(6, 8, 8)
    return LayerStatistics(
        attended_XX=moment_XX,
        others_XX=moment_XX,
        keys_XX=moment_XX,
        queries_HKK=alike_HKK,
        values_XX=moment_XX,
        outputs_HVV=alike_HKK,
        distances_HT=torch.ones(6, 30, dtype=torch.float64),
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_the_norm_is_harmless_where_inputs_have_a_constant(family: str) -> None:
    model, settings = tiny_model(family), Settings(kv_dims=20, rope_dims=8)
    x_TD = torch.randn(30, 48)
    x_TD[:, 5] = 1.5
    known = _known(x_TD)
    assert unevenness(known) < 1e-3
    torch.testing.assert_close(x_TD.double() @ constant(known), torch.ones(30).double(), rtol=0, atol=2e-3)
    rows, before = _cut(model, settings, known, 1)
    step = ForwardPass(model.config, RaggedBatch.rectangular(torch.zeros(1, 30, dtype=torch.int64)), None)
    wanted, found = before(x_TD, step), _stock(model, settings, rows, 1)(x_TD, step)
    assert float((found - wanted).norm() / wanted.norm()) < 3e-3
    # Without the constant channel the same norm does harm.
    without = rows.down.clone()
    without[0] = 0
    harmed = _stock(model, settings, StockRows(**{**vars(rows), "down": without}), 1)(x_TD, step)
    assert float((harmed - wanted).norm() / wanted.norm()) > 0.3


@torch.no_grad()
def test_levelling_changes_sizes_and_nothing_else() -> None:
    model, settings = tiny_model("llama"), Settings(kv_dims=20, rope_dims=8)
    x_TD = torch.randn(30, 48) + 1.0
    rows, _ = _cut(model, settings, _known(x_TD), 1)
    channels, pairs = torch.ones(len(rows.gain)).double(), torch.tensor([64.0, 1 / 512, 8.0, 1.0]).repeat(2).double()
    channels[1:] = 1 / 256
    skewed = replace(
        rows,
        query_rope=rows.query_rope * pairs[:, None],
        key_rope=rows.key_rope / pairs[:, None],
        down=rows.down * 4,
        gain=rows.gain / channels,
        keys=rows.keys * channels,
        values=rows.values * channels,
    )
    step = ForwardPass(model.config, RaggedBatch.rectangular(torch.zeros(1, 30, dtype=torch.int64)), None)
    wanted, found = (_stock(model, settings, these, 1)(x_TD, step) for these in (skewed, skewed.levelled()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    again = skewed.levelled()
    assert all(torch.equal(getattr(again, name), getattr(rows, name)) for name in ("query_rope", "key_rope", "values"))
    sizes = [float(x.square().mean().sqrt()) for x in (again.query, again.down[1:], again.values[..., 1:])]
    assert max(sizes) / min(sizes) < 4


def test_gains_are_exact_in_every_format() -> None:
    known = _known(torch.randn(30, 48) + 1.0)
    rows, _ = _cut(tiny_model("llama"), Settings(kv_dims=20, rope_dims=8), known, 0)
    assert torch.equal(rows.gain, rows.gain.log2().round().exp2())
