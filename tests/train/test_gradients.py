"""Gradients of every kind of layer, three ways: transformers' on each document alone, slopes of the loss itself in
float64, and float64's against those of the arithmetics that training uses.

transformers trains V2, V3 with its drafting modules, and V4; its indexers get none. What it does not have is held to
slopes: the loss at two points a tiny step apart, in a random direction of every kind of parameter, while every choice
of experts and entries stays what it was.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from daedal import ops
from daedal.model.transformer import Transformer
from daedal.train.batches import Batch
from daedal.train.objective import Pretraining
from tests.model.oracles import random_ids, v2_pair, v3_pair, v4_pair, v32_pair
from tests.model.test_mtp import MODULES, with_drafts
from tests.tiny import tiny_model

STEPS = (1e-6, 1e-7, 1e-8)
_RATES = ("compressed_sparse_attention", "heavily_compressed_attention")
_SHORT = {"compress_rates": dict(zip(_RATES, (2, 8), strict=True))}

Pair = tuple[nn.Module, Transformer]


def backend(name: str) -> AbstractContextManager[None]:
    return ops.using("reference") if name == "reference" else nullcontext()


# Against transformers.

PAIRS: dict[str, Callable[[], Pair]] = {
    "v2": lambda: v2_pair(1),
    "v3": lambda: v3_pair(2),
    "v32": lambda: v32_pair(4),
    "v4-window": lambda: v4_pair(1, "window window", sliding_window=7),
    "v4-window-hashed": lambda: v4_pair(1, "window window", hashed=2),
    "v4-csa": lambda: v4_pair(2, "csa csa", **_SHORT),
    "v4-hca": lambda: v4_pair(3, "hca hca", **_SHORT),
}


def _pieces(seed: int, *lengths: int) -> list[Tensor]:
    return [random_ids(10 * seed + number, length + 1) for number, length in enumerate(lengths)]


def _assert_gradients(model: Transformer, oracle: nn.Module, drafts: nn.Module | None = None) -> None:
    theirs = {name.removeprefix("model."): tensor.grad for name, tensor in oracle.named_parameters()}
    for name, tensor in [] if drafts is None else drafts.named_parameters():
        theirs["mtp." + name.replace(".mtp_block.", ".").replace(".post_norm.", ".norm.")] = tensor.grad
    for name, tensor in model.named_parameters():
        assert tensor.grad is not None, name
        if "indexer" in name:
            assert not tensor.grad.any(), name
            continue
        wanted = theirs[name]
        assert wanted is not None, name
        assert wanted.any(), name
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("where", ["chosen", "reference"])
@pytest.mark.parametrize("case", PAIRS)
def test_documents_in_one_batch_learn_what_transformers_learns_from_each_alone(case: str, where: str) -> None:
    oracle, model = PAIRS[case]()
    pieces = _pieces(3, 61, 1, 40)
    batch = Batch.of([piece.numpy() for piece in pieces])
    for piece in pieces:
        logits_TV = oracle(piece[None, :-1], use_cache=False).logits[0]
        (nn.functional.cross_entropy(logits_TV, piece[1:], reduction="sum") / batch.num_targets).backward()
    with backend(where):
        loss = Pretraining(balance_weight=0.0, indexer_weight=0.0, chunk=50)(model, batch)
        (loss.total / batch.num_targets).backward()
    _assert_gradients(model, oracle)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("where", ["chosen", "reference"])
def test_drafting_modules_learn_what_those_of_transformers_learn(where: str) -> None:
    oracle, model = v3_pair(0)
    drafts, model = with_drafts(oracle, model, 1)
    pieces = _pieces(4, 50, 23)
    batch = Batch.of([piece.numpy() for piece in pieces])
    weight = 0.3
    for piece in pieces:
        states = oracle.model(piece[None, :-1], use_cache=False).last_hidden_state
        total = nn.functional.cross_entropy(oracle.lm_head(states[0]), piece[1:], reduction="sum")
        for module in range(MODULES):
            following = piece[None, module + 1 : -1]
            positions = torch.arange(module + 1, len(piece) - 1).unsqueeze(0)
            states = drafts.forward_layer(module, states[:, : following.shape[1]], positions, None, input_ids=following)
            logits_TV = oracle.lm_head(states[0])
            total = total + weight / MODULES * nn.functional.cross_entropy(
                logits_TV, piece[module + 2 :], reduction="sum"
            )
        (total / batch.num_targets).backward()
    with backend(where):
        loss = Pretraining(mtp_weight=weight, balance_weight=0.0)(model, batch)
        (loss.total / batch.num_targets).backward()
    _assert_gradients(model, oracle, drafts.layers)


# Against slopes of the loss.

_FEW_EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "v2": ("deepseek_v2", {"num_hidden_layers": 2, **_FEW_EXPERTS}),
    "v3": ("deepseek_v3", {"num_hidden_layers": 2, "num_nextn_predict_layers": 2, **_FEW_EXPERTS}),
    "v32": ("deepseek_v32", {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "index_topk": 5, **_FEW_EXPERTS}),
    "v4": (
        "deepseek_v4",
        {
            **_SHORT,
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "index_topk": 3,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "swiglu_limit": 0.3,
        },
    ),
}
INDEXED = ("v32", "v4")


def make_model(case: str, dtype: torch.dtype = torch.float64) -> Transformer:
    family, changes = MODELS[case]
    # The same numbers in both.
    return tiny_model(family, seed=3, drafting=True, **changes).to(dtype)


def make_batch() -> Batch:
    return Batch.of([piece.numpy() for piece in _pieces(5, 27, 2, 12)])


def kinds(model: Transformer, wanted: Callable[[str], bool]) -> dict[str, list[nn.Parameter]]:
    """Parameters by what they are, whichever layer they are in."""
    found: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if wanted(name):
            found[re.sub(r"\.\d+\.", ".", name)].append(parameter)
    return found


@contextmanager
def _moved(parameters: list[nn.Parameter], directions: list[Tensor], step: float) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(direction, alpha=step)
        yield
        for parameter, kept in zip(parameters, before, strict=True):
            parameter.copy_(kept)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is chosen from now on, experts and entries, in the order of the forward pass."""
    found: list[Tensor] = []
    route, choose = ops.route, ops.choose_entries

    def routed(*args: object, **settings: object) -> tuple[Tensor, Tensor]:
        ids_TA, weights_TA = route(*args, **settings)  # type: ignore[arg-type]
        found.append(ids_TA)
        return ids_TA, weights_TA

    def chosen(*args: object, **settings: object) -> Tensor:
        found.append(choose(*args, **settings))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(ops, "route", routed)
    monkeypatch.setattr(ops, "choose_entries", chosen)
    return found


def assert_slopes(
    model: Transformer, objective: Pretraining, wanted: Callable[[str], bool], choices: list[Tensor]
) -> None:
    batch = make_batch()

    def loss() -> Tensor:
        choices.clear()
        return objective(model, batch).total / batch.num_targets

    loss().backward()
    usual = list(choices)
    generator = torch.Generator().manual_seed(8)
    for kind, parameters in kinds(model, wanted).items():
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        told = sum(float((grad * d).sum()) for grad, d in zip(grads, directions, strict=True))
        slopes = []
        for step in STEPS:  # the smaller, the rarer that a number in between is cut off on one side only
            ends = []
            for signed in (step, -step):
                with _moved(parameters, directions, signed):
                    ends.append(float(loss()))
                assert all(torch.equal(a, b) for a, b in zip(usual, choices, strict=True)), kind
            slopes.append((ends[0] - ends[1]) / (2 * step))
            if told == pytest.approx(slopes[-1], rel=1e-5, abs=1e-8):
                break
        else:
            raise AssertionError(f"{kind}: the gradient says {told}, the slopes are {slopes}")
        assert abs(told) > 1e-7, f"{kind} does not matter, so equality would prove nothing"


@pytest.mark.parametrize("where", ["chosen", "reference"])
@pytest.mark.parametrize("case", MODELS)
def test_gradients_are_slopes(case: str, where: str, choices: list[Tensor]) -> None:
    """Of the next token's loss, the drafting modules' and the balance loss together."""
    objective = Pretraining(mtp_weight=0.5, balance_weight=0.1, indexer_weight=0.0)
    with backend(where):
        assert_slopes(make_model(case), objective, lambda name: "indexer" not in name, choices)


@pytest.mark.parametrize("where", ["chosen", "reference"])
@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
@pytest.mark.parametrize("case", INDEXED)
def test_gradients_of_indexers_are_slopes_of_their_divergence(
    case: str, stage: str, where: str, choices: list[Tensor]
) -> None:
    """Attention, which they stand for, does not move with them: each layer's example stays what it was."""
    with backend(where):
        assert_slopes(make_model(case), Pretraining(stage=stage), lambda name: "indexer" in name, choices)


# Against float64.


def _gradients(model: Transformer) -> dict[str, Tensor]:
    loss = Pretraining(mtp_weight=0.5, balance_weight=0.1)(model, make_batch())
    (loss.total / loss.targets).backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("where", ["chosen", "reference"])
@pytest.mark.parametrize("case", MODELS)
def test_float32_gives_the_gradients_of_float64(case: str, where: str, choices: list[Tensor]) -> None:
    with backend("reference"):
        wanted = _gradients(make_model(case))
    usual = list(choices)
    choices.clear()
    with backend(where):
        found = _gradients(make_model(case, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(usual, choices, strict=True))
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        span = float(exact.abs().max())
        assert (found[name] - exact).abs().max() <= 1e-3 * span, name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", MODELS)
def test_bfloat16_beside_weights_of_float32_gives_nearly_the_same(case: str, recompute: bool) -> None:
    """Without anything to choose among: a choice that falls otherwise is no rounding."""
    family, changes = MODELS[case]
    all_of_them = {"num_experts_per_tok": 6, "topk_group": 3, "index_topk": 64}
    changes = changes | {name: value for name, value in all_of_them.items() if name in changes}
    wanted, found = ({}, {})
    for gradients, dtype in ((wanted, None), (found, torch.bfloat16)):
        model = tiny_model(family, seed=3, drafting=True, **changes)
        model.compute_dtype, model.recompute = dtype, recompute
        gradients.update(_gradients(model))
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert found[name].dtype == torch.float32
        together = torch.cosine_similarity(found[name].flatten(), exact.flatten(), 0)
        assert together > 0.9, f"{name}: {together}"
    pairs = [torch.cat([grads[name].flatten() for name in wanted]) for grads in (found, wanted)]
    assert torch.cosine_similarity(*pairs, 0) > 0.99
