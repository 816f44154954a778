// Attention's arithmetic in float32 vectors, for every CPU and for float32 tensors. Keys, queries and values of a block
// are widened once into scratch; queries are lanes in the scores, value columns in the weighted sums.
//
// Knows blocks of keys and tiles of queries; not sequences, pages or threads.
#pragma once

struct WideEngine {
#if defined(__AVX512F__)
    static constexpr int KEYS = 8;
#else
    static constexpr int KEYS = 4;
#endif
    static constexpr int COLUMNS = 32;
    using Number = float;

    static inline void begin() {}
    static inline void end() {}

    static inline float number(const void* row, int type, int64_t index) {
        return type == BFLOAT16 ? widen(static_cast<const bf16*>(row)[index]) : static_cast<const float*>(row)[index];
    }

    // Up to 16 rows of `dim` numbers -> [dim, a multiple of 32][16 rows]; what is missing is 0.
    static inline void pack_queries(const void* const* rows, int count, int64_t dim, int type, Number* packed) {
        const int64_t padded = (dim + 31) / 32 * 32;
        for (int64_t k = 0; k < padded; ++k)
            for (int i = 0; i < 16; ++i) packed[k * 16 + i] = i < count && k < dim ? number(rows[i], type, k) : 0.0f;
    }

    // A row padded with zeros to a multiple of 32; null gives zeros.
    static inline void copy_key(const void* row, int64_t dim, int type, Number* to) {
        copy(row, 0, row == nullptr ? 0 : dim, type, to);
        for (int64_t k = row == nullptr ? 0 : dim; k < (dim + 31) / 32 * 32; ++k) to[k] = 0.0f;
    }

    static inline void copy(const void* row, int64_t from, int64_t count, int type, Number* to) {
        int64_t k = 0;
        for (; k + 16 <= count; k += 16)
            store(to + k, type == BFLOAT16 ? load(static_cast<const bf16*>(row) + from + k)
                                           : load(static_cast<const float*>(row) + from + k));
        for (; k < count; ++k) to[k] = number(row, type, from + k);
    }

    // Columns `from` to `from + 32` of `count` rows -> [count][32]; a null row, or a column beyond `dim`, gives zeros.
    static inline void pack_values(const void* const* rows, int count, int64_t from, int64_t dim, int type,
                                   Number* packed) {
        for (int s = 0; s < count; ++s, packed += COLUMNS) {
            const int64_t held = rows[s] == nullptr ? 0 : std::min<int64_t>(COLUMNS, dim - from);
            copy(rows[s], from, held, type, packed);
            for (int64_t k = held; k < COLUMNS; ++k) packed[k] = 0.0f;
        }
    }

    // A packed row, padded with zeros; null gives zeros.
    static inline void unpack(const char* row, const PackedForm& form, int64_t, Number* to) { form.unpack(row, to); }

    static inline void straighten(F16&, F16&) {}

    template <typename T>
    static inline void write(T* to, F16 value) {
        store(to, value);
    }

    // e^(score - max) of `count` keys -> [count][16 queries], and the sum of each query's.
    static inline F16 weigh(const float* scores, int count, float scale, F16 max, Number* weights, int64_t) {
        F16 total = fill(0.0f);
        for (int s = 0; s < count; ++s) {
            const F16 weight = power_of_two(load(scores + s * 16) * scale - max);
            total += weight;
            store(weights + s * 16, weight);
        }
        return total;
    }

    // Scores of `tiles` times 16 keys: key rows [16][dim] times packed queries -> [16 keys][16 queries].
    static inline void scores(const Number* const* keys, const int64_t* strides, int tiles, const Number* queries,
                              int64_t dim, float* to) {
        for (int tile = 0; tile < tiles; ++tile) {
            const int64_t stride = strides[tile] / static_cast<int64_t>(sizeof(Number));
            for (int s = 0; s < 16; s += KEYS, to += KEYS * 16) {
                const Number* rows = keys[tile] + s * stride;
                F16 sums[KEYS];
                for (int i = 0; i < KEYS; ++i) sums[i] = fill(0.0f);
                for (int64_t k = 0; k < dim; ++k) {
                    const F16 query = load(queries + k * 16);
                    for (int i = 0; i < KEYS; ++i) sums[i] += query * rows[i * stride + k];
                }
                for (int i = 0; i < KEYS; ++i) store(to + i * 16, sums[i]);
            }
        }
    }

    // total [tiles][16 queries][16] += weights of `count` keys times packed values; anew where `fresh`.
    static inline void accumulate(const Number* weights, int64_t, int rows, int count, const Number* values, int tiles,
                                  bool fresh, float* total) {
        for (int tile = 0; tile < tiles; ++tile, total += 256)
            for (int row = 0; row < rows; row += 4)
                accumulate_rows(weights + row, count, values + tile * 16, fresh, total + row * 16);
    }

    static inline void accumulate_rows(const Number* weights, int count, const Number* values, bool fresh,
                                       float* total) {
        F16 sums[4];
        for (int i = 0; i < 4; ++i) sums[i] = fresh ? fill(0.0f) : load(total + i * 16);
        for (int s = 0; s < count; ++s) {
            const F16 value = load(values + s * COLUMNS);
            for (int i = 0; i < 4; ++i) sums[i] += value * weights[s * 16 + i];
        }
        for (int i = 0; i < 4; ++i) store(total + i * 16, sums[i]);
    }
};
