"""A step of training on the Triton kernels, beside the same on the reference (see tests/ops/test_triton.py).

A backend that is forced may decline nothing: what training asks of the ops that have kernels, the kernels take.
"""

import pytest
import torch

from daedal import ops
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REFERENCE
from daedal.train.batches import Batch
from daedal.train.learner import Alone
from daedal.train.objective import Pretraining
from tests.ops.triton_run import DEVICE, only_with_triton, warned
from tests.tiny import tiny_model

only_with_triton()
pytestmark = warned


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_triton_trains_as_the_reference(family: str) -> None:
    """Samples of several lengths side by side; grouped heads, expanded latents, experts, a drafting module."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(320, (length,), generator=generator).numpy() for length in (9, 2, 19)]
    drafting = family == "deepseek_v3"
    changes = {"num_nextn_predict_layers": 1} if drafting else {}
    found = {}
    for backend in (BACKEND, REFERENCE):
        learner = Alone(tiny_model(family, drafting=drafting, **changes).to(DEVICE).train())
        with ops.using(backend):
            sums = learner.accumulate(Pretraining(), (Batch.of(samples),))
        found[backend] = sums.parts, sums.loads, dict(learner.model.named_parameters())
    (parts, loads, mine), (wanted_parts, wanted_loads, theirs) = found[BACKEND], found[REFERENCE]
    assert parts == pytest.approx(wanted_parts, rel=1e-5)
    assert {layer: load.tolist() for layer, load in loads.items()} == {
        layer: load.tolist() for layer, load in wanted_loads.items()
    }
    for name, parameter in mine.items():
        wanted = theirs[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if parameter.grad is not None and wanted is not None:
            furthest = float((parameter.grad - wanted).abs().max())
            assert furthest <= 1e-4 * float(wanted.abs().max()) + 1e-7, name
