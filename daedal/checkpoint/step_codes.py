"""Matrices as whole numbers of steps, to be small when they are deflated; the same numbers again from any machine.

Each row has one step, a share of the row's typical number. Codes are not clipped: a column that is far larger than the
others, such as the bias of a latent, keeps the precision of its row. Codes are zigzag numbers of two bytes in two
planes, and the upper plane is nearly all zeros. For numbers like Gaussian ones a step of a sixteenth takes six bits a
number once Huffman's code has had them, and moves a number by under 2 % of the row's size; where something close to
them is known, only the way from there is coded, in far fewer. A uniform step with such a code behind it is within a
quarter of a bit of what any code can do (Gish and Pierce 1968). Knows no checkpoint.
"""

import torch
from torch import Tensor

_LARGEST = 2**15 - 1  # steps
_MEDIAN = 0.6745  # of the size of a Gaussian number, in deviations


def encode(weight_NM: Tensor, share: float, base_NM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """planes_2NM, uint8, the lower bytes first, and step_N1, float32. weight_NM: finite. share: of a row's typical
    number that is one step. base_NM: something known that it is close to.
    """
    wide_NM = weight_NM.float()
    moved_NM = wide_NM if base_NM is None else wide_NM - base_NM.float()
    typical_N1 = wide_NM.abs().median(-1, keepdim=True).values / _MEDIAN
    step_N1 = torch.maximum(share * typical_N1, moved_NM.abs().amax(-1, keepdim=True) / _LARGEST)
    step_N1 = step_N1.where(step_N1 > 0, 1.0)
    code_NM = (moved_NM / step_N1).round().int().clamp(-_LARGEST, _LARGEST)
    zigzag_NM = torch.where(code_NM < 0, -2 * code_NM - 1, 2 * code_NM)
    return torch.stack((zigzag_NM & 255, zigzag_NM >> 8)).to(torch.uint8), step_N1


def decode(planes_2NM: Tensor, step_N1: Tensor, base_NM: Tensor | None = None) -> Tensor:
    """[N, M] float32: what was encoded, each number at most half a step away. base_NM: that of `encode`."""
    low_NM, high_NM = planes_2NM.int()
    zigzag_NM = low_NM | high_NM << 8
    code_NM = (zigzag_NM >> 1) ^ -(zigzag_NM & 1)
    moved_NM: Tensor = code_NM.float() * step_N1
    return moved_NM if base_NM is None else base_NM.float() + moved_NM
