"""What Huawei's fused ops take, said without torch_npu, so that the plan for a chip that is not here is made with the
very predicates that choose on it.

Limits are those of the ops' manuals (Ascend/op-plugin, docs/zh/custom_APIs, August 2026), for Atlas A2 and A3 and for
Ascend 950, the narrower where they differ and the chip's profile does not tell. Knows no chip by name.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from daedal.ops import silicon
from daedal.ops.arithmetic import MXFP8, W8A8, Arithmetic
from daedal.ops.packed import Packed
from daedal.ops.registry import Predicate
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, PagedRows, Rows
from daedal.ops.trained import wants_gradients

BACKEND = "npu"
MAKER = "huawei"
NARROW = (torch.bfloat16, torch.float16)
FLOATS = (*NARROW, torch.float32)
WIDEST_ROTATION, MOST_HEADS = 894, 999
LATENT, ROTATED = 512, 64  # the one split of a latent row that the ops of attention have
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)  # of queries on a latent row
WIDTHS = {(64, 64), (128, 128), (192, 128), (192, 192)}  # of a key and a value, of heads of their own
PAGE, WIDEST_PAGE = 16, 1024  # tokens of a page are a multiple of the one, and no more than the other
MOST_SEQUENCES = 4096
INDEX_HEADS, INDEX_DIM, MOST_CHOSEN = (8, 16, 24, 32, 64), 128, 2048
MOST_ROUTED = 2048  # experts, each group of them rounded up to 32
WIDEST_PRODUCT = 65535
MX_COLUMNS = 64


def declines(*tensors: Tensor | None, types: tuple[torch.dtype, ...] = FLOATS, trains: bool = False) -> str | None:
    """What every op asks first. types: of its numbers. trains: the op has gradients here."""
    present = [tensor for tensor in tensors if tensor is not None]
    profile = silicon.of(present[0].device)
    if profile.maker != MAKER:
        return f"calls ops of Huawei's chips, and this is {profile.name}"
    wrong = next((tensor.dtype for tensor in present if tensor.dtype not in types), None)
    if wrong is not None:
        return f"takes {', '.join(str(dtype).removeprefix('torch.') for dtype in types)}, not {wrong}"
    if any(not tensor.numel() for tensor in present):
        return "takes no empty tensors"
    if not trains and wants_gradients(*present):
        return "has no gradients"
    return None


def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> str | None:
    return declines(x_TD, weight_D, trains=True)


def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> str | None:
    if x_THR.shape[-1] > WIDEST_ROTATION or x_THR.shape[1] > MOST_HEADS:
        return f"rotates at most {MOST_HEADS} heads of {WIDEST_ROTATION} numbers"
    if wants_gradients(cos_TC, sin_TC):
        return "has no gradients of the angles"
    return declines(x_THR, cos_TC, sin_TC, trains=True)


def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> str | None:
    return declines(gate_TF, up_TF, trains=limit is None)


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
    if (scoring, normalise) not in (("sigmoid", True), ("softmax", False)):
        return f"divides the weights of sigmoid by their sum and those of softmax not, which {scoring} here is not"
    groups = 1 if method == "greedy" else n_group
    size = logits_TE.shape[-1] // groups
    if groups * (-(-size // 32) * 32) > MOST_ROUTED or (groups > 1 and size <= 2):
        return f"chooses among {MOST_ROUTED} experts at most, in groups of more than 2"
    return declines(logits_TE, bias_E, types=(torch.float32,), trains=True)


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
    if gate_up_EFD.shape[0] < 2:
        return "groups rows of two experts at least"
    return declines(x_TD, weights_TA, gate_up_EFD, down_EDF)


def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> str | None:
    if len(starts) - 1 not in range(1, MOST_SEQUENCES + 1):
        return f"takes 1 to {MOST_SEQUENCES} sequences"
    if isinstance(values, int):
        return _latent(q_THK, keys, values)
    if isinstance(keys, PagedRows) != isinstance(values, PagedRows):
        return "wants keys and values in places of one kind"
    key, value = memory(keys), memory(values)
    if (key.shape[-1], value.shape[-1]) not in WIDTHS:
        return f"has keys and values of {sorted(WIDTHS)} numbers, and these have {(key.shape[-1], value.shape[-1])}"
    own = key.shape[-2] == q_THK.shape[1]
    if not own and (key.shape[-1], value.shape[-1]) != (128, 128):
        return "has heads that share keys of 128 numbers alone"
    return _places(keys) or declines(q_THK, key, value, types=NARROW)


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
    if rate != 1:
        return f"scores every token, and these entries stand for {rate} each"
    if q_TIK.shape[1] not in INDEX_HEADS or q_TIK.shape[2] != INDEX_DIM:
        return f"has {', '.join(map(str, INDEX_HEADS))} index heads of {INDEX_DIM} numbers"
    if count > MOST_CHOSEN:
        return f"chooses {MOST_CHOSEN} at most"
    if memory(keys).dtype != q_TIK.dtype:
        return f"wants queries and keys of one type, and these are {q_TIK.dtype} and {memory(keys).dtype}"
    with torch.no_grad():  # no gradient passes here
        return _places(keys) or declines(q_TIK, memory(keys), types=NARROW)


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
    if entries is None or chosen_TA is None or window is not None or sinks_H is not None or rate != 1:
        return "reads chosen tokens alone: no window, no sinks, no entries of several tokens"
    if not chosen_TA.numel():
        return "takes no empty tensors"
    return _latent(q_THK, entries, value_dim)


def scaled_linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> str | None:
    profile = silicon.of(x_TD.device)
    if profile.maker == MAKER:
        wanted = MXFP8 if profile.multiplies(torch.float8_e4m3fn) else W8A8
        if arithmetic.stored is not None or not _alike(arithmetic, wanted):
            return f"multiplies as {wanted.name} on this chip, which {arithmetic.name} is not"
    if max(weight_FD.shape[-2:]) > WIDEST_PRODUCT:
        return f"takes at most {WIDEST_PRODUCT} rows and columns"
    if arithmetic.activations == MXFP8.activations and x_TD.shape[-1] % MX_COLUMNS:
        return f"keeps scales of {MX_COLUMNS} columns together, and these are {x_TD.shape[-1]}"
    return declines(x_TD, weight_FD, types=NARROW)


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
        "scaled_linear": scaled_linear,
        "scaled_experts": scaled_experts,
    }
)


def memory(rows: Rows) -> Tensor:
    """The tensor in which rows lie."""
    return rows.rows if isinstance(rows, FlatRows) else rows.pool


def _latent(q_THK: Tensor, rows: Rows, value_dim: int) -> str | None:
    """Queries on latent rows that are their own values."""
    if (value_dim, q_THK.shape[-1] - value_dim) != (LATENT, ROTATED):
        return f"reads latent rows of {LATENT} and {ROTATED} numbers alone"
    if q_THK.shape[1] not in HEADS:
        return f"has {', '.join(map(str, HEADS))} heads, and these are {q_THK.shape[1]}"
    if isinstance(rows, PagedRows) and rows.packing is not None:
        return "does not read packed rows"
    if memory(rows).dtype != q_THK.dtype:
        return f"wants queries and keys of one type, and these are {q_THK.dtype} and {memory(rows).dtype}"
    return declines(q_THK, memory(rows), types=NARROW)


def _places(rows: Rows) -> str | None:
    if not isinstance(rows, PagedRows):
        return None
    if rows.packing is not None:
        return "does not read packed rows"
    size = rows.pages.page_size
    if size % PAGE or size > WIDEST_PAGE:
        return f"reads pages of a multiple of {PAGE} tokens up to {WIDEST_PAGE}, and these have {size}"
    return None


def _alike(given: Arithmetic, wanted: Arithmetic) -> bool:
    return (given.activations, given.weights, given.gradients) == (wanted.activations, wanted.weights, wanted.gradients)
