// Linear maps: rows of activations by packed matrices, or by stacks of them, group by group; and by plain float32
// matrices. Every thread owns panels of the result. Included inside each level's namespace.
#pragma once

#include "registers.h"

// Rows of activations where the caller has them: row i of group g.
template <typename T>
struct Source {
    const T* data;
    int64_t inner, outer_stride, inner_stride, group_stride;

    const T* row(int64_t group, int64_t i) const {
        return data + group * group_stride + (i / inner) * outer_stride + (i % inner) * inner_stride;
    }
};

template <typename T>
struct Linear {
    Source<T> x;
    int64_t groups, rows, columns, features;
    const uint8_t* weights;
    const void* bias;
    bool narrow_bias;
    T* y;
    uint8_t* scratch;
    int64_t workers;

    F16 bias_of(int64_t panel) const {
        if (bias == nullptr) return F16{};
        const int64_t at = panel * PANEL;
        return narrow_bias ? load_part(static_cast<const bf16*>(bias) + at, features - at)
                           : load_part(static_cast<const float*>(bias) + at, features - at);
    }

    void put(int64_t group, int64_t row, int64_t panel, F16 value) const {
        const int64_t at = panel * PANEL;
        store_part(y + (row * groups + group) * features + at, value, features - at);
    }
};

// Up to so many bytes of prepared rows each thread prepares for itself, which costs less than to wait for others.
constexpr int64_t OWN_ROWS = 16 << 10;

template <Format F, typename T>
inline void linear_few(const Linear<T>& job, const Team& team) {
    const Rows<F> form(job.columns);
    const Matrix<F> first(job.weights, job.columns);
    const int64_t panels = ceiling(job.features, PANEL), count = job.groups * job.rows;
    // Numbers that lie as the products want them need no preparation.
    const bool ready = std::is_same_v<Activation<F>, T> && !whole<F> && job.columns % layout<F>.group == 0;
    alignas(64) uint8_t own[OWN_ROWS];
    const bool alone = count * form.bytes <= OWN_ROWS;
    uint8_t* prepared = alone ? own : job.scratch;
    if (!ready) {
        const Range mine = alone ? Range{0, count} : team.share(count);
        for (int64_t i = mine.begin; i < mine.end; ++i)
            prepare_row<F>(job.x.row(i / job.rows, i % job.rows), job.columns, form, prepared + i * form.bytes);
        if (!alone) team.sync();
    }
    const Range mine = team.share(job.groups * panels);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t group = item / panels, panel = item % panels;
        Matrix<F> matrix = first;
        matrix.data += group * panels * matrix.panel_bytes;
        const F16 bias = job.bias_of(panel);
        for (int64_t row = 0; row < job.rows; row += FEW) {
            const int64_t some = std::min<int64_t>(FEW, job.rows - row);
            const uint8_t* rows[FEW];
            for (int64_t n = 0; n < some; ++n)
                rows[n] = ready ? reinterpret_cast<const uint8_t*>(job.x.row(group, row + n))
                                : prepared + (group * job.rows + row + n) * form.bytes;
            F16 result[FEW];
            products<F>(matrix, panel, rows, some, result);
            for (int64_t n = 0; n < some; ++n) job.put(group, row + n, panel, result[n] + bias);
        }
    }
}

#if defined(__AVX512BF16__)

// One group's panels from `first` on, by all rows at x.
template <Format F, typename T>
inline void linear_panels(const Linear<T>& job, Tiles& tiles, const bf16* x, int64_t stride, int64_t group, Range mine,
                          bf16* scratch) {
    const int64_t panels = ceiling(job.features, PANEL), size = widened_columns<F>(job.columns) * PANEL;
    Matrix<F> matrix(job.weights, job.columns);
    matrix.data += group * panels * matrix.panel_bytes;
    const int64_t steps = ceiling(job.columns, STEP);
    const auto tile = [&](int64_t panel) {
        return F == Format::BF16 ? reinterpret_cast<const bf16*>(matrix.panel(panel).codes)
                                 : scratch + (panel - mine.begin) * size;
    };
    for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        widened<F>(matrix.panel(panel), job.columns, scratch + (panel - mine.begin) * size);
    for (int64_t row = 0; row < job.rows; row += BLOCK) {
        const int64_t some = std::min(BLOCK, job.rows - row);
        for (int64_t panel = mine.begin; panel < mine.end; panel += 2) {
            const bool two = panel + 1 < mine.end;
            alignas(64) float c[BLOCK][2 * PANEL];
            tiles.multiply(x + row * stride, stride, some, tile(panel), tile(panel + two), steps, c);
            for (int64_t p = 0; p <= two; ++p) {
                const F16 bias = job.bias_of(panel + p);
                for (int64_t n = 0; n < some; ++n) job.put(group, row + n, panel + p, load(c[n] + p * PANEL) + bias);
            }
        }
    }
}

template <Format F, typename T>
inline void linear_many(const Linear<T>& job, const Team& team) {
    const int64_t pairs = ceiling(ceiling(job.features, PANEL), 2), panels = ceiling(job.features, PANEL);
    const int64_t width = padded(job.columns, STEP), count = job.groups * job.rows;
    const bool ready = std::is_same_v<T, bf16> && width == job.columns && job.x.inner == 1;
    bf16* prepared = reinterpret_cast<bf16*>(job.scratch);
    const Range share = team.share(count);
    if (!ready) {
        for (int64_t i = share.begin; i < share.end; ++i) {
            const T* from = job.x.row(i / job.rows, i % job.rows);
            for (int64_t k = 0; k < width; k += 16)
                store(prepared + i * width + k, load_part(from + k, std::max<int64_t>(job.columns - k, 0)));
        }
        team.sync();
    }
    if (team.rank >= job.workers) return;
    const Team working{team.rank, static_cast<int>(std::min<int64_t>(team.size, job.workers)), team.barrier};
    const int64_t together = panels_at_once<F>(job.rows, job.columns);
    bf16* scratch = prepared + count * width;
    scratch += team.rank * together * widened_columns<F>(job.columns) * PANEL;
    Tiles tiles;
    const Range mine = working.share(job.groups * pairs);
    for (int64_t item = mine.begin; item < mine.end;) {
        const int64_t group = item / pairs, pair = item % pairs;
        const int64_t some = std::min({mine.end - item, pairs - pair, together / 2});
        const Range of{pair * 2, std::min((pair + some) * 2, panels)};
        if (ready)
            linear_panels<F>(job, tiles, reinterpret_cast<const bf16*>(job.x.row(group, 0)), job.x.outer_stride, group,
                             of, scratch);
        else
            linear_panels<F>(job, tiles, prepared + group * job.rows * width, width, group, of, scratch);
        item += some;
    }
}

#endif

template <Format F, typename T>
inline void linear_of(const Linear<T>& job, bool exact, const Team& team) {
#if defined(__AVX512BF16__)
    if (!exact && job.rows >= MANY<F> && has_amx()) return linear_many<F>(job, team);
#endif
    linear_few<F>(job, team);
}

template <typename T>
inline void linear_typed(const Word* a, const Team& team) {
    const Linear<T> job{{pointer<const T>(a[0]), a[4], a[5], a[6], a[7]},
                        a[2], a[3], a[8], a[11], pointer<const uint8_t>(a[9]),
                        pointer<const void>(a[12]), a[13] == BFLOAT16,
                        pointer<T>(a[14]), pointer<uint8_t>(a[15]), a[16]};
    const bool exact = a[17] != 0;
    switch (static_cast<Format>(a[10])) {
        case Format::BF16: return linear_of<Format::BF16>(job, exact, team);
        case Format::INT8: return linear_of<Format::INT8>(job, exact, team);
        case Format::INT4: return linear_of<Format::INT4>(job, exact, team);
        case Format::FP8: return linear_of<Format::FP8>(job, exact, team);
        case Format::FP4: return linear_of<Format::FP4>(job, exact, team);
    }
}

// x, x type, groups, rows, rows of the inner axis, outer stride, inner stride, group stride (elements), columns, packed
// stack of matrices, format, features, bias or null, bias type, y [rows, groups, features] in x's type, scratch,
// threads that it has room for, exact (the arithmetic of few rows for any number)
inline void packed_linear(const Word* a, const Team& team) {
    if (a[1] == BFLOAT16)
        linear_typed<bf16>(a, team);
    else
        linear_typed<float>(a, team);
}

// Features whose sums stay in registers beside those of four rows.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int FEATURES = 4;
#else
constexpr int FEATURES = 2;
#endif

inline Register take_part(const float* from, int64_t count) {
    if (count >= LANES) return take(from);
    Register value{};
    for (int64_t i = 0; i < count; ++i) value[i] = from[i];
    return value;
}

// `N` rows by four features: sums run along the columns, side by side.
template <int N>
inline void dense_block(const float* const* x, const float* weights, int64_t features, int64_t columns, float (*y)[4]) {
    for (int64_t first = 0; first < 4; first += FEATURES) {
        const float* w[FEATURES];
        for (int64_t f = 0; f < FEATURES; ++f) w[f] = weights + std::min(first + f, features - 1) * columns;
        Register sums[N][FEATURES] = {};
        for (int64_t k = 0; k < columns; k += LANES) {
            Register row[N];
            for (int n = 0; n < N; ++n) row[n] = take_part(x[n] + k, columns - k);
            for (int f = 0; f < FEATURES; ++f) {
                const Register weight = take_part(w[f] + k, columns - k);
                for (int n = 0; n < N; ++n) sums[n][f] += weight * row[n];
            }
        }
        for (int n = 0; n < N; ++n)
            for (int f = 0; f < FEATURES; ++f) y[n][first + f] = total(sums[n][f]);
    }
}

// x float32, rows, rows of the inner axis, outer stride, inner stride, columns, weights float32 [features, columns],
// features, bias or null, bias type, y float32 [rows, features]
inline void dense_linear(const Word* a, const Team& team) {
    const Source<float> x{pointer<const float>(a[0]), a[2], a[3], a[4], 0};
    const int64_t rows = a[1], columns = a[5], features = a[7];
    const float* weights = pointer<const float>(a[6]);
    float* y = pointer<float>(a[10]);
    const auto bias = [&](int64_t f) {
        if (a[8] == 0) return 0.0f;
        return a[9] == BFLOAT16 ? widen(pointer<const bf16>(a[8])[f]) : pointer<const float>(a[8])[f];
    };
    const Range mine = team.share(ceiling(features, 4));
    for (int64_t f = mine.begin * 4; f < std::min(mine.end * 4, features); f += 4) {
        const int64_t width = std::min<int64_t>(4, features - f);
        for (int64_t row = 0; row < rows;) {
            const float* from[4];
            const int64_t some = rows - row >= 4 ? 4 : 1;
            for (int64_t n = 0; n < some; ++n) from[n] = x.row(0, row + n);
            float result[4][4];
            if (some == 4)
                dense_block<4>(from, weights + f * columns, width, columns, result);
            else
                dense_block<1>(from, weights + f * columns, width, columns, result);
            for (int64_t n = 0; n < some; ++n)
                for (int64_t j = 0; j < width; ++j) y[(row + n) * features + f + j] = result[n][j] + bias(f + j);
            row += some;
        }
    }
}

#define DAEDAL_LINEAR_KERNELS {"packed_linear", packed_linear}, {"dense_linear", dense_linear},
