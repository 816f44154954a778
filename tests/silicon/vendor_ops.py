"""Plain PyTorch in place of the ops of Huawei's chips: what their manuals say, computed in float32 on the CPU.

Each refuses what the manual refuses (types, sizes, tensors that are not contiguous), so a call that breaks a rule fails
here as it would there. They are a reading of the manuals (Ascend/op-plugin, docs/zh/custom_APIs, August 2026) and of
nothing else: they prove what Daedal asks for, not what a chip answers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
E4M3, E8M0 = 292, 293
TYPES = {5: torch.float16, 15: torch.bfloat16}  # as PyTorch numbers them


def _must(holds: bool, rule: str) -> None:
    if not holds:
        raise RuntimeError(f"aclnn: {rule}")


def _dense(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            _must(tensor.is_contiguous(), "tensors must be contiguous")
            _must(tensor.numel() > 0, "tensors must not be empty")


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    _must(gamma.dtype in (x.dtype, torch.float32), "gamma has x's type or float32")
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * inverse * gamma.float()).to(x.dtype), inverse


def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    normed, along = x.float() * rstd, dy.float() * gamma.float()
    grad_x = (along - normed * (along * normed).mean(-1, keepdim=True)) * rstd
    return grad_x.to(x.dtype), (dy.float() * normed).flatten(0, -2).sum(0)


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    _must(x.dim() == 4, "x is BSND here")
    _must(cos.shape == (1, x.shape[1], 1, x.shape[3]) and sin.shape == cos.shape, "angles are 1S1D")
    _must(x.dtype == cos.dtype == sin.dtype, "x and angles have one type")
    _must(x.shape[3] % 2 == 0 and x.shape[3] < 896 and x.shape[0] * x.shape[2] < 1000, "D < 896, B N < 1000")
    if mode == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        _must(mode == "interleave", "modes are half and interleave")
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def swiglu(x: Tensor, dim: int) -> Tensor:
    _dense(x)
    first, second = x.float().chunk(2, dim)
    return (first * first.sigmoid() * second).to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor, dim: int) -> Tensor:
    _dense(grad, x)
    (first, second), wide = x.float().chunk(2, dim), grad.float()
    gate = first.sigmoid()
    grad_first = wide * second * gate * (1 + first * (1 - gate))
    return torch.cat((grad_first, wide * first * gate), dim).to(x.dtype)


def clipped_swiglu(x: Tensor, *, dim: int, alpha: float, limit: float, bias: float, interleaved: bool) -> Tensor:
    _must(not interleaved, "halves, here")
    first, second = x.float().chunk(2, dim)
    first, second = first.clamp(max=limit), second.clamp(-limit, limit)
    return (first * (alpha * first).sigmoid() * (second + bias)).to(x.dtype)


def fused_infer_attention(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    _must(given["input_layout"] == "TND" and given["sparse_mode"] == 3, "TND and the causal mode, here")
    mask, heads, groups = given["atten_mask"], given["num_query_heads"], given["num_key_value_heads"]
    _must(mask.shape == (2048, 2048) and mask.dtype == torch.bool, "the mask is bool [2048, 2048]")
    _must(torch.equal(mask, torch.ones_like(mask).triu(1)), "the mask hides what is above the diagonal")
    _dense(query, key, value, mask, given.get("query_rope"), given.get("key_rope"))
    _must(query.dtype in NARROW and {key.dtype, value.dtype} == {query.dtype}, "16 bits, one type")
    _must(query.shape[1] == heads, "num_query_heads is the query's")
    ends, lengths = given["actual_seq_qlen"], given["actual_seq_kvlen"]
    _must(list(ends) == sorted(ends) and ends[-1] == query.shape[0], "ends of queries ascend to T")
    if given.get("block_table") is None:
        _must(list(lengths) == sorted(lengths) and lengths[-1] == key.shape[0], "ends of keys ascend to their number")
        held = [slice(start, end) for start, end in pairwise([0, *lengths])]
        keys, values = [key[span] for span in held], [value[span] for span in held]
    else:
        _must(given["block_size"] == key.shape[1] and key.shape[1] % 16 == 0, "pages of a multiple of 16")
        _must(key.dim() == 3, "paged keys are [blocks, block, H]")
        tables = [row.tolist() for row in given["block_table"]]
        keys, values = (
            [_paged(pool, table, length, groups) for table, length in zip(tables, lengths, strict=True)]
            for pool in (key, value)
        )
    rope, key_rope = given.get("query_rope"), given.get("key_rope")
    if rope is not None and key_rope is not None:
        _must(query.shape[2] == 512 and rope.shape == (*query.shape[:2], 64), "latents of 512, 64 of them rotated")
        _must(heads in (1, 2, 4, 8, 16, 32, 64, 128) and groups == 1, "heads are a power of two up to 128")
        query = torch.cat((query, rope), -1)
        keys = [torch.cat((one, key_rope[span]), -1) for one, span in zip(keys, held, strict=True)]
    else:
        _must(heads % groups == 0 and heads // groups <= 64, "at most 64 queries for a key")
    parts = [
        _attend(query[start:end], one, other, given["softmax_scale"])
        for (start, end), one, other in zip(pairwise([0, *ends]), keys, values, strict=True)
    ]
    return torch.cat(parts).to(query.dtype), torch.zeros(1)


def _paged(pool: Tensor, table: Sequence[int], length: int, groups: int) -> Tensor:
    rows = torch.cat([pool[page] for page in table])[:length]
    return rows.unflatten(-1, (groups, -1))


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(repeats, 1) for x in (key, value))
    scores = torch.einsum("thk,shk->hts", query.float(), key) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(key.shape[0] - query.shape[0] + 1)
    return torch.einsum("hts,shv->thv", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)


def lightning_indexer(query: Tensor, key: Tensor, weights: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    table, ends, lengths = (
        given[name] for name in ("block_table", "actual_seq_lengths_query", "actual_seq_lengths_key")
    )
    _dense(query, key, weights)
    _must(query.dtype in NARROW and key.dtype == query.dtype, "16 bits, one type")
    _must(weights.dtype in (query.dtype, torch.float32), "weights of the queries' type or float32")
    _must(query.shape[1] <= 64 and query.shape[2] == key.shape[-1] == 128 and key.shape[-2] == 1, "64 heads of 128")
    _must(ends.dtype == lengths.dtype == torch.int32, "lengths are int32")
    _must(given["sparse_mode"] == 3 and given["layout_query"] == "TND", "TND and the causal mode, here")
    _must(given["layout_key"] == ("TND" if table is None else "PA_BSND"), "the layout of keys says how they lie")
    count = given["sparse_count"]
    found = torch.full((query.shape[0], 1, count), -1, dtype=torch.int32)
    places = [0, *lengths.tolist()]
    for index, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if table is None:
            keys = key[places[index] : places[index + 1], 0]
        else:
            _must(key.shape[1] % 16 == 0, "pages of a multiple of 16")
            keys = _paged(key.flatten(2), table[index].tolist(), places[index + 1], 1)[:, 0]
        scores = torch.einsum("tik,sk->tis", query[start:end].float(), keys.float()).relu()
        ranked = torch.einsum("tis,ti->ts", scores, weights[start:end].float())
        for token in range(end - start):
            seen = len(keys) - (end - start) + token + 1
            best = ranked[token, :seen].topk(min(count, seen)).indices
            found[start + token, 0, : len(best)] = best.to(torch.int32)
    return found, query.new_empty(0)


def sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float, **given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rope, key_rope = given["query_rope"], given["key_rope"]
    _dense(query, key, value, chosen, rope, key_rope)
    _must(
        given["layout_query"] == given["layout_kv"] == "TND" and given["sparse_mode"] == 0, "TND without a mask, here"
    )
    _must(given["attention_mode"] == 2 and given["sparse_block_size"] == 1, "absorbed, token by token")
    _must(query.shape[2] == key.shape[2] == 512 and rope.shape[2] == key_rope.shape[2] == 64, "512 and 64 numbers")
    _must(query.shape[1] in (1, 2, 4, 8, 16, 32, 64, 128) and key.shape[1] == 1, "heads are a power of two")
    _must(query.dtype in NARROW and {key.dtype, rope.dtype, key_rope.dtype} == {query.dtype}, "16 bits, one type")
    ends, places = (given[f"actual_seq_lengths_{name}"] for name in ("query", "kv"))
    _must(chosen.dtype == ends.dtype == places.dtype == torch.int32, "indices and lengths are int32")
    out = []
    for (start, end), (first, last) in zip(pairwise([0, *ends.tolist()]), pairwise([0, *places.tolist()]), strict=True):
        for token in range(start, end):
            row = chosen[token, 0]
            count = int((row >= 0).sum())
            _must(bool((row[:count] >= 0).all() and (row[:count] < last - first).all()), "what is chosen comes first")
            rows = first + row[:count].long()
            keys = torch.cat((key[rows, 0], key_rope[rows, 0]), -1).float()
            scores = torch.cat((query[token], rope[token]), -1).float() @ keys.T * scale
            out.append(scores.softmax(-1) @ value[rows, 0].float())
    return torch.stack(out).to(query.dtype), torch.zeros(0), torch.zeros(0)


def gating_top_k(x: Tensor, k: int, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    bias, groups, kept = given["bias"], given["group_count"], given["k_group"]
    _must(bias is None or bias.dtype == x.dtype, "bias has x's type")
    _must(x.dim() == 2 and x.shape[1] <= 2048 and k <= x.shape[1] // groups * kept, "k experts of the groups kept")
    _must(groups == 1 or x.shape[1] // groups > 2, "groups of more than 2")
    scores = x.float().sigmoid() if given["norm_type"] else x.float().softmax(-1)
    choice = scores if bias is None else scores + bias
    if groups > 1:
        apart = choice.unflatten(-1, (groups, -1))
        rank = apart.topk(2, -1).values.sum(-1) if given["group_select_mode"] else apart.amax(-1)
        best = rank.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        hidden = torch.ones_like(rank, dtype=torch.bool).scatter_(1, best, False)
        choice = apart.masked_fill(hidden.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, ids)
    if given["norm_type"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * given["routed_scaling_factor"], ids.to(torch.int32), torch.zeros(0)


def init_routing(x: Tensor, ids: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _dense(x, ids)
    _must(ids.dtype == torch.int32, "ids are int32")
    _must(given["expert_tokens_num_type"] == 1 and given["expert_tokens_num_flag"], "counts are wanted")
    _must(given["row_idx_type"] == 0 and given["active_num"] == ids.numel(), "no row is dropped")
    order = ids.flatten().argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    counts = torch.bincount(ids.flatten(), minlength=given["expert_num"])
    rows, scales = x[order // ids.shape[1]], torch.zeros(0)
    if given["quant_mode"] == 1:
        rows, scales = dynamic_quant(rows)
    return rows, places.to(torch.int32), counts, scales


def grouped_matmul(xs: Sequence[Tensor], weights: Sequence[Tensor], **given: Any) -> list[Tensor]:
    (x,), (weight,), counts = xs, weights, given["group_list"]
    _must(
        (given["split_item"], given["group_type"], given["group_list_type"]) == (2, 0, 1), "rows by counts, one tensor"
    )
    _must(counts.dtype == torch.int64 and len(counts) == len(weight) > 1, "a count for each of two matrices or more")
    _must(int(counts.sum()) == len(x) and x.dtype == weight.dtype, "counts add up, types agree")
    wide, dtype = x.float(), x.dtype
    results = [rows @ matrix.float() for rows, matrix in zip(wide.split(counts.tolist()), weight, strict=True)]
    if x.dtype == torch.int8:
        (scale,), (per_token,), dtype = given["scale"], given["per_token_scale"], TYPES[given["output_dtype"]]
        _must(scale.dtype == {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}[dtype], "the scales' type")
        _must(per_token.dtype == torch.float32 and scale.shape == (len(weight), weight.shape[2]), "scales of rows")
        results = [part * one.float() for part, one in zip(results, scale, strict=True)]
        return [(torch.cat(results) * per_token.unsqueeze(1)).to(dtype)]
    return [torch.cat(results).to(dtype)]


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    _must(x.dtype in NARROW and x.dim() > 1, "16 bits, two axes at least")
    scale = (x.float().abs().amax(-1) / 127).clamp_min(1e-12)
    return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def dynamic_mx_quant(x: Tensor, *, dst_type: int, scale_alg: int) -> tuple[Tensor, Tensor]:
    _must(x.dtype in NARROW and dst_type == E4M3 and scale_alg == 1, "16 bits to e4m3 under scales rounded up")
    groups = x.float().unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 448).clamp_min(2.0**-127).log2().ceil()
    codes = (groups / exponents.exp2().unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    return codes, (exponents + 127).to(torch.uint8).unflatten(-1, (-1, 2))


def quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, **given: Any) -> Tensor:
    dtype, of_rows = TYPES[given["output_dtype"]], given["pertoken_scale"]
    _must(max(x1.shape[-1], x2.shape[-1]) <= 65535, "results of 16 bits, sizes up to 65535")
    if x1.dtype == torch.int8:
        _must(scale.dtype == of_rows.dtype == torch.float32, "scales are float32")
        _must(scale.shape == (x2.shape[1],) and of_rows.shape == (x1.shape[0],), "a scale for each row and column")
        return ((x1.float() @ x2.float()) * scale * of_rows.unsqueeze(1)).to(dtype)
    _must(given["scale_dtype"] == given["pertoken_scale_dtype"] == E8M0, "scales are e8m0")
    _must(list(given["group_sizes"]) == [1, 1, 32], "groups of 32")
    left = x1.float() * _spread(of_rows.flatten(1))
    right = x2.float() * _spread(scale.transpose(0, 1).flatten(1)).T
    return (left @ right).to(dtype)


def _spread(codes: Tensor) -> Tensor:
    return (codes.float() - 127).exp2().repeat_interleave(32, 1)


OPS: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {
        "npu_rms_norm": rms_norm,
        "npu_rms_norm_backward": rms_norm_backward,
        "npu_rotary_mul": rotary_mul,
        "npu_swiglu": swiglu,
        "npu_swiglu_backward": swiglu_backward,
        "npu_clipped_swiglu": clipped_swiglu,
        "npu_fused_infer_attention_score_v2": fused_infer_attention,
        "npu_lightning_indexer": lightning_indexer,
        "npu_sparse_flash_attention": sparse_flash_attention,
        "npu_moe_gating_top_k": gating_top_k,
        "npu_moe_init_routing_v2": init_routing,
        "npu_grouped_matmul": grouped_matmul,
        "npu_dynamic_quant": dynamic_quant,
        "npu_dynamic_mx_quant": dynamic_mx_quant,
        "npu_quant_matmul": quant_matmul,
    }
)
