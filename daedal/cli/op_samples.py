"""One decode step's tensors for every op, so that `daedal doctor` can ask which backend would run them.

Small, but with the proportions of DeepSeek's models, because backends choose by dtype, device and shape. The values
are zeros, or drawn for a self-check. Imports torch when asked.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from daedal.ops import FlatRows

    Zeros = Callable[..., torch.Tensor]

Call = tuple[tuple[Any, ...], dict[str, Any]]

TOKENS, HIDDEN, HEADS, LATENT, ROTATED, EXPERTS, ACTIVE, WIDTH = 2, 256, 8, 512, 64, 8, 2, 128
PAST, SPAN, RATE, CHOSEN, STREAMS, GROUPS = 127, 32, 4, 8, 4, 2


def samples(
    device: "torch.device", dtype: "torch.dtype", weights: str | None = None, seed: int | None = None
) -> dict[str, Call]:
    """Arguments and keyword arguments by the name of the op. weights: "int8", packed, or None for plain matrices. seed:
    of normal numbers; None for zeros.
    """
    import torch

    from daedal.ops import FlatRows, Packed
    from daedal.ops.integers import quantise_int8
    from daedal.ops.packed import pack

    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def zeros(*shape: int, of: "torch.dtype" = dtype) -> torch.Tensor:
        if generator is None:
            return torch.zeros(shape, dtype=of, device=device)
        return torch.randn(shape, generator=generator).to(device, of)

    def rows(count: int, dim: int) -> FlatRows:
        """So many for each token, which is a sequence of its own."""
        return FlatRows(zeros(TOKENS * count, dim), tuple(range(0, TOKENS * count + 1, count)))

    def matrix(*shape: int) -> "torch.Tensor | Packed":
        if weights is None:
            return zeros(*shape)
        return pack(weights, *quantise_int8(zeros(*shape, of=torch.float32)))

    x_TD, angles_TC = zeros(TOKENS, HIDDEN), zeros(TOKENS, ROTATED // 2, of=torch.float32)
    latents = rows(1, LATENT + ROTATED)
    logits_TE = zeros(TOKENS, EXPERTS, of=torch.float32)
    ids_TA = torch.arange(ACTIVE, device=device).repeat(TOKENS, 1)
    weights_TA = zeros(TOKENS, ACTIVE, of=torch.float32)
    routing = {"scoring": "sigmoid", "method": "noaux_tc", "num_active": ACTIVE, "n_group": 2, "topk_group": 1}
    matrices = matrix(EXPERTS, 2 * WIDTH, HIDDEN), matrix(EXPERTS, HIDDEN, WIDTH)
    return {
        "rms_norm": ((x_TD, zeros(HIDDEN), 1e-6), {}),
        "linear": ((x_TD, matrix(WIDTH, HIDDEN), None), {}),
        "grouped_linear": ((zeros(TOKENS, GROUPS, HIDDEN), matrix(GROUPS, WIDTH, HIDDEN)), {}),
        "rotary": ((zeros(TOKENS, HEADS, ROTATED), angles_TC, angles_TC), {"interleaved": True}),
        "angles": ((torch.arange(TOKENS, device=device), zeros(ROTATED // 2, of=torch.float32), 1.0), {}),
        "swiglu": ((zeros(TOKENS, WIDTH), zeros(TOKENS, WIDTH)), {"limit": 10.0}),
        "attention": ((zeros(TOKENS, HEADS, LATENT + ROTATED), latents.starts, latents, LATENT), {"scale": 0.1}),
        "route": (
            (logits_TE, zeros(EXPERTS, of=torch.float32)),
            {**routing, "normalise": True, "scale": 1.0, "given_TA": None},
        ),
        "experts": ((x_TD, ids_TA, weights_TA, *matrices), {"limit": 10.0}),
        **_sparse(zeros, rows),
        **_groups(zeros),
        **_streams(zeros),
        **_training(zeros),
    }


def _sparse(zeros: "Zeros", rows: "Callable[[int, int], FlatRows]") -> dict[str, Call]:
    """Decode steps of sequences with `PAST` tokens, of whose entries an indexer chooses some."""
    import torch

    place = tuple(range(TOKENS + 1)), (PAST,) * TOKENS
    entries = (PAST + 1) // RATE
    choosing = zeros(TOKENS, HEADS, WIDTH), zeros(TOKENS, HEADS, of=torch.float32)  # by an indexer of V3.2
    chosen_TA = torch.arange(CHOSEN, device=choosing[0].device).expand(TOKENS, CHOSEN)
    attending = rows(entries, LATENT), chosen_TA, rows(SPAN, LATENT), zeros(HEADS, of=torch.float32)
    settings = {"value_dim": LATENT, "scale": 0.1, "rate": RATE, "span": SPAN}
    return {
        "choose_entries": ((*choosing, *place, rows(PAST + 1, WIDTH)), {"count": CHOSEN, "rate": 1}),
        "sparse_attention": ((zeros(TOKENS, HEADS, LATENT), *place, *attending), settings),
    }


def _groups(zeros: "Zeros") -> dict[str, Call]:
    """Compressors in a step that completes a group of each sequence, and the rings and pages that they write."""
    import torch

    from daedal.ops import PagedRows, Pages

    starts, pasts, states = tuple(range(TOKENS + 1)), (PAST,) * TOKENS, tuple(range(TOKENS))
    rows = [zeros(TOKENS, 2 * LATENT, of=torch.float32) for _ in range(2)]
    turn = [zeros(TOKENS, ROTATED // 2, of=torch.float32) for _ in range(2)]
    ring = zeros(TOKENS, 2 * RATE, 2, 2 * LATENT, of=torch.float32)
    pages = Pages(tuple((state,) for state in states), ((PAST + 1) // RATE,) * TOKENS, (PAST + 1) // RATE)
    entries = PagedRows(zeros(TOKENS, (PAST + 1) // RATE, LATENT), pages)
    weights = zeros(RATE, 2 * LATENT, of=torch.float32), zeros(LATENT)
    return {
        "keep_on_pages": ((zeros(TOKENS, LATENT), torch.arange(TOKENS, device=entries.pool.device), entries), {}),
        "keep_in_ring": ((zeros(TOKENS, LATENT), starts, pasts, zeros(TOKENS, SPAN, LATENT), states), {}),
        "pool_groups": (
            (*rows, *weights, *turn, starts, pasts, ring, states, entries),
            {"eps": 1e-6, "overlaps": True},
        ),
    }


def _streams(zeros: "Zeros") -> dict[str, Call]:
    """Residual streams, and the weights that mix them."""
    import torch

    streams, mixes = zeros(TOKENS, STREAMS, HIDDEN), STREAMS * (2 + STREAMS)
    shapes = (mixes, STREAMS * HIDDEN), (mixes,), (3,)
    weights = [zeros(*shape, of=torch.float32) for shape in shapes]
    post_TM, comb_TMM = (zeros(TOKENS, *shape, of=torch.float32) for shape in ((STREAMS,), (STREAMS, STREAMS)))
    return {
        "hyper_collapse": ((streams, *weights), {"norm_eps": 1e-6, "eps": 1e-6, "iterations": 20}),
        "hyper_expand": ((zeros(TOKENS, HIDDEN), streams, post_TM, comb_TMM), {}),
        "hyper_head": (
            (streams, weights[0][:STREAMS], weights[1][:STREAMS], weights[2][:1]),
            {"norm_eps": 1e-6, "eps": 1e-6},
        ),
    }


def _training(zeros: "Zeros") -> dict[str, Call]:
    """Products in the arithmetic of FP8 training; their weights are never packed."""
    import torch

    from daedal.ops.arithmetic import FP8

    x_TD = zeros(TOKENS, HIDDEN)
    ids_TA = torch.arange(ACTIVE, device=x_TD.device).repeat(TOKENS, 1)
    routed = x_TD, ids_TA, zeros(TOKENS, ACTIVE, of=torch.float32)
    matrices = zeros(EXPERTS, 2 * WIDTH, HIDDEN), zeros(EXPERTS, HIDDEN, WIDTH)
    return {
        "scaled_linear": ((x_TD, zeros(WIDTH, HIDDEN), FP8), {}),
        "scaled_experts": ((*routed, *matrices, FP8), {"limit": 10.0}),
    }
