"""Native routed experts at every level of this CPU: all formats against float64 and against the native linear maps,
and bit-equal whatever the threads and the batch."""

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops import reference
from daedal.ops.backends.cpu import experts as native
from daedal.ops.backends.cpu import program
from daedal.ops.exactness import exactly
from daedal.ops.packed import Packed
from daedal.packed import FORMATS
from tests.native import needs_kernels
from tests.ops.packs import random_packed

pytestmark = needs_kernels

Job = tuple[Tensor, Tensor, Tensor, Packed, Packed]


def _job(name: str, tokens: int, active: int, *, experts: int = 5, width: int = 48, dim: int = 96) -> Job:
    """The last expert gets no token, and the first token names one expert `active` times."""
    gate_up, down = random_packed(name, experts, 2 * width, dim), random_packed(name, experts, dim, width)
    size = gate_up.dense().std() * dim**0.5
    x = (torch.randn(tokens, dim + 8) / size).bfloat16()[:, :dim]
    ids = torch.randint(0, experts - 1, (tokens, active))
    ids[:1] = 2
    return x, ids, torch.rand(tokens, active), gate_up, down


@pytest.mark.parametrize("name", FORMATS)
def test_against_the_reference(level: str, name: str) -> None:
    """Gate, up and hidden rows are each off by up to 1/254 of their largest or by bfloat16's rounding, at random: the
    whole by less than 1 % and, in the few numbers of one token, less than 4 %.
    """
    for tokens, active, width, dim in ((0, 2, 16, 33), (1, 2, 48, 96), (3, 2, 64, 33), (70, 3, 48, 100)):
        for limit in (None, 0.7):
            x, ids, weights, gate_up, down = _job(name, tokens, active, width=width, dim=dim)
            for values in (x, x.float()):
                with ops.using("cpu"):
                    y = ops.experts(values, ids, weights, gate_up, down, limit=limit)
                assert y.dtype == values.dtype
                assert y.shape == values.shape
                expected = reference.experts(values.double(), ids, weights, gate_up, down, limit=limit)
                error = (y.double() - expected).norm() / expected.norm() if tokens else torch.tensor(0.0)
                assert error < (0.015 if tokens > 3 else 0.04)


@pytest.mark.parametrize("name", FORMATS)
def test_few_and_many_agree(level: str, name: str) -> None:
    job = _job(name, 70, 3, dim=100)
    results = []
    for wanted in (False, True):
        with exactly(wanted):
            results.append(native.experts(*job, limit=None).float())
    many, few = results
    assert (many - few).norm() < 0.02 * few.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_threads_and_batch_do_not_matter(level: str, name: str) -> None:
    for tokens in (1, 70):
        job = _job(name, tokens, 3)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.experts(*job, limit=None))
        assert all(torch.equal(result, results[0]) for result in results)
    x, ids, weights, gate_up, down = job
    torch.set_num_threads(2)
    with exactly():
        batch = native.experts(*job, limit=None)
        for token in range(0, 70, 23):
            one = slice(token, token + 1)
            alone = native.experts(x[one], ids[one], weights[one], gate_up, down, limit=None)
            assert torch.equal(batch[one], alone)


def test_replay_reads_new_ids(level: str) -> None:
    for tokens in (1, 70):
        x, ids, weights, gate_up, down = _job("int4", tokens, 3)
        with program.recording(program.Program()) as recorded:
            y = native.experts(x, ids, weights, gate_up, down, limit=None)
        ids.copy_(torch.randint(0, 5, ids.shape))
        recorded.replay()
        assert torch.equal(y, native.experts(x, ids, weights, gate_up, down, limit=None))


def test_declines() -> None:
    x, ids, weights, gate_up, _ = _job("int8", 2, 2)
    down = random_packed("int8", 5, 96, 40)
    choices = ops.explain("experts", x, ids, weights, gate_up, down, limit=None)
    assert "multiple of 16" in next(choice.reason for choice in choices if choice.backend == "cpu")
