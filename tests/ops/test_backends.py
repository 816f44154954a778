"""One test for every op and every backend: outputs and gradients against the reference in float64, odd sizes, empty
input, rounding without bias. Freshly allocated memory is NaN throughout (see conftest)."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.errors import BackendError
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import FlatRows, PagedRows, Pages

Case = tuple[str, Callable[[Callable[..., Tensor]], list[object]], dict[str, object]]


def _starts(counts: list[int]) -> tuple[int, ...]:
    return tuple(torch.tensor([0, *counts]).cumsum(0).tolist())


def _cases() -> Iterator[object]:
    """(op, maker of arguments from a maker of tensors, keyword arguments)."""
    yield from _row_cases()
    yield from _attention_cases()
    yield from _expert_cases()


def _row_cases() -> Iterator[object]:
    for tokens, dim in ((1, 48), (5, 33), (0, 16)):
        yield pytest.param(
            "rms_norm", lambda new, t=tokens, d=dim: [new(t, d), new(d), 1e-6], {}, id=f"norm-{tokens}x{dim}"
        )
        for biased in (False, True):

            def projection(new: Callable[..., Tensor], t: int = tokens, d: int = dim, b: bool = biased) -> list[object]:
                return [new(t, d), new(9, d), new(9) if b else None]

            yield pytest.param("linear", projection, {}, id=f"linear-{biased}-{tokens}x{dim}")
        for limit in (None, 0.5):
            yield pytest.param(
                "swiglu",
                lambda new, t=tokens, d=dim: [new(t, d), new(t, d)],
                {"limit": limit},
                id=f"swiglu-{limit}-{tokens}x{dim}",
            )
        yield pytest.param(
            "rms_norm", lambda new, t=tokens, d=dim: [new(t, 3, d), None, 1e-6], {}, id=f"norm-plain-{tokens}x{dim}"
        )
        yield pytest.param(
            "grouped_linear",
            lambda new, t=tokens, d=dim: [new(t, 3, d), new(3, 5, d)],
            {},
            id=f"grouped-{tokens}x{dim}",
        )
    for interleaved in (False, True):
        for tokens, heads, dim in ((1, 3, 8), (7, 2, 6), (0, 2, 4)):

            def rotation(new: Callable[..., Tensor], t: int = tokens, h: int = heads, d: int = dim) -> list[object]:
                angle = torch.linspace(0, 9, t * d // 2).view(t, d // 2)
                return [new(t, h, d), angle.cos(), angle.sin()]

            yield pytest.param("rotary", rotation, {"interleaved": interleaved}, id=f"rotary-{interleaved}-{tokens}")


def _attention_cases() -> Iterator[object]:
    shapes = [
        ([1], [9], 6, 2, 8, 8),
        ([4, 1, 3], [4, 7, 9], 6, 3, 8, 5),
        ([5], [5], 4, 1, 12, 8),
        ([2, 0], [3, 4], 2, 2, 4, 6),
    ]
    for new_tokens, lengths, heads, groups, key, value in shapes:

        def grouped(
            new: Callable[..., Tensor], n=new_tokens, s=lengths, h=heads, g=groups, k=key, v=value
        ) -> list[object]:
            ends = _starts(s)
            return [new(sum(n), h, k), _starts(n), FlatRows(new(sum(s), g, k), ends), FlatRows(new(sum(s), g, v), ends)]

        def shared(new: Callable[..., Tensor], n=new_tokens, s=lengths, h=heads, k=key) -> list[object]:
            return [new(sum(n), h, k), _starts(n), FlatRows(new(sum(s), k), _starts(s)), k - 3]

        yield pytest.param("attention", grouped, {"scale": 0.3}, id=f"attention-{new_tokens}-{lengths}")
        yield pytest.param("attention", shared, {"scale": 0.3}, id=f"attention-latent-{new_tokens}-{lengths}")


def _expert_cases() -> Iterator[object]:
    for tokens, dim, width, num_experts, active in (
        (1, 16, 8, 5, 2),
        (9, 24, 12, 4, 4),
        (6, 7, 5, 6, 3),
        (0, 16, 8, 4, 2),
    ):

        def routed(new: Callable[..., Tensor], t=tokens, d=dim, f=width, e=num_experts, a=active) -> list[object]:
            ids = torch.rand(t, e, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :a]
            return [new(t, d), ids, new(t, a), new(e, 2 * f, d), new(e, d, f)]

        for limit in (None, 0.5):
            yield pytest.param("experts", routed, {"limit": limit}, id=f"experts-{limit}-{tokens}x{dim}x{width}")


CASES = list(_cases())
FAST = [backend for backend in REGISTRY.backends if backend != REFERENCE]


def _run(backend: str, op: str, args: list[object], kwargs: dict[str, object]) -> Tensor:
    with ops.using(backend):
        result: Tensor = REGISTRY.call(op, *args, **kwargs)
        with torch.no_grad():
            again = REGISTRY.call(op, *args, **kwargs)
    tolerance = 2e-2 if result.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(again, result.detach(), rtol=tolerance, atol=tolerance)
    return result


def _maker(dtype: torch.dtype, leaves: list[Tensor]) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(7)

    def new(*shape: int) -> Tensor:
        # The same float32 numbers whatever the dtype of the run.
        leaf = torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_()
        leaves.append(leaf)
        return leaf

    return new


def _outcome(backend: str, case: Case, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    op, make, kwargs = case
    leaves: list[Tensor] = []
    result = _run(backend, op, make(_maker(dtype, leaves)), kwargs)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(8)).bfloat16()
    result.backward(cotangent.to(result.dtype))
    return result.detach().double(), [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("op", "make", "kwargs"), CASES)
@pytest.mark.parametrize("backend", FAST)
def test_backend_equals_the_reference_in_float64(
    backend: str, op: str, make: object, kwargs: dict[str, object]
) -> None:
    exact, exact_grads = _outcome(REFERENCE, (op, make, kwargs), torch.float64)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 6e-2)):
        leaves: list[Tensor] = []
        candidate = next((found for found in REGISTRY.candidates(op) if found.backend == backend), None)
        if candidate is None:
            continue
        if candidate.supports(*make(_maker(dtype, leaves)), **kwargs) is not None:
            with torch.no_grad():
                arguments = make(_maker(dtype, leaves))
                if candidate.supports(*arguments, **kwargs) is None:
                    got = _run(backend, op, arguments, kwargs).double()
                    torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance)
            continue
        got, grads = _outcome(backend, (op, make, kwargs), dtype)
        torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance)
        assert len(grads) == len(exact_grads)
        for mine, theirs in zip(grads, exact_grads, strict=True):
            # Terms that cancel are rounded by their own size: to bfloat16 that shows where gradients are large.
            size = float(theirs.square().mean().sqrt()) if dtype == torch.bfloat16 else 0.0
            torch.testing.assert_close(mine, theirs, rtol=4 * tolerance, atol=tolerance * max(4.0, size))


@pytest.mark.parametrize("backend", REGISTRY.backends)
def test_rounding_to_bfloat16_has_no_bias(backend: str) -> None:
    """Errors against float64 fall on both sides alike: their mean is within four standard errors of zero."""

    def make(dtype: torch.dtype) -> list[object]:
        new = _maker(dtype, [])
        return [new(64, 256), new(256), 1e-6]

    with torch.no_grad():
        exact = _run(REFERENCE, "rms_norm", make(torch.float64), {})
        error = (_run(backend, "rms_norm", make(torch.bfloat16), {}).double() - exact) / exact.abs().clamp_min(1e-6)
    assert error.std() > 0
    assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5


@pytest.mark.parametrize("backend", REGISTRY.backends)
def test_attention_reads_pages_in_table_order(backend: str) -> None:
    pool = torch.randn(7, 4, 2, 8)
    tables, lengths = ((5, 2, 6), (1, 2), (3,)), (10, 8, 4)
    paged = PagedRows(pool, Pages(tables, lengths, page_size=4))
    flat = FlatRows(torch.cat([paged.sequence(index) for index in range(3)]), _starts(list(lengths)))
    by_hand = torch.cat((pool[5], pool[2], pool[6]))[:10]
    assert torch.equal(paged.sequence(0), by_hand)
    assert paged.sequence(1).data_ptr() == pool[1].data_ptr(), "pages that follow one another are a view"
    q, starts = torch.randn(6, 4, 8), (0, 3, 5, 6)
    got = _run(backend, "attention", [q, starts, paged, paged], {"scale": 0.5})
    wanted = _run(REFERENCE, "attention", [q, starts, flat, flat], {"scale": 0.5})
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    part = paged.select([2, 0])
    assert part.lengths == (4, 10)
    assert torch.equal(part.flatten().sequence(1), by_hand)


@pytest.mark.parametrize("backend", REGISTRY.backends)
@pytest.mark.parametrize("shared", [False, True])
def test_one_token_each_of_unequal_sequences_reads_no_padding(backend: str, shared: bool) -> None:
    """Pages hold NaN wherever no token was written."""
    shape = (7, 4, 8) if shared else (7, 4, 2, 8)
    pool = torch.full(shape, torch.nan)
    paged = PagedRows(pool, Pages(((5, 2, 6), (1,), (3, 0)), (10, 1, 8), page_size=4))
    for index, length in enumerate(paged.lengths):
        for place in range(length):
            pool[paged.pages.tables[index][place // 4], place % 4] = torch.randn(shape[2:])
    flat = FlatRows(torch.cat([paged.sequence(index) for index in range(3)]), _starts([10, 1, 8]))
    q, starts = torch.randn(3, 4, 8), (0, 1, 2, 3)
    with torch.no_grad():
        got = _run(backend, "attention", [q, starts, paged, 5 if shared else paged], {"scale": 0.5})
    wanted = _run(REFERENCE, "attention", [q, starts, flat, 5 if shared else flat], {"scale": 0.5})
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_route_breaks_ties_by_the_lowest_index() -> None:
    settings = {"num_active": 3, "normalise": True, "scale": 2.0, "n_group": 4, "topk_group": 2}
    logits = torch.zeros(2, 8)
    ids, weights = ops.route(logits, torch.zeros(8), scoring="sigmoid", method="noaux_tc", **settings)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights.sum(-1), torch.full((2,), 2.0))
    ids, _ = ops.route(logits, None, scoring="softmax", method="group_limited_greedy", **settings)
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_route_bias_steers_the_choice_and_never_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0])
    settings = {
        "scoring": "sigmoid",
        "method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "normalise": False,
        "scale": 1.0,
    }
    ids, weights = ops.route(logits, bias, num_active=2, **settings)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [3, 0]])


def test_a_logit_far_below_leaves_finite_gradients() -> None:
    """softplus(-200) is 0 in float32, where a square root has an infinite slope."""
    logits = torch.tensor([[2.0, 1.0, -200.0]], requires_grad=True)
    settings = {"num_active": 2, "n_group": 1, "topk_group": 1, "normalise": True, "scale": 1.5}
    _, weights = ops.route(logits, torch.zeros(3), scoring="sqrtsoftplus", method="noaux_tc", **settings)
    (weights * torch.tensor([[1.0, 2.0]])).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0] != 0


def test_groups_are_ranked_by_their_best_two_in_v3_and_their_best_in_v2() -> None:
    """Group 0 has the single best expert, group 1 the best pair."""
    logits = torch.tensor([[3.0, -3.0, 2.0, 2.0]])
    settings = {"num_active": 2, "n_group": 2, "topk_group": 1, "normalise": False, "scale": 1.0}
    v3, _ = ops.route(logits, torch.zeros(4), scoring="sigmoid", method="noaux_tc", **settings)
    v2, _ = ops.route(logits, None, scoring="softmax", method="group_limited_greedy", **settings)
    assert v3.tolist() == [[2, 3]]
    assert v2.tolist() == [[0, 1]]


@pytest.mark.parametrize("backend", REGISTRY.backends)
def test_the_limit_cuts_the_gate_above_and_the_other_on_both_sides(backend: str) -> None:
    """Before they are multiplied, so that the product may be larger than the limit; the gate has no lower limit."""
    gate, up = torch.tensor([[5.0, 5.0, -9.0, 1.0]]), torch.tensor([[7.0, -7.0, 0.5, 2.5]])
    cut_gate, cut_up = torch.tensor([[3.0, 3.0, -9.0, 1.0]]), torch.tensor([[3.0, -3.0, 0.5, 2.5]])
    with ops.using(backend):
        got = ops.swiglu(gate, up, limit=3.0)
    torch.testing.assert_close(got, cut_gate * cut_gate.sigmoid() * cut_up)
    assert got[0, 0] > 3.0


@pytest.mark.parametrize("backend", [backend for backend in REGISTRY.backends if backend != "cpu"])  # packed ones only
@pytest.mark.parametrize("tokens", [1, 9])
def test_an_expert_named_twice_counts_twice(backend: str, tokens: int) -> None:
    """As a table of experts by token may do."""
    x, weights, up, down = torch.randn(tokens, 8), torch.rand(tokens, 2), torch.randn(4, 8, 8), torch.randn(4, 8, 4)
    twice = torch.full((tokens, 2), 3)
    with ops.using(backend):
        got = ops.experts(x, twice, weights, up, down)
        once = ops.experts(x, twice[:, :1], weights.sum(1, keepdim=True), up, down)
    torch.testing.assert_close(got, once, rtol=1e-5, atol=1e-5)


def test_experts_that_are_given_are_weighed_by_their_own_scores() -> None:
    """Ids may come in any order; the bias and the best scores have no say."""
    logits, given = torch.tensor([[3.0, -30.0, 0.5, 1.0], [0.0, 25.0, 2.0, 0.0]]), torch.tensor([[2, 0], [1, 1]])
    settings = {"method": "noaux_tc", "num_active": 2, "n_group": 1, "topk_group": 1, "normalise": True, "scale": 1.5}
    ids, weights = ops.route(logits, torch.full((4,), 9.0), scoring="sqrtsoftplus", given_TA=given, **settings)
    assert torch.equal(ids, given)
    scores = torch.log1p(logits.double().exp()).sqrt().gather(1, given)
    torch.testing.assert_close(weights.double(), 1.5 * scores / scores.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


def test_explain_names_the_choice_and_every_reason() -> None:
    exact = torch.ones(1, 4, dtype=torch.float64), torch.ones(4)
    choices = {choice.backend: choice for choice in ops.explain("rms_norm", *exact, 1e-6)}
    assert "takes bfloat16 and float32" in choices["cpu"].reason
    assert choices["aten"].chosen
    assert not choices[REFERENCE].chosen
    assert choices[REFERENCE].reason == "aten is preferred"
    odd = [
        torch.ones(1, 7),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
        torch.ones(2, 6, 7),
        torch.ones(2, 7, 3),
    ]
    declined = {choice.backend: choice for choice in ops.explain("experts", *odd, limit=None)}
    assert "16 bytes" in declined["aten"].reason
    assert declined[REFERENCE].chosen


def test_an_op_that_a_forced_backend_lacks_runs_on_the_reference_and_says_so() -> None:
    settings = {
        "scoring": "sigmoid",
        "method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "normalise": True,
        "scale": 1.0,
        "given_TA": None,
    }
    with ops.using("aten"):
        ids, _ = ops.route(torch.tensor([[0.0, 1.0]]), torch.zeros(2), num_active=1, **settings)
        choices = ops.explain("route", torch.zeros(1, 2), torch.zeros(2), num_active=1, **settings)
    assert ids.tolist() == [[1]]
    (choice,) = (choice for choice in choices if choice.chosen)
    assert choice.reason == "aten is forced and has no route of its own"


def test_a_forced_backend_that_is_unknown_or_unable_is_an_error() -> None:
    with pytest.raises(BackendError, match="may be one of"), ops.using("cuda-magic"):
        pass
    x = torch.ones(1, 7)
    with ops.using("aten"), pytest.raises(BackendError, match="declines experts"):
        ops.experts(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.ones(2, 6, 7), torch.ones(2, 7, 3))
