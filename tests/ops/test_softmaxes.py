"""Softmaxes of training, on kernels and on PyTorch alone, against float64; and gradients of norms and gated units at
every instruction set of this CPU.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops import softmaxes
from daedal.ops.backends.cpu.building import compiler
from daedal.ops.backends.cpu.gradients import causal_declines
from daedal.ops.backends.cpu.program import native
from tests.native import needs_kernels


@pytest.fixture(params=["kernels", "torch"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        with ops.using("reference"):
            yield request.param
    elif compiler() is None:
        pytest.skip("no C++ compiler here, so there are no native kernels")
    else:
        native()  # kernels that do not compile where there is a compiler are broken
        yield request.param


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    hidden_tt = torch.full((q.shape[1], q.shape[1]), float("-inf"), dtype=torch.float64).triu_(1)
    return (q.double() @ k.double().mT * scale + hidden_tt).softmax(-1)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("length", "key", "value"), [(1, 32, 32), (15, 64, 32), (33, 96, 64), (256, 64, 64), (300, 32, 96)]
)
def test_shares_of_causal_attention_and_their_gradients(length: int, key: int, value: int) -> None:
    q, k = random(3, length, key, seed=1), random(3, length, key, seed=2)
    push, v = random(3, length, value, seed=3), random(3, length, value, seed=4)
    shares = softmaxes.causal_shares(q, k, 0.3)
    assert shares.dtype == torch.bfloat16
    wanted = exact_shares(q, k, 0.3)
    torch.testing.assert_close(shares.double(), wanted, rtol=5e-3, atol=1e-6)
    assert not shares.triu(1).any()
    found = softmaxes.causal_gradients(push, v, shares, 0.3)
    scores = (q.double() @ k.double().mT).requires_grad_()
    hidden_tt = torch.full((length, length), float("-inf"), dtype=torch.float64).triu_(1)
    result = ((scores * 0.3 + hidden_tt).softmax(-1) @ v.double() * push.double()).sum()
    (gradient,) = torch.autograd.grad(result, scores)
    # What is rounded are shares, to eight bits: a row's differences of large numbers keep that error.
    torch.testing.assert_close(found.double(), gradient, rtol=2e-2, atol=2**-8 * float(gradient.abs().max()))
    assert not found.triu(1).any()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("length", "width"), [(17, 32), (40, 96)])
def test_both_forms_agree_at_every_instruction_set(length: int, width: int) -> None:
    q, k, v, push = (random(2, length, width, seed=seed) for seed in range(4))
    with ops.using("reference"):
        wanted = softmaxes.causal_shares(q, k, 0.2)
        pulled = softmaxes.causal_gradients(push, v, wanted, 0.2)
    torch.testing.assert_close(softmaxes.causal_shares(q, k, 0.2), wanted, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(softmaxes.causal_gradients(push, v, wanted, 0.2), pulled, rtol=2e-2, atol=2e-3)


@needs_kernels
def test_shapes_that_kernels_leave_to_torch() -> None:
    for length, width in ((513, 32), (8, 48), (8, 544)):
        assert "multiples of 32" in str(
            causal_declines(random(1, length, width, seed=0), random(1, length, 32, seed=1))
        )


def test_kernels_take_bfloat16_alone() -> None:
    """Others are computed all the same, by PyTorch."""
    q, k = random(2, 20, 32, seed=1, dtype=torch.float32), random(2, 20, 32, seed=2, dtype=torch.float32)
    assert "takes bfloat16" in str(causal_declines(q, k))
    torch.testing.assert_close(
        softmaxes.causal_shares(q, k, 0.3).double(), exact_shares(q, k, 0.3), rtol=2e-2, atol=1e-4
    )


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("target", [-1, 100])
def test_a_target_beyond_the_logits_is_refused(target: int) -> None:
    logits = random(2, 100, seed=1, dtype=torch.float32)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        softmaxes.target_surplus(logits, torch.tensor([3, target]), torch.float32)


@pytest.mark.usefixtures("form")
def test_numbers_that_are_none_are_seen() -> None:
    """A loss on NaN must be NaN, or a run would go on."""
    q, k = random(1, 40, 32, seed=1), random(1, 40, 32, seed=2)
    k[0, 5, 3] = float("nan")
    shares = softmaxes.causal_shares(q, k, 0.3)
    assert shares[0, 5:, :6].isnan().all()
    logits = random(4, 100, seed=3, dtype=torch.float32)
    logits[1, 7], logits[2, 7], logits[3, 7] = float("nan"), float("inf"), float("-inf")
    nats, _ = softmaxes.target_surplus(logits, torch.tensor([3, 3, 3, 3]), torch.float32)
    assert nats.isnan().tolist() == [False, True, True, False]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 37, 4096])
def test_what_a_loss_leaves_of_logits(width: int, dtype: torch.dtype) -> None:
    logits = 8 * random(5, width, seed=1, dtype=torch.float32)
    targets = torch.tensor([0, width - 1, width // 2, 0, width // 3])
    exact = logits.double().log_softmax(-1)
    nats, surplus = softmaxes.target_surplus(logits, targets, dtype)
    torch.testing.assert_close(nats.double(), -exact.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    wanted = exact.exp().scatter_add(1, targets[:, None], torch.full((5, 1), -1.0, dtype=torch.float64))
    close = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(surplus.double(), wanted, **close)
    assert (surplus.data_ptr() == logits.data_ptr()) == (dtype == torch.float32)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (3, 7), (130, 40), (200, 256)])
def test_gradients_of_norms(rows: int, dim: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Rows that lie apart in a larger matrix, more of them than blocks of sums."""
    x = random(rows, 2 * dim, seed=1, dtype=dtypes[0])[:, dim:].requires_grad_()
    weight, push = random(dim, seed=2, dtype=dtypes[1]).requires_grad_(), random(rows, dim, seed=3, dtype=dtypes[0])
    results = []
    for backend, given in (("cpu", (x, weight)), ("reference", (x.detach().double(), weight.detach().double()))):
        given = tuple(tensor.requires_grad_() for tensor in given)
        with ops.using(backend):
            y = ops.rms_norm(*given, 1e-5)
        results.append((y, *torch.autograd.grad(y, given, push.to(y.dtype))))
    close = {"rtol": 2e-2, "atol": 4e-2} if dtypes[0] == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), theirs, **close)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_gradients_of_gated_units(limit: float | None, dtype: torch.dtype) -> None:
    gate, up = random(9, 70, seed=1, dtype=dtype).split(35, 1)
    push = random(9, 35, seed=2, dtype=dtype)
    results = []
    for backend, wide in (("cpu", dtype), ("reference", torch.float64)):
        given = [tensor.to(wide).requires_grad_() for tensor in (gate, up)]
        with ops.using(backend):
            y = ops.swiglu(*given, limit=limit)
        results.append((y, *torch.autograd.grad(y, given, push.to(wide))))
    close = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), theirs, **close)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("limit", [None, 0.7])
def test_a_gated_unit_passes_on_what_is_no_number(limit: float | None) -> None:
    gate, up = (random(2, 33, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2))
    with torch.no_grad():
        gate[0, 3] = up[1, 20] = float("nan")
    with ops.using("cpu"):
        y = ops.swiglu(gate, up, limit=limit)
    y.sum().backward()
    assert y.isnan().nonzero().tolist() == [[0, 3], [1, 20]]
    assert gate.grad is not None
    assert gate.grad.isnan().nonzero().tolist() == [[0, 3], [1, 20]]
