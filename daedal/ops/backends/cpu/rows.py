"""Norms, rotation, gated units and routing on native kernels; norms and gated units with their gradients."""

import math

import torch
from torch import Tensor

from daedal.ops.backends.cpu.gradients import TrainedGate, TrainedNorm
from daedal.ops.backends.cpu.program import TYPES, call, missing
from daedal.ops.registry import REGISTRY
from daedal.ops.trained import wants_gradients

BACKEND = "cpu"
FLOATS = (torch.bfloat16, torch.float32)

# As the kernel numbers them, and what its fixed arrays hold.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
MOST_EXPERTS, MOST_GROUPS = 4096, 512


def declines(*tensors: Tensor | None) -> str | None:
    """Why native kernels cannot take these tensors; what every op of this backend asks that has no gradients."""
    return "has no gradients" if wants_gradients(*tensors) else lacks_kernels(*tensors)


def lacks_kernels(*tensors: Tensor | None) -> str | None:
    """Why there are no native kernels where these tensors lie."""
    if any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors):
        return "runs on the CPU alone"
    return missing()


def _rms_norm_supports(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> str | None:
    types = [tensor.dtype for tensor in (x_TD, weight_D) if tensor is not None]
    if any(dtype not in FLOATS for dtype in types):
        return f"takes bfloat16 and float32, not {types[0]}"
    return declines(x_TD) if weight_D is None else lacks_kernels(x_TD, weight_D)


@REGISTRY.register("rms_norm", BACKEND, supports=_rms_norm_supports)
def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    if weight_D is not None and wants_gradients(x_TD, weight_D):
        y_ND: Tensor = TrainedNorm.apply(_norm, _rows(x_TD), weight_D, eps)  # type: ignore[no-untyped-call]
        return y_ND.view(x_TD.shape)
    return _norm(x_TD, weight_D, eps)


def _norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    rows_ND = _rows(x_TD)
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    weight = None if weight_D is None else weight_D.contiguous()
    weight_type = 0 if weight is None else TYPES[weight.dtype]
    num_rows, dim = rows_ND.shape
    call(
        "rms_norm", rows_ND, rows_ND.stride(0), TYPES[x_TD.dtype], weight, weight_type, y_TD, num_rows, dim, float(eps)
    )
    return y_TD


def _rotary_supports(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> str | None:
    if x_THR.dtype not in FLOATS or cos_TC.dtype != torch.float32:
        return f"takes bfloat16 and float32, not {x_THR.dtype}"
    return declines(x_THR)


@REGISTRY.register("rotary", BACKEND, supports=_rotary_supports)
def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> Tensor:
    x_THR = _dense_last(x_THR)
    tokens, heads, dim = x_THR.shape
    y_THR = torch.empty(x_THR.shape, dtype=x_THR.dtype)
    cos_TC, sin_TC = cos_TC.contiguous(), sin_TC.contiguous()
    place = x_THR.stride(0), x_THR.stride(1), TYPES[x_THR.dtype]
    call("rotary", x_THR, *place, cos_TC, sin_TC, y_THR, tokens, heads, dim // 2, interleaved)
    return y_THR


def _angles_supports(positions_T: Tensor, frequencies_C: Tensor, scale: float) -> str | None:
    if frequencies_C.dtype != torch.float32 or positions_T.dtype != torch.int64:
        return f"takes int64 and float32, not {positions_T.dtype} and {frequencies_C.dtype}"
    return declines(positions_T)


@REGISTRY.register("angles", BACKEND, supports=_angles_supports)
def angles(positions_T: Tensor, frequencies_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    tokens, half = positions_T.shape[0], frequencies_C.shape[0]
    cos_TC, sin_TC = torch.empty((2, tokens, half), dtype=torch.float32)
    call("angles", positions_T.contiguous(), frequencies_C, cos_TC, sin_TC, tokens, half, float(scale))
    return cos_TC, sin_TC


def _swiglu_supports(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> str | None:
    if gate_TF.dtype not in FLOATS or up_TF.dtype != gate_TF.dtype:
        return f"takes bfloat16 and float32, not {gate_TF.dtype}"
    return lacks_kernels(gate_TF, up_TF)


@REGISTRY.register("swiglu", BACKEND, supports=_swiglu_supports)
def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> Tensor:
    if wants_gradients(gate_TF, up_TF):
        y_NF: Tensor = TrainedGate.apply(_gated, _rows(gate_TF), _rows(up_TF), limit)  # type: ignore[no-untyped-call]
        return y_NF.view(gate_TF.shape)
    return _gated(gate_TF, up_TF, limit=limit)


def _gated(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> Tensor:
    gate, up = _rows(gate_TF), _rows(up_TF)
    y_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype)
    most = math.inf if limit is None else float(limit)
    call("swiglu", gate, gate.stride(0), up, up.stride(0), TYPES[gate.dtype], y_TF, *gate.shape, most)
    return y_TF


def _route_supports(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    scoring: str,
    method: str,
    num_active: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
    given_TA: Tensor | None,
) -> str | None:
    if logits_TE.dtype != torch.float32 or (bias_E is not None and bias_E.dtype != torch.float32):
        return f"takes float32, not {logits_TE.dtype}"
    if logits_TE.shape[1] > MOST_EXPERTS or n_group > MOST_GROUPS:
        return f"takes up to {MOST_EXPERTS} experts in {MOST_GROUPS} groups"
    return declines(logits_TE, bias_E)


@REGISTRY.register("route", BACKEND, supports=_route_supports)
def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    scoring: str,
    method: str,
    num_active: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
    given_TA: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logits_TE = logits_TE.contiguous()
    tokens, experts = logits_TE.shape
    ids_TA = torch.empty((tokens, num_active), dtype=torch.int64)
    weights_TA = torch.empty((tokens, num_active), dtype=torch.float32)
    scratch = torch.empty((tokens, 2 * experts), dtype=torch.float32)
    given = None if given_TA is None else given_TA.contiguous()
    sizes = tokens, experts, num_active
    ways = SCORINGS.index(scoring), METHODS.index(method), n_group, topk_group, normalise, float(scale)
    call("route", logits_TE, bias_E, given, ids_TA, weights_TA, scratch, *sizes, *ways)
    return ids_TA, weights_TA


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """[N, D] with its last axis dense: a view where the leading axes fold into one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.numel() == 0 else rows.contiguous()
