"""Routing: which experts each token goes to, and with which weights. One token for each program."""

import triton
import triton.language as tl

# What is left out sinks below every score, and stays above what was taken already.
EXCLUDED = tl.constexpr(-3.0e38)


@triton.jit
def _scores(logits, SCORING: tl.constexpr):
    """s of `ops.route`; 0: softmax, 1: sigmoid, 2: the root of softplus."""
    if SCORING == 0:
        powers = tl.exp(logits - tl.max(logits, 0))
        scores = powers / tl.sum(powers, 0)
    elif SCORING == 1:
        scores = tl.sigmoid(logits)
    else:
        # log(1 + u) loses a small u; dividing by what was really added brings it back.
        power = tl.exp(-tl.abs(logits))
        grown = 1.0 + power
        added = tl.where(grown == 1.0, 1.0, grown - 1.0)
        softplus = tl.maximum(logits, 0.0) + tl.where(grown == 1.0, power, tl.log(grown) * (power / added))
        scores = tl.sqrt(tl.maximum(softplus, 1.1754943508222875e-38))
    return scores


@triton.jit
def _first_best(values, numbers):
    """The lowest of `numbers` where a value is the largest. Two plain reductions, because not every compiler of a chip
    takes the one that carries an index."""
    return tl.min(tl.where(values == tl.max(values, 0), numbers, 2147483647), 0)


@triton.jit
def _kept_groups(choice, experts, size, GROUPS: tl.constexpr, KEPT: tl.constexpr, PAIRS: tl.constexpr):
    """Which experts are of the KEPT best groups, by their best score or, where PAIRS, by the sum of their best two."""
    group = experts // size
    kept = experts < 0
    ranks = tl.zeros_like(choice) + float("-inf")
    for number in tl.static_range(GROUPS):
        own = tl.where(group == number, choice, float("-inf"))
        rank = tl.max(own, 0)
        if PAIRS:
            rank += tl.max(tl.where(experts == _first_best(own, experts), float("-inf"), own), 0)
        ranks = tl.where(experts == number, rank, ranks)
    for _ in tl.static_range(KEPT):
        best = _first_best(ranks, experts)
        kept = kept | (group == best)
        ranks = tl.where(experts == best, float("-inf"), ranks)
    return kept


@triton.jit
def route(
    logits,
    bias,
    ids,
    weights,
    num_experts,
    logits_row,
    scale,
    SCORING: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    PAIRS: tl.constexpr,
    ACTIVE: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """GROUPS of one: no groups. PAIRS: groups go by their best two and drop out, else by their best and count as 0."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    inside = experts < num_experts
    scores = _scores(tl.load(logits + token * logits_row + experts, mask=inside, other=float("-inf")), SCORING)
    choice = scores
    if BIASED:
        choice += tl.load(bias + experts, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(inside & (choice == choice), choice, EXCLUDED)
    if GROUPS > KEPT:
        kept = _kept_groups(choice, experts, num_experts // GROUPS, GROUPS, KEPT, PAIRS)
        if PAIRS:
            choice = tl.where(kept, choice, EXCLUDED)
        else:
            choice = tl.where(kept, choice, 0.0)
    choice = tl.where(inside, choice, float("-inf"))
    slots = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int64)
    shares = tl.zeros((SLOTS,), tl.float32)
    for slot in tl.static_range(ACTIVE):
        best = _first_best(choice, experts)
        shares = tl.where(slots == slot, tl.sum(tl.where(experts == best, scores, 0.0), 0), shares)
        chosen = tl.where(slots == slot, best.to(tl.int64), chosen)
        choice = tl.where(experts == best, float("-inf"), choice)
    if NORMALISED:
        shares = shares / (tl.sum(shares, 0) + 1e-20)
    tl.store(ids + token * ACTIVE + slots, chosen, mask=slots < ACTIVE)
    tl.store(weights + token * ACTIVE + slots, shares * scale, mask=slots < ACTIVE)
