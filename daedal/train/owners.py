"""Whole matrices out of shards: every process of a group works on some matrices whole and hands each part back.

Orthogonalising a shard is not the shard of the orthogonalised matrix (it differs by half), and having every process
gather and work on every matrix repeats the work. Here each matrix has one owner: its parts travel there in one
all-to-all, and the results back in another, a round of at most one matrix for each process at a time, so that no more
than one whole matrix lies on a process (Moonlight, arXiv 2502.16982, section 2.3). Knows nothing of what the work is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from daedal.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Part:
    """What this process holds of a tensor of `shape` that is cut along `axis`. local: may have no rows.

    shape: of what the processes of the group hold together, which is less than the parameter where it is cut over
    another axis of the mesh too, by whole matrices.
    """

    local: Tensor
    shape: tuple[int, ...]
    axis: int

    @classmethod
    def of(cls, numbers: Tensor, parameter: Tensor, axis: int) -> "Part":
        """numbers: what this process holds of something placed as `parameter` is."""
        return cls(numbers, (*numbers.shape[:axis], parameter.shape[axis], *numbers.shape[axis + 1 :]), axis)


def local(tensor: Tensor) -> Tensor:
    """What this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut(tensor: Tensor) -> tuple[dist.ProcessGroup, int] | None:
    """The group over which the matrices (the last two axes) of `tensor` are cut, and the axis; None where this process
    holds each of its matrices whole: plain tensors, replicas, stacks that are dealt out by whole matrices.
    """
    if not isinstance(tensor, DTensor):
        return None
    found: list[tuple[dist.ProcessGroup, int]] = []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise _unable(tensor)
        axis = getattr(placement, "dim", None)
        if axis is None or axis < tensor.dim() - 2 or tensor.device_mesh.size(dim) == 1:
            continue
        if type(placement) is not Shard:
            raise _unable(tensor)
        found.append((tensor.device_mesh.get_group(dim), axis))
    if len(found) > 1:
        raise _unable(tensor)
    return found[0] if found else None


def _unable(tensor: DTensor) -> ConfigError:
    return ConfigError(
        f"a parameter of shape {tuple(tensor.shape)} is placed as {tensor.placements}: its matrices may be cut over "
        "one axis of the mesh only, so shard them over one and replicate them over the others"
    )


def deal(costs: Sequence[int], count: int) -> list[list[int | None]]:
    """Rounds of at most one piece of work for each of `count` processes; entry k of a round is process k's.

    The dearest goes first, each to the process that has least so far (ties to the lowest), so that all processes agree
    without a word and none has more than 4/3 of the best possible.
    """
    owned: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owner = loads.index(min(loads))
        owned[owner].append(index)
        loads[owner] += costs[index]
    rounds = max(map(len, owned), default=0)
    return [[pieces[turn] if turn < len(pieces) else None for pieces in owned] for turn in range(rounds)]


def through_owners(
    parts: Sequence[Part | None], group: dist.ProcessGroup, work: Callable[[Tensor], Tensor]
) -> list[Tensor | None]:
    """One round: `work` of each part's whole tensor, done by its owner; back comes this process's part of each result.

    parts: entry k is owned by process k of `group`, None where it has nothing to do. work: given the whole tensor, the
    same shape and dtype back. All processes of the group call this with the same shapes, and one dtype and device.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    mine = parts[rank]
    sent = [0 if part is None else part.local.numel() for part in parts]
    shapes = [] if mine is None else [_part_shape(mine, process, count) for process in range(count)]
    received = [prod(shape) for shape in shapes] or [0] * count
    given = [part.local.reshape(-1) for part in parts if part is not None]
    gathered = _swap(torch.cat(given), received, sent, group)
    results = gathered
    if mine is not None:
        pieces = [flat.reshape(shape) for flat, shape in zip(gathered.split(received), shapes, strict=True)]
        whole = work(torch.cat(pieces, mine.axis))
        lengths = [shape[mine.axis] for shape in shapes]
        results = torch.cat([piece.reshape(-1) for piece in whole.split(lengths, mine.axis)])
    returned = _swap(results, sent, received, group).split(sent)
    return [None if part is None else flat.view_as(part.local) for part, flat in zip(parts, returned, strict=True)]


def agree(flags: Sequence[bool], group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all processes of `group` give the same flags."""
    numbers = torch.tensor(flags, dtype=torch.int32, device=device)
    extremes = torch.cat((numbers, -numbers))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    most, least = extremes.chunk(2)
    return bool((most == -least).all())


def _part_shape(part: Part, process: int, count: int) -> tuple[int, ...]:
    """The part of process `process`: as torch cuts, all the same length but for the last, then nothing."""
    length = part.shape[part.axis]
    each = -(-length // count)
    own = max(0, min(each, length - process * each))
    return (*part.shape[: part.axis], own, *part.shape[part.axis + 1 :])


def _swap(numbers: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends `sent[k]` of the numbers to process k, and gets `received[k]` of its."""
    arrived = numbers.new_empty(sum(received))
    dist.all_to_all_single(arrived, numbers, received, sent, group)
    return arrived
