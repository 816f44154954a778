"""What the Triton kernels take: for each op the reason for declining, or None. Needs no Triton, so that `daedal doctor
--profile` can say what a chip would run that is not here.

GPUs of NVIDIA and AMD, by their profiles; the CPU only through Triton's interpreter (TRITON_INTERPRET=1), which is for
tests. Ops whose best form is a plain product (`linear`, `grouped_linear`) are left to the maker's libraries. On
Huawei's chips only ops for which backend `npu` has none, or not for all sizes: V4's attention, its choice of entries
and its compressors, residual streams, routing. There sums lie beside the core, so sizes have bounds that GPUs lack.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from daedal.ops import silicon
from daedal.ops.arithmetic import Arithmetic, Rounding
from daedal.ops.packed import Packed
from daedal.ops.registry import Predicate
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, PagedRows, Rows
from daedal.ops.trained import wants_gradients

BACKEND = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COMPILERS: Mapping[str, str] = MappingProxyType({"nvidia": "nvidia", "amd": "amd", "huawei": "ascend"})
"""What Triton calls its compiler for the chips of each maker."""
GPUS = ("nvidia", "amd")
WIDEST_ROW = 2**16  # numbers of a row that one program holds
WIDEST_KEY, MOST_EXPERTS, MOST_ACTIVE = 1024, 4096, 64
WIDEST_TRAINED_KEY = 256  # and value: gradients of both are summed at once
MOST_STREAMS = 16
# Where sums lie beside the core: the largest that tools/compile_ascend.py was seen to compile for every chip.
WIDEST_KEY_ON_CHIP, MOST_INDEX_HEADS, WIDEST_INDEX_KEY = 576, 64, 128
MOST_EXPERTS_ON_CHIP, MOST_ACTIVE_ON_CHIP = 512, 16
GROUPS = (32, 64, 128)  # numbers that share a scale, along the summed axis


def declines(*tensors: Tensor | None, trains: bool = False, everywhere: bool = False) -> str | None:
    """What every op asks first. trains: the op has gradients here. everywhere: it compiles for
    chips of other makers too that say where their sums lie."""
    present = [tensor for tensor in tensors if tensor is not None]
    profile = silicon.of(present[0].device)
    fits = profile.maker in GPUS or (profile.device == "cpu" and INTERPRETED)
    if not fits and not (everywhere and profile.sums_on_chip and profile.maker in COMPILERS):
        return f"compiles for GPUs of NVIDIA and AMD, and this is {profile.name}"
    wrong = next((tensor.dtype for tensor in present if tensor.dtype not in FLOATS), None)
    if wrong is not None:
        return f"takes float32, bfloat16 and float16, not {wrong}"
    return "has no gradients" if not trains and wants_gradients(*present) else None


def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> str | None:
    if x_TD.shape[-1] > WIDEST_ROW:
        return f"holds rows of {WIDEST_ROW} numbers at most, and these have {x_TD.shape[-1]}"
    return declines(x_TD, weight_D, trains=True)


def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> str | None:
    if wants_gradients(cos_TC, sin_TC):
        return "has no gradients of the angles"
    return declines(x_THR, cos_TC, sin_TC, trains=True)


def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> str | None:
    return declines(gate_TF, up_TF, trains=True)


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
) -> str | None:
    if given_TA is not None:
        return "chooses experts, and these are given"
    on_chip = silicon.of(logits_TE.device).sums_on_chip
    most, most_active = (MOST_EXPERTS_ON_CHIP, MOST_ACTIVE_ON_CHIP) if on_chip else (MOST_EXPERTS, MOST_ACTIVE)
    if logits_TE.shape[-1] > most or num_active > most_active:
        return f"chooses at most {most_active} of {most} experts"
    return declines(logits_TE, bias_E, trains=True, everywhere=True) or _unaligned(logits_TE)


def experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor | Packed,
    down_EDF: Tensor | Packed,
    *,
    limit: float | None,
) -> str | None:
    if isinstance(gate_up_EFD, Packed) or isinstance(down_EDF, Packed):
        return "does not read packed weights"
    if x_TD.dtype != gate_up_EFD.dtype or x_TD.dtype != down_EDF.dtype:
        return f"wants one type for all, and these are {x_TD.dtype}, {gate_up_EFD.dtype} and {down_EDF.dtype}"
    return declines(x_TD, weights_TA, gate_up_EFD, down_EDF, trains=True)


def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> str | None:
    memories = [_memory(rows) for rows in (keys, values) if not isinstance(rows, int)]
    if not isinstance(values, int) and not _alike(keys, values):
        return "wants keys and values in the same places"
    trained = wants_gradients(q_THK, *memories)
    why = _untrained(keys, values) if trained else None
    return why or _rows_decline(q_THK, keys) or declines(q_THK, *memories, trains=True)


def choose_entries(
    q_TIK: Tensor,
    weights_TI: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    keys: Rows,
    *,
    count: int,
    rate: int,
) -> str | None:
    wide = q_TIK.shape[1] > MOST_INDEX_HEADS or q_TIK.shape[2] > WIDEST_INDEX_KEY
    if wide and silicon.of(q_TIK.device).sums_on_chip:
        return f"holds {MOST_INDEX_HEADS} index heads of {WIDEST_INDEX_KEY} numbers at most"
    with torch.no_grad():  # no gradient passes here
        why = _rows_decline(q_TIK, keys) or declines(q_TIK, weights_TI, _memory(keys), everywhere=True)
    return why or _unaligned(q_TIK, _memory(keys))


def sparse_attention(
    q_THK: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    entries: Rows | None,
    chosen_TA: Tensor | None,
    window: Rows | RingRows | None,
    sinks_H: Tensor | None,
    *,
    value_dim: int,
    scale: float,
    rate: int,
    span: int,
) -> str | None:
    if isinstance(window, PagedRows):
        return "reads windows side by side or in rings, not on pages"
    present = [rows for rows in (entries, window) if rows is not None]
    why = next((why for rows in present if (why := _rows_decline(q_THK, rows))), None)
    memories = [_memory(rows) for rows in present]
    return why or declines(q_THK, sinks_H, *memories, everywhere=True) or _unaligned(q_THK, *memories)


def pool_groups(
    kv_TW: Tensor,
    gate_TW: Tensor,
    bias_rW: Tensor,
    weight_K: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    ring: Tensor,
    states: tuple[int, ...],
    entries: PagedRows,
    *,
    eps: float,
    overlaps: bool,
) -> str | None:
    if entries.packing is not None:
        return "does not write packed rows"
    if weight_K.shape[0] > WIDEST_KEY or weight_K.shape[0] % 2:
        return f"writes entries of an even number up to {WIDEST_KEY}, and these have {weight_K.shape[0]}"
    if any(tensor.dtype != torch.float32 for tensor in (kv_TW, gate_TW, bias_rW, ring)):
        return "pools float32 alone"
    if ring.stride(-1) != 1 or entries.pool.stride(-1) != 1:
        return "writes rows whose numbers lie side by side"
    why = declines(kv_TW, gate_TW, bias_rW, weight_K, cos_TC, sin_TC, entries.pool, everywhere=True)
    return why or _unaligned(kv_TW, ring, entries.pool)


def scaled_linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> str | None:
    roundings = arithmetic.activations, arithmetic.weights, arithmetic.gradients
    wrong = next((rounding for rounding in roundings if not _multiplies(rounding)), None)
    if wrong is not None:
        return f"multiplies e4m3 and int8 in groups of {', '.join(map(str, GROUPS))}, and {arithmetic.name} has {wrong}"
    if len({(rounding.element, rounding.along) for rounding in roundings}) > 1:
        return f"wants one format and length of groups for all factors, which {arithmetic.name} has not"
    return declines(x_TD, weight_FD, trains=True)


def scaled_experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    arithmetic: Arithmetic,
    *,
    limit: float | None,
) -> str | None:
    return scaled_linear(x_TD, gate_up_EFD, arithmetic) or scaled_linear(x_TD, down_EDF, arithmetic)


def hyper_collapse(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> str | None:
    return _streams(streams_TMD, fn, base, scale)


def hyper_head(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float
) -> str | None:
    return _streams(streams_TMD, fn, base, scale)


def hyper_expand(y_TD: Tensor, streams_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> str | None:
    return _streams(streams_TMD, y_TD, post_TM, comb_TMM)


PREDICATES: Mapping[str, Predicate] = MappingProxyType(
    {
        "rms_norm": rms_norm,
        "rotary": rotary,
        "swiglu": swiglu,
        "route": route,
        "experts": experts,
        "attention": attention,
        "choose_entries": choose_entries,
        "sparse_attention": sparse_attention,
        "hyper_collapse": hyper_collapse,
        "hyper_head": hyper_head,
        "hyper_expand": hyper_expand,
        "pool_groups": pool_groups,
        "scaled_linear": scaled_linear,
        "scaled_experts": scaled_experts,
    }
)


def _streams(streams_TMD: Tensor, *others: Tensor) -> str | None:
    if streams_TMD.shape[1] > MOST_STREAMS:
        return f"holds {MOST_STREAMS} streams at most, and these are {streams_TMD.shape[1]}"
    return declines(streams_TMD, *others, everywhere=True) or _unaligned(streams_TMD)


def _memory(rows: Rows | RingRows) -> Tensor:
    return rows.rows if isinstance(rows, FlatRows) else rows.pool


def _alike(keys: Rows, values: Rows) -> bool:
    if isinstance(keys, FlatRows) and isinstance(values, FlatRows):
        return keys.starts == values.starts
    return isinstance(keys, PagedRows) and isinstance(values, PagedRows) and keys.pages is values.pages


def _untrained(keys: Rows, values: Rows | int) -> str | None:
    if isinstance(values, int):
        return "has no gradients of keys that are their own values"
    if not isinstance(keys, FlatRows) or not isinstance(values, FlatRows):
        return "has no gradients of rows on pages"
    widest = max(keys.rows.shape[-1], values.rows.shape[-1])
    if widest > WIDEST_TRAINED_KEY:
        return f"has gradients of keys and values of {WIDEST_TRAINED_KEY} numbers at most, and these have {widest}"
    return None


def _rows_decline(q: Tensor, rows: Rows | RingRows) -> str | None:
    memory = _memory(rows)
    if isinstance(rows, PagedRows) and rows.packing is not None:
        return "does not read packed rows"
    if memory.dtype != q.dtype:
        return f"wants queries and keys of one type, and these are {q.dtype} and {memory.dtype}"
    widest = WIDEST_KEY_ON_CHIP if silicon.of(q.device).sums_on_chip else WIDEST_KEY
    if memory.shape[-1] > widest:
        return f"holds keys of {widest} numbers at most, and these have {memory.shape[-1]}"
    return None


def _unaligned(*tensors: Tensor) -> str | None:
    alignment = silicon.of(tensors[0].device).alignment
    wrong = next((size for x in tensors if (size := x.shape[-1] * x.element_size()) % alignment), None)
    return None if wrong is None else f"reads rows of a multiple of {alignment} bytes, and these have {wrong}"


def _multiplies(rounding: Rounding) -> bool:
    if rounding.element not in ("e4m3", "int8") or rounding.largest is not None:
        return False
    return rounding.along in GROUPS and (rounding.across == 1 or rounding.across in GROUPS)
