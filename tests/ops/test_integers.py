"""Integer formats: how far numbers move, that scales are what is stored, that special groups are exact, transposes."""

import pytest
import torch
from torch import Tensor

from daedal.errors import CheckpointError
from daedal.ops.integers import BLOCK, quantise_int4, quantise_int8, quantise_int8_blocks
from daedal.ops.packed import ZERO_STEPS, Packed, pack
from daedal.packed import FORMATS


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows and columns of very different size."""
    return (torch.randn(shape) * torch.logspace(-4, 2, shape[-2])[:, None]).to(dtype)


def _spread(sides: Tensor, size: int, columns: int) -> Tensor:
    return sides.float().repeat_interleave(size, -1)[..., :columns]


def _int8(weight: Tensor) -> tuple[Packed, Tensor]:
    """Packed, and each number's scale."""
    codes, scale = quantise_int8(weight)
    return pack("int8", codes, scale), _spread(scale, BLOCK, weight.shape[-1])


def _int4(weight: Tensor) -> tuple[Packed, Tensor]:
    codes, scale, zero = quantise_int4(weight)
    return pack("int4", codes, scale, zero), _spread(scale, FORMATS["int4"].group, weight.shape[-1])


@pytest.mark.parametrize("shape", [(5, 33), (37, 320), (3, 17, 96), (16, 64), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_move_no_number_by_more_than_half_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = _normal(*shape, dtype=dtype)
    packed, scale = _int8(weight)
    assert packed.shape == shape
    assert torch.equal(scale.bfloat16().float(), scale)
    largest = weight.float().abs().amax(-1, keepdim=True)
    assert (scale <= largest / 127 * (1 + 2**-7)).all()
    assert ((packed.dense() - weight.float()).abs() <= scale * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(50, 33), (37, 320), (3, 17, 96)])
def test_four_bits_are_nearer_than_steps_of_the_whole_range(shape: tuple[int, ...]) -> None:
    weight = _normal(*shape)
    codes, scale, zero = quantise_int4(weight)
    assert (codes.dtype, zero.dtype) == (torch.uint8, torch.uint8)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert int(codes.max()) <= 15
    packed, _ = _int4(weight)
    for start in range(0, shape[-1], 32):
        own = weight[..., start : start + 32]
        low, high = own.amin(-1, keepdim=True), own.amax(-1, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-30)
        plain = (((own - low) / step).round() * step + low - own).square().sum(-1)
        found = (packed.dense()[..., start : start + 32] - own).square().sum(-1)
        # Scales and zeros are rounded, which those of plain steps are not; in most groups the search more than pays.
        assert (found <= 1.05 * plain + 1e-5 * own.square().sum(-1)).all()
        assert own.shape[-1] < 32 or (found / plain).mean() < 0.92


def test_groups_that_were_four_bits_before_come_back() -> None:
    step = (torch.rand(64, 3, 1) * 0.01 + 0.001).half().float()
    low = (-step * torch.empty(64, 3, 1).uniform_(3, 12)).half().float()
    codes = torch.randint(0, 16, (64, 3, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (step * codes + low).flatten(1)
    packed, _ = _int4(weight)
    found, *_ = quantise_int4(weight)
    assert torch.equal(found, codes.flatten(1).to(torch.uint8))
    # Half a step of a zero point, and the scale's rounding on codes up to 15 away from it.
    bound = step.expand(-1, -1, 32).flatten(1) * (0.5 / ZERO_STEPS + 15 * 2**-8)
    assert ((packed.dense() - weight).abs() <= bound).all()


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-20, 3e4])
def test_groups_of_one_number_are_exact(value: float) -> None:
    weight = torch.full((3, 96), value).bfloat16()
    assert torch.equal(_int4(weight)[0].dense(), weight.float())
    codes, scale, _ = quantise_int4(weight)
    assert torch.isfinite(scale).all()
    assert int(codes.max()) <= 15
    assert ((_int8(weight)[0].dense() - weight.float()).abs() <= abs(value) * 2**-7).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_of_one_sign_use_the_range_that_there_is(sign: float) -> None:
    """A zero point cannot leave 0 to 15.94, so steps are at most a fifteenth of the largest magnitude."""
    weight = sign * torch.empty(40, 64).uniform_(5.0, 6.0)
    packed, _ = _int4(weight)
    assert (packed.dense() - weight).abs().max() <= 6 / 15 / 2 * 1.02
    weight = sign * torch.empty(40, 64).uniform_(0.0, 6.0)
    # Ends may be cut off for smaller steps, so the root mean square counts: that of rounding to whole steps.
    assert (_int4(weight)[0].dense() - weight).square().mean().sqrt() <= 6 / 15 / 12**0.5


@pytest.mark.parametrize("shape", [(64, 128), (2, 100, 70), (3, 16, 24)])
def test_blocks_transpose_exactly(shape: tuple[int, ...]) -> None:
    weight = _normal(*shape)
    codes, scale = quantise_int8_blocks(weight)
    flipped, flipped_scale = quantise_int8_blocks(weight.transpose(-1, -2))
    assert torch.equal(flipped, codes.transpose(-1, -2))
    assert torch.equal(flipped_scale, scale.transpose(-1, -2))
    rows = scale.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
    columns = flipped_scale.repeat_interleave(BLOCK, -2)[..., : shape[-1], :]
    one, other = pack("int8", codes, rows).dense(), pack("int8", flipped, columns).dense()
    assert torch.equal(one.transpose(-1, -2), other)
    assert ((one - weight).abs() <= _spread(rows, BLOCK, shape[-1]) * (0.5 + 1e-5)).all()


def test_threads_and_chunks_change_nothing() -> None:
    weight = _normal(1100, 480)
    alone = [*quantise_int4(weight), *quantise_int8(weight)]
    torch.set_num_threads(2)
    together = [*quantise_int4(weight), *quantise_int8(weight)]
    assert torch.get_num_threads() == 2
    rows = [*quantise_int4(weight[700:701]), *quantise_int8(weight[700:701])]
    for one, other, row in zip(alone, together, rows, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[700:701], row)


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int8_blocks, quantise_int4])
@pytest.mark.parametrize("broken", [float("inf"), float("nan"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(quantise, broken: float) -> None:
    weight = torch.randn(20, 70)
    weight[11, 50] = broken
    with pytest.raises(CheckpointError, match="infinities or NaN"):
        quantise(weight)
