"""Integer formats of weights: eight bits in groups of 64 columns, four bits with a zero point in groups of 32.

Eight bits: value = code * scale, code from -127 to 127. Four bits: value = (code - zero / 16) * scale, code from 0 to
15, zero a byte; a checkpoint that was once expanded from such groups comes back almost exactly. Scales are float32
numbers that bfloat16 holds. A last group that is not whole is quantised by the columns it has. Leading axes stand for
stacked matrices. Rows are taken some at a time, so that memory beside the result stays small. Knows no byte order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from daedal.ops import formats
from daedal.ops.packed import ZERO_STEPS
from daedal.packed import FORMATS

BLOCK = FORMATS["int8"].group

_CHUNK = 2**18  # numbers at a time: what the search reads again and again stays in a core's cache
_SHRUNK = (1.0, 0.94, 0.88, 0.8)  # of a group's range: cutting off its ends may make all steps smaller
_ROUNDS = 2
_CODES = 15  # the largest 4-bit code
_ZEROS = 255


def quantise_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., N, K], scales float32 [..., N, K / 64]): a group's largest magnitude becomes about 127.

    CheckpointError for weights that are not finite.
    """
    codes_NK, scale_Ng = _by_rows(weight_NK, _eight_bits)
    return codes_NK, scale_Ng


def quantise_int8_blocks(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., N, K], scales float32 [..., N / 64, K / 64]): as `quantise_int8` with one scale per 64 x 64
    block, so that the transpose of the codes with the transpose of the scales stands for the same numbers.
    """
    *_, rows, columns = weight_NK.shape
    weight = weight_NK.float()
    blocks = F.pad(weight.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale_bk = _scale_int8(formats.finite(blocks.unflatten(-3, (-1, BLOCK)).amax((-3, -1))))
    spread = scale_bk.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return _codes_int8(weight, spread), scale_bk


def quantise_int4(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [..., N, K], scales float32 and zeros uint8 [..., N, K / 32]), of small squared error.

    Several ranges are tried for each group, each refined by least squares. CheckpointError for weights not finite.
    """
    codes_NK, scale_Ng, zero_Ng = _by_rows(weight_NK, _four_bits)
    return codes_NK, scale_Ng, zero_Ng


def _by_rows(weight_NK: Tensor, quantise: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    rows = weight_NK.reshape(-1, weight_NK.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    chunks = rows.split(step)
    done = _side_by_side(lambda chunk: quantise(chunk.float()), chunks)
    return [torch.cat(results).unflatten(0, weight_NK.shape[:-1]) for results in zip(*done, strict=True)]


def _side_by_side(
    quantise: Callable[[Tensor], tuple[Tensor, ...]], chunks: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Chunks on as many threads as torch has, one thread each: ops this small would wait for one another at each
    step if their own threads shared them, for hundreds of times as long where the machine is busy.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(chunks) == 1:
        return [quantise(chunk) for chunk in chunks]
    try:
        # The number holds for the thread that sets it, and for threads that are yet to come.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(quantise, chunks))
    finally:
        torch.set_num_threads(threads)


def _eight_bits(rows_NK: Tensor) -> tuple[Tensor, Tensor]:
    columns = rows_NK.shape[1]
    grouped = F.pad(rows_NK, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    scale_Ng = _scale_int8(formats.finite(grouped.abs().amax(-1)))
    return _codes_int8(grouped, scale_Ng.unsqueeze(-1)).flatten(1)[:, :columns], scale_Ng


def _scale_int8(largest: Tensor) -> Tensor:
    """largest / 127, rounded up to what bfloat16 holds; 0 for 0."""
    bits = (largest / 127).view(torch.int32)
    return (bits + 0xFFFF & ~0xFFFF).view(torch.float32)


def _codes_int8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127).to(torch.int8)


def _four_bits(rows_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, columns = rows_NK.shape
    size = FORMATS["int4"].group
    edge = rows_NK[:, -1:].expand(-1, -columns % size)
    # Columns of a group along the first axis: sums over it then run over whole vectors of groups.
    w_nG = torch.cat((rows_NK, edge), 1).view(-1, size).T.contiguous()
    codes_nG, scale_G, zero_G = _search(w_nG)
    codes_NK = codes_nG.to(torch.uint8).T.reshape(num_rows, -1)[:, :columns]
    return codes_NK, scale_G.view(num_rows, -1), zero_G.to(torch.uint8).view(num_rows, -1)


def _search(w_nG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best codes, scales and zeros (in their steps) of groups, all float32."""
    low_G, high_G = w_nG.amin(0), w_nG.amax(0)
    largest_G = formats.finite(torch.maximum(high_G, -low_G))
    best = _Best(w_nG)
    # Codes 0, 1 and 2 as minus, nought and plus: exact for a group of one magnitude.
    best.offer(_bfloat16(largest_G), torch.full_like(largest_G, ZERO_STEPS))
    middle_G, half_G = (low_G + high_G) / 2, (high_G - low_G) / 2
    for share in _SHRUNK:
        bottom_G, top_G = middle_G - share * half_G, middle_G + share * half_G
        # A zero point lies between 0 and 15.94 codes: a range far from 0 must reach further towards it.
        least_G = torch.maximum(top_G / _CODES, -bottom_G * (ZERO_STEPS / _ZEROS))
        scale_G = _bfloat16(torch.maximum((top_G - bottom_G) / _CODES, least_G))
        zero_G = _zero(-bottom_G / scale_G)
        for _ in range(_ROUNDS):
            scale_G, zero_G = best.offer(scale_G, zero_G)
        best.offer(scale_G, zero_G)
    return _codes_int4(w_nG, best.scale, best.zero), best.scale, best.zero


class _Best:
    """The best that was offered for each group so far."""

    def __init__(self, w_nG: Tensor):
        self._w, self._size = w_nG, w_nG.shape[0]
        self._sum, self._squares = w_nG.sum(0), w_nG.square().sum(0)
        self._error = torch.full_like(self._sum, float("inf"))
        self.scale, self.zero = torch.zeros_like(self._error), torch.zeros_like(self._error)

    def offer(self, scale_G: Tensor, zero_G: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a scale and a zero where they suit better than all before, and returns those that suit the codes
        best to which they lead.
        """
        codes_nG = _codes_int4(self._w, scale_G, zero_G)
        sum_G, squares_G, product_G = codes_nG.sum(0), codes_nG.square().sum(0), (codes_nG * self._w).sum(0)
        offset_G = zero_G / ZERO_STEPS
        # The squared error of (code - offset) * scale, multiplied out: these sums also give the least squares.
        of_codes_G = squares_G - 2 * offset_G * sum_G + self._size * offset_G.square()
        error_G = scale_G.square() * of_codes_G - 2 * scale_G * (product_G - offset_G * self._sum) + self._squares
        better_G = error_G < self._error
        self._error = torch.where(better_G, error_G, self._error)
        self.scale = torch.where(better_G, scale_G, self.scale)
        self.zero = torch.where(better_G, zero_G, self.zero)
        spread_G = self._size * squares_G - sum_G.square()
        slope_G = (self._size * product_G - sum_G * self._sum) / spread_G
        usable_G = (spread_G > 0) & (slope_G > 0)
        fitted_G = torch.where(usable_G, _bfloat16(slope_G), scale_G)
        return fitted_G, torch.where(usable_G, _zero((sum_G - self._sum / fitted_G) / self._size), zero_G)


def _codes_int4(w_nG: Tensor, scale_G: Tensor, zero_G: Tensor) -> Tensor:
    inverse_G = torch.where(scale_G > 0, 1 / scale_G, 0.0)
    return torch.addcmul(zero_G / ZERO_STEPS, w_nG, inverse_G).round_().clamp_(0, _CODES)


def _zero(codes: Tensor) -> Tensor:
    """A zero point in its steps, from one in codes; 0 / 0 is 0."""
    return (codes * ZERO_STEPS).round_().nan_to_num_(0.0).clamp_(0, _ZEROS)


def _bfloat16(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()
