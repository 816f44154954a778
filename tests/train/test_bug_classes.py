"""The kinds of mistakes that trainers of this architecture have had, each as a test of its own, by number.

Numbers 10 and 11's other half (sharded optimisers, empty shards) are with the tests of many processes; number 13 is in
`tests/cost/test_training_flops.py`. What a mistake would do to the forward pass alone is planted in
`tests/model/test_pitfalls_routing.py`.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from daedal import ops
from daedal.checkpoint.load import load
from daedal.checkpoint.quantize import quantize
from daedal.checkpoint.save import save
from daedal.errors import ConfigError
from daedal.model.attention_compressed import Compressor
from daedal.model.attention_sparse import TokenIndexer
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import Attended, ForwardPass, Indexed
from daedal.model.hyper_connections import HyperConnection, HyperHead
from daedal.model.moe import Experts, GatedMLP, Router
from daedal.model.norm import RMSNorm
from daedal.model.transformer import Transformer, empty, initialise
from daedal.ops.arithmetic import ARITHMETICS, FP4, quantise_dequantise
from daedal.ops.rows import FlatRows
from daedal.train.balance import routers, update_biases
from daedal.train.batches import Batch
from daedal.train.indexing import lesson
from daedal.train.loop import LoopConfig, StepReport, train
from daedal.train.objective import Pretraining
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.precision import apply, preset
from daedal.train.schedule import Schedule
from tests.tiny import tiny_config

BACKENDS = ("aten", "reference")
DRAFTED = ("deepseek_v3", "deepseek_v32", "deepseek_v4")


def model_of(family: str, *, dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    config = tiny_config(family, num_nextn_predict_layers=1, **changes)
    return initialise(empty(config, drafting=True, dtype=dtype), seed=1)


def batch_of(*lengths: int, seed: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.of([torch.randint(320, (length + 1,), generator=generator).numpy() for length in lengths])


def run(
    model: Transformer, steps: list[tuple[Batch, ...]], *, objective: Pretraining | None = None, speed: float = 1e-3
) -> list[StepReport]:
    settings = OptimizerConfig(rate=1e-3, schedule=Schedule(steps=10))
    optimizers = Optimizers(groups(model, model.config), settings)
    config = LoopConfig(bias_speed=speed)
    return list(train(model, steps, objective or Pretraining(), optimizers, config=config))


def gradients(model: Transformer, objective: Pretraining, *batches: Batch) -> dict[str, Tensor]:
    """Of all the batches together, as one step accumulates them."""
    model.zero_grad()
    targets = sum(batch.num_targets for batch in batches)
    for batch in batches:
        (objective(model, batch).total / targets).backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("backend", BACKENDS)
def test_1_streams_return_by_the_matrix_that_took_them(backend: str) -> None:
    """Forwards stream k takes comb[j, k] of stream j, so backwards stream j gets comb[j, k] of k's gradient."""
    y_TD, streams_TMD = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, 7, dtype=torch.float64)
    post_TM, comb_TMM = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, 3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (y_TD, streams_TMD, post_TM, comb_TMM)]
    grad_TMD = torch.randn(5, 3, 7, dtype=torch.float64)
    with ops.using(backend):
        found = torch.autograd.grad(ops.hyper_expand(*leaves), leaves, grad_TMD)
    for token in range(5):
        grad, streams, comb = grad_TMD[token], streams_TMD[token], comb_TMM[token]
        for j in range(3):
            wanted = sum((comb[j, k] * grad[k] for k in range(3)), torch.zeros(7))
            torch.testing.assert_close(found[1][token, j], wanted)
            for k in range(3):
                torch.testing.assert_close(found[3][token, j, k], streams[j] @ grad[k])
            torch.testing.assert_close(found[2][token, j], y_TD[token] @ grad[j])
        torch.testing.assert_close(found[0][token], post_TM[token] @ grad)


def _expert_layer(family: str, arithmetic: str | None) -> tuple[Experts, GatedMLP]:
    config = tiny_config(family, hidden_size=32, moe_intermediate_size=32, n_routed_experts=4, swiglu_limit=2.0)
    experts, shared = Experts(config), GatedMLP(32, 32, bias=False, limit=config.swiglu_limit)
    for module in (experts, shared.gate_proj, shared.up_proj, shared.down_proj):
        module.arithmetic = None if arithmetic is None else ARITHMETICS[arithmetic]
    return experts, shared


# The gate's product, the other one, and which of their matrices then learn: what was cut off passes nothing on.
CUTS = [
    (4.0, 1.0, (False, True)),
    (-4.0, 1.0, (True, True)),
    (1.0, 4.0, (True, False)),
    (1.0, -4.0, (True, False)),
    (1.0, 1.0, (True, True)),
    (4.0, 4.0, (False, False)),
]


# Products in an arithmetic have no aten of their own in float32 on a CPU.
@pytest.mark.parametrize(
    ("arithmetic", "backend"), [(None, "aten"), *((name, "reference") for name in (None, "bf16", "fp8", "fp4"))]
)
@pytest.mark.parametrize(("gate", "up", "learns"), CUTS)
def test_2_both_cuts_of_swiglu_stop_gradients_in_routed_and_shared_experts(
    gate: float, up: float, learns: tuple[bool, bool], arithmetic: str | None, backend: str
) -> None:
    """The gate above, the other on both sides, before they are multiplied, whatever the experts compute in."""
    experts, shared = _expert_layer("deepseek_v4", arithmetic)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.tensor([gate, up]).repeat_interleave(32)[:, None] / 32)
        shared.gate_proj.weight.fill_(gate / 32)
        shared.up_proj.weight.fill_(up / 32)
        experts.down_proj.fill_(1 / 32)
        shared.down_proj.weight.fill_(1 / 32)
    x_TD, ids_TA = torch.ones(6, 32), torch.arange(4).expand(6, 4)
    with ops.using(backend):
        y_TD = experts(x_TD, ids_TA, torch.ones(6, 4)) / 4
        z_TD = shared(x_TD)
    kept, cut = min(gate, 2.0), max(-2.0, min(up, 2.0))
    wanted = torch.full((6, 32), kept / (1 + math.exp(-kept)) * cut)
    for found in (y_TD, z_TD):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=1e-3)
    (y_TD.sum() + z_TD.sum()).backward()
    assert experts.gate_up_proj.grad is not None
    routed = [bool(half.any()) for half in experts.gate_up_proj.grad.chunk(2, 1)]
    both = [
        bool(module.weight.grad.any())
        for module in (shared.gate_proj, shared.up_proj)
        if module.weight.grad is not None
    ]
    assert tuple(routed) == tuple(both) == learns


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_3_every_parameter_of_every_indexer_learns(family: str) -> None:
    """Those of drafting modules too. In the dense stage none does; nowhere is one left out without a word."""
    model, batch = model_of(family), batch_of(70, 30)
    indexers = {name for name, _ in model.named_parameters() if "indexer" in name}
    assert family == "deepseek_v4" or any(name.startswith("mtp.") for name in indexers)
    for stage in ("sparse", "warm-up", "dense"):
        found = gradients(model, Pretraining(stage=stage), batch)
        learning = {name for name, grad in found.items() if grad.any()}
        assert indexers & learning == (set() if stage == "dense" else indexers), stage
        assert stage != "warm-up" or learning == indexers
    everything = {name for name, _ in model.named_parameters()}
    batch = batch_of(140, 30)  # V4's groups of 128
    assert {name for name, grad in gradients(model, Pretraining(), batch).items() if grad.any()} == everything


def test_4_a_head_that_looks_at_its_window_says_little_about_entries() -> None:
    """One head gives everything to its window and, of the little that is left, prefers entry 0; another gives all to
    entry 1. Together they attend to entry 1. Each head on its own would have said: half to either.
    """
    q_THK = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    entries_SK = torch.tensor([[10.0, -20.0], [-10.0, 20.0]])
    window_WK = torch.tensor([[30.0, -20.0]])
    attended = Attended(
        layer=0,
        batch=RaggedBatch.of([[1]], pasts=[3]),
        q_THK=q_THK,
        entries=FlatRows(entries_SK, (0, 2)),
        chosen_TA=None,
        window=FlatRows(window_WK, (0, 1)),
        sinks_H=torch.zeros(2),
        scale=1.0,
        rate=2,
        span=4,
    )

    def loss(scores: tuple[float, float]) -> float:
        keys = FlatRows(torch.tensor(scores)[:, None], (0, 2))
        seen = Indexed(layer=0, q_TIK=torch.ones(1, 1, 1), weights_TI=torch.ones(1, 1), keys=keys, rate=2)
        return float(lesson(seen, attended, count=1).loss)

    assert loss((0.0, 20.0)) == pytest.approx(0.0, abs=1e-6)
    assert loss((1.0, 1.0)) == pytest.approx(math.log(2), abs=1e-5)
    assert loss((20.0, 0.0)) == pytest.approx(20.0, abs=1e-3)


@pytest.mark.parametrize("stage", ["dense", "warm-up", "sparse"])
@pytest.mark.parametrize("family", DRAFTED)
def test_5_every_part_of_the_loss_is_divided_alike_however_a_step_is_cut(family: str, stage: str) -> None:
    """Micro-batches of very different sizes, one of them without a place for the drafting module: the same gradients,
    of drafting modules, routers and indexers as of all else.
    """
    generator = torch.Generator().manual_seed(6)
    pieces = [torch.randint(320, (length + 1,), generator=generator).numpy() for length in (45, 1, 30, 9)]
    model = model_of(family, dtype=torch.float64)
    objective = Pretraining(mtp_weight=0.5, balance_weight=0.1, stage=stage)
    whole = gradients(model, objective, Batch.of(pieces))
    cut = gradients(model, objective, Batch.of(pieces[:1]), Batch.of(pieces[1:2]), Batch.of(pieces[2:]))
    assert whole.keys() == cut.keys()
    if stage != "warm-up":
        assert any(name.startswith("mtp.") and grad.any() for name, grad in whole.items())
    for name, grad in whole.items():
        torch.testing.assert_close(cut[name], grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    reports = [
        run(model_of(family, dtype=torch.float64), [step], objective=objective)[0]
        for step in ((Batch.of(pieces),), tuple(Batch.of([piece]) for piece in pieces))
    ]
    assert reports[0].parts.keys() == reports[1].parts.keys()
    for name in reports[0].parts.keys() - {"recall", "held"}:  # means over those who must choose, no sums
        assert reports[1].parts[name] == pytest.approx(reports[0].parts[name], rel=1e-9), name


def test_6_the_hash_table_is_what_it_was_after_training_and_on_disk(tmp_path: Path) -> None:
    model = model_of("deepseek_v4")
    router = model.layers[0].mlp.gate
    assert isinstance(router, Router)
    assert router.tid2eid is not None
    table = router.tid2eid.clone()
    model.compute_dtype, model.recompute = torch.bfloat16, True
    run(model, [(batch_of(20, 30),), (batch_of(9, 50),)])
    assert torch.equal(router.tid2eid, table)
    assert 0 not in routers(model), "hashed layers are not balanced"
    model.compute_dtype = None
    save(model, tmp_path / "trained")
    found = load(tmp_path / "trained")
    its = found.layers[0].mlp.gate
    assert isinstance(its, Router)
    assert its.tid2eid is not None
    assert its.tid2eid.dtype == torch.int64
    assert torch.equal(its.tid2eid, table)
    ids_BT = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(found.logits(ids_BT), model.logits(ids_BT))


class _Counter:
    """What routers choose, counted at their output and apart from every observer."""

    def __init__(self, model: Transformer):
        self.loads: dict[int, Tensor] = {}
        for module in routers(model).values():
            module.register_forward_hook(self)

    def __call__(self, module: nn.Module, _: object, result: tuple[Tensor, Tensor]) -> None:
        assert isinstance(module, Router)
        load_E = torch.bincount(result[0].flatten(), minlength=module.weight.shape[0])
        self.loads[module.layer] = self.loads.get(module.layer, torch.zeros_like(load_E)) + load_E


@pytest.mark.parametrize("family", DRAFTED)
def test_7_every_router_is_balanced_and_each_choice_counts_once(family: str) -> None:
    """Those of drafting modules too, behind layers that have none; recomputation and evaluation do not count."""
    step = (batch_of(40, 21), batch_of(33))
    model = model_of(family)
    counter = _Counter(model)
    biased = {layer: r for layer, r in routers(model).items() if r.e_score_correction_bias is not None}
    assert max(biased) == model.config.num_hidden_layers, "the drafting module is one of them"
    run(model, [step], speed=0.25)
    found = {layer: r.e_score_correction_bias.clone() for layer, r in biased.items()}
    for layer, bias_E in found.items():
        load_E = counter.loads[layer].float()
        assert torch.equal(bias_E, 0.25 * torch.sign(load_E.mean() - load_E)), layer
    again = model_of(family)
    again.recompute = True
    run(again, [step], speed=0.25)
    with torch.no_grad():
        again.logits(torch.arange(30).view(1, 30))
        Pretraining()(again, step[0])
    for layer, router in routers(again).items():
        assert router.e_score_correction_bias is not None
        assert torch.equal(router.e_score_correction_bias, found[layer]), layer


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_7_while_indexers_alone_learn_no_bias_moves(family: str) -> None:
    model = model_of(family)
    (report,) = run(model, [(batch_of(40, 21),)], objective=Pretraining(stage="warm-up"))
    assert report.balance is None
    assert not any(bool(r.e_score_correction_bias.any()) for r in routers(model).values())
    with pytest.raises(KeyError):
        update_biases(model, {1: torch.ones(12)}, speed=0.1)


NEVER_ROUNDED = (Router, Compressor, TokenIndexer, HyperConnection, HyperHead, RMSNorm, nn.Embedding)


@pytest.mark.parametrize("name", ["fp8", "fp4", "mxfp8"])
@pytest.mark.parametrize("family", DRAFTED)
def test_8_what_decides_computes_the_same_bits_in_a_quantised_model(family: str, name: str) -> None:
    """Given the same input: routers, compressors, indexers, mixing of streams, norms, embedding and head."""
    model = model_of(family)
    plain = copy.deepcopy(model)
    apply(model, preset(name))
    seen: list[tuple[str, tuple[object, ...], object]] = []
    for key, module in model.named_modules():
        if isinstance(module, NEVER_ROUNDED):
            module.register_forward_hook(lambda _, args, out, key=key: seen.append((key, args, out)))
    batch = batch_of(140)
    with torch.no_grad():
        states = model.states(batch.inputs)
        hidden_TD = model.finish(states)
        model.draft(0, batch.inputs, states)
        assert torch.equal(model.head(hidden_TD), plain.head(hidden_TD))
        assert not torch.equal(hidden_TD, plain.finish(plain.states(batch.inputs)))
        kinds = {type(model.get_submodule(key)) for key, _, _ in seen}
        assert {"deepseek_v3": {Router}, "deepseek_v32": {TokenIndexer}}.get(family, {Compressor}) <= kinds
        for key, args, out in seen:
            step = ForwardPass(plain.config, batch.inputs, None)
            fresh = tuple(step if isinstance(arg, ForwardPass) else arg for arg in args)
            assert _same(plain.get_submodule(key)(*fresh), out), key


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple):
        return isinstance(other, tuple) and all(map(_same, one, other))
    if isinstance(one, FlatRows):
        return isinstance(other, FlatRows) and torch.equal(one.rows, other.rows)
    if isinstance(one, Indexed):
        assert isinstance(other, Indexed)
        return _same((one.q_TIK, one.weights_TI, one.keys), (other.q_TIK, other.weights_TI, other.keys))
    return one is None and other is None


def test_9_experts_trained_in_fp4_leave_and_come_back_whole(tmp_path: Path) -> None:
    """Through files: what was multiplied in training is what is loaded, of every row, and the answers are the same."""
    model = model_of("deepseek_v4", hidden_size=64, moe_intermediate_size=32)
    apply(model, preset("fp4"))
    run(model, [(batch_of(40, 20),), (batch_of(33),)])
    save(model, tmp_path / "trained")
    quantize(tmp_path / "trained", tmp_path / "shipped", to="fp4")
    shipped = load(tmp_path / "shipped", dtype=torch.float32, mtp=True)
    ids_BT = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        trained_BTV = model.logits(ids_BT)
        for name, module in model.named_modules():
            if not isinstance(module, Experts):
                continue
            other = shipped.get_submodule(name)
            assert isinstance(other, Experts)
            for mine, theirs in ((module.gate_up_proj, other.gate_up_proj), (module.down_proj, other.down_proj)):
                assert FP4.stored is not None
                assert torch.equal(quantise_dequantise(mine, FP4.stored), theirs), name
                mine.copy_(theirs)
        apply(model, preset("fp8"))
        assert torch.equal(model.logits(ids_BT), trained_BTV)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", DRAFTED)
def test_11_a_micro_batch_too_short_for_any_entry_or_draft_reaches_every_parameter(
    family: str, recompute: bool
) -> None:
    """Gradients of zero, not none: where they are exchanged between processes all must have the same ones."""
    for lengths in ((3, 1, 2), (1,)):
        model = model_of(family)
        model.recompute = recompute
        usual = Pretraining()(model_of(family), batch_of(140, 30))
        loss = Pretraining()(model, batch_of(*lengths))
        loss.total.backward()
        assert [name for name, tensor in model.named_parameters() if tensor.grad is None] == []
        assert loss.parts.keys() == usual.parts.keys()
        assert loss.loads.keys() == usual.loads.keys()
        assert all(bool(tensor.grad.isfinite().all()) for tensor in model.parameters() if tensor.grad is not None)


def test_12_eps_is_a_number_and_as_small_as_declared() -> None:
    """A file may hand over the text `1e-20`; it is refused by name. The number itself is what AdamW gets."""
    with pytest.raises(ConfigError, match="`eps` is the text '1e-20'"):
        OptimizerConfig(rate=1e-3, schedule=Schedule(steps=1), eps="1e-20")  # type: ignore[arg-type]
    model = model_of("deepseek_v4")
    settings = OptimizerConfig(rate=1e-3, schedule=Schedule(steps=1, decay="constant"), weight_decay=0.0)
    optimizers = Optimizers(groups(model, model.config), settings)
    (adamw,) = (each for each in optimizers.each if isinstance(each, torch.optim.AdamW))
    assert {group["eps"] for group in adamw.param_groups} == {1e-20}
    before = model.norm.weight.detach().clone()
    model.norm.weight.grad = torch.full_like(before, 1e-12)
    optimizers.step(0)
    torch.testing.assert_close(before - model.norm.weight.detach(), torch.full_like(before, 1e-3))
