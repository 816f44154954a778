"""What runs in a process whose PyTorch has an adapter for Huawei's chips (`adapter/torch_npu`), the vendor's ops plain
PyTorch there: each op beside the reference, gradients too, and whole models. Started by `test_npu.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

import daedal
from daedal import ops
from daedal.cli import doctor
from daedal.errors import BackendError
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer
from daedal.ops import silicon
from daedal.ops.arithmetic import FP8, MXFP8, W8A8
from daedal.ops.backends import npu
from daedal.ops.backends.npu.supports import BACKEND, PREDICATES
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import FlatRows, PagedRows, Pages
from daedal.train import precision
from tests.silicon import vendor_ops
from tests.silicon.on_device import filled_cache
from tests.tiny import tiny_model

from torch_npu import DEVICE  # isort: skip  # only after daedal, which loads it

NPU = torch.device("npu")
EIGHT_BITS = {"ascend-910c": W8A8, "ascend-950": MXFP8}
NARROW = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=EIGHT_BITS)
def chip(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device as one chip and as another that has other formats."""
    before, profile = DEVICE.profile, silicon.read(request.param)
    DEVICE.become(profile)
    with silicon.assumed(profile):
        yield request.param
    DEVICE.become(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def _moved(x: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(x, FlatRows):
        return FlatRows(change(x.rows), x.starts)
    if isinstance(x, PagedRows):
        return PagedRows(change(x.pool), x.pages)
    return change(x) if isinstance(x, Tensor) else x


def beside_the_reference(
    op: str, dtype: torch.dtype, args: list[object], tolerance: float | None = None, **kwargs: object
) -> None:
    """One op on the device in `dtype`, on the CPU in float64; whole numbers and what is `wide` stay as they are."""

    def there(x: Tensor) -> Tensor:
        return (x.to(dtype) if x.dtype == torch.float32 and not hasattr(x, "wide") else x).to(NPU)

    def exact(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    with torch.no_grad():
        with ops.using(BACKEND):
            given = REGISTRY.call(op, *(_moved(x, there) for x in args), **kwargs)
        with ops.using(REFERENCE):
            wanted = REGISTRY.call(op, *(_moved(x, exact) for x in args), **kwargs)
    given, wanted = ((x if isinstance(x, tuple) else (x,)) for x in (given, wanted))
    for mine, theirs in zip(given, wanted, strict=True):
        assert mine.device.type == "npu"
        if not theirs.is_floating_point():
            assert torch.equal(mine.cpu(), theirs), op
            continue
        allowed = (tolerance or TOLERANCE[mine.dtype]) * float(theirs.abs().max())
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=0, atol=allowed)


def wide(x: Tensor) -> Tensor:
    """Stays float32 on the device."""
    x.wide = True  # type: ignore[attr-defined]
    return x


def flat(lengths: list[int], *shape: int, seed: int) -> FlatRows:
    return FlatRows(normal(sum(lengths), *shape, seed=seed), tuple(accumulate(lengths, initial=0)))


def paged(lengths: list[int], *shape: int, seed: int) -> PagedRows:
    """On pages of 16 tokens that lie in no order."""
    tables = ((5, 2, 0), (3,), (1, 4))
    return PagedRows(normal(6, 16, *shape, seed=seed), Pages(tables, tuple(lengths), 16))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_norms_rotation_and_gates(dtype: torch.dtype) -> None:
    angle = torch.linspace(0, 900, 20).view(5, 4)
    turn = wide(angle.cos()), wide(angle.sin())
    beside_the_reference("rms_norm", dtype, [normal(5, 3, 48), normal(48, seed=1), 1e-6])
    beside_the_reference("rms_norm", dtype, [normal(5, 48), None, 1e-6])
    for interleaved in (True, False):
        beside_the_reference("rotary", dtype, [normal(5, 3, 8), *turn], interleaved=interleaved)
    for limit in (None, 0.5):
        beside_the_reference("swiglu", dtype, [normal(5, 24), normal(5, 24, seed=2)], limit=limit)


def test_gradients_of_what_training_runs() -> None:
    angle = torch.linspace(0, 9, 20).view(5, 4)
    cases: list[tuple[str, list[Tensor], list[object], dict[str, object]]] = [
        ("rms_norm", [normal(5, 8), normal(8, seed=1)], [1e-6], {}),
        ("rotary", [normal(5, 3, 8)], [angle.cos(), angle.sin()], {"interleaved": True}),
        ("rotary", [normal(5, 3, 8)], [angle.cos(), angle.sin()], {"interleaved": False}),
        ("swiglu", [normal(5, 8), normal(5, 8, seed=1)], [], {"limit": None}),
        ("route", [normal(5, 8)], [normal(8, seed=1)], ROUTING | {"scoring": "sigmoid", "normalise": True}),
    ]
    for op, leaves, others, kwargs in cases:
        grads = []
        for backend, device in ((BACKEND, NPU), (REFERENCE, torch.device("cpu"))):
            own = [leaf.to(device).detach().requires_grad_() for leaf in leaves]
            rest = [_moved(x, lambda x, device=device: x.to(device)) for x in others]  # type: ignore[misc]
            with ops.using(backend):
                result = REGISTRY.call(op, *own, *rest, **kwargs)
            result = result[1] if isinstance(result, tuple) else result
            result.backward(normal(*result.shape, seed=9).to(device))
            grads.append([leaf.grad.cpu() for leaf in own if leaf.grad is not None])
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", NARROW)
def test_attention(dtype: torch.dtype) -> None:
    """Absorbed latents, heads of their own as expanded latents have them, grouped heads; side by side and on pages."""
    counts, lengths = [1, 4, 7], [40, 4, 20]
    starts = tuple(accumulate(counts, initial=0))
    for place in (flat, paged):
        latents = place(lengths, 576, seed=1)
        beside_the_reference("attention", dtype, [normal(12, 4, 576), starts, latents, 512], scale=0.04)
        keys, values = place(lengths, 2, 128, seed=2), place(lengths, 2, 128, seed=3)
        if isinstance(keys, PagedRows) and isinstance(values, PagedRows):
            values = PagedRows(values.pool, keys.pages)
        beside_the_reference("attention", dtype, [normal(12, 6, 128), starts, keys, values], scale=0.1)
    keys, values = flat(lengths, 4, 192, seed=2), flat(lengths, 4, 128, seed=3)
    beside_the_reference("attention", dtype, [normal(12, 4, 192), starts, keys, values], scale=0.1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("count", [6, 64])
def test_chosen_tokens_and_attention_on_them(chip: str, dtype: torch.dtype, count: int) -> None:
    """Fewer than there are, then as many; few enough to be copied alone, then whole sequences."""
    counts, lengths = [1, 4, 7], [40, 4, 20]
    starts, pasts = tuple(accumulate(counts, initial=0)), (39, 0, 13)
    for place in (flat, paged):
        # Weights that both types hold: scores then differ by nothing but the order of their sums.
        choosing = [normal(12, 8, 128), normal(12, 8, seed=5), starts, pasts, place(lengths, 128, seed=1)]
        beside_the_reference("choose_entries", dtype, choosing, count=count, rate=1)
        with ops.using(REFERENCE):
            chosen_TA = ops.choose_entries(*choosing, count=count, rate=1)  # type: ignore[arg-type]
        queries, latents = normal(12, 4, 576, seed=6), place(lengths, 576, seed=7)
        beside_the_reference(
            "sparse_attention",
            dtype,
            [queries, starts, pasts, latents, chosen_TA, None, None],
            value_dim=512,
            scale=0.04,
            rate=1,
            span=0,
        )


ROUTING: dict[str, object] = {
    "method": "noaux_tc",
    "num_active": 3,
    "n_group": 2,
    "topk_group": 1,
    "scale": 2.5,
    "given_TA": None,
}


def test_routing() -> None:
    logits, bias = wide(normal(7, 16)), wide(normal(16, seed=1))
    sigmoid = ROUTING | {"scoring": "sigmoid", "normalise": True}
    beside_the_reference("route", torch.float32, [logits, bias], **sigmoid)
    beside_the_reference("route", torch.float32, [logits, bias], **(sigmoid | {"topk_group": 2}))
    softmax = ROUTING | {"scoring": "softmax", "normalise": False}
    for method in ("greedy", "group_limited_greedy"):
        beside_the_reference("route", torch.float32, [logits, None], **(softmax | {"method": method}))
    assert "divides the weights" in str(PREDICATES["route"](logits, None, **(softmax | {"normalise": True})))


def _experts() -> list[object]:
    ids = torch.rand(9, 4, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :2]
    return [normal(9, 64), ids, wide(normal(9, 2).abs()), normal(4, 128, 64, seed=2), normal(4, 64, 64, seed=3)]


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_experts(dtype: torch.dtype) -> None:
    for limit in (None, 0.5):
        beside_the_reference("experts", dtype, _experts(), limit=limit)


@pytest.mark.parametrize("dtype", NARROW)
def test_products_in_the_eight_bits_that_the_chip_has(chip: str, dtype: torch.dtype) -> None:
    eight_bits = EIGHT_BITS[chip]
    x, weight = normal(3, 5, 128), normal(24, 128, seed=1)
    beside_the_reference("scaled_linear", dtype, [x, weight, eight_bits])
    # What is between the two products is rounded to 16 bits first, after which some codes are others.
    beside_the_reference("scaled_experts", dtype, [*_experts(), eight_bits], 3e-2, limit=None)
    # Turned factors are rounded to 16 bits, too.
    turned = replace(eight_bits, name="turned", turned=64)
    beside_the_reference("scaled_experts", dtype, [*_experts(), turned], 6e-2, limit=None)
    if eight_bits is W8A8:  # without the turn int8 sees little beside the outlier
        x[..., 9], weight[:, 9] = 40.0, 0.0
        beside_the_reference("scaled_linear", dtype, [x, weight, turned], 4e-2)
    other = W8A8 if eight_bits is MXFP8 else MXFP8
    for arithmetic in (other, FP8):
        told = str(PREDICATES["scaled_linear"](x.to(dtype).to(NPU), weight.to(dtype).to(NPU), arithmetic))
        assert told == f"multiplies as {eight_bits.name} on this chip, which {arithmetic.name} is not"


# V3.2 with heads, latents and indexers of the sizes for which there are ops, and little else.
SIZES: dict[str, object] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": 32,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
INDEXED = SIZES | {"index_n_heads": 8, "index_head_dim": 128, "index_topk": 16}


def _models(family: str, **changes: object) -> tuple[Transformer, Transformer]:
    """There and here. In float16: with the rounding of bfloat16 near ties of experts fall otherwise."""
    here = tiny_model(family, dtype=torch.float16, **changes)
    return tiny_model(family, dtype=torch.float16, **changes).to("npu"), here


@pytest.mark.parametrize(("family", "changes"), [("deepseek_v3", SIZES), ("deepseek_v32", INDEXED)])
def test_a_model_runs_on_the_vendors_ops_and_waits_for_nobody(family: str, changes: dict[str, object]) -> None:
    there, here = _models(family, **changes)
    ids_BT = torch.randint(0, 320, (2, 40))
    DEVICE.log.clear()
    with torch.no_grad():
        given = there.logits(ids_BT).cpu()
        with ops.using(REFERENCE):
            wanted = here.logits(ids_BT)
    assert _apart(given, wanted) < 0.02
    assert _called() >= {
        "rms_norm",
        "rotary_mul",
        "swiglu",
        "moe_gating_top_k",
        "moe_init_routing_v2",
        "grouped_matmul",
    }
    pasts = [30, 17]
    batch, cache = RaggedBatch.of([[9], [4]], pasts, device="npu"), filled_cache(there)
    DEVICE.log.clear()
    with torch.inference_mode():
        there(batch, cache.view([(0, 2), (3, 1)], pasts, [1, 1], [1, 0]))
    wanted_ops = {"lightning_indexer", "sparse_flash_attention"} if family == "deepseek_v32" else set()
    assert _called() >= (wanted_ops or {"fused_infer_attention_score_v2"})
    assert not DEVICE.log.waits, DEVICE.log.waits


def _apart(given: Tensor, wanted: Tensor) -> float:
    """The mean error as a share of the mean: one expert that a near tie decides moves a row of logits far."""
    return float((given - wanted).abs().mean() / wanted.abs().mean())


def _called() -> set[str]:
    return {name.removeprefix("npu::npu_") for name in DEVICE.log.calls if name.startswith("npu::")}


def test_a_model_in_eight_bits_stays_close(chip: str) -> None:
    """Every product of layers in the chip's own eight bits, with the numbers that the same arithmetic gives the CPU."""
    there, here = _models("deepseek_v3", **SIZES)
    roles = dict.fromkeys(("attention", "routed_expert", "shared_expert", "dense_mlp"), EIGHT_BITS[chip].name)
    for model in (there, here):
        precision.apply(model, precision.Precision(name="eight", roles=roles))
    ids_BT = torch.randint(0, 320, (2, 24))
    DEVICE.log.clear()
    with torch.no_grad():
        given = there.logits(ids_BT).cpu()
        with ops.using(REFERENCE):
            wanted = here.logits(ids_BT)
    assert "quant_matmul" in _called()
    assert _apart(given, wanted) < 0.1


def test_the_engine_serves_there() -> None:
    there, here = _models("deepseek_v3", **SIZES)
    greedy = daedal.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    given = daedal.Engine(there, max_batch=2).generate([[5, 9, 2], [7] * 20], greedy)
    wanted = daedal.Engine(here, max_batch=2).generate([[5, 9, 2], [7] * 20], greedy)
    assert [output.ids for output in given] == [output.ids for output in wanted]


def test_a_call_by_another_signature_is_refused() -> None:
    x, ops_there = normal(4, 64).to(NPU), torch.ops.npu
    for call in (
        lambda: ops_there.npu_rms_norm(x, x[0], eps=1e-6),
        lambda: ops_there.npu_swiglu(x, dim="last"),
        lambda: ops_there.npu_moe_init_routing_v2(x),
    ):
        with pytest.raises((RuntimeError, TypeError), match="npu_"):
            call()
    with pytest.raises(RuntimeError, match="contiguous"):
        ops_there.npu_swiglu(x.T, -1)


def test_doctor_names_the_vendors_ops_and_checks_them() -> None:
    found = doctor.diagnose()
    chosen = {row["op"]: row["backend"] for row in found["ops"] if row["chosen"]}
    assert {op for op, backend in chosen.items() if backend == BACKEND} >= set(PREDICATES) - {
        "sparse_attention",
        "scaled_linear",
        "scaled_experts",
    }
    assert len(found["checked"]) == len(chosen)


FAULTS: dict[str, tuple[str, Callable[..., object], str]] = {
    "a wrong result": (
        "npu_rotary_mul",
        lambda *args: 1.5 * vendor_ops.rotary_mul(*args),
        "backend 'npu' gives a wrong result for rotary",
    ),
    "other arguments": (
        "npu_lightning_indexer",
        lambda query, key: None,
        "backend 'npu' fails at choose_entries \\(TypeError",
    ),
}


def test_an_op_that_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert npu._present()
    monkeypatch.setattr(npu, "NAMES", (*npu.NAMES, "npu_of_tomorrow"))
    with pytest.raises(AttributeError, match="it lacks npu_of_tomorrow"):
        npu._present()


@pytest.mark.parametrize("fault", FAULTS)
def test_an_op_that_is_broken_stops_doctor_with_its_name(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, planted, told = FAULTS[fault]
    monkeypatch.setitem(DEVICE.vendor, name, planted)
    with pytest.raises(BackendError, match=f"{told}.*DAEDAL_OPS=reference"):
        doctor.self_check(NPU, torch.bfloat16)
