"""Decode steps that are recorded and replayed give, bit for bit, what the same steps give run op by op: in every
family, across borders of pages, windows, groups and entries, as sequences join, leave, and lose their pages. What
cannot be recorded says why.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.infer.engine import Engine
from daedal.infer.looking import Look
from daedal.infer.request import Request, SamplingParams
from daedal.infer.sampling import Logits
from daedal.infer.scheduler import Step
from daedal.infer.speculative import Speculation
from daedal.model.attention_sparse import IndexedAttention
from daedal.model.transformer import Transformer
from tests.infer.engines import assert_idle, fitting, paged, poisoned
from tests.model.feeding import Feeder
from tests.native import needs_kernels
from tests.tiny import FAMILIES, tiny_model

pytestmark = needs_kernels

NO_BIAS: Mapping[int, float] = MappingProxyType({})
Arrivals = Sequence[tuple[int, int, int]]  # of each request: the step before which it comes, its prompt, its answer


class Watched:
    """An engine that notes each step: how many sequences it had, its logits, and whether it was replayed."""

    def __init__(self, engine: Engine, *, records: bool):
        self.engine, self.recorded = engine, engine._runner._recorded
        self.sizes: list[int] = []
        self.logits: list[Tensor] = []
        self.replayed = 0
        if not records:
            self.recorded.refusal = "switched off"
        self._run = engine._runner.run
        engine._runner.run = self._note

    def _note(self, step: Step, rows: Sequence[int], look: Look | None = None) -> tuple[Logits, Tensor | None]:
        known = [recorded.logits for recorded in self.recorded._steps.values()]
        logits, states = self._run(step, rows, look)
        self.replayed += any(logits is one for one in known)
        self.sizes.append(len(step.chunks))
        self.logits.append(logits.tensor.clone())
        return logits, states

    def generate(self, arrivals: Arrivals, bias: Mapping[int, float] = NO_BIAS) -> dict[str, list[int]]:
        """The ids of every answer, by request. bias: tokens that the first request wants more."""
        answers: dict[str, list[int]] = {}
        clock = 0
        while self.engine.has_work or clock <= max(time for time, _, _ in arrivals):
            for index, (time, length, most) in enumerate(arrivals):
                if time == clock:
                    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(index)).tolist()
                    params = SamplingParams(
                        temperature=0.0, max_tokens=most, ignore_eos=True, logit_bias=NO_BIAS if index else bias
                    )
                    self.engine.add(Request(id=str(index), prompt=tuple(ids), params=params))
            for output in self.engine.step():
                answers.setdefault(output.request_id, []).extend(output.ids)
            clock += 1
        assert_idle(self.engine)
        return answers


def _equal(
    make: Callable[[], Engine], arrivals: Arrivals, bias: Mapping[int, float] = NO_BIAS
) -> tuple[Watched, Watched]:
    """Two engines, one of which records, after the same steps with the same results."""
    recording, plain = Watched(make(), records=True), Watched(make(), records=False)
    assert recording.generate(arrivals, bias) == plain.generate(arrivals, bias)
    assert recording.recorded.refusal is None
    assert not plain.recorded._steps
    assert recording.sizes == plain.sizes
    for ours, theirs in zip(recording.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    return recording, plain


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_equal_those_run_op_by_op(
    family: str, weights: str, packed: Callable[[str, str], Transformer]
) -> None:
    """Sequences join at odd steps and leave at others, so steps of one to three are recorded and met again."""
    model = packed(family, weights)
    arrivals = [(0, 5, 33), (4, 1, 20), (11, 23, 9), (40, 3, 6)]
    recording, _ = _equal(
        lambda: poisoned(Engine(model, page_size=fitting(model, 4), max_batch=3, stride_ms=None)), arrivals
    )
    assert set(recording.recorded._steps) == {1, 2, 3}
    assert recording.replayed > 30


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_sequences_that_lose_their_pages_come_back(family: str, packed: Callable[[str, str], Transformer]) -> None:
    """Prompts are read again between replayed steps, onto other pages and into other rings."""
    model = packed(family, "int8")
    size = fitting(model, 4)
    arrivals = [(0, size - 3, 10), (0, size - 2, 9), (1, size - 1, 7)]
    recording, _ = _equal(lambda: paged(model, 3 * size, max_batch=3, max_step_tokens=37, stride_ms=None), arrivals)
    assert recording.engine.stats().num_preemptions > 0
    assert recording.replayed > 10


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_v4_across_windows_groups_entries_and_pages(weights: str, packed: Callable[[str, str], Transformer]) -> None:
    """Windows of 16 begin to slide, groups of 4 and of 128 close, choices of 7 leave entries out, pages of 128 end."""
    model = packed("deepseek_v4", weights)
    arrivals = [(0, 2, 40), (2, 119, 30), (5, 246, 25), (9, 381, 140)]
    recording, _ = _equal(lambda: poisoned(Engine(model, page_size=128, max_batch=4, stride_ms=None)), arrivals)
    assert set(recording.recorded._steps) == {1, 2, 3, 4}
    assert recording.replayed > 120


def test_a_single_query_that_chooses_everything_reads_what_dense_attention_reads() -> None:
    """V3.2's decode steps take the sparse form at every length."""
    model = tiny_model("deepseek_v32", dtype=torch.float64)
    ids = torch.randint(0, 320, (20,)).tolist()

    def decoded() -> Tensor:
        feeder = Feeder(model, [20])
        return torch.cat([feeder.feed({0: [token]})[0] for token in ids])

    sparse_TV = decoded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IndexedAttention, "reads_chosen", lambda self, num_new, num_keys: num_keys > self.indexer.count)
        torch.testing.assert_close(decoded(), sparse_TV, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_recorded_is_named(packed: Callable[[str, str], Transformer]) -> None:
    """Unpacked weights in bfloat16 have no native kernels; the steps run all the same."""
    plain = Watched(Engine(tiny_model("deepseek_v3", dtype=torch.bfloat16)), records=True)
    assert len(plain.generate([(0, 4, 5)])["0"]) == 5
    assert "has no native form" in str(plain.recorded.refusal)
    assert not plain.recorded._steps
    forced = Watched(Engine(packed("deepseek_v3", "int8")), records=True)
    with ops.using("reference"):
        forced.generate([(0, 4, 5)])
    assert forced.recorded.refusal is None
    assert not forced.recorded._steps


def test_a_draft_is_checked_between_replayed_steps(packed: Callable[[str, str], Transformer]) -> None:
    """Steps of several tokens a sequence and of one take turns on the same rings. Where there are four tokens to choose
    from, they soon come in an order that was there before.
    """
    model = packed("deepseek_v4", "int8")
    speculate = Speculation(method="lookup", draft_tokens=4)
    arrivals, bias = [(0, 30, 30), (3, 9, 60)], dict.fromkeys(range(5, 9), 100.0)
    recording, _ = _equal(
        lambda: poisoned(Engine(model, page_size=128, max_batch=2, speculate=speculate)), arrivals, bias
    )
    assert recording.replayed > 5
    assert recording.engine.stats().num_drafted_total > 0
