// Residual streams mixed before and after each block (mHC; V4, section 2.2), each side one kernel. Computes in float32.
//
// Collapsing has two phases: the products of each token's streams with the mixing rows, divided over rows and tokens so
// that one token keeps every thread busy; then the gates, and the weighted sum of the streams. Sixteen tokens share a
// vector in the turns that make the mixing matrix doubly stochastic. Included inside each level's namespace.
#pragma once

#include "registers.h"

#if defined(__AVX512F__)
constexpr int HYPER_BLOCK = 4;  // rows and tokens whose products share their loads
#else
constexpr int HYPER_BLOCK = 2;
#endif
constexpr int HYPER_COLUMNS = 512;  // columns that one thread takes at once
constexpr int HYPER_STREAMS = 8;    // the most streams that are supported

inline F16 sigmoid(F16 x) { return 1.0f / (1.0f + exponential(-x)); }

// products[t * width + r] = row r . token t, for ROWS rows and TOKENS tokens.
template <int ROWS, int TOKENS, typename T>
inline void hyper_products(const float* fn, const T* x, int64_t stride, int64_t dim, float* products, int64_t width) {
    Register sums[TOKENS][ROWS] = {};
    float rest[TOKENS][ROWS] = {};
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES) {
        Register row[ROWS];
        for (int r = 0; r < ROWS; ++r) row[r] = take(fn + r * dim + i);
        for (int t = 0; t < TOKENS; ++t) {
            const Register value = take(x + t * stride + i);
            for (int r = 0; r < ROWS; ++r) sums[t][r] += value * row[r];
        }
    }
    for (; i < dim; ++i)
        for (int t = 0; t < TOKENS; ++t)
            for (int r = 0; r < ROWS; ++r) rest[t][r] += load_one(x + t * stride + i) * fn[r * dim + i];
    for (int t = 0; t < TOKENS; ++t)
        for (int r = 0; r < ROWS; ++r) products[t * width + r] = total(sums[t][r]) + rest[t][r];
}

template <int TOKENS, typename T>
inline void hyper_rows(
    const float* fn, int64_t rows, const T* x, int64_t stride, int64_t dim, float* products, int64_t width) {
    if (rows == HYPER_BLOCK) {
        hyper_products<HYPER_BLOCK, TOKENS>(fn, x, stride, dim, products, width);
        return;
    }
    for (int64_t r = 0; r < rows; ++r) hyper_products<1, TOKENS>(fn + r * dim, x, stride, dim, products + r, width);
}

template <typename T>
inline float hyper_squares(const T* x, int64_t dim) {
    F16 squares[4] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + 64 <= dim; i += 64)
        for (int part = 0; part < 4; ++part) {
            const F16 value = load(x + i + 16 * part);
            squares[part] += value * value;
        }
    for (; i < dim; ++i) rest += load_one(x + i) * load_one(x + i);
    return sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest;
}

struct Hyper {
    const float *fn, *base, *scale;
    float* products;  // [T, rows + 1]: a token's products with the rows of fn, then the sum of its squares
    float *post, *comb;
    int64_t tokens, streams, dim, rows, iterations;
    float norm_eps, eps;

    int64_t width() const { return rows + 1; }
    float norm(int64_t token) const {
        const float mean = products[token * width() + rows] / static_cast<float>(streams * dim);
        return 1.0f / std::sqrt(mean + norm_eps);
    }
};

template <typename T>
inline void hyper_all_products(const Hyper& h, const T* x, int64_t stride, const Team& team) {
    const int64_t row_blocks = (h.rows + HYPER_BLOCK - 1) / HYPER_BLOCK + 1;
    const int64_t token_blocks = (h.tokens + HYPER_BLOCK - 1) / HYPER_BLOCK, dim = h.streams * h.dim;
    const Range mine = team.share(row_blocks * token_blocks);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t token = item / row_blocks * HYPER_BLOCK, row = item % row_blocks * HYPER_BLOCK;
        const int64_t tokens = std::min<int64_t>(HYPER_BLOCK, h.tokens - token);
        const T* from = x + token * stride;
        float* to = h.products + token * h.width();
        if (item % row_blocks == row_blocks - 1) {
            for (int64_t t = 0; t < tokens; ++t) to[t * h.width() + h.rows] = hyper_squares(from + t * stride, dim);
            continue;
        }
        const int64_t rows = std::min<int64_t>(HYPER_BLOCK, h.rows - row);
        const float* fn = h.fn + row * dim;
        if (tokens == HYPER_BLOCK) {
            hyper_rows<HYPER_BLOCK>(fn, rows, from, stride, dim, to + row, h.width());
            continue;
        }
        for (int64_t t = 0; t < tokens; ++t)
            hyper_rows<1>(fn, rows, from + t * stride, stride, dim, to + t * h.width() + row, h.width());
    }
}

// Divides by column sums and row sums in turn, columns first and last. FIXED: the number of streams, or 0 for any.
template <int FIXED>
inline void hyper_balance(F16* comb, int64_t streams, int64_t iterations, F16 eps) {
    const int64_t m = FIXED ? FIXED : streams;
    for (int64_t turn = 0; turn < 2 * iterations - 1; ++turn) {
        const int64_t along = turn % 2 ? 1 : m, across = turn % 2 ? m : 1;
        for (int64_t line = 0; line < m; ++line) {
            F16 total = eps;
            for (int64_t i = 0; i < m; ++i) total += comb[line * across + i * along];
            const F16 share = 1.0f / total;
            for (int64_t i = 0; i < m; ++i) comb[line * across + i * along] *= share;
        }
    }
}

// post and comb of up to sixteen tokens, one in each lane.
inline void hyper_gates(const Hyper& h, int64_t first) {
    const int64_t m = h.streams, count = std::min<int64_t>(16, h.tokens - first);
    F16 norm = fill(0.0f), comb[HYPER_STREAMS * HYPER_STREAMS];
    for (int64_t lane = 0; lane < count; ++lane) norm[lane] = h.norm(first + lane);
    const auto logit = [&](int64_t row, int part) {
        F16 value = fill(0.0f);
        for (int64_t lane = 0; lane < count; ++lane) value[lane] = h.products[(first + lane) * h.width() + row];
        return value * norm * h.scale[part] + h.base[row];
    };
    for (int64_t k = 0; k < m; ++k) {
        const F16 post = 2.0f * sigmoid(logit(m + k, 1));
        for (int64_t lane = 0; lane < count; ++lane) h.post[(first + lane) * m + k] = post[lane];
    }
    for (int64_t j = 0; j < m; ++j) {
        F16 *row = comb + j * m, peak = row[0] = logit(2 * m + j * m, 2), total = fill(0.0f);
        for (int64_t k = 1; k < m; ++k) peak = max(peak, row[k] = logit(2 * m + j * m + k, 2));
        for (int64_t k = 0; k < m; ++k) total += row[k] = exponential(row[k] - peak);
        for (int64_t k = 0; k < m; ++k) row[k] = row[k] / total + h.eps;
    }
    if (m == 4)
        hyper_balance<4>(comb, m, h.iterations, fill(h.eps));
    else
        hyper_balance<0>(comb, m, h.iterations, fill(h.eps));
    for (int64_t i = 0; i < m * m; ++i)
        for (int64_t lane = 0; lane < count; ++lane) h.comb[(first + lane) * m * m + i] = comb[i][lane];
}

// Columns begin to end of the block's input: the streams, weighted.
template <typename T>
inline void hyper_sum(const Hyper& h, int64_t token, const T* streams, T* x, int64_t begin, int64_t end) {
    F16 logits = fill(0.0f);
    const float norm = h.norm(token);
    for (int64_t k = 0; k < h.streams; ++k)
        logits[k] = h.products[token * h.width() + k] * norm * h.scale[0] + h.base[k];
    const F16 weights = sigmoid(logits) + h.eps;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
        F16 total = fill(0.0f);
        for (int64_t k = 0; k < h.streams; ++k) total += load(streams + k * h.dim + i) * weights[k];
        store(x + i, total);
    }
    for (; i < end; ++i) {
        float total = 0.0f;
        for (int64_t k = 0; k < h.streams; ++k) total += load_one(streams + k * h.dim + i) * weights[k];
        store_one(x + i, total);
    }
}

template <typename T>
inline void hyper_collapse_typed(const Hyper& h, const T* streams, int64_t stride, T* x, const Team& team) {
    hyper_all_products(h, streams, stride, team);
    team.sync();
    const int64_t gates = h.comb == nullptr ? 0 : (h.tokens + 15) / 16;
    const int64_t parts = (h.dim + HYPER_COLUMNS - 1) / HYPER_COLUMNS;
    const Range mine = team.share(gates + h.tokens * parts);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
        if (item < gates) {
            hyper_gates(h, item * 16);
            continue;
        }
        const int64_t token = (item - gates) / parts, begin = (item - gates) % parts * HYPER_COLUMNS;
        const int64_t end = std::min(begin + HYPER_COLUMNS, h.dim);
        hyper_sum(h, token, streams + token * stride, x + token * h.dim, begin, end);
    }
}

// streams, token stride (elements), type, fn, base, scale, scratch [T, rows + 1] float32, x, post or null, comb or
// null, tokens, streams, dim, rows of fn, iterations, norm eps, eps. Without post and comb fn has
// only the input's rows.
inline void hyper_collapse(const Word* a, const Team& team) {
    const Hyper h{pointer<const float>(a[3]), pointer<const float>(a[4]), pointer<const float>(a[5]),
                  pointer<float>(a[6]),       pointer<float>(a[8]),       pointer<float>(a[9]),
                  a[10],                      a[11],                      a[12],
                  a[13],                      a[14],                      real(a[15]),
                  real(a[16])};
    if (a[2] == BFLOAT16)
        hyper_collapse_typed(h, pointer<const bf16>(a[0]), a[1], pointer<bf16>(a[7]), team);
    else
        hyper_collapse_typed(h, pointer<const float>(a[0]), a[1], pointer<float>(a[7]), team);
}

// Columns begin to end of all streams of a token after a block. FIXED: the number of streams, or 0 for any.
template <int FIXED, typename T>
inline void hyper_mix(const T* y, const T* before, const float* post, const float* comb, T* after, int64_t streams,
                      int64_t dim, int64_t begin, int64_t end) {
    const int64_t m = FIXED ? FIXED : streams;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
        F16 old[FIXED ? FIXED : HYPER_STREAMS];
        for (int64_t j = 0; j < m; ++j) old[j] = load(before + j * dim + i);
        const F16 added = load(y + i);
        for (int64_t k = 0; k < m; ++k) {
            F16 total = added * post[k];
            for (int64_t j = 0; j < m; ++j) total += old[j] * comb[j * m + k];
            store(after + k * dim + i, total);
        }
    }
    for (; i < end; ++i)
        for (int64_t k = 0; k < m; ++k) {
            float total = load_one(y + i) * post[k];
            for (int64_t j = 0; j < m; ++j) total += load_one(before + j * dim + i) * comb[j * m + k];
            store_one(after + k * dim + i, total);
        }
}

// y, y stride, streams, token stride, type, post, comb, result (contiguous), tokens, streams, dim
inline void hyper_expand(const Word* a, const Team& team) {
    const int64_t m = a[9], dim = a[10], parts = (dim + HYPER_COLUMNS - 1) / HYPER_COLUMNS;
    const Range mine = team.share(a[8] * parts);
    const auto typed = [&](auto* y, auto* before, auto* after) {
        for (int64_t item = mine.begin; item < mine.end; ++item) {
            const int64_t token = item / parts, begin = item % parts * HYPER_COLUMNS;
            const int64_t end = std::min(begin + HYPER_COLUMNS, dim);
            const auto mix = m == 4 ? hyper_mix<4, std::decay_t<decltype(*after)>>
                                    : hyper_mix<0, std::decay_t<decltype(*after)>>;
            mix(y + token * a[1], before + token * a[3], pointer<const float>(a[5]) + token * m,
                pointer<const float>(a[6]) + token * m * m, after + token * m * dim, m, dim, begin, end);
        }
    };
    if (a[4] == BFLOAT16)
        typed(pointer<const bf16>(a[0]), pointer<const bf16>(a[2]), pointer<bf16>(a[7]));
    else
        typed(pointer<const float>(a[0]), pointer<const float>(a[2]), pointer<float>(a[7]));
}

#define DAEDAL_HYPER_KERNELS {"hyper_collapse", hyper_collapse}, {"hyper_expand", hyper_expand},
