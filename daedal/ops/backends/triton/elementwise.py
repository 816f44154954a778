"""Norms, rotation and gated units: the kernels of `kernels/elementwise.py` with their gradients."""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops import silicon
from daedal.ops.backends.triton import spaces, supports
from daedal.ops.backends.triton.kernels import elementwise as kernels
from daedal.ops.backends.triton.launch import tuned
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY

ROWS_PER_PROGRAM = 4  # of a gradient's programs for each core, so that few partial sums are left to add
HEADS = 8
COLUMNS = 1024

_NORM = tuned(kernels.rms_norm, spaces.ROWS, ["num_columns"])
_NORM_BACKWARD = tuned(kernels.rms_norm_backward, spaces.ROWS, ["num_columns"])


@REGISTRY.register("rms_norm", BACKEND, supports=supports.rms_norm)
def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    y_TD: Tensor = _RmsNorm.apply(rows(x_TD), weight_D, eps)  # type: ignore[no-untyped-call]
    return y_TD.view(x_TD.shape)


@REGISTRY.register("rotary", BACKEND, supports=supports.rotary)
def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> Tensor:
    y_THR: Tensor = _Rotary.apply(x_THR, cos_TC, sin_TC, interleaved)  # type: ignore[no-untyped-call]
    return y_THR


@REGISTRY.register("swiglu", BACKEND, supports=supports.swiglu)
def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> Tensor:
    y_TF: Tensor = _SwiGLU.apply(rows(gate_TF), rows(up_TF), limit)  # type: ignore[no-untyped-call]
    return y_TF.view(gate_TF.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        num_rows, num_columns = x_TD.shape
        weight = None if weight_D is None else weight_D.contiguous()
        y_TD = x_TD.new_empty(x_TD.shape)
        inverse_T = x_TD.new_empty(num_rows, dtype=torch.float32)
        if y_TD.numel():
            _NORM[(num_rows,)](
                x_TD, x_TD if weight is None else weight, y_TD, inverse_T, num_columns, x_TD.stride(0), float(eps),
                WEIGHTED=weight is not None, KEPT=any(ctx.needs_input_grad), BLOCK=triton.next_power_of_2(num_columns),
            )  # fmt: skip
        ctx.save_for_backward(x_TD, weight, inverse_T)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_TD, weight, inverse_T = ctx.saved_tensors
        num_rows, num_columns = x_TD.shape
        programs = min(num_rows, ROWS_PER_PROGRAM * (silicon.of(x_TD.device).cores or 1))
        grad_x = x_TD.new_empty(x_TD.shape)
        partial = x_TD.new_empty((programs, num_columns), dtype=torch.float32)
        if grad_x.numel():
            _NORM_BACKWARD[(programs,)](
                grad_TD.contiguous(), x_TD, x_TD if weight is None else weight, inverse_T, grad_x, partial,
                num_rows, num_columns, x_TD.stride(0),
                WEIGHTED=weight is not None, BLOCK=triton.next_power_of_2(num_columns),
            )  # fmt: skip
        return grad_x, None if weight is None else partial.sum(0).to(weight.dtype), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        ctx.interleaved = interleaved
        return _rotate(x_THR, cos_TC, sin_TC, interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THR: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _rotate(grad_THR, cos_TC, sin_TC, ctx.interleaved, back=True), None, None, None


def _rotate(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool, *, back: bool) -> Tensor:
    num_tokens, num_heads, size = x_THR.shape
    x_THR = x_THR if x_THR.stride(-1) == 1 else x_THR.contiguous()
    cos_TC, sin_TC = cos_TC.contiguous(), sin_TC.contiguous()
    y_THR = x_THR.new_empty(x_THR.shape)
    if y_THR.numel():
        kernels.rotate[(num_tokens, triton.cdiv(num_heads, HEADS))](
            x_THR, cos_TC, sin_TC, y_THR, num_heads, x_THR.stride(0), x_THR.stride(1), size // 2,
            PAIRS=size // 2, INTERLEAVED=interleaved, BACK=back, HEADS=HEADS, BLOCK=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return y_THR


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.limit = limit
        y_TF = gate_TF.new_empty(gate_TF.shape)
        if y_TF.numel():
            kernels.swiglu[_grid(gate_TF)](
                gate_TF, up_TF, y_TF, gate_TF.shape[1], gate_TF.stride(0), up_TF.stride(0), float(limit or 0.0),
                LIMITED=limit is not None, BLOCK=COLUMNS,
            )  # fmt: skip
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_TF, up_TF = ctx.saved_tensors
        grad_gate, grad_up = gate_TF.new_empty(gate_TF.shape), up_TF.new_empty(up_TF.shape)
        if grad_gate.numel():
            kernels.swiglu_backward[_grid(gate_TF)](
                grad_TF.contiguous(), gate_TF, up_TF, grad_gate, grad_up, gate_TF.shape[1], gate_TF.stride(0),
                up_TF.stride(0), float(ctx.limit or 0.0), LIMITED=ctx.limit is not None, BLOCK=COLUMNS,
            )  # fmt: skip
        return grad_gate, grad_up, None


def rows(x: Tensor) -> Tensor:
    """[N, D] with dense rows, a view where there is one."""
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _grid(x_TF: Tensor) -> tuple[int, int]:
    return x_TF.shape[0], triton.cdiv(x_TF.shape[1], COLUMNS)
