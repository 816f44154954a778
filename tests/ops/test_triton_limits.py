"""The Triton kernels on a chip that starts few programs at once, keeps sums beside its cores and reads aligned rows,
beside the reference in float64 (see tests/ops/test_triton.py). Such chips are Huawei's.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops import silicon
from daedal.ops.backends.triton import spaces
from daedal.ops.backends.triton.supports import BACKEND, INTERPRETED, PREDICATES
from daedal.ops.registry import REFERENCE
from tests.ops.triton_run import (
    DEVICE,
    beside_the_reference,
    boundaries,
    flat_rows,
    normal,
    only_with_triton,
    paged_rows,
    warned,
)

only_with_triton()
pytestmark = [warned, pytest.mark.skipif(not INTERPRETED, reason="assumes the profile of a chip that is not here")]


@pytest.fixture(autouse=True, params=["ascend-910c", "ascend-950"])
def narrow(request: pytest.FixtureRequest) -> Iterator[None]:
    """A chip that starts 12 programs at once."""
    with silicon.assumed(replace(silicon.read(request.param), most_programs=12)):
        yield


def test_stretches_hold_what_one_start_may_have() -> None:
    stretches = pytest.importorskip("daedal.ops.backends.triton.launch").stretches
    cut = list(stretches(10, 4, DEVICE))
    assert [(part.start, part.stop) for part in cut] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert len(list(stretches(10, 4, DEVICE, most=2))) == 5
    assert len(list(stretches(2, 99, DEVICE))) == 2
    assert not list(stretches(0, 4, DEVICE))


def test_blocks_of_keys_are_as_wide_as_the_chip_wants_them() -> None:
    launch = pytest.importorskip("daedal.ops.backends.triton.launch")
    started: list[dict[str, int]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **constants: started.append(constants)

    launch.tuned(Kernel(), spaces.ATTENTION, ())[(1,)]()
    assert started == [{"BN": 32 if silicon.of(DEVICE).narrowest > 16 else 16}]


def test_streams_go_in_stretches() -> None:
    streams, count, settings = normal(30, 4, 48), 24, {"norm_eps": 1e-6, "eps": 1e-3}
    weights = normal(count, 4 * 48, seed=1) * 0.05, normal(count, seed=2), normal(3, seed=3)
    given, exact = ([tensor.to(dtype) for tensor in (streams, *weights)] for dtype in (torch.float32, torch.float64))

    def mixed(tensors: list[Tensor]) -> Tensor:
        x, post, comb = ops.hyper_collapse(*tensors, **settings, iterations=5)
        expanded = ops.hyper_expand(x, tensors[0], post, comb)
        head = ops.hyper_head(tensors[0], tensors[1][:4], tensors[2][:4], tensors[3][:1], **settings)
        return torch.cat([part.flatten() for part in (x, post, comb, expanded, head)])

    beside_the_reference(lambda: mixed(given), lambda: mixed(exact), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_and_a_window_go_in_stretches(dtype: torch.dtype) -> None:
    counts, pasts, heads, dim, rate, span = [6, 1, 3], (10, 30, 0), 5, 32, 4, 6
    totals = [past + new for past, new in zip(pasts, counts, strict=True)]
    entries = [normal(total // rate, dim, seed=index) for index, total in enumerate(totals)]
    ends = [-(span + new) for new in counts]
    lasts = [normal(total, dim, seed=20 + total)[end:] for total, end in zip(totals, ends, strict=True)]
    chosen = torch.tensor([[0, 1, -1]] * sum(counts))
    chosen[-3:] = -1

    def attended(place: object, dtype: torch.dtype, some: Tensor | None) -> Tensor:
        kept, read = ([part.to(dtype) for part in parts] for parts in (entries, lasts))
        return ops.sparse_attention(
            normal(sum(counts), heads, dim, seed=7).to(dtype), boundaries(counts), pasts, place(kept), some,
            flat_rows(read), normal(heads, seed=8), value_dim=dim, scale=0.3, rate=rate, span=span,
        )  # fmt: skip

    for some in (None, chosen):
        beside_the_reference(
            lambda some=some: attended(paged_rows, dtype, some),
            lambda some=some: attended(flat_rows, torch.float64, some),
            2e-5 if dtype == torch.float32 else 2e-2,
        )


def test_choices_go_in_stretches() -> None:
    """Small whole numbers, so that many tie."""
    generator = torch.Generator().manual_seed(5)
    shapes = (9, 3, 8), (9, 3), (209, 8)
    q, weights, keys = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    logits = torch.randint(-3, 4, (40, 24), generator=generator).float()
    routing = {"scoring": "sqrtsoftplus", "method": "noaux_tc", "num_active": 6, "n_group": 1, "topk_group": 1}
    found = []
    for backend in (BACKEND, REFERENCE):
        with torch.no_grad(), ops.using(backend):
            chosen = ops.choose_entries(q, weights, (0, 9), (200,), flat_rows([keys]), count=7, rate=1)
            found.append((chosen, ops.route(logits, logits[0] / 8, **routing, normalise=True, scale=1.5)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1][0], found[1][1][0])
    torch.testing.assert_close(found[0][1][1], found[1][1][1], rtol=1e-5, atol=1e-6)


def test_what_such_a_chip_does_not_take_is_said() -> None:
    streams, fn, base, scale = torch.ones(2, 4, 40), torch.ones(24, 160), torch.ones(24), torch.ones(3)
    mixing = {"norm_eps": 1e-6, "eps": 1e-6, "iterations": 2}
    assert PREDICATES["hyper_collapse"](streams, fn, base, scale, **mixing) is None
    assert "multiple of 32 bytes, and these have 72" in str(
        PREDICATES["hyper_collapse"](streams[..., :18], fn, base, scale, **mixing)
    )
    assert "not torch.float64" in str(PREDICATES["hyper_collapse"](streams.double(), fn, base, scale, **mixing))
    wide = flat_rows([torch.ones(3, 640)])
    attending = {"value_dim": 512, "scale": 1.0, "rate": 1, "span": 0}
    told = PREDICATES["sparse_attention"](torch.ones(1, 2, 640), (0, 1), (2,), wide, None, None, None, **attending)
    assert told == "holds keys of 576 numbers at most, and these have 640"
    assert "GPUs of NVIDIA and AMD, and this is Huawei" in str(PREDICATES["rms_norm"](streams[0], None, 1e-6))
