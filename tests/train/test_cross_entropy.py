"""The loss in chunks of the vocabulary against torch's own on all logits: value and gradients."""

import pytest
import torch
from torch.nn import functional as F

from daedal.errors import ConfigError
from daedal.train.batches import IGNORED
from daedal.train.cross_entropy import cross_entropy


def data(dtype: torch.dtype, tokens: int = 23) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(tokens, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head_VD = torch.randn(37, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets_T = torch.randint(37, (tokens,), generator=generator)
    targets_T[::5] = IGNORED
    return hidden_TD, head_VD, targets_T


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000])
def test_value_and_gradients_do_not_depend_on_the_chunk(chunk: int) -> None:
    hidden_TD, head_VD, targets_T = data(torch.float64)
    wanted = F.cross_entropy(hidden_TD @ head_VD.T, targets_T, ignore_index=IGNORED, reduction="sum")
    wanted_grads = torch.autograd.grad(3.0 * wanted, (hidden_TD, head_VD))
    found = cross_entropy(hidden_TD, head_VD, targets_T, chunk=chunk)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(3.0 * found, (hidden_TD, head_VD)), wanted_grads)


def test_states_of_bfloat16_and_a_wide_head_are_multiplied_in_float32() -> None:
    hidden_TD, head_VD, targets_T = data(torch.float32)
    narrow_TD = hidden_TD.detach().bfloat16().requires_grad_()
    loss = cross_entropy(narrow_TD, head_VD, targets_T, chunk=10)
    wanted = cross_entropy(narrow_TD.detach().float(), head_VD.detach(), targets_T, chunk=10)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert narrow_TD.grad is not None
    assert narrow_TD.grad.dtype == torch.bfloat16


def test_nothing_to_predict_is_a_loss_of_nothing() -> None:
    hidden_TD, head_VD, targets_T = data(torch.float32)
    loss = cross_entropy(hidden_TD, head_VD, torch.full_like(targets_T, IGNORED), chunk=8)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden_TD.grad is not None
    assert not hidden_TD.grad.any()


def test_large_logits_stay_finite() -> None:
    hidden_TD, head_VD, targets_T = data(torch.float32)
    loss = cross_entropy(hidden_TD.detach() * 1e4, head_VD, targets_T, chunk=8)
    loss.backward()
    assert loss.isfinite()
    assert head_VD.grad is not None
    assert head_VD.grad.isfinite().all()


def test_a_chunk_of_nothing_is_refused() -> None:
    hidden_TD, head_VD, targets_T = data(torch.float32)
    with pytest.raises(ConfigError, match="chunk is 0"):
        cross_entropy(hidden_TD, head_VD, targets_T, chunk=0)
