"""FLOPs of training against what torch counts while a model runs; number 13 of `tests/train/test_bug_classes.py`."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from daedal import ops, shapes
from daedal.cost.training import flops_per_token
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer
from tests.tiny import tiny_config, tiny_model


def _multiplied(model: Transformer) -> tuple[float, float]:
    """Multiply-adds per token in products with matrices, and in all, as torch counts them while the model runs on
    documents of one token, where nothing is masked or padded.
    """
    batch = RaggedBatch.of([[token] for token in range(7)])
    with torch.no_grad(), ops.using("reference"), FlopCounterMode(display=False) as counter:
        model(batch)
    by_matrices = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    return by_matrices / 2 / 7, counter.get_total_flops() / 2 / 7


@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "deepseek_v3"])
def test_13_flops_are_those_of_the_matrices_that_a_forward_pass_multiplies_with(family: str) -> None:
    """And of a token's attention to itself; norms and biases are counted with them, a number each."""
    model = tiny_model(family)
    config = model.config
    vectors = sum(slot.numel for slot in shapes.parameters(config) if len(slot.shape) == 1)
    widths = config.head_dim + (config.v_head_dim or config.head_dim)
    attention = config.num_hidden_layers * config.num_attention_heads * widths
    assert flops_per_token(config, 1) / 6 == _multiplied(model)[0] + vectors + attention


def test_13_flops_of_v4_leave_out_the_mixing_of_streams_alone() -> None:
    model = tiny_model("deepseek_v4", num_nextn_predict_layers=0)
    config = model.config
    assert config.hc_mult is not None
    mixing = 2 * config.num_hidden_layers * config.hc_mult**2 * config.hidden_size
    slots = shapes.parameters(config)
    added = sum(slot.numel for slot in slots if len(slot.shape) == 1 or slot.name.endswith("position_bias"))
    assert flops_per_token(config, 1) / 6 == pytest.approx(_multiplied(model)[1] - mixing + added, rel=0.01)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_13_flops_grow_with_the_context_and_with_each_drafting_module(family: str) -> None:
    config = tiny_config(family, num_nextn_predict_layers=0)
    drafting = config.replace(num_nextn_predict_layers=1) if family != "deepseek_v4" else tiny_config(family)
    for context in (16, 256):
        short, twice = flops_per_token(config, context), flops_per_token(config, 2 * context)
        assert short < twice < 2 * short
        layer = (short - 6 * config.vocab_size * config.hidden_size) / config.num_hidden_layers
        module = flops_per_token(drafting, context) - short
        assert 0.5 * layer < module - 6 * config.vocab_size * config.hidden_size < 2 * layer
