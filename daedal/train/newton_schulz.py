"""Newton-Schulz orthogonalisation: U V^T, the nearest (semi-)orthogonal matrix, of each matrix U S V^T by products.

A step takes X to a X + b (X X^T) X + c (X X^T)^2 X, which maps each singular value s to a s + b s^3 + c s^5 and leaves
U and V as they are. V4 (report, section on Muon) takes eight steps that grow and two that settle. The first polynomial
has slope 3.4445 at 0, so that small values grow fast, but it has no resting point at 1: they end scattered from 0.68 to
1.14. The second has its resting point at 1 with slope 0 there, so each step about squares the error. Knows nothing of
optimisers, shards or layers.
"""

import torch
from torch import Tensor

from daedal.errors import ConfigError
from daedal.train.bounds import number

NewtonSchulz = tuple[tuple[float, float, float], ...]

V4_SCHEDULE: NewtonSchulz = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def orthogonalise(
    matrices: Tensor, schedule: NewtonSchulz = V4_SCHEDULE, *, dtype: torch.dtype | None = None
) -> Tensor:
    """U V^T of each of `matrices` [..., R, C], in their shape; the size of a matrix does not matter, zero stays zero.

    A matrix is divided by its Frobenius norm first. After V4's steps every singular value above 1.6e-5 of that norm is
    in [0.9, 1.01]: with n values between 1 and 1 / k that is sure for k sqrt(n) below 6e4, and holds far beyond for
    spectra that fall evenly. Smaller ones end between 0 and that, rounding errors of a missing rank among them; none
    ends above 1.01. NaN and infinities make their own matrix NaN, no other.

    dtype: of the products and the result; None is float32 (float64 stays). bfloat16 is for units that are fast in it:
    its rounding stirs directions of small singular values, so sums in another order give visibly other results.
    """
    if matrices.dim() < 2 or not matrices.is_floating_point():
        raise ConfigError(
            f"matrices have shape {tuple(matrices.shape)} and type {matrices.dtype}: give floats [..., R, C]"
        )
    wide = torch.float64 if matrices.dtype == torch.float64 else torch.float32
    if matrices.numel() == 0:
        return matrices.to(dtype or wide, copy=True)
    tall = matrices.shape[-2] > matrices.shape[-1]
    # Always a stack, so that a matrix alone and one among others go through the same products.
    stack = matrices.reshape(-1, *matrices.shape[-2:]).to(wide)
    x = _normalised(stack.mT if tall else stack).to(dtype or wide)
    for a, b, c in schedule:
        gram = torch.bmm(x, x.mT)
        mixed = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, mixed, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def checked(schedule: NewtonSchulz) -> NewtonSchulz:
    """`schedule` as a tuple of triples of numbers; ConfigError where it is none."""
    steps = tuple(tuple(step) for step in schedule)
    if not steps or any(len(step) != 3 for step in steps):
        raise ConfigError(f"the Newton-Schulz schedule is {schedule!r}: give one triple of coefficients for each step")
    limit = 100.0
    return tuple(
        (
            number("schedule[...][0]", a, low=-limit, high=limit),
            number("schedule[...][1]", b, low=-limit, high=limit),
            number("schedule[...][2]", c, low=-limit, high=limit),
        )
        for a, b, c in steps
    )


def _normalised(stack: Tensor) -> Tensor:
    """Each matrix with Frobenius norm 1. The largest number goes first: squares of tiny gradients would underflow."""
    largest = stack.abs().amax((-2, -1), keepdim=True)
    scaled = stack / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.matrix_norm(scaled, keepdim=True)
    return scaled / torch.where(norm == 0, 1, norm)
