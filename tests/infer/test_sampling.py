"""Choices against a slow, plain version in float64, and against the chi-square of what they should be."""

import pytest
import torch

from daedal.infer.logprobs import token_logprobs
from daedal.infer.request import SamplingParams
from daedal.infer.sampling import Logits, RowSampler, check_finite, choose
from tests.ops.test_drawing import plainly


def sampler(params: SamplingParams, prompt: tuple[int, ...] = (0,), vocab_size: int = 8) -> RowSampler:
    return RowSampler(params, prompt, vocab_size=vocab_size, device="cpu")


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.9, "min_p": 0.1}],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(changes: dict[str, float]) -> None:
    params = SamplingParams(seed=11, **changes)
    logits = [1.0, -0.5, 2.0, 0.0, 2.0, -3.0, 0.7, 1.4]
    expected = plainly(logits, params)
    one = sampler(params)
    num_draws = 3000
    logits_NV = torch.tensor([logits])
    counts = dict.fromkeys(range(8), 0)
    for _ in range(num_draws):
        counts[choose(Logits(logits_NV), [one])[0]] += 1
    assert {token for token, count in counts.items() if count} <= expected.keys()
    statistic = sum((counts[token] - num_draws * share) ** 2 / (num_draws * share) for token, share in expected.items())
    # The 99.9th percentile for 7 degrees of freedom; fewer have a lower one.
    assert statistic < 24.3


def test_a_row_draws_alike_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(5)
    logits_SNV = torch.randn(12, 4, 40, generator=generator) * 2
    kinds = [
        SamplingParams(seed=1, top_p=0.9),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(seed=-3, temperature=1.7, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={3: 4.0}),
        SamplingParams(seed=1, top_k=3),
    ]
    together = [sampler(params, vocab_size=40) for params in kinds]
    rows = [choose(Logits(logits_NV), together) for logits_NV in logits_SNV]
    for index, params in enumerate(kinds):
        alone = sampler(params, vocab_size=40)
        assert [choose(Logits(logits_NV[index : index + 1]), [alone])[0] for logits_NV in logits_SNV] == [
            row[index] for row in rows
        ]


def test_penalties_and_bias() -> None:
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias={0: 1.0, 5: -100.0},
    )
    one = sampler(params, prompt=(1, 2, 2), vocab_size=6)
    logits_V = torch.tensor([1.0, 4.0, -1.0, 3.0, 2.0, 50.0])
    kept_V = logits_V.clone()
    assert one.adjusted(logits_V).tolist() == [2.0, 2.0, -2.0, 3.0, 2.0, -50.0]
    assert choose(Logits(logits_V.unsqueeze(0)), [one]) == [3]
    one.observe(3)
    one.observe(0)
    assert one.adjusted(logits_V).tolist() == [2.0 / 2 - 0.75, 2.0, -2.0, 3.0 / 2 - 1.25, 2.0, -50.0]
    assert torch.equal(logits_V, kept_V)


def test_ties_go_to_the_lowest_id() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    greedy = [sampler(SamplingParams(temperature=0.0)) for _ in range(2)]
    assert choose(Logits(logits_V.expand(2, -1)), greedy) == [1, 1]
    tops = token_logprobs(logits_V.expand(3, -1), [0, 0, 0], [1, 3, 6])
    assert [[token for token, _ in entry.top] for entry in tops] == [[1], [1, 3, 2], [1, 3, 2, 4, 5, 0]]


def test_extreme_temperatures_and_forbidden_tokens() -> None:
    logits_NV = torch.tensor([[1e30, -1e30, -torch.inf, 1e29]])
    assert choose(Logits(logits_NV), [sampler(SamplingParams(temperature=1e-6, seed=0))]) == [0]
    narrow = sampler(SamplingParams(temperature=100.0, seed=0))
    drawn = {choose(Logits(torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])), [narrow])[0] for _ in range(60)}
    assert drawn == {0, 2}


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_logits_are_not_sampled(broken: float) -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        check_finite(Logits(torch.tensor([[0.0, 1.0], [0.0, broken]])))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        check_finite(Logits(torch.full((1, 3), -torch.inf)))
    check_finite(Logits(torch.tensor([[0.0, -torch.inf]])))
    check_finite(Logits(torch.zeros(0, 3)))


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits_NV = torch.randn(150, 30, generator=torch.Generator().manual_seed(2)) * 9
    exact_NV = logits_NV.double().log_softmax(-1)
    tokens = [row % 30 for row in range(150)]
    entries = token_logprobs(logits_NV, tokens, [row % 4 for row in range(150)])
    for row, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        assert entry.id == token
        assert entry.logprob == pytest.approx(float(exact_NV[row, token]), abs=1e-5)
        values, ids = exact_NV[row].topk(row % 4)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
