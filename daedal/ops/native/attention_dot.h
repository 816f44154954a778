// Attention's arithmetic on bfloat16 pairs: scores and weighted sums as products of 16 x 32 and 32 x 16 tiles, on the
// matrix unit or by vdpbf16ps. Keys are the rows of a tile as they lie in the cache; queries are lanes, so that the
// softmax goes down the columns of a tile and needs no sum across lanes (FlashAttention-2, section 3).
//
// Knows blocks of keys and tiles of queries; not sequences, pages or threads.
#pragma once

#if defined(__AVX512BF16__)

struct DotEngine {
    // Keys are taken in groups of so many, value columns in groups of so many.
    static constexpr int KEYS = 32, COLUMNS = 64;
    using Number = bf16;

    static inline void transpose(__m512i (&r)[16]) {
        __m512i t[16];
        for (int i = 0; i < 8; ++i) {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 4; ++i) {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for (int j = 0; j < 4; ++j) {
            const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
            const __m512i b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
            const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
            const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
            t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
            t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
            t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
            t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
        }
        for (int i = 0; i < 16; ++i) r[i] = t[i];
    }

    static inline __mmask32 first(int64_t count) {
        return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    }

    // Up to 16 rows of `dim` numbers -> tiles [dim / 32][16 pairs][16 rows][2]; what is missing is 0.
    static inline void pack_queries(const void* const* rows, int count, int64_t dim, int, Number* packed) {
        for (int64_t k = 0; k < dim; k += 32, packed += 512) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = i < count ? _mm512_maskz_loadu_epi16(first(dim - k), static_cast<const bf16*>(rows[i]) + k)
                                 : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + i * 32, r[i]);
        }
    }

    // A row padded with zeros to a multiple of 32; null gives zeros.
    static inline void copy_key(const void* row, int64_t dim, int, Number* to) {
        const bf16* from = static_cast<const bf16*>(row);
        for (int64_t k = 0; k < dim; k += 32)
            _mm512_storeu_si512(to + k, from == nullptr ? _mm512_setzero_si512()
                                                        : _mm512_maskz_loadu_epi16(first(dim - k), from + k));
    }

    // Columns `from` to `from + 64` of `count` rows (a multiple of 32) -> [count / 32][4 tiles][16 pairs][16][2].
    // Within 32 columns, the first tile holds those whose bit 2 is 0, the second the rest: `straighten` undoes that. A
    // null row gives zeros.
    static inline void pack_values(const void* const* rows, int count, int64_t from, int64_t dim, int, Number* packed) {
        if (dim - from >= 64)
            pack_columns<2>(rows, count, from, first(32), packed);
        else if (dim - from > 32)
            pack_columns<2>(rows, count, from, first(dim - from - 32), packed);
        else
            pack_columns<1>(rows, count, from, first(dim - from), packed);
    }

    // `mask`: which of the last 32 columns there are.
    template <int HALVES>
    static inline void pack_columns(const void* const* rows, int count, int64_t from, __mmask32 mask, Number* packed) {
        // A load that hides an address that is not mapped is slow: missing rows are read here.
        alignas(64) static const bf16 zeros[64] = {};
        for (int s = 0; s < count; s += 2) {
            const bf16* a = rows[s] == nullptr ? zeros : static_cast<const bf16*>(rows[s]) + from;
            const bf16* b = rows[s + 1] == nullptr ? zeros : static_cast<const bf16*>(rows[s + 1]) + from;
            Number* to = packed + (s / 32) * 2048 + (s % 32) * 16;
            for (int half = 0; half < HALVES; ++half) {
                const __mmask32 there = half + 1 == HALVES ? mask : ~__mmask32{0};
                const __m512i x = _mm512_maskz_loadu_epi16(there, a + 32 * half);
                const __m512i y = _mm512_maskz_loadu_epi16(there, b + 32 * half);
                _mm512_store_si512(to + 1024 * half, _mm512_unpacklo_epi16(x, y));
                _mm512_store_si512(to + 1024 * half + 512, _mm512_unpackhi_epi16(x, y));
            }
        }
    }

    static constexpr int64_t UNPACK_AHEAD = 4096;  // bytes

    // A packed row, padded with zeros to `stride` numbers; null gives zeros.
    static inline void unpack(const char* row, const PackedForm& form, int64_t stride, Number* to) {
        // Rows mostly follow one another in memory, but prefetchers start anew on each page.
        for (int64_t i = 0; row != nullptr && i < form.nbytes(); i += 64)
            _mm_prefetch(row + UNPACK_AHEAD + i, _MM_HINT_T0);
        int64_t k = 0;
        for (; row != nullptr && k + PACKED_GROUP <= form.width; k += PACKED_GROUP) {
            const PackedGroup group = form.group(row, k);
            _mm512_storeu_si512(to + k, group.low);
            _mm512_storeu_si512(to + k + 32, group.high);
        }
        for (; k < stride; k += 32) _mm512_storeu_si512(to + k, form.narrow_part(row, k));
    }

    static inline void straighten(F16& low, F16& high) {
        const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i eight = _mm512_set1_epi32(8);
        const __m512 a = _mm512_permutex2var_ps((__m512)low, order, (__m512)high);
        high = (F16)_mm512_permutex2var_ps((__m512)low, _mm512_add_epi32(order, eight), (__m512)high);
        low = (F16)a;
    }

    static inline void write(bf16* to, F16 value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
    }

    // e^(score - max) of `count` keys (a multiple of 32) -> [16 queries][stride], and the sum of each query's.
    static inline F16 weigh(const float* scores, int count, float scale, F16 max, Number* weights, int64_t stride) {
        const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        F16 total_a = fill(0.0f), total_b = fill(0.0f);
        for (int s = 0; s < count; s += 32, scores += 512, weights += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                const F16 a = power_of_two(load(scores + 32 * i) * scale - max);
                const F16 b = power_of_two(load(scores + 32 * i + 16) * scale - max);
                total_a += a;
                total_b += b;
                r[i] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
            }
            transpose(r);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(weights + i * stride, r[i]);
        }
        return total_a + total_b;
    }

    // Scores of `tiles` (an even number) times 16 keys: key rows [16][dim], `strides` in bytes, times packed queries ->
    // [16 keys][16 queries].
    static inline void scores(const Number* const* keys, const int64_t* strides, int tiles, const Number* queries,
                              int64_t dim, float* to) {
        if (has_amx()) return scores_amx(keys, strides, tiles, queries, dim, to);
        for (int tile = 0; tile < tiles; ++tile, to += 256) {
            __m512 sums[16];
            for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
            const char* rows = reinterpret_cast<const char*>(keys[tile]);
            const int64_t stride = strides[tile];
            // Rows mostly follow one another, but sixteen streams are too many for prefetchers.
            const char* ahead = rows + 16 * stride;
            for (int64_t k = 0; k < dim; k += 32, ahead += 64, rows += 64) {
                const char* row = ahead;
#pragma GCC unroll 2
                for (int pair = 0; pair < 16; ++pair, row += stride) {
                    const __m512bh query = (__m512bh)_mm512_load_si512(queries + k * 16 + pair * 32);
                    _mm_prefetch(row, _MM_HINT_T1);
#pragma GCC unroll 16
                    for (int i = 0; i < 16; ++i) sums[i] = multiply(sums[i], query, rows + i * stride + pair * 4);
                }
            }
            for (int i = 0; i < 16; ++i) _mm512_store_ps(to + i * 16, sums[i]);
        }
    }

    // total [tiles][16 queries][16] += weights [16][stride] of `count` keys times packed values; anew where `fresh`.
    static inline void accumulate(const Number* weights, int64_t stride, int rows, int count, const Number* values,
                                  int tiles, bool fresh, float* total) {
        if (has_amx()) return accumulate_amx(weights, stride, count, values, tiles, fresh, total);
        for (int tile = 0; tile < tiles; ++tile, values += 512, total += 256) {
            if (rows <= 4)
                accumulate_rows<4>(weights, stride, count, values, fresh, total);
            else if (rows <= 8)
                accumulate_rows<8>(weights, stride, count, values, fresh, total);
            else if (rows <= 12)
                accumulate_rows<12>(weights, stride, count, values, fresh, total);
            else
                accumulate_rows<16>(weights, stride, count, values, fresh, total);
        }
    }

    template <int ROWS>
    static inline void accumulate_rows(const Number* weights, int64_t stride, int count, const Number* values,
                                       bool fresh, float* total) {
        __m512 sums[ROWS];
        for (int i = 0; i < ROWS; ++i) sums[i] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(total + i * 16);
        for (int s = 0; s < count; s += 32) {
            for (int pair = 0; pair < 16; ++pair) {
                const __m512bh value = (__m512bh)_mm512_load_si512(values + s * 64 + pair * 32);
                const char* from = reinterpret_cast<const char*>(weights + s + pair * 2);
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; ++i) sums[i] = multiply(sums[i], value, from + i * stride * 2);
            }
        }
        for (int i = 0; i < ROWS; ++i) _mm512_store_ps(total + i * 16, sums[i]);
    }

    // Adds to every lane the product of its pair and the one pair that `from` points to.
    static inline __m512 multiply(__m512 sum, __m512bh lanes, const char* from) {
        int32_t pair;
        std::memcpy(&pair, from, sizeof pair);
        return _mm512_dpbf16_ps(sum, lanes, (__m512bh)_mm512_set1_epi32(pair));
    }

#define DAEDAL_AMX __attribute__((target("amx-tile,amx-bf16")))

    // Tiles 0 to 3 hold sums, 4 the operand that they share, 5 to 7 their own.
    DAEDAL_AMX static inline void begin() {
        if (!has_amx()) return;
        // In memory throughout: compilers know of only the first bytes that the instruction reads.
        alignas(64) static const uint8_t shape[64] = {
            1,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  64, 0,  64, 0,  64, 0,
            64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
            0,  0,  0,  0,  16, 16, 16, 16, 16, 16, 16, 16};
        _tile_loadconfig(shape);
    }

    DAEDAL_AMX static inline void end() {
        if (has_amx()) _tile_release();
    }

    DAEDAL_AMX static void scores_amx(const Number* const* keys, const int64_t* strides, int tiles,
                                      const Number* queries, int64_t dim, float* to) {
        for (int tile = 0; tile < tiles; tile += 4, keys += 4, strides += 4, to += 1024) {
            const bool four = tiles - tile > 2;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < dim; k += 32) {
                _tile_loadd(4, queries + k * 16, 64);
                _tile_loadd(5, keys[0] + k, strides[0]);
                _tile_dpbf16ps(0, 5, 4);
                _tile_loadd(6, keys[1] + k, strides[1]);
                _tile_dpbf16ps(1, 6, 4);
                if (!four) continue;
                _tile_loadd(7, keys[2] + k, strides[2]);
                _tile_dpbf16ps(2, 7, 4);
                _tile_loadd(5, keys[3] + k, strides[3]);
                _tile_dpbf16ps(3, 5, 4);
            }
            _tile_stored(0, to, 64);
            _tile_stored(1, to + 256, 64);
            if (!four) continue;
            _tile_stored(2, to + 512, 64);
            _tile_stored(3, to + 768, 64);
        }
    }

    DAEDAL_AMX static void accumulate_amx(const Number* weights, int64_t stride, int count, const Number* values,
                                          int tiles, bool fresh, float* total) {
        const bool four = tiles > 2;
        if (fresh) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, total, 64);
            _tile_loadd(1, total + 256, 64);
            if (four) {
                _tile_loadd(2, total + 512, 64);
                _tile_loadd(3, total + 768, 64);
            }
        }
        for (int s = 0; s < count; s += 32, values += 2048) {
            _tile_loadd(4, weights + s, stride * 2);
            _tile_loadd(5, values, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, values + 512, 64);
            _tile_dpbf16ps(1, 4, 6);
            if (!four) continue;
            _tile_loadd(7, values + 1024, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, values + 1536, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, total, 64);
        _tile_stored(1, total + 256, 64);
        if (!four) return;
        _tile_stored(2, total + 512, 64);
        _tile_stored(3, total + 768, 64);
    }
};

#endif
