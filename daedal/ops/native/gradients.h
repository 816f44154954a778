// What training does with rows on a CPU: gradients of norms and of gated units, the softmax of causal attention with its
// gradient, experts' rows back to their tokens, and what a loss leaves of logits. Each reads its operands once and
// writes its result once, where a chain of elementwise kernels goes over memory four to eight times. All compute in
// float32. Sums over rows go block by block of rows, so that no result depends on the number of threads. Included inside
// each level's namespace.
#pragma once

constexpr int64_t ROW_BLOCKS = 64;  // as `gradients.py` knows

// Calls visit(first column, columns) for each vector of a row.
template <typename F>
inline void each_vector(int64_t dim, const F& visit) {
    for (int64_t i = 0; i < dim; i += 16) visit(i, std::min<int64_t>(16, dim - i));
}

// y = x w / r with r = sqrt(mean(x^2) + eps): grad x = (p w - n mean(p w n)) / r, where n = x / r and p is the
// gradient of y; to `sums` is added p n, the row's part of w's gradient.
template <typename T, typename W>
inline void norm_gradient_row(const T* x, const W* weight, const T* push, T* grad, float* sums, int64_t dim, float eps) {
    F16 squares{}, along{};
    each_vector(dim, [&](int64_t i, int64_t some) {
        const F16 value = load_part(x + i, some);
        squares += value * value;
        along += load_part(push + i, some) * load_part(weight + i, some) * value;
    });
    const float size = static_cast<float>(dim), inverse = 1.0f / std::sqrt(sum(squares) / size + eps);
    const float share = sum(along) * inverse / size;
    each_vector(dim, [&](int64_t i, int64_t some) {
        const F16 normed = load_part(x + i, some) * inverse, p = load_part(push + i, some);
        store_part(grad + i, (p * load_part(weight + i, some) - normed * share) * inverse, some);
        store_part(sums + i, load_part(sums + i, some) + p * normed, some);
    });
}

template <typename T, typename W>
inline void norm_gradients_typed(const Word* a, const Team& team) {
    const int64_t rows = a[6], dim = a[7], blocks = std::min(ROW_BLOCKS, rows);
    float *sums = pointer<float>(a[9]), *total = pointer<float>(a[10]);
    const Range mine = team.share(blocks);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
        float* part = sums + block * dim;
        std::fill(part, part + dim, 0.0f);
        for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row)
            norm_gradient_row(pointer<const T>(a[0]) + row * a[1], pointer<const W>(a[3]),
                              pointer<const T>(a[4]) + row * dim, pointer<T>(a[5]) + row * dim, part, dim, real(a[8]));
    }
    team.sync();
    const Range columns = team.share(dim);
    for (int64_t i = columns.begin; i < columns.end; ++i) {
        float found = 0.0f;
        for (int64_t block = 0; block < blocks; ++block) found += sums[block * dim + i];
        total[i] = found;
    }
}

// x, its row stride, type of x and both gradients, weight (float32 or bfloat16), gradient of y, of x (both contiguous),
// rows, dim, eps, scratch float32 [min(64, rows), dim], gradient of the weight float32 [dim], type of the weight
inline void norm_gradients(const Word* a, const Team& team) {
    if (a[2] == BFLOAT16 && a[11] == BFLOAT16) return norm_gradients_typed<bf16, bf16>(a, team);
    if (a[2] == BFLOAT16) return norm_gradients_typed<bf16, float>(a, team);
    if (a[11] == BFLOAT16) return norm_gradients_typed<float, bf16>(a, team);
    norm_gradients_typed<float, float>(a, team);
}

template <typename T>
inline void gate_gradient_row(const T* gate, const T* up, const T* push, T* grad_gate, T* grad_up, int64_t dim,
                              float limit) {
    // The limit comes first in each comparison, so that NaN passes.
    const F16 most = fill(limit), none{};
    each_vector(dim, [&](int64_t i, int64_t some) {
        const F16 given = load_part(gate + i, some), raised = load_part(up + i, some), p = load_part(push + i, some);
        const F16 g = min(most, given), u = max(-most, min(most, raised));
        const F16 opened = 1.0f / (1.0f + exponential(-g)), slope = opened * (1.0f + g * (1.0f - opened));
        store_part(grad_gate + i, given > most ? none : p * u * slope, some);
        store_part(grad_up + i, (raised > most) | (raised < -most) ? none : p * g * opened, some);
    });
}

// gate, its row stride, up, its row stride, type of all, gradient of y, of gate, of up (contiguous), rows, dim, limit
inline void swiglu_gradients(const Word* a, const Team& team) {
    const Range mine = team.share(a[8]);
    const int64_t dim = a[9];
    const auto typed = [&](auto* gate, auto* up, auto* push, auto* grad_gate, auto* grad_up) {
        for (int64_t row = mine.begin; row < mine.end; ++row)
            gate_gradient_row(gate + row * a[1], up + row * a[3], push + row * dim, grad_gate + row * dim,
                              grad_up + row * dim, dim, real(a[10]));
    };
    if (a[4] == BFLOAT16)
        typed(pointer<const bf16>(a[0]), pointer<const bf16>(a[2]), pointer<const bf16>(a[5]), pointer<bf16>(a[6]),
              pointer<bf16>(a[7]));
    else
        typed(pointer<const float>(a[0]), pointer<const float>(a[2]), pointer<const float>(a[5]), pointer<float>(a[6]),
              pointer<float>(a[7]));
}

// The largest of `count` numbers; `exponentials` overwrites them by e^((x - peak) scale) and gives their sum, which is
// NaN where one of them is.
inline float peak_of_row(const float* row, int64_t count) {
    F16 best = fill(-std::numeric_limits<float>::infinity());
    float rest = best[0];
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) best = max(best, load(row + i));
    for (; i < count; ++i) rest = std::max(rest, row[i]);
    return std::max(rest, largest(best));
}

inline float exponentials(float* row, int64_t count, float peak, float scale) {
    F16 total{};
    each_vector(count, [&](int64_t i, int64_t some) {
        const F16 x = (load_part(row + i, some) - peak) * scale;
        F16 value = x == x ? exponential(x) : x;
        for (int64_t lane = some; lane < 16; ++lane) value[lane] = 0.0f;
        total += value;
        store_part(row + i, value, some);
    });
    return sum(total);
}

// Rows of a square of products: row i of left by rows 0 to i of right, for sequences of one length, 16 rows at a time.
struct CausalProducts {
    const bf16 *left, *right;
    int64_t count, length, dim;  // length at most LENGTH, dim at most DIM and a multiple of 32

    static constexpr int64_t LENGTH = 512, DIM = 512;

    // Calls visit(row of all, how many products, the products, which it may overwrite).
    template <typename Visit>
    void each(const Team& team, const Visit& visit) const {
        const int64_t blocks = ceiling(length, 16);
        const Range mine = team.share(count * blocks);
        alignas(64) float rows[16][LENGTH];
        Engine::begin();
        for (int64_t item = mine.begin; item < mine.end; ++item) {
            const int64_t first = item / blocks * length, from = item % blocks * 16;
            const int64_t some = std::min<int64_t>(16, length - from);
            block(left + (first + from) * dim, right + first * dim, some, from + some, rows);
            for (int64_t i = 0; i < some; ++i) visit(first + from + i, from + i + 1, rows[i]);
        }
        Engine::end();
    }

#if defined(__AVX512BF16__)
    using Engine = DotEngine;

    // `some` rows at `queries` by `seen` rows at `keys`.
    void block(const bf16* queries, const bf16* keys, int64_t some, int64_t seen, float (*rows)[LENGTH]) const {
        alignas(64) bf16 packed[16 * DIM], last[32 * DIM];
        alignas(64) float products[16 * LENGTH];
        const void* given[16];
        for (int64_t i = 0; i < some; ++i) given[i] = queries + i * dim;
        Engine::pack_queries(given, static_cast<int>(some), dim, BFLOAT16, packed);
        const bf16* tiles[LENGTH / 16];
        int64_t strides[LENGTH / 16];
        const int64_t padded_keys = padded(seen, 32), whole_keys = seen / 16 * 16;
        for (int64_t s = 0; s < padded_keys; s += 16) {
            tiles[s / 16] = s < whole_keys ? keys + s * dim : last + (s - whole_keys) * dim;
            strides[s / 16] = dim * 2;
        }
        std::memcpy(last, keys + whole_keys * dim, (seen - whole_keys) * dim * 2);
        std::memset(last + (seen - whole_keys) * dim, 0, (padded_keys - seen) * dim * 2);
        Engine::scores(tiles, strides, static_cast<int>(padded_keys / 16), packed, dim, products);
        for (int64_t s = 0; s < seen; s += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(products + (s + i) * 16);
            Engine::transpose(r);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(rows[i] + s, r[i]);
        }
    }
#else
    using Engine = WideEngine;

    void block(const bf16* queries, const bf16* keys, int64_t some, int64_t seen, float (*rows)[LENGTH]) const {
        for (int64_t i = 0; i < some; ++i) {
            for (int64_t s = 0; s < seen; ++s) {
                F16 total{};
                for (int64_t k = 0; k < dim; k += 16) total += load(queries + i * dim + k) * load(keys + s * dim + k);
                rows[i][s] = sum(total);
            }
        }
    }
#endif
};

// queries bfloat16 [N, t, K], keys the same, shares bfloat16 [N, t, t], N, t, K, scale: row i is the softmax of the
// query's products with its first i + 1 keys, times scale, and 0 behind them
inline void causal_shares(const Word* a, const Team& team) {
    const int64_t length = a[4];
    const CausalProducts products{pointer<const bf16>(a[0]), pointer<const bf16>(a[1]), a[3], length, a[5]};
    products.each(team, [&](int64_t row, int64_t seen, float* scores) {
        bf16* shares = pointer<bf16>(a[2]) + row * length;
        const float inverse = 1.0f / exponentials(scores, seen, peak_of_row(scores, seen), real(a[6]));
        each_vector(seen, [&](int64_t i, int64_t some) {
            store_part(shares + i, load_part(scores + i, some) * inverse, some);
        });
        std::fill(shares + seen, shares + length, bf16{0});
    });
}

// gradients of the results bfloat16 [N, t, V], values the same, shares bfloat16 [N, t, t], gradients of the products
// bfloat16 [N, t, t], N, t, V, scale
inline void causal_gradients(const Word* a, const Team& team) {
    const int64_t length = a[5];
    const float scale = real(a[7]);
    const CausalProducts products{pointer<const bf16>(a[0]), pointer<const bf16>(a[1]), a[4], length, a[6]};
    products.each(team, [&](int64_t row, int64_t seen, const float* push) {
        const bf16* shares = pointer<const bf16>(a[2]) + row * length;
        bf16* grad = pointer<bf16>(a[3]) + row * length;
        F16 along{};
        each_vector(seen, [&](int64_t i, int64_t some) {
            along += load_part(push + i, some) * load_part(shares + i, some);
        });
        const float mean = sum(along);
        each_vector(seen, [&](int64_t i, int64_t some) {
            store_part(grad + i, (load_part(push + i, some) - mean) * load_part(shares + i, some) * scale, some);
        });
        std::fill(grad + seen, grad + length, bf16{0});
    });
}

// logits float32 [t, V] (overwritten), targets int64 [t], -log p(target) float32 [t], t, V, probabilities less one at the
// targets [t, V] (may be the logits' memory), their type
inline void target_surplus(const Word* a, const Team& team) {
    const int64_t width = a[4];
    const Range mine = team.share(a[3]);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        float* logits = pointer<float>(a[0]) + row * width;
        char* surplus = pointer<char>(a[5]) + row * width * type_bytes(a[6]);
        const int64_t target = pointer<const int64_t>(a[1])[row];
        const float wanted = logits[target], peak = peak_of_row(logits, width);
        const float total = exponentials(logits, width, peak, 1.0f), inverse = 1.0f / total;
        const float least = logits[target] * inverse - 1.0f;
        const auto typed = [&](auto* to) {
            each_vector(width, [&](int64_t i, int64_t some) {
                store_part(to + i, load_part(logits + i, some) * inverse, some);
            });
            store_one(to + target, least);
        };
        if (a[6] == BFLOAT16)
            typed(reinterpret_cast<bf16*>(surplus));
        else
            typed(reinterpret_cast<float*>(surplus));
        pointer<float>(a[2])[row] = peak - wanted + std::log(total);
    }
}

// y[t] = sum over a of weights[t, a] times rows[places[t, a]], without weights their sum. rows, type, places int64
// [T, A], weights float32 [T, A] or null, y [T, D], T, A, D
inline void combine_rows(const Word* a, const Team& team) {
    const int64_t choices = a[6], dim = a[7];
    const int64_t* places = pointer<const int64_t>(a[2]);
    const float* weights = pointer<const float>(a[3]);
    const Range mine = team.share(a[5]);
    const auto typed = [&](auto* rows, auto* y) {
        for (int64_t token = mine.begin; token < mine.end; ++token) {
            each_vector(dim, [&](int64_t i, int64_t some) {
                F16 total{};
                for (int64_t n = token * choices; n < (token + 1) * choices; ++n) {
                    const F16 value = load_part(rows + places[n] * dim + i, some);
                    total += weights == nullptr ? value : value * weights[n];
                }
                store_part(y + token * dim + i, total, some);
            });
        }
    };
    if (a[1] == BFLOAT16)
        typed(pointer<const bf16>(a[0]), pointer<bf16>(a[4]));
    else
        typed(pointer<const float>(a[0]), pointer<float>(a[4]));
}

// rows, type, places int64 [T, A], weights float32 [T, A], gradient of y [T, D], of the rows (those without a place stay
// as they are), of the weights float32 [T, A], T, A, D
inline void combine_gradients(const Word* a, const Team& team) {
    const int64_t choices = a[8], dim = a[9];
    const int64_t* places = pointer<const int64_t>(a[2]);
    const float* weights = pointer<const float>(a[3]);
    const Range mine = team.share(a[7]);
    const auto typed = [&](auto* rows, auto* push, auto* grad) {
        for (int64_t n = mine.begin * choices; n < mine.end * choices; ++n) {
            const auto* p = push + n / choices * dim;
            F16 along{};
            each_vector(dim, [&](int64_t i, int64_t some) {
                const F16 value = load_part(p + i, some);
                along += value * load_part(rows + places[n] * dim + i, some);
                store_part(grad + places[n] * dim + i, value * weights[n], some);
            });
            pointer<float>(a[6])[n] = sum(along);
        }
    };
    if (a[1] == BFLOAT16)
        typed(pointer<const bf16>(a[0]), pointer<const bf16>(a[4]), pointer<bf16>(a[5]));
    else
        typed(pointer<const float>(a[0]), pointer<const float>(a[4]), pointer<float>(a[5]));
}

#define DAEDAL_GRADIENTS_KERNELS                                                       \
    {"norm_gradients", norm_gradients}, {"swiglu_gradients", swiglu_gradients},        \
        {"causal_shares", causal_shares}, {"causal_gradients", causal_gradients}, {"target_surplus", target_surplus}, \
        {"combine_rows", combine_rows}, {"combine_gradients", combine_gradients},
