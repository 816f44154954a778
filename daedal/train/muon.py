"""Muon: momentum, orthogonalised matrix by matrix (Jordan 2024; Moonlight, arXiv 2502.16982; V4, section on Muon).

M becomes mu M + G; the direction is the orthogonal matrix next to mu M + G (Nesterov) or M; weights decay apart from
it. An orthogonal R x C matrix has min(R, C) singular values of 1, so its numbers have a mean square of
min(R, C) / (R C) = 1 / max(R, C): times sqrt(max(R, C)) and `update_rms` its RMS is `update_rms`, that of a usual Adam
update, and one learning rate serves both. A gradient of lower rank moves less by the square root of the share of rank
it has. Knows parameters and their placement, nothing of models.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypedDict, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from daedal.errors import ConfigError
from daedal.train.bounds import number, whole
from daedal.train.newton_schulz import V4_SCHEDULE, NewtonSchulz, checked, orthogonalise
from daedal.train.owners import Part, agree, cut, deal, local, through_owners


class _Group(TypedDict):
    params: list[Tensor]
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    update_rms: float
    split: int


_Turn = tuple[Tensor, _Group]
_CutTurn = tuple[Tensor, _Group, int]  # and the axis along which matrices are cut


class Muon(torch.optim.Optimizer):
    """Updates matrices [R, C] and stacks of them [..., R, C], each matrix of a stack on its own.

    lr: the RMS of an update is `update_rms` * lr. weight_decay: decoupled, weights shrink by lr * weight_decay first.
    split, of a parameter group: matrices that lie one below the other in each [R, C], orthogonalised apart: 2 for
    the gates and ups of experts, the number of groups for a block-diagonal projection. schedule, arithmetic: those of
    `orthogonalise`; arithmetic None is float32.

    Momentum is float32 (float64 for float64 parameters). A parameter of bfloat16 or float16 gets a float32 `master` in
    the state, whose rounding it is: weights, gradients, momentum and master then take 2 + 2 + 4 + 4 bytes a number,
    just as much as 4 + 4 + 4 of float32, which is the better choice where there is one: its gradients are not rounded.

    Parameters may be DTensors. Where a shard cuts through matrices, each matrix is put together by one process, its
    owner; a sharded step gives the bits of an unsharded one as long as products of the same shape do. Replicas repeat
    the work. A parameter without gradient is left alone, on all processes or on none.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
        split: int = 1,
        schedule: NewtonSchulz = V4_SCHEDULE,
        arithmetic: torch.dtype | None = None,
    ):
        self._schedule, self._arithmetic = checked(schedule), arithmetic
        if arithmetic not in (None, torch.float32, torch.float64, torch.bfloat16):
            raise ConfigError(f"arithmetic is {arithmetic}: Newton-Schulz runs in float32, float64 or bfloat16")
        settings = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "update_rms": update_rms,
            "split": split,
        }
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimiser; ConfigError for numbers out of range and parameters that hold no matrices."""
        settings = self.defaults | param_group
        number("lr", settings["lr"], low=0.0, high=1e3)
        number("weight_decay", settings["weight_decay"], low=0.0, high=1e3)
        number("update_rms", settings["update_rms"], low=0.0, high=1e3, above=True)
        if number("momentum", settings["momentum"], low=0.0, high=1.0) == 1.0:
            raise ConfigError("`momentum` is 1: a gradient would never fade, so give a number below 1")
        split = whole("split", settings["split"], low=1)
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2 or not parameter.is_floating_point():
                raise ConfigError(
                    f"a parameter has shape {tuple(parameter.shape)} and type {parameter.dtype}: Muon updates matrices "
                    "of floats, so give it to AdamW"
                )
            if parameter.shape[-2] % split:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} is to be split into {split}: its rows do not divide"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient. Where matrices are cut, all processes take part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole: list[_Turn] = []
        shared: dict[dist.ProcessGroup, list[_CutTurn]] = defaultdict(list)
        for group in cast(list[_Group], self.param_groups):
            for parameter in group["params"]:
                _check_placement(parameter)
                place = cut(parameter)
                if place is not None:
                    shared[place[0]].append((parameter, group, place[1]))
                elif parameter.grad is not None:
                    whole.append((parameter, group))
        # All that may be refused comes before the first change.
        present = {processes: _with_gradient(turns, processes) for processes, turns in shared.items()}
        for parameter, group in whole:
            self._apply(parameter, group, self._direction(self._blended(parameter, group), group))
        for processes, turns in present.items():
            self._step_shared(processes, turns)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimiser, but that the state keeps its float32: torch would round it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    self.state[parameter][name] = value.to(device=parameter.device, dtype=_wide(parameter))

    def _step_shared(self, processes: dist.ProcessGroup, turns: list[_CutTurn]) -> None:
        """Steps of parameters whose matrices are cut over `processes`."""
        # One exchange has one dtype; float64 parameters go apart.
        for wide in (torch.float32, torch.float64):
            chosen = [turn for turn in turns if _wide(turn[0]) == wide]
            costs = [_cost(parameter) for parameter, *_ in chosen]
            for indices in deal(costs, dist.get_world_size(processes)):
                self._round([None if index is None else chosen[index] for index in indices], processes)

    def _round(self, turns: list[_CutTurn | None], processes: dist.ProcessGroup) -> None:
        parts = [turn and Part.of(self._blended(turn[0], turn[1]), turn[0], turn[2]) for turn in turns]
        own = turns[dist.get_rank(processes)]
        results = through_owners(parts, processes, lambda matrix: self._direction(matrix, own[1]) if own else matrix)
        for turn, result in zip(turns, results, strict=True):
            if turn is not None and result is not None:
                self._apply(turn[0], turn[1], result)

    def _blended(self, parameter: Tensor, group: _Group) -> Tensor:
        """Momentum with the new gradient in it, as the direction wants it: this process's part, in float32."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=_wide(parameter))
            if parameter.dtype != _wide(parameter):
                state["master"] = parameter.detach().to(_wide(parameter))
        momentum, fresh = local(state["momentum"]), local(gradient).to(_wide(parameter))
        # Sums with a factor may be rounded once or twice, as vectors end; products and sums apart are always the same.
        momentum.mul_(group["momentum"]).add_(fresh)
        return torch.mul(momentum, group["momentum"]).add_(fresh) if group["nesterov"] else momentum

    def _direction(self, blended: Tensor, group: _Group) -> Tensor:
        """Of whole matrices [..., R, C]: their orthogonal ones, of the RMS wanted, in float32."""
        apart = blended.unflatten(-2, (group["split"], -1))
        direction = orthogonalise(apart, self._schedule, dtype=self._arithmetic).to(blended.dtype)
        rows, columns = apart.shape[-2:]
        return direction.mul_(group["update_rms"] * math.sqrt(max(rows, columns))).flatten(-3, -2)

    def _apply(self, parameter: Tensor, group: _Group, direction: Tensor) -> None:
        master = self.state[parameter].get("master")
        weights = local(parameter if master is None else master)
        weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction.mul_(group["lr"]))
        if master is not None:
            local(parameter).copy_(weights)


def _with_gradient(turns: list[_CutTurn], processes: dist.ProcessGroup) -> list[_CutTurn]:
    """Those that have a gradient, the same on all processes; else they would wait for one another for ever."""
    present = [parameter.grad is not None for parameter, *_ in turns]
    if not agree(present, processes, local(turns[0][0]).device):
        raise ConfigError("a sharded parameter has a gradient on some processes only: give it one on all or none")
    return [turn for turn, has in zip(turns, present, strict=True) if has]


def _check_placement(parameter: Tensor) -> None:
    gradient, placed = parameter.grad, getattr(parameter, "placements", None)
    if gradient is not None and getattr(gradient, "placements", None) != placed:
        raise ConfigError(
            f"a parameter of shape {tuple(parameter.shape)} is placed as {placed}, its gradient otherwise: "
            "redistribute the gradient first"
        )


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _cost(parameter: Tensor) -> int:
    """Multiplications of a Newton-Schulz step, up to a factor."""
    return parameter.numel() * min(parameter.shape[-2:])
