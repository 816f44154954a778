"""Divergences, gates and signals in chunks, against the same written out in float64 on all scores."""

import math

import pytest
import torch
from torch import Tensor

from daedal.distill.divergence import Divergence
from daedal.distill.errors import TeacherError
from daedal.distill.losses import Gate, Lesson, Measure, Taught, teach
from daedal.distill.signals import Hidden, Sampled, Signal, Truncated, sample
from daedal.train.batches import IGNORED

TOKENS, WIDTH, IDS = 23, 12, 37


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student() -> tuple[Tensor, Tensor]:
    return numbers(TOKENS, WIDTH, seed=1).requires_grad_(), numbers(IDS, WIDTH, seed=2).requires_grad_()


def hidden() -> Hidden:
    """The teacher is of another width."""
    return Hidden(hidden_TD=numbers(TOKENS, 9, seed=3), head_VD=numbers(IDS, 9, seed=4))


def lesson(*, share: float = 0.7) -> Lesson:
    generator = torch.Generator().manual_seed(5)
    targets_T = torch.randint(IDS, (TOKENS,), generator=generator)
    targets_T[::6] = IGNORED
    true_T = torch.rand(TOKENS, generator=generator) < 0.6
    return Lesson(
        targets_T=targets_T,
        shares_T=torch.full((TOKENS,), share, dtype=torch.float64),
        true_T=true_T,
        weights_T=torch.rand(TOKENS, generator=generator, dtype=torch.float64),
    )


def divergence_by_hand(p: Tensor, q: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return (p * (p / q).log()).sum(-1)
    if beta == 1.0:
        return (q * (q / p).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def total_by_hand(hidden_TD: Tensor, head_VD: Tensor, signal: Hidden, given: Lesson, measure: Measure) -> Tensor:
    logits, taught = hidden_TD @ head_VD.T, signal.hidden_TD @ signal.head_VD.T
    heat = measure.divergence.temperature
    p, q = (taught / heat).softmax(-1), (logits / heat).softmax(-1)
    nats = divergence_by_hand(p, q, measure.divergence.beta) * heat**2
    known = given.targets_T.clamp_min(0)[:, None]
    ce = -logits.log_softmax(-1).gather(1, known).squeeze(1)
    share = given.shares_T
    if measure.gate is not None:
        truth = taught.log_softmax(-1).gather(1, known).squeeze(1)
        gated = share * torch.sigmoid((truth - measure.gate.threshold) / measure.gate.width)
        share = torch.where(given.true_T, gated, share)
    rest = torch.where(given.true_T, 1 - share, 0.0)
    assert given.weights_T is not None
    kept = (given.targets_T != IGNORED) * given.weights_T
    return ((share * nats + rest * ce) * kept).sum()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("gate", [None, Gate(threshold=-3.0, width=0.5)])
@pytest.mark.parametrize(
    "divergence",
    [
        Divergence(),
        Divergence(beta=1.0),
        Divergence(beta=0.5),
        Divergence(beta=0.9, temperature=2.5),
        Divergence(temperature=0.5),
        Divergence(beta=1.0, temperature=3.0),
    ],
    ids=lambda one: f"{one.beta}-{one.temperature}",
)
def test_value_and_gradients(divergence: Divergence, gate: Gate | None, chunk: int) -> None:
    hidden_TD, head_VD = student()
    measure = Measure(divergence=divergence, gate=gate, chunk=chunk)
    wanted = total_by_hand(hidden_TD, head_VD, hidden(), lesson(), measure)
    wanted_grads = torch.autograd.grad(3.0 * wanted, (hidden_TD, head_VD))
    found = teach(hidden_TD, head_VD, hidden(), lesson(), measure)
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(torch.autograd.grad(3.0 * found.total, (hidden_TD, head_VD)), wanted_grads)


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("gate", [None, Gate(threshold=-3.0, width=0.5)])
def test_true_text_alone_takes_the_shortest_way(gate: Gate | None, chunk: int) -> None:
    """All targets true and none weighted, as in healing: a pass fewer, and the same."""
    hidden_TD, head_VD = student()
    some = lesson()
    plain = Lesson(targets_T=some.targets_T, shares_T=some.shares_T, true_T=torch.ones(TOKENS).bool())
    ones = Lesson(
        targets_T=plain.targets_T,
        shares_T=plain.shares_T,
        true_T=plain.true_T,
        weights_T=torch.ones(TOKENS, dtype=torch.float64),
    )
    measure = Measure(gate=gate, chunk=chunk)
    wanted = total_by_hand(hidden_TD, head_VD, hidden(), ones, measure)
    wanted_grads = torch.autograd.grad(wanted, (hidden_TD, head_VD))
    for given in (plain, ones):
        found = teach(hidden_TD, head_VD, hidden(), given, measure)
        torch.testing.assert_close(found.total, wanted)
        torch.testing.assert_close(torch.autograd.grad(found.total, (hidden_TD, head_VD)), wanted_grads)


def test_golden_values() -> None:
    """Two tokens, p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2): each divergence is a number that paper gives."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.25, 0.5]]).double()
    signal = Hidden(hidden_TD=p.log(), head_VD=torch.eye(3).double())
    one = Lesson(targets_T=torch.tensor([2]), shares_T=torch.ones(1).double(), true_T=torch.ones(1).bool())
    half = 0.375 * math.log(0.375)
    wanted = {
        0.0: 0.25 * math.log(2),
        1.0: 0.25 * math.log(2),
        0.5: -2 * half - 0.25 * math.log(0.25) + 0.5 * math.log(0.5) + 0.5 * math.log(0.25),
    }
    for beta, nats in wanted.items():
        measure = Measure(divergence=Divergence(beta=beta))
        taught = teach(q.log(), torch.eye(3).double(), signal, one, measure)
        assert float(taught.divergence) == pytest.approx(nats, abs=1e-12)
        assert float(taught.nats) == pytest.approx(math.log(2))
        assert float(taught.share) == 1.0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_is_the_student_teaches_nothing(beta: float, dtype: torch.dtype) -> None:
    hidden_TD, head_VD = (tensor.detach().to(dtype).requires_grad_() for tensor in student())
    signal = Hidden(hidden_TD=hidden_TD.detach(), head_VD=head_VD.detach())
    taught = teach(hidden_TD, head_VD, signal, lesson(share=1.0), Measure(divergence=Divergence(beta=beta)))
    taught.total.backward()
    assert hidden_TD.grad is not None
    assert head_VD.grad is not None
    exact = beta in (0.0, 1.0)
    for tensor in (taught.total.detach(), taught.divergence, hidden_TD.grad, head_VD.grad):
        assert float(tensor.float().abs().max()) <= (0.0 if exact else 1e-5)


def test_share_zero_is_next_token_loss() -> None:
    hidden_TD, head_VD = student()
    given = lesson(share=0.0)
    every = Lesson(targets_T=given.targets_T, shares_T=given.shares_T, true_T=torch.ones(TOKENS).bool())
    wanted = torch.nn.functional.cross_entropy(hidden_TD @ head_VD.T, given.targets_T, reduction="sum")
    found = teach(hidden_TD, head_VD, hidden(), every, Measure())
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(found.total, found.nats)


def test_the_gate_closes_where_the_truth_is_unlikely() -> None:
    """A teacher that is sure of something else has no say; one that is sure of the truth has all of its share."""
    sure = torch.tensor([[20.0, 0.0, 0.0]]).double()
    signal = Hidden(hidden_TD=sure.repeat(2, 1), head_VD=torch.eye(3).double())
    given = Lesson(targets_T=torch.tensor([0, 1]), shares_T=torch.ones(2).double(), true_T=torch.ones(2).bool())
    states = numbers(2, 3, seed=1).requires_grad_()
    taught = teach(states, torch.eye(3).double(), signal, given, Measure(gate=Gate()))
    assert float(taught.share) == pytest.approx(1.0, abs=2e-3)
    (grad,) = torch.autograd.grad(taught.total, states)
    truth = states.detach().softmax(-1) - torch.eye(3).double()[:2]
    torch.testing.assert_close(grad[1], truth[1], atol=1e-5, rtol=1e-5)


def by_buckets(hidden_TD: Tensor, head_VD: Tensor, signal: Truncated, given: Lesson, beta: float) -> Tensor:
    q = (hidden_TD @ head_VD.T).softmax(-1).gather(1, signal.ids_TA)
    p = signal.logprobs_TA.exp()
    p, q = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in (p, q))
    return (divergence_by_hand(p, q, beta) * (given.targets_T != IGNORED)).sum()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_truncated_scores_are_compared_bucket_by_bucket(beta: float) -> None:
    hidden_TD, head_VD = student()
    teacher = hidden()
    top = (teacher.hidden_TD @ teacher.head_VD.T).log_softmax(-1).topk(5, -1)
    signal = Truncated(ids_TA=top.indices, logprobs_TA=top.values)
    given = lesson()
    pure = Lesson(targets_T=given.targets_T, shares_T=torch.ones(TOKENS).double(), true_T=torch.zeros(TOKENS).bool())
    wanted = by_buckets(hidden_TD, head_VD, signal, given, beta)
    wanted_grads = torch.autograd.grad(wanted, (hidden_TD, head_VD))
    found = teach(hidden_TD, head_VD, signal, pure, Measure(divergence=Divergence(beta=beta), chunk=5))
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.total, (hidden_TD, head_VD)), wanted_grads)


def gradient(signal: Signal, given: Lesson) -> tuple[Taught, Tensor]:
    hidden_TD, head_VD = student()
    taught = teach(hidden_TD, head_VD, signal, given, Measure())
    (grad,) = torch.autograd.grad(taught.total, hidden_TD)
    return taught, grad


def test_sampled_scores_are_unbiased() -> None:
    """Over many draws the mean gradient is that of the whole distribution, which truncation would miss."""
    teacher, given = hidden(), lesson()
    logprobs = (teacher.hidden_TD @ teacher.head_VD.T).log_softmax(-1)
    exact, wanted = gradient(teacher, given)
    generator = torch.Generator().manual_seed(0)
    runs = [gradient(sample(logprobs, given.targets_T, 50, generator), given) for _ in range(200)]
    grads = torch.stack([grad for _, grad in runs])
    error = (grads.mean(0) - wanted).abs()
    assert float((error / (grads.std(0) / 200**0.5 + 1e-12)).max()) < 5.0
    means = torch.stack([taught.divergence for taught, _ in runs])
    assert abs(float(means.mean() - exact.divergence)) < 5 * float(means.std()) / 200**0.5


@pytest.mark.parametrize("divergence", [Divergence(beta=1.0), Divergence(temperature=2.0)])
def test_sampled_scores_say_what_they_cannot_measure(divergence: Divergence) -> None:
    empty = torch.zeros(TOKENS, 1)
    signal = Sampled(ids_TA=empty.long(), shares_TA=empty, entropy_T=empty[:, 0], true_T=empty[:, 0])
    with pytest.raises(TeacherError, match="forward KL at temperature 1 alone"):
        teach(*student(), signal, lesson(), Measure(divergence=divergence))
    if divergence.temperature != 1.0:
        with pytest.raises(TeacherError, match="leave it at 1"):
            teach(
                *student(), Truncated(ids_TA=empty.long(), logprobs_TA=empty), lesson(), Measure(divergence=divergence)
            )


def test_nothing_to_learn_is_a_loss_of_nothing() -> None:
    hidden_TD, head_VD = student()
    given = lesson()
    nothing = Lesson(targets_T=torch.full_like(given.targets_T, IGNORED), shares_T=given.shares_T, true_T=given.true_T)
    taught = teach(hidden_TD, head_VD, hidden(), nothing, Measure())
    taught.total.backward()
    assert float(taught.total.detach()) == 0.0
    assert hidden_TD.grad is not None
    assert not hidden_TD.grad.any()
