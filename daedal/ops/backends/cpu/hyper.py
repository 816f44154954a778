"""Residual streams mixed on native kernels: one call before each block, one after it."""

import torch
from torch import Tensor

from daedal.ops.backends.cpu.program import TYPES, call
from daedal.ops.backends.cpu.rows import BACKEND, declines
from daedal.ops.registry import REGISTRY

MOST_STREAMS = 8  # a kernel holds a token's mixing matrix on its stack


def _declines(streams_TMD: Tensor, weights: tuple[Tensor, ...]) -> str | None:
    if streams_TMD.dtype not in (torch.bfloat16, torch.float32):
        return f"takes streams in bfloat16 and float32, not {streams_TMD.dtype}"
    if any(weight.dtype != torch.float32 for weight in weights):
        return "takes weights in float32"
    if streams_TMD.shape[1] > MOST_STREAMS:
        return f"takes at most {MOST_STREAMS} streams"
    if not streams_TMD.is_contiguous() or not all(weight.is_contiguous() for weight in weights):
        return "takes contiguous tensors"
    return declines(streams_TMD, *weights)


def _collapse_supports(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> str | None:
    return _declines(streams_TMD, (fn, base, scale))


@REGISTRY.register("hyper_collapse", BACKEND, supports=_collapse_supports)
def hyper_collapse(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, streams, dim = streams_TMD.shape
    x_TD = torch.empty((tokens, dim), dtype=streams_TMD.dtype)
    post_TM = torch.empty((tokens, streams))
    comb_TMM = torch.empty((tokens, streams, streams))
    products = torch.empty((tokens, fn.shape[0] + 1))
    call(
        "hyper_collapse",
        *(streams_TMD, streams * dim, TYPES[streams_TMD.dtype], fn, base, scale, products, x_TD, post_TM, comb_TMM),
        *(tokens, streams, dim, fn.shape[0], iterations, float(norm_eps), float(eps)),
    )
    return x_TD, post_TM, comb_TMM


def _head_supports(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float
) -> str | None:
    return _declines(streams_TMD, (fn, base, scale))


@REGISTRY.register("hyper_head", BACKEND, supports=_head_supports)
def hyper_head(streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    tokens, streams, dim = streams_TMD.shape
    x_TD = torch.empty((tokens, dim), dtype=streams_TMD.dtype)
    products = torch.empty((tokens, fn.shape[0] + 1))
    call(
        "hyper_collapse",
        *(streams_TMD, streams * dim, TYPES[streams_TMD.dtype], fn, base, scale, products, x_TD, None, None),
        *(tokens, streams, dim, fn.shape[0], 0, float(norm_eps), float(eps)),
    )
    return x_TD


def _expand_supports(y_TD: Tensor, streams_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> str | None:
    if y_TD.dtype != streams_TMD.dtype:
        return f"takes a block's output in the streams' {streams_TMD.dtype}, not {y_TD.dtype}"
    if y_TD.stride(-1) != 1:
        return "takes a block's output with dense rows"
    return _declines(streams_TMD, (post_TM, comb_TMM)) or declines(y_TD)


@REGISTRY.register("hyper_expand", BACKEND, supports=_expand_supports)
def hyper_expand(y_TD: Tensor, streams_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    tokens, streams, dim = streams_TMD.shape
    after_TMD = torch.empty_like(streams_TMD)
    call(
        "hyper_expand",
        *(y_TD, y_TD.stride(0), streams_TMD, streams * dim, TYPES[streams_TMD.dtype], post_TM, comb_TMM, after_TMD),
        *(tokens, streams, dim),
    )
    return after_TMD
