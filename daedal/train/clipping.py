"""The norm of all gradients of a model, however its parameters are spread over processes, and clipping by it.

One norm is taken over everything, so that clipping keeps the direction of the step (Pascanu et al. 2013). A shard
counts where it lies, a replica once. What is not finite is told, never clipped or skipped: a step on it would ruin the
weights, and only the caller knows whether to stop. Knows no optimiser.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from daedal.errors import ConfigError
from daedal.ops import silicon
from daedal.train.bounds import number
from daedal.train.owners import local

_STRETCH = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """Parameters, and the groups whose processes hold different ones of them though their tensors do not say so.

    groups: that of expert parallelism for plain stacks of a process's own experts; that of the pipeline for everything.
    A process of such a group that holds none of them gives an empty list; all give their lists in the same order. What
    DTensors are sharded over is known from them and not named here.
    """

    parameters: Sequence[Tensor]
    groups: tuple[dist.ProcessGroup, ...] = ()


def gradient_norm(parts: Sequence[Spread], device: torch.device | str = "cpu") -> float:
    """The Euclidean norm of all gradients there are, the same on all processes; NaN or infinite if any number is.

    device: where sums are exchanged. All processes of all groups named take part.
    """
    total = 0.0
    for part in parts:
        squares = _squares(part.parameters, torch.device(device))
        for group in part.groups:
            dist.all_reduce(squares, dist.ReduceOp.SUM, group)
        total += squares.item()
    return math.sqrt(total)


def clip(parts: Sequence[Spread], most: float, device: torch.device | str = "cpu") -> float:
    """Scales all gradients down so that their norm is at most `most`, and returns what it was.

    If that is not finite the gradients are left as they are: the caller must look, and must not step. Parameters of
    one norm are clipped together, so all that an optimiser steps belongs into one call.
    """
    limit = number("most", most, low=0.0, high=1e9, above=True)
    norm = gradient_norm(parts, device)
    if math.isfinite(norm) and norm > limit:
        for part in parts:
            for parameter in part.parameters:
                if parameter.grad is not None:
                    local(parameter.grad).mul_(limit / norm)
    return norm


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the parameters whose gradient, as far as this process holds it, has a NaN or an infinity."""
    return [name for name, p in named if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all())]


def _squares(parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squared gradients in the widest type of the chip, summed over what DTensors are sharded over."""
    buckets: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        # The bucket is made from the parameter: a gradient may be missing, and all must exchange the same sums.
        bucket = buckets[_sharded_over(parameter)]
        if parameter.grad is not None:
            bucket.append(_square(local(parameter.grad)))
    total = torch.zeros((), dtype=_widest(device), device=device)
    for groups, found in buckets.items():
        squares = torch.stack(found).sum().to(device, total.dtype) if found else torch.zeros_like(total)
        for group in groups:
            dist.all_reduce(squares, dist.ReduceOp.SUM, group)
        total += squares
    return total


def _square(gradient: Tensor) -> Tensor:
    """The sum of squares in the widest type of the chip. float32 serves for a thousand numbers; over millions its sums
    may stand still, which is why a chip that has nothing wider adds up sums of a thousand.
    """
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    flat = gradient.reshape(-1)
    even = flat.numel() // _STRETCH * _STRETCH
    stretches = torch.linalg.vector_norm(flat[:even].view(-1, _STRETCH), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(flat[even:], dtype=wide)
    return torch.cat((stretches, rest.view(1))).to(_widest(gradient.device)).square().sum()


def _widest(device: torch.device) -> torch.dtype:
    return torch.float64 if silicon.of(device).doubles else torch.float32


def _sharded_over(parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not isinstance(parameter, DTensor):
        return ()
    for placed in (parameter, parameter.grad):
        if isinstance(placed, DTensor) and any(placement.is_partial() for placement in placed.placements):
            raise ConfigError(
                f"a parameter of shape {tuple(parameter.shape)} or its gradient is placed as {placed.placements}: sums "
                "that are still partial have no norm, so redistribute them first"
            )
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(dim) for dim, p in enumerate(parameter.placements) if not p.is_replicate())
