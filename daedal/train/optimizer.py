"""Which optimiser updates which parameter, and both optimisers behind one handle.

Roles come from the list of parameters in `shapes`, never from a look at names or sizes. V4's report names what AdamW
gets: embedding, head, norms, and the static biases and gating factors of hyper-connections; "everything else" is
Muon's. Read so, Muon has routers, indexers, compressors and the mixing matrices `fn` of hyper-connections too. What is
no matrix stays with AdamW whatever its role: sinks, biases. That leaves the compressors' tables of position biases, of
which nothing is published: they are added and map nothing, so AdamW has them. Knows nothing of losses and batches.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from daedal import shapes
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.shapes import ROLES, Slot
from daedal.train.bounds import number
from daedal.train.muon import Muon
from daedal.train.newton_schulz import V4_SCHEDULE, NewtonSchulz
from daedal.train.schedule import Schedule

Kind = Literal["muon", "adamw"]

_MATRICES = frozenset(
    {
        "attention",
        "indexer",
        "compressor",
        "hyper_connection",
        "dense_mlp",
        "router",
        "routed_expert",
        "shared_expert",
        "draft",
    }
)
_TABLES = frozenset({"embedding", "head"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Parameters of one role that are updated alike. decays: whether weight decay acts. split: as in `Muon`."""

    kind: Kind
    role: str
    decays: bool
    split: int
    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]


def groups(model: nn.Module, config: ModelConfig) -> tuple[Group, ...]:
    """Every parameter of `model` in one group, frozen ones too; buffers in none.

    model: a Transformer of `config`, or a part of one whose parameters keep their names (a pipeline stage), sharded or
    not. Norms, biases and whatever else has one axis do not decay, nor do tables of position biases. ConfigError for a
    parameter that `shapes` does not list.
    """
    slots = {slot.name: slot for slot in (*shapes.parameters(config), *shapes.drafting(config))}
    found: dict[tuple[Kind, str, bool, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if name not in slots:
            raise ConfigError(
                f"the model has a parameter {name!r}: {config.model_type} has none of that name, so group the "
                "parameters of the Transformer itself, not of a wrapper"
            )
        slot = slots[name]
        found[_kind(slot), slot.role, _decays(slot), _split(slot, config)].append((name, parameter))
    return tuple(
        Group(kind=kind, role=role, decays=decays, split=split, names=names, parameters=parameters)
        for (kind, role, decays, split), members in found.items()
        for names, parameters in [tuple(zip(*members, strict=True))]
    )


def _kind(slot: Slot) -> Kind:
    if slot.role not in _MATRICES | _TABLES | {"norm"}:
        raise ConfigError(f"parameter {slot.name!r} has the role {slot.role!r}: no optimiser is known for it")
    return "muon" if slot.role in _MATRICES and len(slot.shape) > 1 and not _is_position_bias(slot) else "adamw"


def _decays(slot: Slot) -> bool:
    return len(slot.shape) > 1 and not _is_position_bias(slot)


def _is_position_bias(slot: Slot) -> bool:
    return slot.role == "compressor" and slot.name.endswith(".position_bias")


def _split(slot: Slot, config: ModelConfig) -> int:
    """Matrices that lie one below the other in one: gates and ups of experts; the blocks of V4's first output map.

    `kv_b_proj` stays whole, keys and values of all heads: Moonlight and V4 orthogonalise the matrices of attention as
    they are stored. (V4.1 is said to go head by head for queries and keys.)
    """
    if slot.role == "routed_expert" and slot.name.endswith(".gate_up_proj"):
        return 2
    if slot.role == "attention" and slot.name.endswith(".o_a_proj.weight"):
        assert config.o_groups is not None
        return config.o_groups
    return 1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated; the numbers are V4's where they have defaults.

    rate: the peak learning rate, of Muon and AdamW alike (see `muon` on why). rates, schedules: by role, where one
    differs. update_rms: of Muon. weight_decay: of both, where a group decays. betas, eps: of AdamW.

    eps is so small that it only keeps 0 from being divided by 0. It also bounds what happens when squares underflow:
    float32 has no g^2 for |g| below about 3e-23; then an update is |g| / eps, at most 0.003 of the rate. An eps below
    1e-22 would let such gradients take steps larger than the rate, and is refused. (Where a processor flushes
    subnormal numbers to 0, the same happens from |g| = 5e-19 on, and updates may reach 50 times the rate.)
    """

    rate: float
    schedule: Schedule
    rates: Mapping[str, float] = field(default_factory=dict)
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    update_rms: float = 0.18
    newton_schulz: NewtonSchulz = V4_SCHEDULE
    arithmetic: torch.dtype | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20

    def __post_init__(self) -> None:
        number("rate", self.rate, low=0.0, high=1e3, above=True)
        number("weight_decay", self.weight_decay, low=0.0, high=1e3)
        number("update_rms", self.update_rms, low=0.0, high=1e3, above=True)
        number("momentum", self.momentum, low=0.0, high=math.nextafter(1.0, 0.0))
        number("eps", self.eps, low=1e-22, high=1.0)
        if len(self.betas) != 2:
            raise ConfigError(f"`betas` is {self.betas!r}: give two numbers, as in (0.9, 0.95)")
        for index, beta in enumerate(self.betas):
            number(f"betas[{index}]", beta, low=0.0, high=math.nextafter(1.0, 0.0))
        for name, given in (("rates", self.rates), ("schedules", self.schedules)):
            if unknown := set(given) - set(ROLES):
                raise ConfigError(f"`{name}` names {', '.join(sorted(unknown))}: the roles are {', '.join(ROLES)}")
            object.__setattr__(self, name, MappingProxyType(dict(given)))
        for role, rate in self.rates.items():
            number(f"rates[{role!r}]", rate, low=0.0, high=1e3)

    def at(self, role: str, step: int) -> float:
        """The learning rate of a role's parameters in step `step`, counted from 0."""
        return self.rates.get(role, self.rate) * self.schedules.get(role, self.schedule).at(step)


class Optimizers:
    """Muon and AdamW of one model, stepped together; the step's number alone decides the learning rates.

    each: the optimisers of torch, for `get_optimizer_state_dict` and its kin of `torch.distributed.checkpoint`: one or
    both, as there are parameters for them. Those functions refuse a trainable parameter that never had a gradient, so
    what a stage does not train (an indexer) must be frozen by `requires_grad_(False)`. AdamW's parameters must be
    float32 (or float64): they are few, and its moments have their dtype. ConfigError otherwise.
    """

    def __init__(self, members: Sequence[Group], config: OptimizerConfig):
        self.config = config
        self._named: dict[Kind, torch.optim.Optimizer] = {}
        if matrices := [self._described(group) for group in members if group.kind == "muon"]:
            self._named["muon"] = Muon(
                matrices,
                config.rate,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                update_rms=config.update_rms,
                schedule=config.newton_schulz,
                arithmetic=config.arithmetic,
            )
        if others := [self._described(group) for group in members if group.kind == "adamw"]:
            _check_wide([group for group in members if group.kind == "adamw"])
            # Fused: one pass over memory instead of a dozen, seven times as fast on a CPU.
            self._named["adamw"] = torch.optim.AdamW(
                others, config.rate, betas=config.betas, eps=config.eps, fused=True
            )
        self.each = tuple(self._named.values())

    def _described(self, group: Group) -> dict[str, Any]:
        described: dict[str, Any] = {"params": list(group.parameters), "role": group.role}
        described["weight_decay"] = self.config.weight_decay if group.decays else 0.0
        return described | ({"split": group.split} if group.kind == "muon" else {})

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate of each role that this model has, in step `step`."""
        roles = [group["role"] for optimizer in self.each for group in optimizer.param_groups]
        return {role: self.config.at(role, step) for role in roles}

    def step(self, step: int) -> None:
        """Updates every parameter that has a gradient. step: how many there were before, over all runs."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = self.config.at(group["role"], step)
            optimizer.step()

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """By "muon" and "adamw". Of sharded parameters it holds this process's shards: see `each`."""
        return {kind: optimizer.state_dict() for kind, optimizer in self._named.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ConfigError where the state is that of another choice of optimisers."""
        if set(state) != set(self._named):
            raise ConfigError(
                f"the saved state is of {', '.join(sorted(state)) or 'no optimiser'}, the model has "
                f"{', '.join(sorted(self._named))}: load the state of the same model"
            )
        for kind, optimizer in self._named.items():
            optimizer.load_state_dict(state[kind])


def _check_wide(members: Sequence[Group]) -> None:
    for group in members:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"{name} is {parameter.dtype}: AdamW keeps moments in its parameter's dtype, so hold this one in "
                    "float32 and cast it in the forward pass"
                )
