"""The native kernels as PyTorch's own operators: schema, fake form and dispatch, as torch itself checks them."""

import pytest
import torch

import daedal.ops
from daedal.ops.backends.cpu import operators
from tests.native import needs_kernels
from tests.ops.packs import random_packed

pytestmark = needs_kernels


def _calls() -> dict[str, tuple[object, tuple[object, ...]]]:
    x = torch.randn(3, 64).bfloat16()
    one, stack = random_packed("int4", 32, 64), random_packed("int8", 2, 32, 64)
    up, down = random_packed("int8", 4, 32, 64), random_packed("int8", 4, 64, 16)
    ids = torch.tensor([[0, 3], [1, 2], [3, 3]])
    table, lengths = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32), torch.tensor([20, 5], dtype=torch.int32)
    pool = torch.randn(4, 16, 48).bfloat16()
    return {
        "rms_norm": (operators.rms_norm, (x, torch.ones(64), 1e-6)),
        "rotary": (operators.rotary, (x.view(3, 4, 16), torch.ones(3, 8), torch.zeros(3, 8), True)),
        "swiglu": (operators.swiglu, (x, x, 1.0)),
        "packed_linear": (operators.packed_linear, (x, one.data, "int4", 32, None)),
        "packed_grouped_linear": (operators.packed_grouped_linear, (torch.randn(3, 2, 64), stack.data, "int8", 32)),
        "packed_experts": (
            operators.packed_experts,
            (x, ids, torch.rand(3, 2), up.data, down.data, "int8", 4, 16, None),
        ),
        "paged_attention": (
            operators.paged_attention,
            (torch.randn(2, 4, 48).bfloat16(), [0, 1, 2], pool, None, table, lengths, 32, 0.1),
        ),
    }


@pytest.mark.parametrize("name", _calls())
def test_torch_accepts_the_operator(name: str) -> None:
    operator, arguments = _calls()[name]
    torch.library.opcheck(operator, arguments)


def test_an_exported_graph_calls_the_kernel() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.daedal.rms_norm(x, None, 1e-6) * 2

    x = torch.randn(3, 64)
    exported = torch.export.export(Norm(), (x,))
    with torch.no_grad(), daedal.ops.using("reference"):
        wanted = daedal.ops.rms_norm(x, None, 1e-6) * 2
    torch.testing.assert_close(exported.module()(x), wanted)
