"""Every role of every family computes in what is declared for it, what is never quantised cannot be, and a model that
is trained so computes with rounded numbers in fact."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from daedal import shapes
from daedal.errors import ConfigError
from daedal.model.linear import GroupedLinear, Linear
from daedal.model.moe import Experts
from daedal.model.transformer import Transformer
from daedal.ops import formats
from daedal.ops.arithmetic import ARITHMETICS, Arithmetic
from daedal.train.precision import PRECISIONS, QUANTISABLE, Precision, apply, preset
from tests.tiny import tiny_model

DEEPSEEK = ("deepseek_v3", "deepseek_v32", "deepseek_v4")
NEVER = ("embedding", "head", "norm", "indexer", "compressor", "hyper_connection", "router", "router_bias")


def _slots(model: Transformer) -> list[shapes.Slot]:
    return shapes.parameters(model.config) + shapes.drafting(model.config)


def _arithmetic(model: Transformer, slot: shapes.Slot) -> Arithmetic | None:
    found = getattr(model.get_submodule(slot.name.rpartition(".")[0]), "arithmetic", None)
    assert found is None or isinstance(found, Arithmetic)
    return found


def _loss(model: Transformer) -> tuple[float, dict[str, Tensor]]:
    ids_BT = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    logits_BTV = model.logits(ids_BT)
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: found.grad for name, found in model.named_parameters() if found.grad is not None}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("family", DEEPSEEK)
def test_each_role_gets_what_is_declared_and_nothing_else_does(family: str, name: str) -> None:
    model = tiny_model(family, drafting=True, num_nextn_predict_layers=1)
    apply(model, preset(name))
    for slot in _slots(model):
        if slot.role in QUANTISABLE and len(slot.shape) > 1:
            wanted = "fp8" if name == "fp4" and slot.role != "routed_expert" else name
            assert _arithmetic(model, slot) is ARITHMETICS[wanted], slot.name
        elif slot.role not in QUANTISABLE:
            assert _arithmetic(model, slot) is None, slot.name
    roles = {slot.role for slot in _slots(model)}
    assert {"indexer", "compressor", "hyper_connection"} & roles or family == "deepseek_v3"
    apply(model, Precision(name="experts alone", roles={"routed_expert": "fp4"}))
    left = {module for module in model.modules() if getattr(module, "arithmetic", None) is not None}
    assert left == {module for module in model.modules() if isinstance(module, Experts)}


@pytest.mark.parametrize("role", [*NEVER, "hash_table", "cache", "state"])
def test_what_is_never_quantised_is_refused(role: str) -> None:
    with pytest.raises(ConfigError, match=f"role '{role}' is given 'fp8', but is never quantised"):
        Precision(name="mine", roles={"attention": "fp8", role: "fp8"})


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(ConfigError, match="'mlp' is unknown: it must be one of attention"):
        Precision(name="mine", roles={"mlp": "fp8"})
    with pytest.raises(ConfigError, match="'fp6', no arithmetic: use one of bf16, fp8"):
        Precision(name="mine", roles={"attention": "fp6"})
    with pytest.raises(ConfigError, match="precision is 'fp16': it must be one of bf16"):
        preset("fp16")
    roles = {"attention": "fp8"}
    frozen = Precision(name="mine", roles=roles)
    roles["attention"] = "int8"
    assert frozen.roles == {"attention": "fp8"}
    with pytest.raises(TypeError):
        frozen.roles["router"] = "fp8"  # type: ignore[index]


def test_the_table_names_every_role_of_parameters() -> None:
    lines = preset("fp4").describe().splitlines()
    table = {line.split()[0]: line for line in lines}
    assert set(table) - {"role"} == set(shapes.ROLES) - {"cache", "state"}
    assert "e2m1 1x32 power_of_two, then e4m3 128x128 power_of_two" in table["routed_expert"]
    assert "e4m3 1x128 power_of_two" in table["attention"]
    assert "e2m1" not in table["attention"]
    assert all(set(table[role].split()[1:]) == {"-"} for role in NEVER)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("family", DEEPSEEK)
def test_a_step_is_rounded_a_little(family: str, name: str) -> None:
    # Nothing to choose among: a choice that falls otherwise is no small change.
    wide = {"num_experts_per_tok": 12, "index_topk": 64, "topk_group": 4}
    absent = {"deepseek_v3": "index_topk", "deepseek_v4": "topk_group"}.get(family)
    model = tiny_model(family, **{key: value for key, value in wide.items() if key != absent})
    plain, plain_grads = _loss(model)
    apply(model, preset(name))
    rounded, grads = _loss(model)
    assert 0 < abs(rounded - plain) < 0.05 * plain
    assert grads.keys() == plain_grads.keys()
    for key, grad in grads.items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()
        if grad.dim() > 1 and plain_grads[key].norm() > 1e-4:
            assert not torch.equal(grad, plain_grads[key]), key
    together, exact = (torch.cat([found.flatten() for found in side.values()]) for side in (grads, plain_grads))
    assert torch.cosine_similarity(together, exact, dim=0) > 0.8
    apply(model, Precision(name="none", roles={}))
    assert _loss(model)[0] == plain, "and back, bit for bit"


def test_every_quantised_matrix_takes_part() -> None:
    """A forward pass of each family with the drafting module calls each module that was given an arithmetic."""
    for family in DEEPSEEK:
        model = tiny_model(family, drafting=True, num_nextn_predict_layers=1)
        apply(model, preset("fp8"))
        asked = {name for name, module in model.named_modules() if getattr(module, "arithmetic", None) is not None}
        called: set[str] = set()
        for name, module in model.named_modules():
            if name in asked:
                module.register_forward_hook(lambda *_, name=name, called=called: called.add(name))
        _loss(model)
        missing = {name for name in asked - called if not name.startswith("mtp.")}
        # V3.2 reads chosen rows in the absorbed form, which multiplies by parts of this matrix.
        assert not {name for name in missing if family != "deepseek_v32" or not name.endswith("kv_b_proj")}
        assert any(name.startswith("mtp.") for name in asked)


def test_what_fp4_training_computes_with_is_what_fp4_export_ships() -> None:
    """Experts that leave as FP4 and come back give the same logits, as all of them and not as half of their codes."""
    model = tiny_model("deepseek_v4", hidden_size=64, moe_intermediate_size=32)
    ids_BT = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(6))
    apply(model, preset("fp4"))
    trained_BTV = model.logits(ids_BT)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                for weight in (module.gate_up_proj, module.down_proj):
                    codes, scales = formats.quantise_fp4(weight)
                    assert codes.shape[-1] * 2 == weight.shape[-1]
                    weight.copy_(formats.dequantise_fp4(codes, scales))
    apply(model, preset("fp8"))
    assert torch.equal(model.logits(ids_BT), trained_BTV)


def test_layers_start_without_an_arithmetic() -> None:
    for module in tiny_model("deepseek_v4").modules():
        if isinstance(module, Linear | GroupedLinear | Experts):
            assert module.arithmetic is None
