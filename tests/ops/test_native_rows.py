"""Native norms, rotation, gates and routing at every instruction set of this CPU, and recorded programs of them."""

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops import Program, trace
from daedal.ops.backends.cpu.rows import METHODS, SCORINGS
from daedal.ops.rows import Unrecordable
from tests.native import needs_kernels

pytestmark = needs_kernels


def _both(op: str, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    results = []
    for backend in ("reference", "cpu"):
        with ops.using(backend):
            results.append(getattr(ops, op)(*args, **kwargs))
    return results[0], results[1]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_slices_of_larger_ones(dtype: torch.dtype) -> None:
    x_THR = torch.randn(3, 5, 24).to(dtype)[:, 1:4]
    cos_TC, sin_TC = torch.randn(3, 12), torch.randn(3, 12)
    for interleaved in (True, False):
        torch.testing.assert_close(*_both("rotary", x_THR, cos_TC, sin_TC, interleaved=interleaved))
    gate_TF, up_TF = torch.randn(4, 70).to(dtype).split(35, 1)
    for limit in (None, 0.5):
        torch.testing.assert_close(*_both("swiglu", gate_TF, up_TF, limit=limit))
    torch.testing.assert_close(*_both("rms_norm", torch.randn(3, 96).to(dtype)[:, 7:40], torch.randn(33), 1e-6))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("method", METHODS)
def test_experts_are_chosen_with_ties_to_the_lowest(scoring: str, method: str) -> None:
    logits_TE = torch.randn(6, 32)
    logits_TE[0, :9], logits_TE[1] = 3.0, 0.0
    bias_E = torch.randn(32) * (torch.arange(32) > 9) if method == "noaux_tc" else None
    rules = {"num_active": 4, "n_group": 4, "topk_group": 2, "normalise": True, "scale": 2.5}
    wanted, got = _both("route", logits_TE, bias_E, scoring=scoring, method=method, **rules)
    assert torch.equal(wanted[0], got[0])
    torch.testing.assert_close(wanted[1], got[1])


def test_a_recorded_pass_is_the_same_arithmetic_on_new_inputs() -> None:
    ids_T, positions_T, written_T = torch.tensor([3, 5]), torch.tensor([7, 9]), torch.tensor([4, 9])
    table, frequencies, weight = torch.randn(10, 32).bfloat16(), torch.rand(4), torch.randn(32)
    pools = [torch.zeros(16, 8).bfloat16() for _ in range(2)]

    def forward(pool: Tensor) -> Tensor:
        x_TD = torch.nn.functional.embedding(ids_T, table)
        angles_TC = positions_T.float().unsqueeze(-1) * frequencies
        normed = ops.rms_norm(x_TD, weight, 1e-6) + x_TD
        q, k = normed.unflatten(-1, (4, 8)).split((3, 1), 1)
        rotated = ops.rotary(torch.cat((q, k), 1), angles_TC.cos() * 1.1, angles_TC.sin(), interleaved=True)
        pool.index_copy_(0, written_T, rotated[:, 0])
        return rotated.transpose(0, 1).flatten(1).float() * 2

    program = Program()
    with torch.inference_mode(), ops.using("cpu"):
        with trace(program, [ids_T, positions_T, written_T]):
            result = forward(pools[0])
        for step in ([1, 2], [100, 3], [0, 5]), ([9, 9], [0, 70000], [6, 11]):
            for tensor, values in zip((ids_T, positions_T, written_T), step, strict=True):
                tensor.copy_(torch.tensor(values))
            program.replay()
            again = forward(pools[1])
            torch.testing.assert_close(result, again, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(pools[0][written_T], pools[1][written_T], rtol=2e-2, atol=2e-2)


def test_what_a_program_cannot_repeat_is_named() -> None:
    x_TD, kept = torch.randn(2, 8), torch.zeros(2)
    for forward, named in (
        (lambda: x_TD.softmax(-1), "_softmax"),
        (lambda: float(x_TD.sum()), "sum"),
        (lambda: kept.add_(1), "changes memory"),
        (lambda: x_TD @ torch.randn(8, 8), "mm"),
    ):
        with pytest.raises(Unrecordable, match=named), torch.inference_mode(), trace(Program(), [x_TD]):
            forward()


def test_what_depends_on_no_input_is_computed_once() -> None:
    x_TD = torch.randn(2, 8)
    program = Program()
    with torch.inference_mode(), trace(program, [x_TD]):
        constant = torch.arange(8).float().softmax(-1)
        constant[0] = 5.0
        result = x_TD * constant
    x_TD.copy_(torch.ones(2, 8))
    program.replay()
    torch.testing.assert_close(result, constant.expand(2, 8))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33, 1000])
def test_recorded_maxima_are_where_numpy_finds_them(columns: int) -> None:
    """Of equals the first, of numbers and NaN the first NaN; on one thread and more, and again when numbers change."""
    nan, inf = float("nan"), float("inf")
    rows: list[Tensor] = [
        torch.randn(columns),
        torch.zeros(columns),
        torch.full((columns,), -inf),
        torch.randn(columns),
    ]
    rows[3][columns // 2], rows[3][-1] = nan, nan
    found_NV = torch.stack([*rows, torch.randn(columns).round()])
    x_NV, program = torch.zeros_like(found_NV), Program()
    with trace(program, [x_NV]):
        values_N, places_N = x_NV.max(dim=-1)
    for row_NV in (found_NV, found_NV.flip(0), found_NV.flip(1)):
        x_NV.copy_(row_NV)
        program.replay()
        wanted_N = torch.from_numpy(row_NV.numpy().argmax(-1))
        assert torch.equal(places_N, wanted_N)
        assert torch.equal(values_N.nan_to_num(nan=7.0), row_NV.gather(1, wanted_N[:, None])[:, 0].nan_to_num(nan=7.0))


def test_a_maximum_along_another_axis_cannot_be_recorded() -> None:
    x_NV = torch.randn(3, 4)
    with pytest.raises(Unrecordable, match="any axis but the last"), trace(Program(), [x_NV]):
        x_NV.max(dim=0)
