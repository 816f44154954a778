"""Which optimiser gets what, both behind one handle, clipping, and all of it sharded by FSDP2."""

import math
from collections import Counter
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from daedal import shapes
from daedal.errors import ConfigError
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer, empty
from daedal.train.clipping import Spread, clip, gradient_norm, not_finite
from daedal.train.muon import Muon
from daedal.train.optimizer import Group, OptimizerConfig, Optimizers, groups
from daedal.train.schedule import Schedule
from tests.tiny import FAMILIES, tiny_config, tiny_model
from tests.train.processes import run

FLAT = Schedule(steps=100, decay="constant")


def _one_each(families: tuple[str, ...] = FAMILIES) -> list[object]:
    drafted = [pytest.param(name, True, id=f"{name}+mtp") for name in ("deepseek_v3", "deepseek_v32", "deepseek_v4")]
    return [*(pytest.param(name, False, id=name) for name in families), *drafted]


@pytest.mark.parametrize(("family", "drafting"), _one_each())
def test_every_parameter_is_in_one_group_and_no_buffer_in_any(family: str, drafting: bool) -> None:
    config = tiny_config(family, **({"num_nextn_predict_layers": 1} if drafting else {}))
    model = empty(config, device="meta", drafting=drafting)
    found = groups(model, config)
    counts = Counter(id(parameter) for group in found for parameter in group.parameters)
    assert counts == Counter(id(parameter) for parameter in model.parameters())
    assert not counts.keys() & {id(buffer) for buffer in model.buffers()}
    roles = {slot.name: slot.role for slot in (*shapes.parameters(config), *shapes.drafting(config))}
    assert all(roles[name] == group.role for group in found for name in group.names)
    for group in found:
        axes = {parameter.dim() for parameter in group.parameters}
        if group.role in ("embedding", "head", "norm") or axes == {1}:
            assert group.kind == "adamw"
        if 1 in axes:
            assert not group.decays
        if group.kind == "muon":
            assert group.decays
            assert min(axes) >= 2


def _by_name(found: tuple[Group, ...]) -> dict[str, Group]:
    return {name: group for group in found for name in group.names}


def test_v4_is_grouped_as_its_report_says() -> None:
    config = tiny_config("deepseek_v4")
    found = _by_name(groups(empty(config, device="meta", drafting=True), config))
    muon = [
        "layers.1.attn_hc.fn",
        "hc_head.hc_fn",
        "layers.1.mlp.gate.weight",
        "layers.1.mlp.experts.down_proj",
        "layers.1.mlp.shared_experts.up_proj.weight",
        "layers.1.self_attn.compressor.kv_proj.weight",
        "layers.1.self_attn.compressor.indexer.scorer.weights_proj.weight",
        "mtp.0.e_proj.weight",
    ]
    bare = [
        "layers.1.attn_hc.base",
        "layers.1.attn_hc.scale",
        "layers.1.self_attn.sinks",
        "layers.1.self_attn.compressor.position_bias",
        "norm.weight",
    ]
    assert {(found[name].kind, found[name].decays, found[name].split) for name in muon} == {("muon", True, 1)}
    assert {(found[name].kind, found[name].decays) for name in bare} == {("adamw", False)}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert (found[name].kind, found[name].decays) == ("adamw", True)
    assert found["layers.1.mlp.experts.gate_up_proj"].split == 2
    assert found["layers.1.self_attn.o_a_proj.weight"].split == config.o_groups == 3


def test_groups_of_a_stage_and_of_a_wrapper() -> None:
    config = tiny_config("deepseek_v4")
    stage = empty(config, device="meta")
    stage.layers = nn.ModuleDict({"2": stage.layers[2]})  # type: ignore[assignment]
    assert _by_name(groups(stage, config))["layers.2.mlp.gate.weight"].role == "router"
    wrapper = nn.ModuleDict({"module": stage})
    with pytest.raises(ConfigError, match=r"parameter 'module\.embed_tokens\.weight'.*not of a wrapper"):
        groups(wrapper, config)


def _gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_both_step_with_the_rates_of_their_roles() -> None:
    """AdamW's first step is the rate itself in every number; Muon's has an RMS of 0.18 of it."""
    model = tiny_model("deepseek_v3")
    schedules = {"norm": Schedule(steps=10, warmup=2, decay="linear", floor=0.0)}
    config = OptimizerConfig(rate=1e-2, schedule=FLAT, rates={"embedding": 0.5}, schedules=schedules, weight_decay=0.0)
    optimizers = Optimizers(groups(model, model.config), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _gradients(model, 0)
    optimizers.step(0)
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    for name, rate in (("lm_head.weight", 1e-2), ("embed_tokens.weight", 0.5), ("norm.weight", 0.5e-2)):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], rate), rtol=1e-3, atol=0.0)
    experts = moved["layers.1.mlp.experts.down_proj"]
    torch.testing.assert_close(experts.square().mean((1, 2)).sqrt(), torch.full((12,), 0.0018), rtol=0.02, atol=0.0)
    assert optimizers.rates(9)["norm"] == 0.0
    assert optimizers.rates(9)["router"] == 1e-2
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    first = tiny_model("deepseek_v4")
    settings = OptimizerConfig(rate=1e-2, schedule=Schedule(steps=10, warmup=3))
    optimizers = Optimizers(groups(first, first.config), settings)
    for step in range(2):
        _gradients(first, step)
        optimizers.step(step)
    second = tiny_model("deepseek_v4")
    second.load_state_dict(first.state_dict())
    resumed = Optimizers(groups(second, second.config), settings)
    resumed.load_state_dict(deepcopy(optimizers.state_dict()))
    for model, its in ((first, optimizers), (second, resumed)):
        _gradients(model, 2)
        its.step(2)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ConfigError, match="the saved state is of adamw, the model has adamw, muon"):
        resumed.load_state_dict({"adamw": {}})


def test_adamw_eps_keeps_tiny_gradients_from_large_steps() -> None:
    """Squares of gradients below 3e-23 are 0 in float32: what is left is g / eps."""
    sizes = torch.tensor([1.0, 1e-10, 1e-18, 1e-20, 1e-22, 2e-23, 1e-30, 0.0])
    parameter = nn.Parameter(torch.zeros(8))
    group = Group(kind="adamw", role="norm", decays=False, split=1, names=("x",), parameters=(parameter,))
    optimizers = Optimizers([group], OptimizerConfig(rate=1.0, schedule=FLAT))
    parameter.grad = sizes.clone()
    optimizers.step(0)
    moved = -parameter.detach()
    assert moved.isfinite().all()
    assert moved.max() <= 1.001
    assert moved[:3] == pytest.approx([1.0, 1.0, 0.99], rel=1e-3)
    assert 0 < moved[5] < 3e-3
    assert moved[-1] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": "1e-20"}, "`eps` is the text '1e-20': it must be a number from 1e-22 to 1, so write 1.0e-20 without"),
        ({"rate": "3e-4"}, "`rate` is the text '3e-4'"),
        ({"rate": "fast"}, "`rate` is the text 'fast'"),
        ({"eps": 1e-30}, "`eps` is 1e-30"),
        ({"eps": math.nan}, "`eps` is nan"),
        ({"betas": ("0.9", 0.95)}, "`betas[0]` is the text '0.9'"),
        ({"betas": (0.9, 1.0)}, "`betas[1]` is 1.0"),
        ({"betas": (0.9,)}, "give two numbers"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"weight_decay": None}, "`weight_decay` is None"),
        ({"weight_decay": True}, "`weight_decay` is True"),
        ({"rates": {"embeding": 1.0}}, "`rates` names embeding: the roles are embedding,"),
        ({"rates": {"embedding": "1"}}, "`rates['embedding']` is the text '1'"),
    ],
)
def test_numbers_are_checked_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(**{"rate": 1e-3, "schedule": FLAT, **changes})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_narrow_parameters_are_refused_for_adamw() -> None:
    model = tiny_model("deepseek_v4", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight is torch.bfloat16.*float32"):
        Optimizers(groups(model, model.config), OptimizerConfig(rate=1e-3, schedule=FLAT))


def test_clipping_keeps_the_direction_and_tells_what_is_not_finite() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (5000,), (2, 2))]
    parameters[0].grad, parameters[1].grad = torch.randn(3, 5), torch.randn(5000).bfloat16().float()
    grads = [parameter.grad.clone() for parameter in parameters[:2] if parameter.grad is not None]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    spread = [Spread(parameters=parameters)]
    assert clip(spread, 1e6) == pytest.approx(norm, rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters[:2], grads, strict=True) if p.grad is not None)
    assert clip(spread, 0.5) == pytest.approx(norm, rel=1e-6)
    assert gradient_norm(spread) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(parameters[0].grad, grads[0] * (0.5 / norm))
    parameters[1].grad[7] = math.inf
    before = parameters[0].grad.clone()
    assert clip(spread, 0.5) == math.inf
    parameters[1].grad[8] = math.nan
    assert math.isnan(clip(spread, 0.5))
    assert torch.equal(parameters[0].grad, before)
    assert not_finite(zip("abc", parameters, strict=True)) == ["b"]
    with pytest.raises(ConfigError, match=r"`most` is 0\.0"):
        clip(spread, 0.0)


def test_the_norm_of_many_numbers_does_not_stand_still() -> None:
    parameter = nn.Parameter(torch.zeros(1 << 24))
    parameter.grad = torch.full((1 << 24,), 0.1)
    assert gradient_norm([Spread(parameters=[parameter])]) == pytest.approx(0.1 * 4096, rel=1e-6)


def _trained(model: Transformer, optimizers: Optimizers, first: int, last: int) -> list[float]:
    """Steps of a plain loss; returns the gradients' norms."""
    norms = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        # Longer than a compressed window of 128: a compressor that completes none has no gradient.
        batch = RaggedBatch.of([torch.randint(0, 320, (140,), generator=generator).tolist()])
        logits_TV = model(batch)
        nn.functional.cross_entropy(logits_TV[:-1], batch.ids_T[1:]).backward()
        norms.append(clip([Spread(parameters=list(model.parameters()))], 0.5))
        optimizers.step(step)
        optimizers.zero_grad()
    return norms


def _trainable() -> Transformer:
    """A model whose indexers, which this loss does not reach, are frozen: checkpoints want a state of all others."""
    model = tiny_model("deepseek_v4").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    return model


_SETTINGS = OptimizerConfig(rate=2e-3, schedule=Schedule(steps=20, warmup=2))


def _sharded_model(count: int) -> tuple[Transformer, Optimizers]:
    model = _trainable()
    mesh = init_device_mesh("cpu", (count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, Optimizers(groups(model, model.config), _SETTINGS)


def _fsdp(rank: int, count: int) -> dict[str, Tensor]:
    model, optimizers = _sharded_model(count)
    norms = _trained(model, optimizers, 0, 2)
    # A second run goes on from the state of the first, by the utilities of torch's checkpoints.
    saved = deepcopy(get_optimizer_state_dict(model, optimizers.each))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norms += _trained(model, optimizers, 2, 3)
    resumed, its = _sharded_model(count)
    resumed.load_state_dict(weights)
    set_optimizer_state_dict(resumed, its.each, saved)
    assert _trained(resumed, its, 2, 3) == norms[2:]
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert isinstance(one, DTensor)
        assert isinstance(other, DTensor)
        assert torch.equal(one.to_local(), other.to_local())
    found = {name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return found | {"norms": torch.tensor(norms, dtype=torch.float64)}


def test_fsdp_is_one_process() -> None:
    """The same batch on both processes: weights, norms and a resumed run agree with one process."""
    model = _trainable()
    optimizers = Optimizers(groups(model, model.config), _SETTINGS)
    assert isinstance(optimizers.each[0], Muon)
    norms = _trained(model, optimizers, 0, 3)
    assert max(norms) > 0.5  # clipped
    for found in run(_fsdp, 2, 2):
        assert found.pop("norms").tolist() == pytest.approx(norms, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=2e-6)


def _spread(rank: int, count: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (count,))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(3, 4), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(torch.full((3, 4), 2.0), mesh, [Shard(0)])
    copied, own = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2, 3, 3))
    copied.grad = torch.ones(5)
    # The experts of the second process have no token; their norm is asked for all the same.
    own.grad = None if rank else torch.full((2, 3, 3), 3.0)
    assert dist.group.WORLD is not None
    parts = [Spread(parameters=[sharded, copied]), Spread(parameters=[own], groups=(dist.group.WORLD,))]
    norm = clip(parts, 1.0)
    return {"norm": torch.tensor([norm, gradient_norm(parts)], dtype=torch.float64)}


def test_the_norm_over_processes() -> None:
    expected = math.sqrt(12 * 4.0 + 5 * 1.0 + 18 * 9.0)
    for found in run(_spread, 2, 2):
        assert found["norm"].tolist() == pytest.approx([expected, 1.0], rel=1e-6)


def _failing(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("the second process has had enough")
    dist.barrier()


def test_a_failing_process_ends_them_all_and_is_heard() -> None:
    with pytest.raises(AssertionError, match="the second process has had enough"):
        run(_failing, 2)
