// Routed experts in one kernel: gate and up, the gated unit, down, and the weighted sum, every chosen expert read once.
// Pairs of a token and an expert are ordered by expert, then by token and place, so that sums have one order whoever
// computes them. Few pairs take the arithmetic of `matvec.h`, many that of `matmul.h`. Included inside each level's
// namespace.
#pragma once

template <typename T>
struct Experts {
    const T* x;
    int64_t stride, tokens, columns;
    const int64_t* ids;
    int64_t active;
    const float* shares;
    const uint8_t *gate_up, *down;
    int64_t experts, width;  // width: of one expert, a multiple of PANEL
    float limit;
    T* y;
    int64_t workers;

    int64_t pairs() const { return tokens * active; }
    int64_t token(int32_t pair) const { return pair / active; }

    template <Format F>
    Matrix<F> gate_up_of(int64_t expert) const {
        Matrix<F> matrix(gate_up, columns);
        matrix.data += expert * (2 * width / PANEL) * matrix.panel_bytes;
        return matrix;
    }

    template <Format F>
    Matrix<F> down_of(int64_t expert) const {
        Matrix<F> matrix(down, width);
        matrix.data += expert * ceiling(columns, PANEL) * matrix.panel_bytes;
        return matrix;
    }
};

// Scratch, cut into pieces.
class Pieces {
  public:
    explicit Pieces(uint8_t* at) : at_(at) {}

    template <typename T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(at_);
        at_ += padded(count * sizeof(T), 64);
        return piece;
    }

  private:
    uint8_t* at_;
};

// Which experts have pairs, and which pairs: those of chosen[i] are order[begins[i]] up to order[begins[i + 1]].
struct Plan {
    int32_t *count, *chosen, *begins, *order;

    Plan(Pieces& pieces, int64_t experts, int64_t pairs)
        : count(pieces.take<int32_t>(1)),
          chosen(pieces.take<int32_t>(experts + 1)),
          begins(pieces.take<int32_t>(experts + 1)),
          order(pieces.take<int32_t>(pairs)) {}

    // By counting. `begins` first holds, for each expert, where its next pair goes.
    void make(const int64_t* ids, int64_t experts, int64_t pairs) {
        int32_t* next = begins;
        std::fill(next, next + experts + 1, 0);
        for (int64_t i = 0; i < pairs; ++i) ++next[ids[i]];
        int32_t used = 0, at = 0;
        for (int64_t expert = 0; expert < experts; ++expert) {
            if (next[expert] > 0) chosen[used++] = static_cast<int32_t>(expert);
            at += std::exchange(next[expert], at);
        }
        for (int64_t i = 0; i < pairs; ++i) order[next[ids[i]]++] = static_cast<int32_t>(i);
        // Each place is now the end of its expert's pairs. Those of the chosen move forward, over places already read.
        at = 0;
        for (int32_t i = 0; i < used; ++i) {
            const int32_t end = next[chosen[i]];
            begins[i] = at;
            at = end;
        }
        begins[used] = at;
        *count = used;
    }

    Range of(int32_t i) const { return {begins[i], begins[i + 1]}; }
};

inline F16 gated(F16 gate, F16 up, float limit) {
    // The limit comes first in each comparison, so that NaN passes.
    const F16 most = fill(limit);
    return silu(min(most, gate)) * max(-most, min(most, up));
}

// Weighs the products of panel `panel` for one pair into the token's sum.
template <typename T>
inline void add(const Experts<T>& job, float* sums, int32_t pair, int64_t panel, F16 value) {
    float* at = sums + job.token(pair) * padded(job.columns, PANEL) + panel * PANEL;
    store(at, load(at) + value * job.shares[pair]);
}

// Sums of panels `mine` of all tokens, before the first expert and after the last.
template <typename T>
inline void clear(const Experts<T>& job, float* sums, Range mine) {
    const int64_t width = padded(job.columns, PANEL);
    for (int64_t token = 0; token < job.tokens; ++token)
        std::fill(sums + token * width + mine.begin * PANEL, sums + token * width + mine.end * PANEL, 0.0f);
}

template <typename T>
inline void finish(const Experts<T>& job, const float* sums, Range mine) {
    const int64_t width = padded(job.columns, PANEL);
    for (int64_t token = 0; token < job.tokens; ++token)
        for (int64_t panel = mine.begin; panel < mine.end; ++panel)
            store_part(job.y + token * job.columns + panel * PANEL, load(sums + token * width + panel * PANEL),
                       job.columns - panel * PANEL);
}

// Columns of the hidden row that one thread makes at a time: a group of the format, so that it can round them too.
template <Format F>
constexpr int64_t HIDDEN = whole<F> ? layout<F>.group : 32;

// Part `part` of the hidden rows of one expert's pairs.
template <Format F, typename T>
inline void hidden_few(const Experts<T>& job, const Plan& plan, int32_t chosen, int64_t part, const Rows<F>& x_form,
                       const uint8_t* x, const Rows<F>& h_form, uint8_t* hidden) {
    const Matrix<F> matrix = job.template gate_up_of<F>(plan.chosen[chosen]);
    const int64_t panels = job.width / PANEL, begin = part * HIDDEN<F>, end = std::min(begin + HIDDEN<F>, job.width);
    const bool last = end == job.width;
    const Range of = plan.of(chosen);
    for (int64_t i = of.begin; i < of.end; i += FEW) {
        const int64_t some = std::min<int64_t>(FEW, of.end - i);
        const uint8_t* rows[FEW];
        for (int64_t n = 0; n < some; ++n) rows[n] = x + job.token(plan.order[i + n]) * x_form.bytes;
        alignas(64) float h[FEW][HIDDEN<F>];
        for (int64_t column = begin; column < end; column += PANEL) {
            F16 gate[FEW], up[FEW];
            products<F>(matrix, column / PANEL, rows, some, gate);
            products<F>(matrix, panels + column / PANEL, rows, some, up);
            for (int64_t n = 0; n < some; ++n) store(h[n] + column - begin, gated(gate[n], up[n], job.limit));
        }
        for (int64_t n = 0; n < some; ++n)
            prepare_columns<F>(h[n], end - begin, h_form, hidden + (i + n) * h_form.bytes, begin,
                               last ? h_form.columns - begin : HIDDEN<F>);
    }
}

template <Format F, typename T>
inline void experts_few(const Experts<T>& job, Pieces pieces, const Team& team) {
    const Rows<F> x_form(job.columns), h_form(job.width);
    Plan plan(pieces, job.experts, job.pairs());
    uint8_t* x = pieces.take<uint8_t>(job.tokens * x_form.bytes);
    uint8_t* hidden = pieces.take<uint8_t>(job.pairs() * h_form.bytes);
    float* sums = pieces.take<float>(job.tokens * padded(job.columns, PANEL));
    if (team.rank == 0) plan.make(job.ids, job.experts, job.pairs());
    const Range tokens = team.share(job.tokens);
    for (int64_t token = tokens.end - 1; token >= tokens.begin; --token)
        prepare_row<F>(job.x + token * job.stride, job.columns, x_form, x + token * x_form.bytes);
    team.sync();
    const int64_t parts = ceiling(job.width, HIDDEN<F>);
    const Range items = team.share(*plan.count * parts);
    for (int64_t item = items.begin; item < items.end; ++item)
        hidden_few<F>(job, plan, static_cast<int32_t>(item / parts), item % parts, x_form, x, h_form, hidden);
    const Range mine = team.share(ceiling(job.columns, PANEL));
    clear(job, sums, mine);
    team.sync();
    for (int32_t chosen = 0; chosen < *plan.count; ++chosen) {
        const Matrix<F> matrix = job.template down_of<F>(plan.chosen[chosen]);
        const Range of = plan.of(chosen);
        for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
            for (int64_t i = of.begin; i < of.end; i += FEW) {
                const int64_t some = std::min<int64_t>(FEW, of.end - i);
                const uint8_t* rows[FEW];
                for (int64_t n = 0; n < some; ++n) rows[n] = hidden + (i + n) * h_form.bytes;
                F16 result[FEW];
                products<F>(matrix, panel, rows, some, result);
                for (int64_t n = 0; n < some; ++n) add(job, sums, plan.order[i + n], panel, result[n]);
            }
        }
    }
    finish(job, sums, mine);
}

#if defined(__AVX512BF16__)

// Panel `panel` of the hidden rows of one expert's pairs; rows are padded to whole tiles.
template <Format F, typename T>
inline void hidden_many(const Experts<T>& job, const Plan& plan, int32_t chosen, int64_t panel, Tiles& tiles,
                        const bf16* x, bf16* hidden, bf16* scratch) {
    const Matrix<F> matrix = job.template gate_up_of<F>(plan.chosen[chosen]);
    const int64_t panels = job.width / PANEL, x_width = padded(job.columns, STEP), h_width = padded(job.width, STEP);
    const bf16* gate = widened<F>(matrix.panel(panel), job.columns, scratch);
    const bf16* up = widened<F>(matrix.panel(panels + panel), job.columns,
                                scratch + widened_columns<F>(job.columns) * PANEL);
    const Range of = plan.of(chosen);
    for (int64_t i = of.begin; i < of.end; i += BLOCK) {
        const int64_t some = std::min(BLOCK, of.end - i);
        alignas(64) float c[BLOCK][2 * PANEL];
        tiles.multiply(x + i * x_width, x_width, some, gate, up, x_width / STEP, c);
        for (int64_t n = 0; n < some; ++n) {
            bf16* to = hidden + (i + n) * h_width + panel * PANEL;
            store(to, gated(load(c[n]), load(c[n] + PANEL), job.limit));
            if (panel == panels - 1 && h_width > job.width) store(to + PANEL, F16{});
        }
    }
}

// Two panels of the result, or one, of one expert's pairs.
template <Format F, typename T>
inline void down_many(const Experts<T>& job, const Plan& plan, int32_t chosen, Range two, Tiles& tiles,
                      const bf16* hidden, bf16* scratch, float* sums) {
    const Matrix<F> matrix = job.template down_of<F>(plan.chosen[chosen]);
    const int64_t h_width = padded(job.width, STEP);
    const bf16* tile[2];
    for (int64_t p = 0; p < 2; ++p)
        tile[p] = two.begin + p < two.end ? widened<F>(matrix.panel(two.begin + p), job.width,
                                                       scratch + p * widened_columns<F>(job.width) * PANEL)
                                          : tile[0];
    const Range of = plan.of(chosen);
    for (int64_t i = of.begin; i < of.end; i += BLOCK) {
        const int64_t some = std::min(BLOCK, of.end - i);
        alignas(64) float c[BLOCK][2 * PANEL];
        tiles.multiply(hidden + i * h_width, h_width, some, tile[0], tile[1], h_width / STEP, c);
        for (int64_t n = 0; n < some; ++n)
            for (int64_t panel = two.begin; panel < two.end; ++panel)
                add(job, sums, plan.order[i + n], panel, load(c[n] + (panel - two.begin) * PANEL));
    }
}

template <Format F, typename T>
inline void experts_many(const Experts<T>& job, Pieces pieces, const Team& team) {
    const int64_t pairs = job.pairs(), x_width = padded(job.columns, STEP);
    Plan plan(pieces, job.experts, pairs);
    bf16* x = pieces.take<bf16>(pairs * x_width);
    bf16* hidden = pieces.take<bf16>(pairs * padded(job.width, STEP));
    float* sums = pieces.take<float>(job.tokens * padded(job.columns, PANEL));
    const int64_t size = 2 * PANEL * std::max(widened_columns<F>(job.columns), widened_columns<F>(job.width));
    bf16* scratch = pieces.take<bf16>(F == Format::BF16 ? 0 : size * job.workers) + team.rank * size;
    if (team.rank == 0) plan.make(job.ids, job.experts, pairs);
    team.sync();
    const Range gathered = team.share(pairs);
    for (int64_t i = gathered.begin; i < gathered.end; ++i) {
        const T* from = job.x + job.token(plan.order[i]) * job.stride;
        for (int64_t k = 0; k < x_width; k += 16)
            store(x + i * x_width + k, load_part(from + k, std::max<int64_t>(job.columns - k, 0)));
    }
    // Only so many threads have scratch; the others have nothing to share out, but must come to each barrier.
    const bool works = team.rank < job.workers;
    const Team working{team.rank, static_cast<int>(std::min<int64_t>(team.size, job.workers)), team.barrier};
    const int64_t parts = job.width / PANEL;
    const Range items = works ? working.share(*plan.count * parts) : Range{0, 0};
    const int64_t panels = ceiling(job.columns, PANEL);
    const Range twos = works ? working.share(ceiling(panels, 2)) : Range{0, 0};
    const Range mine{2 * twos.begin, std::min(2 * twos.end, panels)};
    Tiles tiles;
    clear(job, sums, mine);
    team.sync();
    for (int64_t item = items.begin; item < items.end; ++item)
        hidden_many<F>(job, plan, static_cast<int32_t>(item / parts), item % parts, tiles, x, hidden, scratch);
    team.sync();
    for (int32_t chosen = 0; chosen < *plan.count; ++chosen)
        for (int64_t panel = mine.begin; panel < mine.end; panel += 2)
            down_many<F>(job, plan, chosen, {panel, std::min(panel + 2, mine.end)}, tiles, hidden, scratch, sums);
    finish(job, sums, mine);
}

#endif

template <Format F, typename T>
inline void experts_of(const Experts<T>& job, uint8_t* scratch, bool exact, const Team& team) {
#if defined(__AVX512BF16__)
    // On average over all experts: a step's shape decides, never its ids.
    if (!exact && job.pairs() >= MANY<F> * job.experts && has_amx())
        return experts_many<F>(job, Pieces(scratch), team);
#endif
    experts_few<F>(job, Pieces(scratch), team);
}

template <typename T>
inline void experts_typed(const Word* a, const Team& team) {
    const Experts<T> job{pointer<const T>(a[0]), a[2], a[3], a[4], pointer<const int64_t>(a[5]), a[6],
                         pointer<const float>(a[7]), pointer<const uint8_t>(a[8]), pointer<const uint8_t>(a[9]),
                         a[11], a[12], real(a[13]), pointer<T>(a[14]), a[16]};
    uint8_t* scratch = pointer<uint8_t>(a[15]);
    const bool exact = a[17] != 0;
    switch (static_cast<Format>(a[10])) {
        case Format::BF16: return experts_of<Format::BF16>(job, scratch, exact, team);
        case Format::INT8: return experts_of<Format::INT8>(job, scratch, exact, team);
        case Format::INT4: return experts_of<Format::INT4>(job, scratch, exact, team);
        case Format::FP8: return experts_of<Format::FP8>(job, scratch, exact, team);
        case Format::FP4: return experts_of<Format::FP4>(job, scratch, exact, team);
    }
}

// x, x type, x row stride (elements), tokens, columns, ids int64 [tokens, active], active, weights float32 [tokens,
// active], packed gate and up [experts, 2 width, columns], packed down [experts, columns, width], format of both,
// experts, width, limit, y [tokens, columns] in x's type, scratch, threads that it has room for, exact
inline void packed_experts(const Word* a, const Team& team) {
    if (a[1] == BFLOAT16)
        experts_typed<bf16>(a, team);
    else
        experts_typed<float>(a, team);
}

#define DAEDAL_EXPERTS_KERNELS {"packed_experts", packed_experts},
