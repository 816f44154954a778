"""Speculation leaves the distribution of sampled tokens as it is, whoever drafts: Pearson's chi-square says so."""

from collections.abc import Sequence

import pytest
import torch

from daedal.infer.engine import Engine
from daedal.infer.request import SamplingParams
from daedal.model.transformer import Transformer
from tests.infer.engines import check_acceptance, speculation
from tests.infer.models import tame, tiny


def likelihood(observed: Sequence[Sequence[int]], chance: torch.Tensor) -> float:
    """How likely draws from `chance` [V, ...] would lie as far from it as those observed (Pearson's chi-square).

    Outcomes are pooled, rarest first, until each group is expected five times.
    """
    indices_ND = torch.tensor(observed)
    counts = torch.zeros_like(chance).index_put_(tuple(indices_ND.T), torch.ones(len(observed)).to(chance), True)
    groups: list[list[float]] = [[0.0, 0.0]]
    for place in chance.flatten().argsort().tolist():
        if groups[-1][0] >= 5.0:
            groups.append([0.0, 0.0])
        groups[-1][0] += float(chance.flatten()[place]) * len(observed)
        groups[-1][1] += float(counts.flatten()[place])
    statistic = sum((count - expected) ** 2 / expected for expected, count in groups)
    freedom = torch.tensor((len(groups) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


# Ends with 3, and whatever comes next has come after 3 before.
ONWARDS = [3, 0, 3, 3, 1, 0, 3, 2, 1, 3, 3, 1, 3, 4, 0, 3]


@pytest.fixture(scope="module")
def dice() -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    """A model of five tokens, and the chance of each four that follow `ONWARDS`: as sampled, and a little flatter."""
    model = tame(tiny("latent", vocab_size=5, drafting=True, seed=1))
    three_N3 = torch.cartesian_prod(*[torch.arange(5)] * 3)
    with torch.inference_mode():
        logits_NTV = model.logits(torch.cat((torch.tensor(ONWARDS).expand(125, -1), three_N3), 1)).double()
    chances = []
    for temperature in (1.0, 1.4):
        first, second, third, fourth = (logits_NTV[:, -4:] / temperature).softmax(-1).view(5, 5, 5, 4, 5).unbind(3)
        begun_VVV = first[0, 0, 0, :, None, None] * second[:, 0, 0, :, None] * third[:, :, 0]
        chances.append(begun_VVV[..., None] * fourth)
    return model, chances[0], chances[1]


@pytest.mark.parametrize("method", ["lookup", "model", "mtp"])
def test_draws_follow_the_model_s_own_distribution(
    dice: tuple[Transformer, torch.Tensor, torch.Tensor], method: str
) -> None:
    """5,200 draws; the test would see that they came from a temperature of 1.4."""
    model, chance, flatter = dice
    engine = Engine(model, max_batch=256, max_step_tokens=8192, page_size=32, speculate=speculation(method, model, 2))
    params = [SamplingParams(seed=seed, max_tokens=4, ignore_eos=True) for seed in range(1300)]
    outputs = engine.generate([ONWARDS] * len(params), params)
    draws = [output.ids for output in outputs]
    assert engine.stats().num_accepted_at[1] > 200
    check_acceptance(engine.stats())
    assert likelihood(draws, chance) > 0.01
    assert likelihood(draws, flatter) < 1e-6
