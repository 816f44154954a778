"""Muon against a plain step in float64, on stacks and split matrices, in bfloat16, and cut over processes."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from daedal.errors import ConfigError
from daedal.train.muon import Muon
from daedal.train.owners import deal
from tests.train.processes import run

RATES = (0.3, 0.2, 0.1)


def _plain_steps(weights: Tensor, gradients: list[Tensor], *, nesterov: bool) -> Tensor:
    """V4's rule on one matrix, written as in its report, in float64."""
    weights, momentum = weights.double(), torch.zeros_like(weights, dtype=torch.float64)
    for rate, gradient in zip(RATES, gradients, strict=True):
        momentum = 0.95 * momentum + gradient.double()
        x = 0.95 * momentum + gradient.double() if nesterov else momentum
        x = x / x.square().sum().sqrt()
        for step in range(10):
            a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
            x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
        update = x * 0.18 * math.sqrt(max(x.shape))
        weights = weights * (1 - rate * 0.1) - rate * update
    return weights


def _gradients(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in RATES]


def _step_through(parameters: list[nn.Parameter], gradients: list[list[Tensor]], optimizer: Muon) -> None:
    for turn, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, given in zip(parameters, gradients, strict=True):
            parameter.grad = given[turn].to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize(
    ("shape", "split"), [((6, 15), 1), ((15, 6), 1), ((4, 5, 9), 1), ((3, 8, 5), 2), ((12, 7), 3)], ids=str
)
def test_steps_are_those_of_the_report(
    shape: tuple[int, ...], split: int, dtype: torch.dtype, tolerance: float, nesterov: bool
) -> None:
    start, gradients = torch.randn(shape), _gradients(shape, 5)
    parameter = nn.Parameter(start.to(dtype, copy=True))
    _step_through([parameter], [gradients], Muon([{"params": [parameter], "split": split}], 1.0, nesterov=nesterov))

    def pieces(whole: Tensor) -> list[Tensor]:
        return [piece for matrix in whole.reshape(-1, *shape[-2:]) for piece in matrix.chunk(split)]

    each = zip(pieces(start), *map(pieces, gradients), strict=True)
    expected = torch.cat([_plain_steps(first, list(rest), nesterov=nesterov) for first, *rest in each])
    torch.testing.assert_close(parameter.double().reshape(expected.shape), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(32, 32), (16, 90), (90, 16), (3, 20, 40)], ids=str)
def test_updates_have_the_rms_that_was_asked_for(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape) * 1e-6
    Muon([parameter], 0.5, update_rms=0.18).step()
    for matrix in parameter.detach().reshape(-1, *shape[-2:]):
        assert matrix.square().mean().sqrt() == pytest.approx(0.5 * 0.18, rel=0.01)


def test_experts_and_halves_are_matrices_of_their_own() -> None:
    """A stack of gates and ups moves bit for bit as its matrices would alone."""
    start, gradients = torch.randn(4, 10, 7), _gradients((4, 10, 7), 6)
    stacked = nn.Parameter(start.clone())
    _step_through([stacked], [gradients], Muon([{"params": [stacked], "split": 2}], 1.0))
    alone = [nn.Parameter(half.clone()) for expert in start for half in expert.chunk(2)]
    own = [[given[expert, half * 5 : half * 5 + 5] for given in gradients] for expert in range(4) for half in range(2)]
    _step_through(alone, own, Muon(alone, 1.0))
    assert torch.equal(stacked, torch.stack([p.detach() for p in alone]).view(4, 10, 7))


def test_bfloat16_parameters_follow_a_float32_master() -> None:
    start = torch.randn(9, 14).bfloat16()
    gradients = [given.bfloat16().float() for given in _gradients((9, 14), 7)]
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = Muon([narrow], 1.0)
    _step_through([narrow], [gradients], optimizer)
    _step_through([wide], [gradients], Muon([wide], 1.0))
    assert torch.equal(optimizer.state[narrow]["master"], wide)
    assert torch.equal(narrow, wide.bfloat16())
    assert not torch.equal(narrow.float(), wide)
    # Steps too small for bfloat16 add up.
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    before = narrow.detach().clone()
    for _ in range(200):
        optimizer.step()
    assert (narrow - before).abs().float().mean() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    first, gradients = nn.Parameter(torch.randn(6, 8).to(dtype)), _gradients((6, 8), 8)
    optimizer = Muon([first], 1.0)
    _step_through([first], [gradients], optimizer)
    second = nn.Parameter(first.detach().clone())
    resumed = Muon([second], 1.0)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert {value.dtype for value in resumed.state[second].values()} == {torch.float32}
    for one, its in ((first, optimizer), (second, resumed)):
        one.grad = gradients[0].to(dtype)
        its.step()
    assert torch.equal(first, second)


def test_no_gradient_no_step_and_a_zero_gradient_only_decays() -> None:
    untouched, zero = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.ones(3, 4))
    before = untouched.detach().clone()
    zero.grad = torch.zeros(3, 4)
    optimizer = Muon([untouched, zero], 0.5)
    optimizer.step()
    assert torch.equal(untouched, before)
    assert untouched not in optimizer.state
    assert torch.equal(zero, torch.full((3, 4), 0.95))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "1e-3"}, "`lr` is the text '1e-3'"),
        ({"lr": -1.0}, "`lr` is -1.0"),
        ({"momentum": 1.0}, "`momentum` is 1"),
        ({"weight_decay": math.nan}, "`weight_decay` is nan"),
        ({"update_rms": 0.0}, "`update_rms` is 0.0: it must be a number above 0"),
        ({"split": 2}, "split into 2: its rows do not divide"),
        ({"arithmetic": torch.float16}, "arithmetic is torch.float16"),
        ({"schedule": ()}, "one triple"),
    ],
)
def test_what_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Muon([nn.Parameter(torch.ones(3, 4))], **{"lr": 0.1, **settings})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="give it to AdamW"):
        Muon([nn.Parameter(torch.ones(3))], 0.1)


def test_work_is_dealt_out_evenly() -> None:
    costs = [9, 1, 7, 7, 2, 2, 5, 3, 0]
    rounds = deal(costs, 3)
    owned = [[turn[process] for turn in rounds if turn[process] is not None] for process in range(3)]
    assert sorted(index for indices in owned for index in indices) == list(range(len(costs)))
    assert max(sum(costs[index] for index in indices) for indices in owned) == 12
    assert deal([], 3) == []


# Shape, split, placement, dtype. Over two or three processes some parts are shorter than others and some are empty.
_CUT: dict[str, tuple[tuple[int, ...], int, Placement, torch.dtype]] = {
    "even": ((12, 20), 1, Shard(0), torch.float32),
    "uneven": ((7, 12), 1, Shard(0), torch.float32),
    "tall": ((31, 6), 1, Shard(0), torch.float32),
    "one row": ((1, 16), 1, Shard(0), torch.float32),
    "columns": ((6, 11), 1, Shard(1), torch.float32),
    "groups": ((9, 8), 3, Shard(0), torch.float32),
    "experts": ((5, 6, 8), 2, Shard(0), torch.float32),
    "one expert": ((1, 6, 8), 1, Shard(0), torch.float32),
    "experts' rows": ((4, 10, 9), 2, Shard(1), torch.float32),
    "experts' columns": ((2, 10, 5), 1, Shard(2), torch.float32),
    "copies": ((8, 5), 1, Replicate(), torch.float32),
    "narrow": ((5, 6), 1, Shard(0), torch.bfloat16),
    "wide": ((5, 6), 1, Shard(0), torch.float64),
}


def _starts() -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(9)
    starts = {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _, _, dtype) in _CUT.items()}
    gradients = {name: _gradients(shape, seed) for seed, (name, (shape, *_)) in enumerate(_CUT.items())}
    return starts, gradients


def _sharded(rank: int, count: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (count,))
    starts, gradients = _starts()
    parameters = {name: nn.Parameter(distribute_tensor(starts[name], mesh, [_CUT[name][2]])) for name in _CUT}
    optimizer = Muon([{"params": [parameters[name]], "split": _CUT[name][1]} for name in _CUT], 1.0)
    dealt = [
        [distribute_tensor(given.to(_CUT[name][3]), mesh, [_CUT[name][2]]) for given in gradients[name]]
        for name in _CUT
    ]
    _step_through(list(parameters.values()), dealt, optimizer)
    found = {name: parameter.detach().full_tensor().clone() for name, parameter in parameters.items()}
    for name in ("uneven", "narrow"):
        for key, value in optimizer.state[parameters[name]].items():
            assert isinstance(value, DTensor)
            assert value.placements == (Shard(0),)
            found[f"{name} {key}"] = value.full_tensor()
    parameters["copies"].grad, kept = DTensor.from_local(torch.ones(8, 5), mesh, [Partial()]), parameters["copies"].grad
    with pytest.raises(ConfigError, match="its gradient otherwise"):
        optimizer.step()
    parameters["copies"].grad = kept
    if rank == 1:
        parameters["uneven"].grad = None
    with pytest.raises(ConfigError, match="a gradient on some processes only"):
        optimizer.step()
    assert torch.equal(parameters["copies"].full_tensor(), found["copies"])
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_sharded_is_unsharded_bit_for_bit(count: int) -> None:
    starts, gradients = _starts()
    parameters = {name: nn.Parameter(start) for name, start in starts.items()}
    optimizer = Muon([{"params": [parameters[name]], "split": _CUT[name][1]} for name in _CUT], 1.0)
    _step_through(list(parameters.values()), [gradients[name] for name in _CUT], optimizer)
    expected = {name: parameter.detach() for name, parameter in parameters.items()}
    for name in ("uneven", "narrow"):
        expected |= {f"{name} {key}": value for key, value in optimizer.state[parameters[name]].items()}
    for found in run(_sharded, count, count):
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
