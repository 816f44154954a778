"""Hyper-connections: a plain product by PyTorch, and one kernel for all that follows from it."""

import torch
import triton
from torch import Tensor

from daedal.ops.backends.triton import supports
from daedal.ops.backends.triton.kernels import streams as kernels
from daedal.ops.backends.triton.launch import stretches
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY

_COLUMNS = 1024


@REGISTRY.register("hyper_collapse", BACKEND, supports=supports.hyper_collapse)
def hyper_collapse(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_streams, num_columns = streams_TMD.shape
    streams_TMD = streams_TMD.contiguous()
    x_TD = streams_TMD.new_empty((num_tokens, num_columns))
    post_TM = streams_TMD.new_empty((num_tokens, num_streams), dtype=torch.float32)
    comb_TMM = streams_TMD.new_empty((num_tokens, num_streams, num_streams), dtype=torch.float32)
    mixes = _mixes(streams_TMD, fn)
    for part in stretches(num_tokens, 1, x_TD.device) if x_TD.numel() else ():
        kernels.collapse[(part.stop - part.start,)](
            streams_TMD[part], mixes[part], base, scale, x_TD[part], post_TM[part], comb_TMM[part], num_columns,
            float(norm_eps), float(eps), FULL=True, ITERATIONS=iterations, STREAMS=num_streams,
            SLOTS=triton.next_power_of_2(num_streams), BLOCK=_COLUMNS,
        )  # fmt: skip
    return x_TD, post_TM, comb_TMM


@REGISTRY.register("hyper_head", BACKEND, supports=supports.hyper_head)
def hyper_head(streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    num_tokens, num_streams, num_columns = streams_TMD.shape
    streams_TMD = streams_TMD.contiguous()
    x_TD = streams_TMD.new_empty((num_tokens, num_columns))
    mixes = _mixes(streams_TMD, fn)
    for part in stretches(num_tokens, 1, x_TD.device) if x_TD.numel() else ():
        kernels.collapse[(part.stop - part.start,)](
            streams_TMD[part], mixes[part], base, scale, x_TD[part], base, base, num_columns, float(norm_eps),
            float(eps), FULL=False, ITERATIONS=1, STREAMS=num_streams, SLOTS=triton.next_power_of_2(num_streams),
            BLOCK=_COLUMNS,
        )  # fmt: skip
    return x_TD


@REGISTRY.register("hyper_expand", BACKEND, supports=supports.hyper_expand)
def hyper_expand(y_TD: Tensor, streams_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    num_tokens, num_streams, num_columns = streams_TMD.shape
    result_TMD = streams_TMD.new_empty(streams_TMD.shape)
    given = [tensor.contiguous() for tensor in (y_TD, streams_TMD, post_TM, comb_TMM)]
    runs = triton.cdiv(num_columns, _COLUMNS)
    for part in stretches(num_tokens, runs, y_TD.device) if result_TMD.numel() else ():
        kernels.expand[(part.stop - part.start, runs)](
            *(tensor[part] for tensor in given), result_TMD[part], num_columns, STREAMS=num_streams, BLOCK=_COLUMNS
        )
    return result_TMD


def _mixes(streams_TMD: Tensor, fn: Tensor) -> Tensor:
    """float32: the streams side by side times their weights, not normed yet."""
    return (streams_TMD.flatten(1).float() @ fn.float().T).contiguous()
