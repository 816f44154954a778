"""What a student learns from, a teacher's scores and the true next token, in chunks, with no matrix of all scores.

At each token the loss is a D + (1 - a) CE where the target is true text, and a D where it is not. D is the divergence
from the teacher, CE the next-token loss, and a the teacher's share, which a gate may lower: on free text the teacher
counts less where it finds the true token very unlikely, a = share x sigmoid((log p(true) - threshold) / width). For
forward KL at temperature 1 that is the cross-entropy with the mixed target a p + (1 - a) true token. As in
`train.cross_entropy`, gradients are made while a chunk's scores are there. Knows no models.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.distill.divergence import Divergence
from daedal.distill.mixed_rows import MixedRows
from daedal.distill.signals import Products, Scored, Signal, Whole
from daedal.ops.narrow_factors import narrow_factors
from daedal.train.batches import IGNORED
from daedal.train.bounds import number, whole

_ROWS = 8
"""Of a chunk, that are worked on at once: of 49,152 ids, 1.5 MB in float32."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """threshold: nats, the log-probability of the true token at which the teacher's share is halved. width: nats, how
    far around it the share falls from most to little.
    """

    threshold: float = -7.0
    width: float = 1.0

    def __post_init__(self) -> None:
        number("threshold", self.threshold, low=-1e3, high=0.0)
        number("width", self.width, low=1e-3, high=1e3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What T places are to learn. targets_T: int64, IGNORED for nothing. shares_T: float, the teacher's share from 0 to
    1. true_T: bool, whether the target is true text, and not what some model wrote. weights_T: float, how much each
    place counts; None: all alike.
    """

    targets_T: Tensor
    shares_T: Tensor
    true_T: Tensor
    weights_T: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Lesson":
        """Shares and weights in `dtype`."""
        weights_T = None if self.weights_T is None else self.weights_T.to(dtype)
        return replace(self, shares_T=self.shares_T.to(dtype), weights_T=weights_T)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How it is measured. chunk: tokens whose scores are held at once; nothing but rounding depends on it."""

    divergence: Divergence = field(default_factory=Divergence)
    gate: Gate | None = None
    chunk: int = 512

    def __post_init__(self) -> None:
        whole("chunk", self.chunk, low=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Taught:
    """Sums over the places that have a target. total: to be differentiated. nats: -log p(target) of the student.
    divergence: from the teacher, temperature included. share: of the teacher, gate included. The last three are not
    weighted and carry no gradients.
    """

    total: Tensor
    nats: Tensor
    divergence: Tensor
    share: Tensor


def teach(hidden_TD: Tensor, head_VD: Tensor, signal: Signal, lesson: Lesson, measure: Measure) -> Taught:
    """hidden_TD: the student's normed states. head_VD: its output matrix, of any floating dtype.

    All in float32 (float64 stays); where the states are bfloat16, so are the factors of products. TeacherError where
    the signal cannot measure the divergence.
    """
    signal.check(measure.divergence)
    sums = _Chunked.apply(hidden_TD, head_VD, signal, lesson, measure)  # type: ignore[no-untyped-call]
    total, nats, divergence, share = sums
    return Taught(total=total, nats=nats, divergence=divergence, share=share)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, signal: Signal, lesson: Lesson, measure: Measure
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        kept_t = (lesson.targets_T != IGNORED).nonzero().squeeze(-1)
        states_tD, wide_VD = hidden_TD[kept_t].to(wide), head_VD.to(wide)
        learns_states, learns_head = ctx.needs_input_grad[:2]
        grad_tD = torch.zeros_like(states_tD) if learns_states else None
        grad_VD = torch.zeros_like(wide_VD) if learns_head else None
        narrow = hidden_TD.dtype == torch.bfloat16
        products: Products = partial(narrow_factors, hidden_TD.device) if narrow else nullcontext
        chosen, some = signal.select(kept_t), _select(lesson, kept_t).to(wide)
        sums = states_tD.new_zeros(4)
        # One piece of memory for all chunks: a system that hands out fresh pages takes longer than the arithmetic.
        scratch_2tV = states_tD.new_empty(2, min(measure.chunk, len(kept_t)), len(wide_VD))
        for first in range(0, len(kept_t), measure.chunk):
            span = slice(first, first + measure.chunk)
            logits_tV, other_tV = scratch_2tV[:, : len(states_tD[span])]
            with products():
                torch.mm(states_tD[span], wide_VD.T, out=logits_tV)
            sums += _slopes(logits_tV, chosen.scored(span, other_tV, products), _select(some, span), measure)
            with products():
                if grad_tD is not None:
                    grad_tD[span] = logits_tV @ wide_VD
                if grad_VD is not None:
                    grad_VD.addmm_(logits_tV.T, states_tD[span])
        grad_TD = None
        if grad_tD is not None:
            grad_TD = torch.zeros_like(hidden_TD).index_copy_(0, kept_t, grad_tD.to(hidden_TD.dtype))
        ctx.save_for_backward(grad_TD, None if grad_VD is None else grad_VD.to(head_VD.dtype))
        total, nats, divergence, share = (part.clone() for part in sums.unbind())
        ctx.mark_non_differentiable(nats, divergence, share)
        return total, nats, divergence, share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scaled = (None if kept is None else (kept.to(grad.dtype) * grad).to(kept.dtype) for kept in ctx.saved_tensors)
        grad_TD, grad_VD = scaled
        return grad_TD, grad_VD, None, None, None


def _select(lesson: Lesson, places: Tensor | slice) -> Lesson:
    return Lesson(
        targets_T=lesson.targets_T[places],
        shares_T=lesson.shares_T[places],
        true_T=lesson.true_T[places],
        weights_T=None if lesson.weights_T is None else lesson.weights_T[places],
    )


def _slopes(logits_tV: Tensor, signal: Scored, lesson: Lesson, measure: Measure) -> Tensor:
    """Total, nats, divergence and share, summed over a chunk. Its scores become the slopes of the total with them.

    A few rows at a time: what is done to one row after the other then stays in a CPU's cache, which halves the time.
    """
    sums = logits_tV.new_zeros(4)
    together = _ROWS if logits_tV.device.type == "cpu" else len(logits_tV)
    for first in range(0, len(logits_tV), together):
        rows = slice(first, first + together)
        sums += _rows(logits_tV[rows], rows, signal, _select(lesson, rows), measure)
    return sums


def _rows(logits_rV: Tensor, rows: slice, signal: Scored, lesson: Lesson, measure: Measure) -> Tensor:
    """As `_slopes`, of the rows of a chunk that these scores are of."""
    if isinstance(signal, Whole) and measure.divergence == Divergence():
        return _mixed(logits_rV, signal.logits_tV[rows], lesson, measure.gate)
    divergence, targets_r1 = measure.divergence, lesson.targets_T[:, None]
    student_rV = logits_rV.log_softmax(-1)
    warm_rV = student_rV
    if divergence.temperature != 1.0:
        warm_rV = (logits_rV / divergence.temperature).log_softmax(-1)
    compared = signal.compare(rows, warm_rV, lesson.targets_T, divergence)
    share_r, rest_r = _shares(compared.true_r, lesson, measure.gate)
    nats_r = -student_rV.gather(1, targets_r1).squeeze(1)
    weights_r = 1.0 if lesson.weights_T is None else lesson.weights_T
    pull_r1, push_r1 = (share_r * weights_r).unsqueeze(-1), (rest_r * weights_r).unsqueeze(-1)
    slope_rV = compared.slope_rV.mul_(pull_r1)
    torch.addcmul(slope_rV, student_rV.exp_(), push_r1, out=logits_rV)
    logits_rV.scatter_add_(1, targets_r1, -push_r1)
    return _sums(nats_r, compared.nats_r, share_r, rest_r, weights_r)


def _mixed(logits_rV: Tensor, teacher_rV: Tensor, lesson: Lesson, gate: Gate | None) -> Tensor:
    """As `_rows`, for forward KL at temperature 1 from all of the teacher's scores, which are used up."""
    compared = MixedRows(logits_rV, teacher_rV, lesson.targets_T)
    share_r, rest_r = _shares(compared.true_r, lesson, gate)
    weights_r = 1.0 if lesson.weights_T is None else lesson.weights_T
    whole = lesson.weights_T is None and bool(lesson.true_T.all())
    compared.slopes(share_r * weights_r, rest_r * weights_r, whole=whole)
    return _sums(-compared.own_r, compared.nats_r, share_r, rest_r, weights_r)


def _shares(true_r: Tensor, lesson: Lesson, gate: Gate | None) -> tuple[Tensor, Tensor]:
    """Of the teacher, gate included, and of the true token. true_r: the target's log-probability by the teacher."""
    share_r = lesson.shares_T
    if gate is not None:
        open_r = torch.sigmoid((true_r - gate.threshold) / gate.width)
        share_r = torch.where(lesson.true_T, share_r * open_r, share_r)
    return share_r, torch.where(lesson.true_T, 1 - share_r, 0.0)


def _sums(nats_r: Tensor, divergence_r: Tensor, share_r: Tensor, rest_r: Tensor, weights_r: Tensor | float) -> Tensor:
    """Total, nats, divergence and share, as `_slopes` gives them."""
    loss_r = share_r * divergence_r + rest_r * nats_r
    return torch.stack([(loss_r * weights_r).sum(), nats_r.sum(), divergence_r.sum(), share_r.sum()])
