"""Draws and filters against a slow, plain version in float64; the kernel at every instruction set of this CPU."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daedal import ops
from daedal.infer.request import SamplingParams
from daedal.ops.backends.cpu.program import LEVELS, native
from daedal.ops.drawing import Draws, filtered, likeliest
from tests.native import use_level


@pytest.fixture(scope="module", params=["numpy", *LEVELS])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """NumPy, then the kernel at each instruction set; those that this machine lacks are passed over."""
    if request.param == "numpy":
        with ops.using("reference"):
            yield request.param
    else:
        use_level(request.param)
        yield request.param
        native().use(None)


def normalised(logits_V: Tensor, params: SamplingParams) -> dict[int, float]:
    ids_C, weights_C = filtered(logits_V.numpy(), params)
    ids = range(len(weights_C)) if ids_C is None else ids_C.tolist()
    probabilities = weights_C.astype(float) / weights_C.sum(dtype=float)
    return dict(zip(ids, probabilities.tolist(), strict=True))


def plainly(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Sorts everything, filters one token at a time."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / params.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k:
        order = order[: params.top_k]
    mass, before, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if before < params.top_p * mass or params.top_p == 1.0:
            kept.append(token)
        before += weights[token]
    kept = [token for token in kept if weights[token] >= params.min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


def middles(shares: dict[int, float]) -> dict[int, float]:
    """Of each token's part of the line from 0 to 1, in the order of their ids, as far as a float32 can tell it."""
    found, before = {}, 0.0
    for token in sorted(shares):
        if shares[token] > 1e-4:
            found[token] = before + shares[token] / 2
        before += shares[token]
    return found


# Halves, so that ties are common and no filter's border depends on rounding.
HALVES = st.lists(st.integers(-8, 8).map(lambda half: half / 2), min_size=1, max_size=600)
FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 300, 700]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.123, 0.61, 0.987]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.37, 1.0]),
)


@settings(max_examples=150, deadline=None)
@given(logits=HALVES, params=FILTERS)
def test_filters_equal_a_plain_version(logits: list[float], params: SamplingParams) -> None:
    expected = plainly(logits, params)
    found = normalised(torch.tensor(logits), params)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4)


@settings(max_examples=150, deadline=None)
@given(logits=HALVES, params=FILTERS, uniform=st.sampled_from([0.0, 1.0 - 2.0**-53]))
def test_draws_are_those_of_a_plain_version(
    form: str, logits: list[float], params: SamplingParams, uniform: float
) -> None:
    """In the middle of each token's part of the line, and at both ends of the line, beside rows of other numbers."""
    rows_NV = torch.stack([torch.full((len(logits),), math.nan), torch.tensor(logits), torch.zeros(len(logits))])
    draws, shares = Draws(rows_NV.numpy()), plainly(logits, params)
    for token, middle in middles(shares).items():
        assert draws.draw(1, params, middle) == token
    assert draws.draw(1, params, uniform) == (min(shares) if uniform == 0.0 else max(shares))


@pytest.mark.parametrize("size", [1, 15, 127, 128, 129, 50_000])
@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 50}, {"top_k": 1000, "top_p": 0.9}, {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.05}],
    ids=str,
)
def test_large_vocabularies_and_their_ends(form: str, size: int, changes: dict[str, float]) -> None:
    """Numbers of all sizes; whatever is drawn belongs to the filter's choice, and as often as it should."""
    generator = torch.Generator().manual_seed(size)
    logits_V = torch.randn(size, generator=generator) * 3
    params = SamplingParams(temperature=0.8, **changes)  # type: ignore[arg-type]
    shares = normalised(logits_V, params)
    draws, count = Draws(logits_V[None].numpy()), 400
    found = [draws.draw(0, params, (place + 0.5) / count) for place in range(count)]
    assert found == sorted(found), "a larger number leads to a later token"
    # float32 weights may move the border of a filter by a token.
    assert sum(token not in shares for token in found) <= 1
    heaviest = max(shares, key=shares.__getitem__)
    assert abs(found.count(heaviest) / count - shares[heaviest]) < 2.5 / count


@pytest.mark.parametrize("changes", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_what_is_forbidden_is_never_drawn(form: str, changes: dict[str, float]) -> None:
    logits_V = torch.full((300,), -math.inf)
    logits_V[[7, 130, 299]] = torch.tensor([1.0, 3.0, 2.0])
    draws = Draws(logits_V[None].numpy())
    for uniform in (0.0, 0.3, 0.6, 0.9, 1.0 - 2.0**-53):
        assert draws.draw(0, SamplingParams(**changes), uniform) in (7, 130, 299)  # type: ignore[arg-type]


def test_rows_are_read_when_they_are_drawn_from(form: str) -> None:
    """The memory of recorded logits is written anew by every step."""
    logits_NV = torch.zeros(2, 40)
    draws, params = Draws(logits_NV.numpy()), SamplingParams(top_k=1)
    for token in (3, 39, 17):
        logits_NV.zero_()[1, token] = 5.0
        assert draws.draw(1, params, 0.5) == token


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_a_wide_nucleus_is_found_in_a_large_vocabulary(top_p: float) -> None:
    logits_V = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    found = normalised(logits_V, SamplingParams(top_p=top_p))
    probabilities, ids = logits_V.double().softmax(0).sort(descending=True, stable=True)
    size = int((probabilities.cumsum(0) - probabilities < top_p).sum())
    # float32 weights may move the border by a token or two of so many.
    assert abs(len(found) - size) <= 2
    assert found.keys() == set(ids[: len(found)].tolist())


def test_ties_go_to_the_lowest_id() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    assert likeliest(logits_V.numpy(), 4).tolist() == [1, 2, 3, 4]
    assert list(normalised(logits_V, SamplingParams(top_k=3))) == [1, 2, 3]
    assert list(normalised(logits_V, SamplingParams(top_p=0.7))) == [1, 2, 3]
